"""Reductions over the batch, and validation of arguments."""

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
    """Validates an argument that has a fixed set of values."""
    if value not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"{name} must be {wanted}; got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Validates a positive number; tracers are not checked."""
    if not isinstance(value, Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive; got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Validates an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}.")
