"""`python -m examples.finetune.compare RUN...`: a table of runs, averaged over seeds."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from examples.common.command import ended
from examples.common.tables import as_markdown_table
from examples.common.text import markdown, plain_console
from examples.finetune.report import as_rich

PROGRAM = "python -m examples.finetune.compare"
# Runs that differ in these settings only are repetitions.
REPEATED = ("training.seed", "data.split_seed")
# Settings that do not change the results.
IGNORED = ("output.", "devices.", "data.workers", "training.evaluation_batch_size")


@dataclass(frozen=True)
class Config:
    """Compare finished runs: mean and standard deviation over seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of runs, each with its summary.json."""
    baseline: Path | None = None
    """One of the runs: differences are computed from its setting, seed by seed."""
    markdown: bool = False
    """Print a Markdown table."""


class Run(NamedTuple):
    """A finished run.

    Attributes:
        setting: The settings without seeds, as names and values.
        seeds: The values of the seeds.
        summary: The content of its summary.json.
    """

    setting: tuple[tuple[str, str], ...]
    seeds: tuple[Any, ...]
    summary: Mapping[str, Any]

    def percent(self, split: str) -> float:
        """The accuracy in percent."""
        return 100 * self.summary[split]["accuracy"]


def read(directory: Path) -> Run:
    """Reads the summary of a run.

    Raises:
        FileNotFoundError: If it has not finished.
    """
    file = directory / "summary.json"
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no summary.json: it is not a finished run.")
    summary = json.loads(file.read_bytes())
    config = summary["config"]
    kept = {
        name: str(value)
        for name, value in config.items()
        if name not in REPEATED and not name.startswith(IGNORED)
    }
    return Run(tuple(sorted(kept.items())), tuple(config[name] for name in REPEATED), summary)


def rows(runs: Sequence[Run], baseline: Run | None) -> list[list[str]]:
    """A header, then a row for each setting, in the order of the arguments.

    Raises:
        ValueError: If two runs have the same setting and seeds, or the baseline lacks a seed.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[tuple[Any, ...], Run]] = {}
    for run in runs:
        group = groups.setdefault(run.setting, {})
        if run.seeds in group:
            raise ValueError(f"Two runs are the same, including {REPEATED} = {run.seeds}.")
        group[run.seeds] = run
    differing = [
        name
        for name in dict.fromkeys(name for setting in groups for name, _ in setting)
        if len({dict(setting).get(name) for setting in groups}) > 1
    ]
    head = [*(name.split(".")[1] for name in differing), "runs", "validation", "test"]
    table = [head if baseline is None else [*head, "− baseline"]]
    for setting, group in groups.items():
        row = [short(dict(setting).get(name, "None")) for name in differing]
        row.append(str(len(group)))
        row += [spread([run.percent(split) for run in group.values()]) for split in head[-2:]]
        if baseline is not None:
            of_baseline = groups[baseline.setting]
            if missing := [seeds for seeds in group if seeds not in of_baseline]:
                raise ValueError(f"The baseline lacks {REPEATED} = {missing[0]}.")
            differences = [
                run.percent("test") - of_baseline[seeds].percent("test")
                for seeds, run in group.items()
            ]
            row.append("" if group is of_baseline else spread(differences, sign="+"))
        table.append(row)
    return table


def short(value: str) -> str:
    """Formats a setting for a cell: the last part of a path, nothing for ``None``."""
    if value == "None":
        return ""
    return Path(value).name if Path(value).is_absolute() else value


def spread(values: Sequence[float], sign: str = "") -> str:
    """Formats mean and standard deviation; a single value has no deviation."""
    mean = f"{np.mean(values):{sign}.1f}".replace("-", "−")
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def main(arguments: Sequence[str]) -> int:
    """Compares the runs of the command line; returns the exit code."""

    def compare() -> None:
        print_table(tyro.cli(Config, prog=PROGRAM, args=arguments))

    return ended(PROGRAM, compare, (ValueError, KeyError, OSError))


def print_table(config: Config) -> None:
    """Reads and compares the runs."""
    runs = [read(directory) for directory in config.runs]
    baseline = None if config.baseline is None else read(config.baseline)
    table = rows(runs, baseline)
    if config.markdown:
        print(as_markdown_table(table, markdown))
    else:
        # Long lines are better than truncated numbers.
        width = sum(max(map(len, column)) + 2 for column in zip(*table, strict=True))
        console = plain_console()
        console.width = max(console.width, width)
        console.print(as_rich(table, numbers=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
