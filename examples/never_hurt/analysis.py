"""From results to numbers: paired differences, intervals, verdicts, gains.

A study is a tidy DataFrame, one row per regularized cell: the settings of the cell, its results,
and its differences from the runs that it is compared with. All functions take such a frame, or a
part of it, and the name of the column of differences.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from examples.never_hurt.cell import NONE, Cell, Result
from examples.never_hurt.grids import KINDS
from examples.never_hurt.sources import RANDOM_WEIGHTS

LEVEL = 0.95
RESAMPLES = 5000
WEIGHTED_SUM = "weighted_sum"

PAIR = ["source", "target"]
TASK = [*PAIR, "regularizer"]
SETTING = [*TASK, "rule", "strength"]
"""Cells of one setting differ only in their seeds."""

TAIL = (1 - LEVEL) / 2

OTHER_METRICS = ("shifted", "source_accuracy")
"""Accuracies besides that on the test images of the target."""

NUMBERS: Mapping[str, Callable[[float], str]] = {
    "held_out": lambda n: f"{n} held out",
    "held_out_every": lambda n: f"every {n}",
    "trial": lambda share: f"{share:.0%} of the steps",
}
"""Settings that are named where cells of one rule differ in them."""

Choice = Literal["validation", "held_out"]
"""The images that a strength is chosen on."""


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row per cell, with its settings and results as columns.

    ``accuracy`` is that on test images, or on validation images if the cell has no test accuracy;
    it and all other accuracies are in percent, but for those on training and held-out images.
    ``kind`` is the kind of the source. ``rule`` also names the procedure, unless it is plain, and
    the `NUMBERS` in which the cells of a rule differ: ``weighted_sum, lp_ft`` and
    ``weighted_sum, 2 held out``.
    """
    cells = pd.DataFrame([{**vars(each.cell), **vars(each)} for each in results])
    accuracy = cells["test"].astype(float).fillna(cells["validation"])
    return cells.drop(columns=["cell", "test"]).assign(
        rule=_methods(cells),
        accuracy=100 * accuracy,
        **{name: 100 * cells[name].astype(float) for name in ("validation", *OTHER_METRICS)},
        kind=cells["source"].map(pd.Series(KINDS)),
    )


def _methods(cells: pd.DataFrame) -> pd.Series:
    """The names of rules with what else distinguishes their cells."""
    is_plain = cells["procedure"] == Cell.procedure
    named = cells["rule"] + ", " + cells["procedure"]
    names = named.where(cells["rule"] != NONE, cells["procedure"]).mask(is_plain, cells["rule"])
    for column, text in NUMBERS.items():
        numbers = cells[column]
        varies = numbers.groupby(names).transform("nunique") > 1
        with_number = names + ", " + numbers.map(text)
        names = names.mask(varies & (numbers > 0), with_number)
    return names


def compare(cells: pd.DataFrame, metric: str = "accuracy") -> pd.DataFrame:
    """Compares each regularized cell with other cells of the same target and seed.

    Where several runs differ only in the order of their batches, their mean is the baseline, so
    that a lucky plain run does not count against every rule.

    Args:
        cells: What `frame` returns.
        metric: The column to compare.

    Returns:
        The regularized cells with more columns: the baselines ``plain`` (plain fine-tuning),
        ``scratch`` (training from random weights) and ``weighted_sum`` (the same setting with the
        weighted sum), and the differences ``against_plain``, ``against_scratch`` and
        ``against_sum``. A baseline that was not run is NaN. ``plain_validation`` is the accuracy of
        the plain runs on validation images. ``shifted`` and ``source_accuracy`` are compared with
        plain fine-tuning likewise, in ``shifted_against_plain`` and so on.

    Raises:
        ValueError: If a cell has no plain run of its seed.
    """
    is_plain = cells["rule"] == NONE
    plain = cells[is_plain]
    baselines = {
        "plain": (plain, [*PAIR, "seed"]),
        "scratch": (plain[plain["source"] == RANDOM_WEIGHTS], ["target", "seed"]),
        WEIGHTED_SUM: (cells[cells["rule"] == WEIGHTED_SUM], [*TASK, "strength", "seed"]),
    }
    compared = cells[~is_plain]
    for name, (runs, shared) in baselines.items():
        compared = compared.join(runs.groupby(shared)[metric].mean().rename(name), on=shared)
    of_plain = plain.groupby([*PAIR, "seed"])[["validation", *OTHER_METRICS]].mean()
    compared = compared.join(of_plain.add_prefix("plain_"), on=[*PAIR, "seed"])
    alone = compared[compared["plain"].isna()]
    if len(alone):
        raise ValueError(f"Cells have no plain run of their seed:\n{alone[[*SETTING, 'seed']]}")
    others = {
        f"{name}_against_plain": compared[name] - compared[f"plain_{name}"]
        for name in OTHER_METRICS
    }
    return compared.assign(
        **others,
        against_plain=compared[metric] - compared["plain"],
        against_scratch=compared[metric] - compared["scratch"],
        against_sum=compared[metric] - compared[WEIGHTED_SUM],
    )


