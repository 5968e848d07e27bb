"""Reductions over the batch, and validation of arguments."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dtnh_jax._numerics import ratio

Reduction = Literal["mean", "sum"]
ReductionOrNone = Literal["mean", "sum", "none"]
WITH_NONE = ("mean", "sum", "none")


def reduced(
    of_examples: jax.Array, reduction: ReductionOrNone, where: jax.Array | None = None
) -> jax.Array:
    """The mean or the sum of ``of_examples`` over all of its axes, or each of them.

    Args:
        of_examples: A number for each example.
        reduction: As in the regularizers.
        where: Booleans of the same shape: examples that are ``False`` do not count.
    """
    if where is not None:
        of_examples = jnp.where(where, of_examples, 0)
    if reduction == "none":
        return of_examples
    if reduction == "mean" and where is None:
        return jnp.mean(of_examples)
    total = jnp.sum(of_examples)
    if reduction == "sum" or where is None:
        return total
    return ratio(total, jnp.sum(where).astype(total.dtype))


def as_mask(what: str, where: object, shape: tuple[int, ...]) -> jax.Array | None:
    """``where`` as booleans of the shape of the examples; ``None`` where all of them count."""
    if where is None:
        return None
    mask = jnp.asarray(where)  # type: ignore[arg-type]
    fits = mask.ndim <= len(shape) and all(
        size in (1, wanted) for size, wanted in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if mask.dtype != bool or not fits:
        raise ValueError(
            f"{what} expects where to be booleans that broadcast to the shape of the examples, "
            f"{shape}; got {mask.dtype} of shape {mask.shape}."
        )
    return jnp.broadcast_to(mask, shape)


def only(where: jax.Array | None, x: jax.Array) -> jax.Array:
    """``x``, of shape ``(*where.shape, ...)``, and zeros where an example does not count.

    Whatever is there, also what is no number, has no part in values and gradients.
    """
    if where is None:
        return x
    return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, 0)


def check_choice(name: str, value: object, choices: tuple[str, ...] = ("mean", "sum")) -> None:
    """Validates an argument that has a fixed set of values."""
    if value not in choices:
        wanted = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {wanted}; got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Validates a positive number; tracers are not checked."""
    if not isinstance(value, Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive; got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Validates an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}.")
