"""Reads the command line: `python -m examples.never_hurt run --help`, and `report --help`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from examples.never_hurt import report, runner, store
from examples.never_hurt.cell import Cell
from examples.never_hurt.grids import GRIDS, Grid
from examples.never_hurt.runner import Places, WorkerError

PROGRAM = "python -m examples.never_hurt"


@dataclass(frozen=True)
class Run:
    """Runs the cells of a grid that have no result yet. Kill it and start it again as you like."""

    data: Path
    """Has a folder of images for each data set: data/flowers17/train/<class>/*.jpg and so on."""
    results: Path
    """Where results go: GRID.jsonl, a line for each cell, is added to; and sources/, networks."""
    grid: str = "small"
    """Which grid."""
    smoke: bool = False
    """A few steps of a few cells, to see that everything works."""
    weights: Path | None = None
    """Has the .safetensors files that some grids start from."""
    workers: int = 1
    """Processes. On a CPU, one for each core."""
    lanes: int = 1
    """Cells that each process runs at once, by jax.vmap: for a GPU. On a CPU one is fastest."""
    share: tuple[int, int] = (0, 1)
    """Of several machines with the same grid: which this one is, from 0, and how many there are."""
    only: str = ""
    """Of the cells only those whose key begins so."""
    dry_run: bool = False
    """Say what is missing, and run nothing."""


@dataclass(frozen=True)
class Report:
    """Makes every table and figure from files of results."""

    results: Annotated[Path, tyro.conf.Positional]
    """Has the results of each grid, GRID.jsonl or GRID.jsonl.gz."""
    out: Path = Path("results/never_hurt")
    """Where tables and figures go."""
    page: Path | None = None
    """A Markdown page whose tables are renewed, and its figures in assets/ beside it."""


def run(options: Run) -> None:
    """Runs what is missing."""
    if options.grid not in GRIDS:
        raise ValueError(f"There is no grid {options.grid}: there are {', '.join(GRIDS)}.")
    grid = GRIDS[options.grid]
    if options.smoke:
        grid = grid.smoke()
    name = f"{options.grid}-smoke" if options.smoke else options.grid
    places = Places(
        options.data,
        options.weights,
        options.results / f"{name}.jsonl",
        options.results / "sources",
    )
    for name, cells in _stages(grid, options, places.results):
        done = store.read(places.results)
        missing = sum(cell.key not in done for cell in cells)
        print(f"{name}: {len(cells)} cells, {missing} of them to run")
        if options.dry_run:
            return
        runner.run_missing(
            cells,
            places,
            workers=options.workers,
            lanes=options.lanes,
            pretraining_steps=grid.pretraining_steps,
        )


def _stages(grid: Grid, options: Run, results: Path) -> Iterator[tuple[str, list[Cell]]]:
    """What is run one after another, each named."""
    yield "Learning rates", grid.tuning()
    which, of = options.share
    cells = grid.cells(store.read(results))
    yield (
        "Cells",
        [
            cell
            for number, cell in enumerate(cells)
            if number % of == which and cell.key.startswith(options.only)
        ],
    )


def main(arguments: list[str]) -> int:
    """Runs or reports; returns the exit code."""
    options = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "report": Report}, prog=PROGRAM, args=arguments
    )
    try:
        if isinstance(options, Run):
            run(options)
        else:
            report.report(options.results, options.out, options.page)
    except (ValueError, OSError, ImportError, WorkerError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