def select(cells: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The cells whose columns have the wanted values."""
    for column, value in wanted.items():
        cells = cells[cells[column] == value]
    return cells


def values(cells: pd.DataFrame, column: str) -> list:
    """The values of a column: numbers in ascending order, names in the order of the results."""
    found = cells[column].drop_duplicates()
    return list(found.sort_values() if found.dtype.kind == "f" else found)


def estimates(cells: pd.DataFrame, difference: str) -> pd.DataFrame:
    """The mean difference of each setting, with Student's t interval.

    A few seeds are too few to estimate the spread of one setting. The spread is assumed equal in
    all settings of a rule and a target (the number of test images determines most of it) and
    pooled over them.

    Args:
        cells: Cells of one rule or more.
        difference: The column of differences.

    Returns:
        One row per setting, indexed by `SETTING`: the ``mean``, the ``half_width`` of its
        interval (infinite if nothing was pooled but single seeds), the one-sided ``p_value`` of a
        mean below zero, and whether the interval lies ``below`` or ``above`` zero.
    """
    found = cells.groupby(SETTING, sort=False)[difference].agg(["mean", "count", "var"])
    pooled = pd.DataFrame(
        {
            "degrees": found["count"] - 1,
            "squares": (found["var"] * (found["count"] - 1)).fillna(0.0),
        }
    )
    pooled = pooled.groupby(["rule", "target"]).transform("sum")
    degrees = pooled["degrees"].where(pooled["degrees"] > 0)
    error = (pooled["squares"] / degrees / found["count"]) ** 0.5
    half_width = (error * stats.t.ppf(1 - TAIL, degrees)).fillna(np.inf)
    p_value = pd.Series(stats.t.cdf(found["mean"] / error, degrees), found.index).fillna(1.0)
    return found[["mean"]].assign(
        half_width=half_width,
        p_value=p_value,
        below=found["mean"] < -half_width,
        above=found["mean"] > half_width,
    )


def verdicts(estimates: pd.DataFrame) -> pd.DataFrame:
    """Counts the settings of each rule that differ from what they are compared with.

    Args:
        estimates: What `estimates` returns.

    Returns:
        One row per rule: the number of ``settings``, their ``mean``, how many are ``below``
        zero, how many of these are so ``at_once``, how many are ``above``, and the ``worst``.
    """
    return estimates.groupby("rule", sort=False).agg(
        settings=("mean", "size"),
        mean=("mean", "mean"),
        below=("below", "sum"),
        at_once=("p_value", n_below_at_once),
        above=("above", "sum"),
        worst=("mean", "idxmin"),
    )


def win_tie_loss(cells: pd.DataFrame) -> tuple[int, int, int]:
    """Against the weighted sum: the intervals above zero, across it, and below it."""
    found = estimates(cells, "against_sum")
    wins, losses = int(found["above"].sum()), int(found["below"].sum())
    return wins, len(found) - wins - losses, losses


def n_below_at_once(p_values: pd.Series) -> int:
    """How many settings are below zero at a level that holds for all at once (Holm's method)."""
    fails = p_values.sort_values() > TAIL / np.arange(len(p_values), 0, -1)
    return int(np.argmax([*fails, True]))


def bootstrap_mean(cells: pd.DataFrame, difference: str, seed: int = 0) -> Interval:
    """The mean over settings, with an interval from resampling pairs and then seeds.

    Settings of one source, target and seed share their plain runs, so their differences are
    correlated: pairs of source and target are drawn, and then seeds of each.

    Args:
        cells: The cells; each pair has the same seeds in all its settings.
        difference: The column of differences.
        seed: Of the resampling.

    Returns:
        The mean over all settings, and the percentile interval.
    """
    of_seeds = cells.pivot_table(difference, PAIR, "seed", sort=False).to_numpy()
    n_pairs, n_seeds = of_seeds.shape
    n_settings = cells.groupby(PAIR, sort=False).size().to_numpy() / n_seeds
    rng = np.random.default_rng(seed)
    pairs = rng.integers(n_pairs, size=(RESAMPLES, n_pairs))
    seeds = rng.integers(n_seeds, size=(RESAMPLES, n_pairs, n_seeds))
    means = of_seeds[pairs[:, :, None], seeds].mean(axis=2)
    drawn = np.average(means, axis=1, weights=n_settings[pairs])
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    mean = np.average(of_seeds.mean(axis=1), weights=n_settings)
    return Interval(float(mean), float(low), float(high))


def at_best_rate(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the learning rate that is best on validation images, for each setting."""
    scores = cells.groupby([*SETTING, "learning_rate"], sort=False)["validation"].mean()
    best = scores.groupby(SETTING, sort=False).idxmax()
    return cells.merge(pd.DataFrame(list(best), columns=[*SETTING, "learning_rate"]))


def at_best_strength(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the strength that is best on validation images, for each task and rule."""
    scores = cells.groupby(SETTING, sort=False)["validation"].mean()
    best = scores.groupby([*TASK, "rule"], sort=False).idxmax()
    return pd.DataFrame(list(best), columns=SETTING).merge(cells, on=SETTING)


def with_chosen_strength(cells: pd.DataFrame, on: Choice) -> pd.DataFrame:
    """What a user gets who trains once with each strength and keeps the best network.

    Args:
        cells: What `compare` returns. Cells with λ = 0 are candidates.
        on: The images that the accuracies are compared on: the validation images, with plain
            fine-tuning as another candidate; or the images that were held out of the training
            images, which costs their use for training. There, only cells with held-out images are
            candidates. Of equal accuracies, the lowest loss on these images is chosen, or else the
            lowest strength.

    Returns:
        For each task, rule and seed the cell that is chosen; plain fine-tuning has strength 0.
    """
    if on == "validation":
        plain = cells.drop_duplicates([*TASK, "rule", "seed"])
        plain = plain.assign(
            strength=0.0,
            validation=plain["plain_validation"],
            accuracy=plain["plain"],
            against_plain=0.0,
        )
        order = pd.concat([plain, cells]).sort_values(
            ["validation", "strength"], ascending=[False, True], kind="stable"
        )
    else:
        order = cells.dropna(subset="held_out_accuracy").sort_values(
            ["held_out_accuracy", "held_out_loss", "strength"], ascending=[False, True, True]
        )
    return order.drop_duplicates([*TASK, "rule", "seed"]).sort_index(kind="stable")


def kept_gain(best: pd.DataFrame, rule: str, seed: int = 0) -> Interval:
    """The gain of a rule as a share of the gain of the weighted sum, at their best strengths.

    The share is meaningless unless the weighted sum has a clear gain.

    Args:
        best: What `at_best_strength` returns.
        rule: The rule.
        seed: Of the resampling.

    Returns:
        The share, and the percentile interval from resampling tasks.
    """
    ours, sums = (
        select(best, rule=name).groupby(TASK, sort=False)["against_plain"].mean()
        for name in (rule, WEIGHTED_SUM)
    )
    sums = sums[sums.index.isin(ours.index)]

    def share(ours: np.ndarray, sums: np.ndarray, axis: int = -1) -> np.ndarray:
        return ours.sum(axis) / sums.sum(axis)

    data = ours.reindex(sums.index).to_numpy(), sums.to_numpy()
    interval = stats.bootstrap(
        data,
        share,
        n_resamples=RESAMPLES,
        paired=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(share(*data)), float(interval.low), float(interval.high))


def conflict_by_layer(cells: pd.DataFrame) -> pd.DataFrame:
    """The share of steps in conflict, mean over cells: a row per layer, a column per quarter."""
    layers = list(cells["conflict"].iloc[0])
    shares = [[of_cell[layer] for layer in layers] for of_cell in cells["conflict"]]
    return pd.DataFrame(np.mean(shares, axis=0), index=layers)
