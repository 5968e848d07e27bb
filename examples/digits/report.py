"""The results as a table, a few sentences, and files."""

import dataclasses
import io
import json
import platform
from importlib.metadata import version

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from examples.common.files import write
from examples.common.tables import as_markdown_table
from examples.digits.config import Config
from examples.digits.figure import draw, in_points
from examples.digits.results import METHODS, SOURCES, Results
from examples.digits.train import trial_steps

COLUMNS = ("source", "rule", "accuracy", "− plain", "cost", "L2-SP used")
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
        return f"{in_points(self.mean)} ± {self.deviation:.1f}"


def report(results: Results, cfg: Config) -> None:
    """Prints a table and a summary; writes figure, table and numbers to ``cfg.out``."""
    rows, sentences = table_rows(results, cfg), summary(results, cfg)
    console = Console(highlight=False)
    console.print(as_rich(rows))
    for sentence in sentences:
        console.print(f"\n{sentence}")

    picture = io.BytesIO()
    draw(results, cfg).savefig(picture, format="png", dpi=120)
    files = {
        "figure.png": picture.getvalue(),
        "table.md": "\n\n".join([as_markdown_table([COLUMNS, *rows]), *sentences, ""]).encode(),
        "results.json": json.dumps(as_json(results, cfg), indent=1).encode(),
    }
    cfg.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(cfg.out / name, content)
    console.print(f"\n{results.seconds:.0f} s. Written to {cfg.out}: {', '.join(files)}.")


def table_rows(results: Results, cfg: Config) -> list[list[str]]:
    """The rows of the table, one for each source and method."""
    rows = []
    for source in SOURCES:
        for method in METHODS:
            final = results.accuracies(source, method)[:, -1]
            row = [source, method, f"{final.mean():.1f} ± {final.std(ddof=1):.1f}", "", "1", ""]
            if method != "plain":
                gap = against_plain(results, source, method)
                row[3] = f"{gap}{MARKS[gap.verdict]}"
            if method == "trial_runs":
                row[4] = f"{1 + 2 * cfg.folds * trial_steps(cfg) / cfg.steps:.2g}"
                row[5] = f"{times_used(results, source)} of {cfg.seeds}"
            rows.append(row)
    return rows


def summary(results: Results, cfg: Config) -> list[str]:
    """What the numbers show, in sentences."""
    scratch = results.accuracies("scratch")[:, -1]
    (_, fit), (memorized, unfit) = (
        100 * np.mean(results.source_accuracy[source], axis=0) for source in SOURCES
    )
    sentences = [
        f"Accuracy in % on {cfg.evaluate_on} images after the last step, mean ± standard deviation "
        f"over {cfg.seeds} seeds. − plain: points against plain fine-tuning, seed by seed; "
        "▲ helps, ▼ hurts: the mean is farther from 0 than the standard deviation. Cost in "
        "fine-tunings. L2-SP used: how often the trial runs decided for the regularizer.",
        f"Training from scratch reaches {scratch.mean():.1f} ± {scratch.std(ddof=1):.1f} %. The "
        f"fitting source classifies {fit:.1f} % of the {cfg.evaluate_on} images correctly. The "
        f"unfitting source has memorized {memorized:.1f} % of its permuted labels and classifies "
        f"{unfit:.1f} % of the {cfg.evaluate_on} images correctly.",
    ]
    for source in SOURCES:
        plain = difference(results.accuracies(source)[:, -1], scratch)
        of_sum, of_trials = (
            against_plain(results, source, method) for method in ("weighted_sum", "trial_runs")
        )
        sentences.append(
            f"{source.capitalize()} source: plain fine-tuning is {plain} points from scratch. From "
            f"plain fine-tuning, the weighted sum is {of_sum} points and the procedure of trial "
            f"runs {of_trials}; the trials decided for L2-SP in {times_used(results, source)} of "
            f"{cfg.seeds} seeds."
        )
    diverged = sum(run.diverged for run in results.fine_tunings)
    if diverged:
        sentences.append(
            f"{diverged} of {len(results.fine_tunings)} fine-tunings diverged: their logits were "
            "no longer finite, and their accuracy is that of chance."
        )
    return sentences


def as_rich(rows: list[list[str]]) -> Table:
    """The table for a terminal of 80 columns, with a section for each source."""
    table = Table(*COLUMNS, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, row in enumerate(rows):
        same_source = i > 0 and rows[i - 1][0] == row[0]
        table.add_row("" if same_source else row[0], *row[1:])
    return table


def difference(these: np.ndarray, those: np.ndarray) -> Difference:
    """The difference of paired accuracies."""
    paired = these - those
    return Difference(float(paired.mean()), float(paired.std(ddof=1)))


def against_plain(results: Results, source: str, method: str) -> Difference:
    """Against fine-tuning from the same source without a regularizer."""
    return difference(results.accuracies(source, method)[:, -1], results.accuracies(source)[:, -1])


def times_used(results: Results, source: str) -> int:
    """In how many seeds the trial runs decided for the regularizer."""
    return sum(run.regularized for run in results.of(source, "trial_runs"))


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
            dataclasses.asdict(run) | {"accuracy": run.accuracy.tolist()}
            for run in results.fine_tunings
        ],
    }
