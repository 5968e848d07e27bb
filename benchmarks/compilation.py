"""Compilation time and program size by number of leaves."""

import time

import jax

from benchmarks import combination, trees
from benchmarks.config import Sizes
from benchmarks.machine import Ceilings
from benchmarks.programs import compile_program
from benchmarks.report import Row, Table

CONTESTANTS = (
    combination.BASE,
    *(f"dtnh {scope}" for scope in combination.SCOPES),
    *(f"ml-bloop {direction}" for direction in combination.THEIR_RULES),
)


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Compiles the contestants; those that would exceed the remaining time are skipped."""
    del ceilings
    rows: list[Row] = []
    known = combination.contestants(all_rules=False)
    last = {name: (0.0, 1) for name in CONTESTANTS if name in known}
    end = time.perf_counter() + sizes.compile_seconds
    left_out = False
    for n_leaves in sorted(sizes.leaves):
        shapes = trees.small_leaves(n_leaves)
        inputs = combination.Inputs(*(shapes for _ in combination.Inputs._fields))
        for name, (seconds, of_leaves) in list(last.items()):
            if time.perf_counter() + seconds * n_leaves / of_leaves > end:
                left_out = True
                continue
            contestant = known[name]
            arguments = jax.eval_shape(contestant.arguments, inputs)
            # Do not reuse what was traced for another contestant.
            jax.clear_caches()
            program = compile_program(contestant.function, *arguments)
            last[name] = program.lower_seconds + program.compile_seconds, n_leaves
            rows.append(
                {
                    "leaves": n_leaves,
                    "contestant": name,
                    "lower s": program.lower_seconds,
                    "compile s": program.compile_seconds,
                    "instructions": program.hlo.size(),
                    "fusions": program.hlo.count("fusion"),
                    "launches": program.hlo.launches(),
                }
            )
    return Table(
        "compile",
        "Compilation",
        "Layers of a 32×32 kernel and a bias. Instructions: of the optimized program, including "
        "those in fusions; launches: instructions executed in a run without branches."
        + (" Rows that would have exceeded the time limit were skipped." if left_out else ""),
        rows,
    )
