"""Runs the benchmarks and writes the tables: `python -m benchmarks --help`."""

import time
from collections.abc import Callable

import tyro
from rich.console import Console

from benchmarks import (
    accelerators,
    combination,
    compilation,
    goals,
    machine,
    memory,
    pytorch,
    report,
    scaling,
    step,
)
from benchmarks.config import Config, Section, Sizes
from benchmarks.machine import Ceilings
from benchmarks.report import Table

RUNS: dict[Section, Callable[[Sizes, Ceilings], Table]] = {
    "combination": combination.run,
    "step": step.run,
    "memory": memory.run,
    "compile": compilation.run,
    "scaling": scaling.run,
    "torch": pytorch.run,
    "accelerators": accelerators.run,
    "accelerator_steps": accelerators.run_steps,
}


def main(config: Config) -> None:
    """Runs the selected benchmarks."""
    start = time.perf_counter()
    console = Console(highlight=False)
    sizes = config.settled()
    header = machine.describe()
    ceilings = machine.ceilings(sizes)
    header |= {
        "copy": f"{ceilings.copy / 1e9:.1f} GB/s read and written",
        "triad": f"{ceilings.triad / 1e9:.1f} GB/s read and written",
        "inner product": f"{ceilings.read / 1e9:.1f} GB/s read",
    } | {f"{dtype} matmul": f"{rate / 1e9:.0f} GFLOP/s" for dtype, rate in ceilings.matmul.items()}
    for name, value in header.items():
        console.print(f"{name}: {value}")
    tables: dict[str, Table] = {}
    for section in config.only:
        tables[section] = RUNS[section](sizes, ceilings)
        report.show(tables[section], console)
    tables["goals"] = goals.run(tables, ceilings)
    report.show(tables["goals"], console)
    files = report.save(list(tables.values()), header, config.out)
    console.print(
        f"{time.perf_counter() - start:.0f} s. Written to {config.out}: {', '.join(files)}."
    )


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks"))
