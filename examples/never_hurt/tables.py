"""Every table of the report, as rows of text; the first row is the header."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from examples.never_hurt import analysis
from examples.never_hurt.analysis import (
    PAIR,
    SETTING,
    TAIL,
    TASK,
    WEIGHTED_SUM,
    select,
    values,
)
from examples.never_hurt.cell import Result
from examples.never_hurt.labels import label, points
from examples.never_hurt.sources import RANDOM_WEIGHTS

LEAST_GAIN = 3.0
"""In points: tasks in which the weighted sum gains less are not tasks with a gain to keep."""

Rows = list[list[str]]


def cross(
    cells: pd.DataFrame, down: Sequence[str], across: str, text: Callable[[pd.DataFrame], str]
) -> Rows:
    """A cross table.

    Args:
        cells: Rows of any frame.
        down: There is a row for each combination of values of these columns.
        across: There is a column for each value of this column.
        text: From the cells of a row and a column to the text there; without cells it is empty.

    Returns:
        The table.
    """
    columns = values(cells, across)
    rows = [[*down, *map(label, columns)]]
    for names, of_row in cells.groupby([*down], sort=False):
        parts = [select(of_row, **{across: column}) for column in columns]
        rows.append([*map(label, names), *(text(part) if len(part) else "" for part in parts)])
    return rows


def plain(cells: pd.DataFrame) -> Rows:
    """Accuracy of plain fine-tuning, mean and standard deviation over seeds."""

    def text(part: pd.DataFrame) -> str:
        return f"{part['plain'].mean():.1f} ± {part['plain'].std():.1f}"

    return cross(cells.drop_duplicates([*PAIR, "seed"]), ["source", "kind"], "target", text)


def verdicts(cells: pd.DataFrame, against: str = "plain") -> Rows:
    """For each rule how many settings are below plain fine-tuning, "the sum" or "scratch"."""
    if against == "the sum":
        cells = cells[cells["rule"] != WEIGHTED_SUM]
    if against == "scratch":
        cells = cells[cells["source"] != RANDOM_WEIGHTS]
    difference = f"against_{against.removeprefix('the ')}"
    estimates = analysis.estimates(cells, difference)
    rows = [["rule", "settings", "mean", f"below {against}", "at once", "above", "worst setting"]]
    for rule, found in analysis.verdicts(estimates).iterrows():
        by_chance = f"({found['settings'] * TAIL:.1f})"
        rows.append(
            [
                label(rule),
                f"{found['settings']}",
                points(found["mean"]),
                f"{found['below']} {by_chance}",
                f"{found['at_once']}",
                f"{found['above']} {by_chance}",
                f"{_estimate(estimates, found['worst'])}: {_setting(*found['worst'])}",
            ]
        )
    return rows


def settings(cells: pd.DataFrame) -> Rows:
    """The mean difference of each setting from plain fine-tuning, and its interval."""
    estimates = analysis.estimates(cells, "against_plain")
    names = [_setting(*index) for index in estimates.index]
    return cross(
        estimates.reset_index().assign(setting=names, index=estimates.index),
        ["setting"],
        "rule",
        lambda part: _estimate(estimates, part["index"].iloc[0]),
    )


def by_strength(cells: pd.DataFrame) -> Rows:
    """For each rule and strength the mean over sources and targets, and its interval."""
    return cross(cells, ["rule"], "strength", _gain)


def worst_by_pair(cells: pd.DataFrame) -> Rows:
    """For each source and target the worst setting over strengths and regularizers, by rule."""
    return cross(cells, PAIR, "rule", lambda part: points(_setting_means(part).min()))


def against_sum(cells: pd.DataFrame) -> Rows:
    """For each rule and strength: wins, ties and losses against the weighted sum."""
    strengths = values(cells, "strength")
    rows = [["rule", *map(label, strengths), "all"]]
    for rule, of_rule in cells[cells["rule"] != WEIGHTED_SUM].groupby("rule", sort=False):
        counts = [analysis.win_tie_loss(select(of_rule, strength=each)) for each in strengths]
        counts = np.array([*counts, np.sum(counts, axis=0)])
        rows.append([label(rule), *(" / ".join(map(str, each)) for each in counts.tolist())])
    return rows


def gains(cells: pd.DataFrame) -> Rows:
    """The gain of each rule at the strength that is best on validation images."""
    best = analysis.at_best_strength(cells)
    [head, *rows] = cross(best, ["rule"], "regularizer", _gain)
    for row, (rule, of_rule) in zip(rows, best.groupby("rule", sort=False), strict=True):
        kept = analysis.kept_gain(best, str(rule))
        share = f"{kept.mean:.2f} [{kept.low:.2f}, {kept.high:.2f}]"
        row += [_gain(of_rule), "" if rule == WEIGHTED_SUM else share]
    head[1:] = [f"{name}: gain" for name in (*head[1:], "all")]
    return [[*head, "share of the weighted sum's"], *rows]


def kept(studies: Sequence[pd.DataFrame], rules: Sequence[str], times: float = 1.0) -> Rows:
    """What each rule keeps of the weighted sum's gain at the sum's best strength, or at a multiple.

    The strength is chosen on validation images, for each task. Tasks in which the sum gains less
    than `LEAST_GAIN` there are left out.

    Args:
        studies: What `analysis.compare` returns, for each grid; the grids differ in targets,
            images or networks.
        rules: The columns.
        times: The multiple of the best strength.

    Returns:
        For each task and rule the gain, and its share of the sum's gain at the best strength.
    """
    tasks = ["task", "images per class", "regularizer", "best λ"]
    rows = [[*tasks, *map(label, rules)]]
    for cells, (source, target, regularizer), sums in _gaining(studies):
        strength, gain = sums["strength"].iloc[0], sums["against_plain"].mean()
        at = select(cells, source=source, target=target, regularizer=regularizer)
        at = select(at, strength=times * strength)
        texts = []
        for rule in rules:
            found = select(at, rule=rule)["against_plain"]
            share = f"{found.mean() / gain + 0:.0%}".replace("-0%", "0%").replace("-", "−")
            texts.append(f"{points(found.mean())} ({share})" if len(found) else "")
        if any(texts):
            per_class = sums["images_per_class"].iloc[0]
            n_images = "all" if np.isnan(per_class) else f"{per_class:g}"
            task = f"{label(source)} → {label(target)}"
            rows.append([task, n_images, label(regularizer), f"× {strength:g}", *texts])
    return rows


def _gaining(studies: Sequence[pd.DataFrame]) -> Iterator[tuple[pd.DataFrame, Any, pd.DataFrame]]:
    """The tasks in which the weighted sum has a gain: the study, the task, the sum's best cells."""
    for cells in studies:
        best = analysis.at_best_strength(select(cells, rule=WEIGHTED_SUM))
        for task, sums in best.groupby(TASK, sort=False):
            if sums["against_plain"].mean() >= LEAST_GAIN:
                yield cells, task, sums


