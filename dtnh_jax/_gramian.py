"""Inner products of two lists of leaves, group by group, and the combination they lead to.

The two passes over memory that every rule is made of. Symbols, here and in ``_weightings``:
one group of leaves is one vector; ``r`` is the reference that a group is held to, the loss gradient
``a`` itself unless another one was asked for; ``b`` is the group's regularizer gradient.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dtnh_jax._numerics import compute_dtype, widened


class Gramian(NamedTuple):
    r"""The Gramian of ``r̂ = r / ref_scale`` and ``b̂ = b / reg_scale`` in each group.

    The scales of a group are 1. Those of single elements are magnitudes, so that ``r̂`` and ``b̂``
    are signs, and nothing is squared that could underflow.

    Attributes:
        ref_sq: ``‖r̂‖²``, one number for each group.
        inner: ``⟨r̂, b̂⟩``, likewise.
        reg_sq: ``‖b̂‖²``, likewise.
        ref_scale: What was divided out of ``r``, likewise.
        reg_scale: What was divided out of ``b``, likewise.
    """

    ref_sq: jax.Array
    inner: jax.Array
    reg_sq: jax.Array
    ref_scale: jax.Array
    reg_scale: jax.Array


def gramians(
    ref_leaves: Sequence[jax.Array],
    reg_leaves: Sequence[jax.Array],
    rows: Sequence[int],
    n_rows: int,
) -> tuple[list[Gramian], Gramian]:
    """The Gramian of each group, in one pass over both lists.

    Args:
        ref_leaves: The leaves of ``r``, real or complex.
        reg_leaves: The leaves of ``b``, shapes as in ``ref_leaves``.
        rows: The group of each leaf.
        n_rows: How many groups there are; one without leaves has a Gramian of zeros.

    Returns:
        For each group scalars, and the same as arrays of shape ``(n_rows,)``, in float32 or the
        widest dtype of the leaves. What is made of the scalars compiles faster: leaves of the same
        shape are the same program, which they are not if each looks into an array at its own place.
    """
    dtype = compute_dtype(*(leaf.dtype for leaf in [*ref_leaves, *reg_leaves]))
    of_rows: list[list[tuple[jax.Array, ...]]] = [[] for _ in range(n_rows)]
    sizes = np.zeros(n_rows)
    for r, b, row in zip(ref_leaves, reg_leaves, rows, strict=True):
        pairs = ((r, r), (r, b), (b, b))
        of_rows[row].append(tuple(inner_product(x, y).astype(dtype) for x, y in pairs))
        sizes[row] += r.size
    zeros = (jnp.zeros([], dtype),) * 3
    sums = [
        tuple(_total(column) for column in zip(*leaves, strict=True)) or zeros for leaves in of_rows
    ]
    of_each = [_gramian(*group, size=size) for group, size in zip(sums, sizes, strict=True)]
    columns = zip(*sums, strict=True) if sums else ((),) * 3
    return of_each, _gramian(*(jnp.asarray(column, dtype) for column in columns), size=sizes)


def _total(column: Sequence[jax.Array]) -> jax.Array:
    if len(column) == 1:
        return column[0]
    # Or XLA would add them all up again in the program of each leaf.
    return jnp.sum(jax.lax.optimization_barrier(jnp.stack(column)))


def _gramian(
    ref_sq: jax.Array,
    inner: jax.Array,
    reg_sq: jax.Array,
    *,
    size: np.ndarray | np.floating | np.floating,
) -> Gramian:
    """The Gramian of sums over so many numbers."""
    # A sum of squares so small has lost some to underflow: too small beside inner.
    info = jnp.finfo(inner.dtype)
    lowest = jnp.asarray(size * float(info.tiny) / float(info.eps), inner.dtype)
    ref_sq, reg_sq = (jnp.where(square < lowest, 0, square) for square in (ref_sq, reg_sq))
    one = jnp.ones_like(inner)
    return Gramian(ref_sq, inner, reg_sq, one, one)


def no_gramian(dtype: DTypeLike) -> Gramian:
    """The Gramian of zeros: of groups without leaves, or where nobody needs to look."""
    zero, one = jnp.zeros([], dtype), jnp.ones([], dtype)
    return Gramian(zero, zero, zero, one, one)


def element_gramian(r: jax.Array, b: jax.Array) -> Gramian:
    """The Gramian of each element of a leaf: ``r̂`` and ``b̂`` are signs, the scales magnitudes.

    Args:
        r: One leaf of the reference, real or complex.
        b: The same leaf of the regularizer's gradient, of the same shape.

    Returns:
        Arrays of the leaf's shape.
    """
    dtype = compute_dtype(r.dtype, b.dtype)
    r, b = widened(r, dtype), widened(b, dtype)
    r_hat, b_hat = jnp.sign(r), jnp.sign(b)
    return Gramian(
        ref_sq=_product(r_hat, r_hat),
        inner=_product(r_hat, b_hat),
        reg_sq=_product(b_hat, b_hat),
        ref_scale=jnp.abs(r),
        reg_scale=jnp.abs(b),
    )


def change(r: jax.Array, b: jax.Array, ref_shift: jax.Array, reg: jax.Array) -> jax.Array:
    """One leaf of ``ref_shift r + reg b``: what a rule adds to the loss gradient.

    Args:
        r: The leaf of the reference.
        b: The leaf of the regularizer's gradient, of the same shape.
        ref_shift: The factor of ``r``, a scalar.
        reg: The factor of ``b``, a scalar.

    Returns:
        The change, in float32 or wider.
    """
    dtype = compute_dtype(r.dtype, b.dtype)
    r, b = widened(r, dtype), widened(b, dtype)
    return _sum(times(ref_shift.astype(dtype), r), times(reg.astype(dtype), b))


def element_change(r: jax.Array, b: jax.Array, ref_shift: jax.Array, reg: jax.Array) -> jax.Array:
    """:func:`change` with a factor for each element, whose ``r̂`` and ``b̂`` are signs."""
    dtype = compute_dtype(r.dtype, b.dtype)
    r_hat, b_hat = jnp.sign(widened(r, dtype)), jnp.sign(widened(b, dtype))
    return _sum(times(ref_shift.astype(dtype), r_hat), times(reg.astype(dtype), b_hat))


def changed(a: jax.Array, changes: Sequence[jax.Array]) -> jax.Array:
    """One leaf of the direction ``d = a + changes``, in ``a``'s dtype.

    ``a`` plus the change, not ``α a + β b``: without conflict the change is ``λ b`` to the last
    bit.
    """
    dtype = compute_dtype(a.dtype, *(each.dtype for each in changes))
    wide = [widened(each, dtype) for each in changes]
    direction = functools.reduce(_sum, wide[1:], wide[0])
    return _sum(widened(a, dtype), direction).astype(a.dtype)


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x) != jnp.iscomplexobj(y):
        complex_dtype = np.result_type(x.dtype, y.dtype)
        return x.astype(complex_dtype) + y.astype(complex_dtype)
    return x + y


def times(factor: jax.Array, x: jax.Array) -> jax.Array:
    """``factor x`` for a real factor, without a complex product."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(factor * jnp.real(x), factor * jnp.imag(x))
    return factor * x


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = compute_dtype(x.dtype, y.dtype)
    product = jnp.real(x).astype(dtype) * jnp.real(y).astype(dtype)
    if jnp.iscomplexobj(x) and jnp.iscomplexobj(y):
        product = product + jnp.imag(x).astype(dtype) * jnp.imag(y).astype(dtype)
    return product


def inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The real inner product of two leaves, a scalar."""
    # Multiply and sum in place: a ravel would gather a sharded leaf on every device.
    return jnp.sum(_product(x, y))
