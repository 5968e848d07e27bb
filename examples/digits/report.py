"""The results as a table, a few sentences, and files."""

import dataclasses
import io
import itertools
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from examples.common.files import write
from examples.common.tables import as_markdown_table
from examples.digits.config import Config
from examples.digits.figure import draw
from examples.digits.results import PLAIN, SOURCES, FineTuning, Method, Results

COLUMNS = (
    *("source", "regularizer", "λ", "rule", "accuracy"),
    *("− plain", "− sum", "conflict", "removed"),
)
MARKS = {"helps": " ▲", "hurts": " ▼", "within the spread": ""}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference in accuracy between runs of the same seeds, in percentage points."""

    mean: float
    deviation: float

    @property
    def verdict(self) -> str:
        """Whether the difference exceeds its standard deviation over the seeds."""
        if abs(self.mean) <= self.deviation:
            return "within the spread"
        return "helps" if self.mean > 0 else "hurts"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.deviation:.1f}".replace("-", "−")

    @property
    def marked(self) -> str:
        """The difference with its verdict as a mark."""
        return f"{self}{MARKS[self.verdict]}"


def report(results: Results, cfg: Config) -> None:
    """Prints a table and a summary; writes figure, table and numbers to ``cfg.out``."""
    rows, sentences = table_rows(results), summary(results, cfg)
    console = Console(highlight=False)
    console.print(as_rich(rows))
    for sentence in sentences:
        console.print(sentence)

    picture = io.BytesIO()
    draw(results, cfg).savefig(picture, format="png", dpi=120)
    files = {
        "figure.png": picture.getvalue(),
        "table.md": "\n".join([as_markdown_table([COLUMNS, *rows]), "", *sentences, ""]).encode(),
        "results.json": json.dumps(as_json(results, cfg), indent=1).encode(),
    }
    cfg.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(cfg.out / name, content)
    console.print(f"{results.seconds:.0f} s. Written to {cfg.out}: {', '.join(files)}.")


def table_rows(results: Results) -> list[list[str]]:
    """The rows of the table, one for each source and method."""
    rows = []
    for source, method in results.settings():
        values = accuracies(results, source, method)
        accuracy = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        row = [source, "none", "", "", accuracy, "", "", "", ""]
        if method != PLAIN:
            row[1:4] = method.regularizer, f"{method.reg_weight:g}", method.rule
            row[5] = against_plain(results, source, method).marked
            if method.rule != "weighted_sum":
                row[6] = against_weighted_sum(results, source, method).marked
            runs = results.of(source, method)
            row[7:] = f"{100 * conflict_rate(runs):.0f} %", f"{100 * removed(runs):.0f} %"
        rows.append(row)
    return rows


def summary(results: Results, cfg: Config) -> list[str]:
    """What the numbers show, in sentences."""
    regularized = [setting for setting in results.settings() if setting[1] != PLAIN]
    (fitted, fit_held_out), (memorized, unfit_held_out) = (
        100 * np.mean(results.source_accuracy[source], axis=0) for source in SOURCES
    )
    where = "parameter tensors" if cfg.scope in ("leaf", "element") else f"{cfg.scope} groups"
    sentences = [
        f"Accuracy in % on {cfg.evaluate_on} images of the target, mean ± standard deviation over "
        f"{cfg.seeds} seeds. Differences, in points, pair the runs of a seed: against fine-tuning "
        "from the same source without a regularizer (plain), and against weighted_sum (sum). "
        "▲ helps, ▼ hurts: the mean is farther from 0 than the standard deviation. Conflict: the "
        f"share of steps and {where} in which the two gradients of the mini-batch conflict. "
        "Removed: what the rule removes from the regularizer's gradient, as a share of its "
        "length, mean over the steps.",
        f"The fitting source classifies {fitted:.1f} % of its training images and "
        f"{fit_held_out:.1f} % of held-out source images correctly. The unfitting source has "
        f"memorized {memorized:.1f} % of its random labels and classifies {unfit_held_out:.1f} % "
        "of held-out images correctly.",
    ]
    for source in SOURCES:
        gap = difference(accuracies(results, source, PLAIN), accuracies(results, "scratch", PLAIN))
        sentences.append(
            f"Plain fine-tuning from the {source} source against training from scratch: {gap} "
            f"points, {gap.verdict}."
        )
    for rule in dict.fromkeys(method.rule for _, method in regularized):
        settings = [setting for setting in regularized if setting[1].rule == rule]
        differences = [against_plain(results, *setting) for setting in settings]
        worst, best = (choose(differences, key=lambda each: each.mean) for choose in (min, max))
        sentence = (
            f"{rule} against plain fine-tuning, {counted(differences)}; from {worst} to {best} "
            "points."
        )
        if rule != "weighted_sum":
            gains = [against_weighted_sum(results, *setting) for setting in settings]
            sentence += f" Against weighted_sum, {counted(gains)}."
        sentences.append(sentence)
    diverged = sum(not np.isfinite(run.cosine).all() for run in results.fine_tunings)
    if diverged:
        sentences.append(
            f"{diverged} of {len(results.fine_tunings)} fine-tunings diverged: their gradients "
            "were no longer finite, and their accuracy is that of chance."
        )
    with_rule = [setting for setting in regularized if setting[1].rule != "weighted_sum"]
    if any(against_plain(results, *setting).verdict == "hurts" for setting in with_rule):
        sentences.append(
            "dtnh guarantees that, to first order, its direction does not raise the loss of the "
            "mini-batch. Neither it nor the variants guarantee the accuracy on held-out images: "
            "▼ marks where it fell."
        )
    return sentences


def counted(differences: list[Difference]) -> str:
    """Counts the verdicts."""
    verdicts = [each.verdict for each in differences]
    counts = ", ".join(f"{verdict} in {verdicts.count(verdict)}" for verdict in MARKS)
    return f"{len(verdicts)} settings: {counts}"


def as_rich(rows: list[list[str]]) -> Table:
    """The table for a terminal of 80 columns: a section for each source, and in it for each λ."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in COLUMNS[3:]:
        table.add_column(header, no_wrap=True)
    for source, of_source in itertools.groupby(rows, key=lambda row: row[0]):
        table.add_row(f"[bold]{source}[/bold]")
        for (regularizer, weight), section in itertools.groupby(of_source, lambda row: row[1:3]):
            if weight:
                table.add_row(f"[italic]{regularizer} {weight}[/italic]")
            for row in section:
                table.add_row(row[3] or "plain", *row[4:])
    return table


