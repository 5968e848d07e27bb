"""The dtype that numbers are computed in, whatever the dtype they are kept in."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_WIDE = {np.dtype(np.float64), np.dtype(np.complex128)}


def compute_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The real dtype to compute in: float64 where one of ``dtypes`` is that wide, or float32."""
    is_wide = not _WIDE.isdisjoint([np.dtype(dtype) for dtype in dtypes])
    return np.dtype(np.float64 if is_wide else np.float32)


def widened(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """``x`` in the real ``dtype``, or in the complex one of its width where ``x`` is complex."""
    return x.astype(np.promote_types(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, 0 where the denominator is 0, with finite derivatives there."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


def unit(x: jax.Array) -> jax.Array:
    """Each ``x[i]`` over its norm; 0 where it is 0, with finite derivatives there."""
    axes = tuple(range(1, x.ndim))
    # Scaled first, or the squares of small numbers would underflow. The result does not depend on
    # the scale, so no derivative is lost with it.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    x = ratio(x, size)
    squares = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
    return ratio(x, jnp.sqrt(jnp.where(squares > 0, squares, 1)))