def best_by_pair(cells: pd.DataFrame) -> Rows:
    """The gain at the best strength, task by task."""

    def text(part: pd.DataFrame) -> str:
        return f"{points(part['against_plain'].mean())} ({label(part['strength'].iloc[0])})"

    return cross(analysis.at_best_strength(cells), TASK, "rule", text)


def by_rule(cells: pd.DataFrame) -> Rows:
    """For each rule and regularizer the mean over pairs and strengths, and the worst setting."""
    regularizers = values(cells, "regularizer")
    rows = [["rule", *(f"{label(x)}: {what}" for x in regularizers for what in ("mean", "worst"))]]
    for rule, of_rule in cells.groupby("rule", sort=False):
        means = [_setting_means(select(of_rule, regularizer=each)) for each in regularizers]
        rows.append(
            [label(rule), *(points(x) for each in means for x in (each.mean(), each.min()))]
        )
    return rows


def by_regularizer(cells: pd.DataFrame, difference: str = "against_plain") -> Rows:
    """For each regularizer and rule the mean over pairs at each strength, and the worst setting.

    Cells without the difference are left out.
    """
    down = ["regularizer", "rule"]
    cells = cells.dropna(subset=difference)

    def text(part: pd.DataFrame) -> str:
        return points(_setting_means(part, difference).mean())

    rows = cross(cells, down, "strength", text)
    rows[0].append("worst setting")
    for row, (_, part) in zip(rows[1:], cells.groupby(down, sort=False), strict=True):
        estimates = analysis.estimates(part, difference)
        row.append(_estimate(estimates, estimates["mean"].idxmin()))
    return rows