def accuracies(results: Results, source: str, method: Method) -> np.ndarray:
    """The accuracy after the last step, in percent, for each seed."""
    return np.array([100 * run.accuracy[-1] for run in results.of(source, method)])


def conflict_rate(runs: Sequence[FineTuning]) -> float:
    """The share of (step, group) in which the gradients conflict."""
    return float(np.mean([run.conflict for run in runs]))


def removed(runs: Sequence[FineTuning]) -> float:
    """The share of the length of the regularizer's gradient that the rule removes."""
    return float(np.mean([run.removed for run in runs]))


def difference(these: np.ndarray, those: np.ndarray) -> Difference:
    """The difference of paired accuracies."""
    paired = these - those
    return Difference(float(paired.mean()), float(paired.std(ddof=1)))


def against_plain(results: Results, source: str, method: Method) -> Difference:
    """Against fine-tuning from the same source without a regularizer."""
    return difference(accuracies(results, source, method), accuracies(results, source, PLAIN))


def against_weighted_sum(results: Results, source: str, method: Method) -> Difference:
    """Against the weighted sum of the same gradients with the same weight."""
    weighted_sum = dataclasses.replace(method, rule="weighted_sum")
    return difference(
        accuracies(results, source, method), accuracies(results, source, weighted_sum)
    )


def as_json(results: Results, cfg: Config) -> dict[str, object]:
    """Config, versions and the numbers of each run."""
    packages = ("dtnh_jax", "jax", "optax", "flax", "numpy", "scikit-learn")
    return {
        "config": dataclasses.asdict(cfg) | {"out": str(cfg.out)},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
        "seconds": round(results.seconds, 1),
        "source_accuracy": results.source_accuracy,
        "fine_tunings": [
            {
                "seed": run.seed,
                "source": run.source,
                **dataclasses.asdict(run.method),
                "accuracy": run.accuracy.tolist(),
                "conflict_rate": conflict_rate([run]),
                "removed": removed([run]) if np.isfinite(run.removed).all() else None,
                "conflict_rate_of_group": dict(
                    zip(run.groups, run.conflict.mean(axis=0).tolist(), strict=True)
                ),
            }
            for run in results.fine_tunings
        ],
    }
