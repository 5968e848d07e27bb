"""How one number for each example becomes one for the batch."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Reduction = Literal["mean", "sum"]


def reduced(of_examples: jax.Array, reduction: Reduction) -> jax.Array:
    """The mean or the sum of ``of_examples`` over all of its axes."""
    return jnp.mean(of_examples) if reduction == "mean" else jnp.sum(of_examples)


def check_choice(name: str, value: object, choices: tuple[str, ...] = ("mean", "sum")) -> None:
    """Refuses a convention that there is not."""
    if value not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"{name} must be {wanted}; got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Refuses a number that is not above zero; one that is traced passes."""
    if not isinstance(value, Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive; got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Refuses what is no whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1; got {value!r}.")