def chosen_strength(cells: pd.DataFrame) -> Rows:
    """Each rule at every strength, and with the strength that is chosen anew for each seed.

    The mean over pairs; for the choices also the worst pair, with its interval.
    """
    down = ["regularizer", "rule"]
    rows = cross(cells, down, "strength", lambda part: points(_setting_means(part).mean()))
    titles: dict[analysis.Choice, str] = {"validation": "validation", "held_out": "held-out"}
    for on, title in titles.items():
        chosen = analysis.with_chosen_strength(cells, on).assign(strength=0.0)  # one setting
        rows[0] += [f"λ chosen on {title} images", "worst pair"]
        for row, (names, _) in zip(rows[1:], cells.groupby(down, sort=False), strict=True):
            part = select(chosen, **dict(zip(down, names, strict=True)))
            row += ["", ""] if part.empty else _mean_and_worst(part)
    return rows


def _mean_and_worst(cells: pd.DataFrame) -> list[str]:
    estimates = analysis.estimates(cells, "against_plain")
    return [points(estimates["mean"].mean()), _estimate(estimates, estimates["mean"].idxmin())]


def length_ratios(cells: pd.DataFrame) -> Rows:
    """How long λ times the regularizer's gradient is, relative to the loss gradient.

    The median over cells, for each quarter of training. It says what a strength means.
    """

    def text(part: pd.DataFrame) -> str:
        quarters = pd.DataFrame([*part["length_ratio"]], dtype=float).median()
        return ", ".join(f"{ratio:.2g}" for ratio in quarters)

    measured = cells[cells["length_ratio"].map(len) > 0]
    return cross(measured, ["regularizer", "rule"], "strength", text)


def repeated(of_grids: Mapping[str, Mapping[str, Result]], again: Mapping[str, Result]) -> Rows:
    """How many cells that were run again have the accuracies that they had.

    Args:
        of_grids: The results of each grid, by key.
        again: The results of the cells that were run again, by key.
    """
    rows = [["grid", "cells repeated", "identical", "largest difference", "mean difference"]]
    for grid, results in of_grids.items():
        pairs = [(results[key], result) for key, result in again.items() if key in results]
        if pairs:
            differences = [100 * (_accuracy(new) - _accuracy(old)) for old, new in pairs]
            identical = sum(
                (old.validation, old.test) == (new.validation, new.test) for old, new in pairs
            )
            largest = max(map(abs, differences))
            mean = points(float(np.mean(differences)))
            rows.append([f"`{grid}`", f"{len(pairs)}", f"{identical}", f"{largest:.1f}", mean])
    return rows


def _accuracy(result: Result) -> float:
    return result.validation if result.test is None else result.test


def _setting_means(cells: pd.DataFrame, difference: str = "against_plain") -> pd.Series:
    return cells.groupby(SETTING)[difference].mean()


def _setting(source: str, target: str, regularizer: str, rule: str, strength: float) -> str:
    """Names a setting of a rule that the row or the column names."""
    del rule
    return f"{label(source)} → {label(target)}, {label(regularizer)} × {strength:g}"


def _estimate(estimates: pd.DataFrame, index: Any) -> str:
    found: Any = estimates.loc[index]
    return f"{points(found['mean'])} ± {found['half_width']:.1f}"


def _gain(cells: pd.DataFrame) -> str:
    mean, low, high = map(points, analysis.bootstrap_mean(cells, "against_plain"))
    return f"{mean} [{low}, {high}]"
