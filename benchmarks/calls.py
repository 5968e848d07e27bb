"""Counts the Python calls of one eager update inside the package: `python -m benchmarks.calls`.

The count does not depend on the machine. It measures how much code one update runs through.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import dtnh_jax

PACKAGE = str(Path(dtnh_jax.__file__).parent)


class Calls(NamedTuple):
    """The calls of one update inside the package.

    Attributes:
        calls: Function calls, comprehensions and generators counted.
        changes_of_file: Calls into a file other than that of the previous call.
    """

    calls: int
    changes_of_file: int


RULES = {
    "dtnh layer": dtnh_jax.dtnh(0.1, scope="layer"),
    "dtnh_sgd": dtnh_jax.dtnh_sgd(0.1, 0.1),
}


def count(tx: optax.GradientTransformation) -> Calls:
    """Counts one eager update on three layers of two leaves."""
    layer = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    tree = {f"layer{i}": layer for i in range(3)}
    pair, state = dtnh_jax.GradientPair(tree, tree), tx.init(tree)
    tx.update(pair, state, tree)  # work that is done only once
    files: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        tx.update(pair, state, tree)
    finally:
        sys.setprofile(None)
    before = [None, *files]
    return Calls(len(files), sum(x != y for x, y in zip(before, files, strict=False)))


if __name__ == "__main__":
    for name, tx in RULES.items():
        print(name, count(tx))
