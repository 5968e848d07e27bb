"""The two passes over memory that every rule is made of: inner products, then a combination.

Each takes lists of leaves. Symbols are those of :mod:`dtnh_jax.weightings`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dtnh_jax.weightings import Geometry

FEW = 4  # leaves: those of most layers


class Part(NamedTuple):
    """A leaf that takes part.

    Attributes:
        leaf: Its index.
        r: Of the reference.
        b: Of the regularizer's gradient.
        bound: Of what the bound is relative to; often the same as ``r``.
        row: The row of its group.
    """

    leaf: int
    r: jax.Array
    b: jax.Array
    bound: jax.Array
    row: int


def geometries(
    parts: Sequence[Part], n_rows: int, dtype: np.dtype, bound_is_apart: bool
) -> tuple[list[Geometry], Geometry, list[jax.Array]]:
    """The geometry of each group, in one pass over its leaves.

    Args:
        parts: All leaves that take part.
        n_rows: How many groups there are; one without leaves has a geometry of zeros.
        dtype: What to compute in.
        bound_is_apart: Whether ``bound`` is another vector than ``r``.

    Returns:
        For each group scalars, and the same as arrays of shape ``(n_rows,)``, and for each group
        the norm of ``bound``. What is made of the scalars compiles faster: leaves of the same shape
        are the same program, which they are not if each looks into an array at its own place.
    """
    of_rows: list[list[tuple[jax.Array, ...]]] = [[] for _ in range(n_rows)]
    sizes = np.zeros(n_rows)
    for _, r, b, bound, row in parts:
        products = ((r, r), (r, b), (b, b), (bound, bound))[: 4 if bound_is_apart else 3]
        of_rows[row].append(_inner_products(products, dtype))
        sizes[row] += r.size
    zeros = (jnp.zeros([], dtype),) * (4 if bound_is_apart else 3)
    sums = [_totals(leaves) if leaves else zeros for leaves in of_rows]
    each = [_geometry(*group, size=size) for group, size in zip(sums, sizes, strict=True)]
    columns = [*zip(*sums, strict=True)] or [()] * len(zeros)
    together = _geometry(*[jnp.asarray(column, dtype) for column in columns], size=sizes)
    if bound_is_apart:
        bounds = [jnp.sqrt(group[3]) for group in sums]
    else:
        bounds = [geometry.ref_norm for geometry in each]
    return each, together, bounds


def _inner_products(
    pairs: Sequence[tuple[jax.Array, jax.Array]], dtype: np.dtype
) -> tuple[jax.Array, ...]:
    """The real inner products of pairs of leaves, as scalars."""
    # Multiply and sum in place: a ravel would gather a sharded leaf on every device.
    return tuple([jnp.sum(real_product(x, y, dtype)) for x, y in pairs])


def real_product(x: jax.Array, y: jax.Array, dtype: np.dtype) -> jax.Array:
    """The products of the numbers of two leaves, as real vectors."""
    product = jnp.real(x).astype(dtype) * jnp.real(y).astype(dtype)
    if jnp.iscomplexobj(x) and jnp.iscomplexobj(y):
        product = product + jnp.imag(x).astype(dtype) * jnp.imag(y).astype(dtype)
    return product


def _totals(leaves: Sequence[tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    """The sums of a group, from those of its leaves."""
    if len(leaves) == 1:
        return leaves[0]
    if len(leaves) > FEW or not isinstance(leaves[0][0], Tracer):
        return _added_as_arrays(leaves)
    # Arrays of a few numbers are kernels of their own on a TPU and a GPU, and numbers on a CPU.
    return jax.lax.platform_dependent(leaves, cpu=_added_as_arrays, default=_added)


def _added(leaves: Sequence[tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    return tuple(functools.reduce(jnp.add, column) for column in zip(*leaves, strict=True))


def _added_as_arrays(leaves: Sequence[tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    # Behind a barrier, or XLA would add them all up again in the program of each leaf.
    columns = zip(*leaves, strict=True)
    return tuple(jnp.sum(jax.lax.optimization_barrier(jnp.stack(column))) for column in columns)


def _geometry(
    ref_sq: jax.Array,
    inner: jax.Array,
    reg_sq: jax.Array,
    bound_sq: jax.Array | None = None,
    *,
    size: np.ndarray | np.floating,
) -> Geometry:
    """The geometry of sums over so many numbers."""
    # A sum of squares this small has lost some to underflow: too small beside inner. NaN is kept.
    info = jnp.finfo(inner.dtype)
    # Where they are not finite, 0 times them is NaN. That one of the three numbers tells it saves a
    # fourth, which would be one more kernel for each group.
    squares = ref_sq + reg_sq if bound_sq is None else ref_sq + reg_sq + bound_sq
    lowest = jnp.asarray(size * float(info.tiny) / float(info.eps), inner.dtype)
    (has_ref, ref_norm), (has_reg, reg_norm) = (
        (~(square <= lowest), jnp.sqrt(jnp.where(square <= lowest, 1, square)))
        for square in (ref_sq, reg_sq)
    )
    return Geometry(
        ref_norm=jnp.where(has_ref, ref_norm, 0),
        reg_norm=jnp.where(has_reg, reg_norm, 0),
        along=jnp.where(has_ref, inner / ref_norm, 0) + 0 * squares,
    )


def element_geometry(r: jax.Array, b: jax.Array, dtype: np.dtype) -> Geometry:
    """The geometry of each element of a leaf, in arrays of the leaf's shape."""
    sign = jnp.sign(scaled(r, 1, dtype))
    sizes = (jnp.abs(scaled(x, 1, dtype)) for x in (r, b))
    return Geometry(*sizes, along=real_product(sign, b, dtype))


def change(
    r: jax.Array, b: jax.Array, ref: jax.Array, reg: jax.Array, dtype: np.dtype
) -> jax.Array:
    """One leaf of ``ref r + reg b``."""
    return total(scaled(r, ref, dtype), scaled(b, reg, dtype))


def element_change(
    r: jax.Array, b: jax.Array, ref: jax.Array, reg: jax.Array, dtype: np.dtype
) -> jax.Array:
    """One leaf of ``ref r̂ + reg b``, where ``r̂`` is the sign of ``r``."""
    # |b| sign(b), so that what is dropped is exactly 0 where a compiler fuses multiply and add.
    r_hat, b_hat = (jnp.sign(scaled(x, 1, dtype)) for x in (r, b))
    reg = reg * jnp.abs(scaled(b, 1, dtype))
    return change(r_hat, b_hat, ref, reg, dtype)


def scaled(x: jax.Array, factor: jax.typing.ArrayLike, dtype: np.dtype) -> jax.Array:
    """``factor x`` for a real factor, computed in the real ``dtype`` or the complex one of it."""
    factor = jnp.asarray(factor, dtype)
    if jnp.iscomplexobj(x):
        # Without a complex product.
        return jax.lax.complex(*[factor * part(x).astype(dtype) for part in (jnp.real, jnp.imag)])
    return factor * x.astype(dtype)


def total(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x + y`` in the dtype that holds both."""
    dtype = np.promote_types(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)
