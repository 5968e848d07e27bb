"""The command line: `python -m examples.never_hurt {run,again,repeat,report} --help`."""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from examples.never_hurt import report, runner, store, train
from examples.never_hurt.grids import GRIDS
from examples.never_hurt.runner import Places, WorkerError
from examples.never_hurt.sources import is_file

PROGRAM = "python -m examples.never_hurt"


@dataclass(frozen=True)
class Run:
    """Runs the cells of a grid that have no result yet. It can be interrupted and restarted."""

    data: Path
    """Has a folder of images for each data set: data/flowers17/train/<class>/*.jpg and so on."""
    results: Path
    """Folder of the results: GRID.jsonl with one line per cell, and sources/ with the networks."""
    grid: str = "small"
    """Name of the grid."""
    smoke: bool = False
    """Run a few steps of a few cells, to test the setup."""
    weights: Path | None = None
    """Folder of the .safetensors files that some grids start from."""
    workers: int = 1
    """Number of processes. On a CPU, one per core."""
    lanes: int = 1
    """Cells that each process runs at once with jax.vmap, for a GPU. On a CPU, 1 is fastest."""
    share: tuple[int, int] = (0, 1)
    """To divide a grid among N machines: I N runs every N-th cell from the I-th on, I from 0."""
    dry_run: bool = False
    """Print how many cells are missing, and run nothing."""

    def __call__(self) -> None:
        """Chooses the learning rates, then runs the cells.

        Raises:
            ValueError: If there is no such grid or share.
        """
        if self.grid not in GRIDS:
            raise ValueError(f"There is no grid {self.grid}: there are {', '.join(GRIDS)}.")
        index, n_machines = self.share
        if not 0 <= index < n_machines:
            raise ValueError(f"share must be I N with 0 ≤ I < N; got {index} {n_machines}.")
        grid, file_name = GRIDS[self.grid], f"{self.grid}.jsonl"
        if self.smoke:
            grid, file_name = grid.smoke(), f"{self.grid}-smoke.jsonl"
        file = self.results / file_name
        places = Places(self.data, self.weights, file, self.results / "sources")
        for title in ("Learning rates", "Cells"):
            done = store.read(file)
            tuning = title == "Learning rates"
            cells = grid.tuning() if tuning else grid.cells(done)[index::n_machines]
            missing = sum(cell.key not in done for cell in cells)
            print(f"{title}: {len(cells)} cells, {missing} of them to run")
            if self.dry_run:
                return
            runner.run_missing(
                cells,
                places,
                workers=self.workers,
                lanes=self.lanes,
                pretraining_steps=grid.pretraining_steps,
            )


@dataclass(frozen=True)
class Again:
    """Runs one cell of a file of results again, and prints the old and the new result."""

    file: Annotated[Path, tyro.conf.Positional]
    """The file of results, named after its grid: .../small.jsonl or small.jsonl.gz."""
    key: Annotated[str, tyro.conf.Positional]
    """The key of the cell, or its first digits."""
    data: Path
    """As for `run`."""
    sources: Path
    """Folder of the networks trained here; the source is trained first if it is not there."""
    weights: Path | None = None
    """As for `run`."""

    def __call__(self) -> None:
        """Runs the cell.

        Raises:
            ValueError: If the file is not named after a grid, or the key is not that of one cell.
        """
        grid = GRIDS.get(self.file.name.partition(".")[0])
        if grid is None:
            raise ValueError(f"{self.file} is not named after a grid: {', '.join(GRIDS)}.")
        results = store.read(self.file)
        found = [result for key, result in results.items() if key.startswith(self.key)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} cells of {self.file} have a key like {self.key!r}.")
        [old] = found
        places = Places(self.data, self.weights, self.file, self.sources)
        with runner.one_core(0):
            [new] = train.run([runner.prepare(old.cell, places, grid.pretraining_steps)])
        for title, result in ("old", old), ("new", new):
            print(f"{title}: {replace(result, seconds=0.0).to_json()}")


@dataclass(frozen=True)
class Repeat:
    """Runs cells that are drawn at random from files of results again; `report` compares them."""

    results: Annotated[Path, tyro.conf.Positional]
    """Folder of the results of each grid. What the cells give now is added to repeated.jsonl."""
    data: Path
    """As for `run`."""
    sources: Path
    """As for `again`."""
    weights: Path | None = None
    """As for `run`. Without it, grids that start from such files are left out."""
    sample: int = 3
    """Cells of each grid."""
    seed: int = 0
    """Draws the cells."""

    def __call__(self) -> None:
        """Runs the cells."""
        out = self.results / report.REPEATED
        done = store.read(out)
        for name, grid in GRIDS.items():
            file = store.of_grid(self.results, name)
            if file is None:
                continue
            kept = [
                result.cell
                for result in store.read(file).values()
                if self.weights or not is_file(result.cell.source)
            ]
            drawn = random.Random(f"{self.seed} {name}").sample(kept, min(self.sample, len(kept)))
            print(f"{name}: {len(drawn)} of {len(kept)} cells")
            runner.run_missing(
                [cell for cell in drawn if cell.key not in done],
                Places(self.data, self.weights, out, self.sources),
                workers=1,
                lanes=1,
                pretraining_steps=grid.pretraining_steps,
            )


@dataclass(frozen=True)
class Report:
    """Makes every table and figure from files of results."""

    results: Annotated[Path, tyro.conf.Positional]
    """Folder of the results of each grid, GRID.jsonl or GRID.jsonl.gz."""
    out: Path = Path("results/never_hurt")
    """Folder for tables and figures."""
    page: Path | None = None
    """A Markdown page whose tables are renewed, with its figures in assets/ next to it."""

    def __call__(self) -> None:
        """Makes them."""
        report.report(self.results, self.out, self.page)


def main(arguments: list[str]) -> int:
    """Runs a subcommand; returns the exit code."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "again": Again, "repeat": Repeat, "report": Report},
        prog=PROGRAM,
        args=arguments,
    )
    try:
        command()
    except (ValueError, OSError, ImportError, WorkerError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
