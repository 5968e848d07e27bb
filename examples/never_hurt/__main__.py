"""Reads the command line: `python -m examples.never_hurt run --help`; `again` and `report` too."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from examples.never_hurt import report, runner, store, train
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
    dry_run: bool = False
    """Say what is missing, and run nothing."""


@dataclass(frozen=True)
class Again:
    """Runs one cell of a file of results again, and tells what came out then and now."""

    file: Annotated[Path, tyro.conf.Positional]
    """The file of results, named after its grid: .../small.jsonl or small.jsonl.gz."""
    key: Annotated[str, tyro.conf.Positional]
    """The cell's key, or its first digits."""
    data: Path
    """As for `run`."""
    sources: Path
    """Where networks trained here are kept; one that is not there is trained first."""
    weights: Path | None = None
    """As for `run`."""


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
    which, of = options.share
    if not 0 <= which < of:
        raise ValueError(f"share is which machine, from 0, and of how many; got {which} of {of}.")
    grid = GRIDS[options.grid]
    file_name = f"{options.grid}.jsonl"
    if options.smoke:
        grid, file_name = grid.smoke(), f"{options.grid}-smoke.jsonl"
    places = Places(
        options.data, options.weights, options.results / file_name, options.results / "sources"
    )
    for title, cells in _stages(grid, options.share, places.results):
        done = store.read(places.results)
        missing = sum(cell.key not in done for cell in cells)
        print(f"{title}: {len(cells)} cells, {missing} of them to run")
        if options.dry_run:
            return
        runner.run_missing(
            cells,
            places,
            workers=options.workers,
            lanes=options.lanes,
            pretraining_steps=grid.pretraining_steps,
        )


def _stages(
    grid: Grid, share: tuple[int, int], results: Path
) -> Iterator[tuple[str, Sequence[Cell]]]:
    """What is run one after another, each named."""
    yield "Learning rates", grid.tuning()
    which, of = share
    yield "Cells", grid.cells(store.read(results))[which::of]


def again(options: Again) -> None:
    """Runs a cell again, and prints it.

    Raises:
        ValueError: If the file is not that of a grid, or the key not that of one cell.
    """
    grid = GRIDS.get(options.file.name.partition(".")[0])
    if grid is None:
        raise ValueError(f"{options.file} is not named after a grid: {', '.join(GRIDS)}.")
    results = store.read(options.file)
    found = [result for key, result in results.items() if key.startswith(options.key)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} cells of {options.file} have a key like {options.key!r}.")
    [then] = found
    places = Places(options.data, options.weights, options.file, options.sources)
    with runner.one_core(0):
        [now] = train.run([runner.prepare(then.cell, places, grid.pretraining_steps)])
    for title, result in ("then", then), ("now", now):
        print(f"{title}: {replace(result, seconds=0.0).to_json()}")


def main(arguments: list[str]) -> int:
    """Does what the command line says; returns the exit code."""
    options = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "again": Again, "report": Report}, prog=PROGRAM, args=arguments
    )
    try:
        if isinstance(options, Run):
            run(options)
        elif isinstance(options, Again):
            again(options)
        else:
            report.report(options.results, options.out, options.page)
    except (ValueError, OSError, ImportError, WorkerError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
