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

    The scales are powers of two, and 1 unless the squares of the group over- or underflow: what
    is computed from the Gramian stays exact, and gradients from 1e-38 to 1e38 keep their angle.

    Attributes:
        ref_sq: ``‖r̂‖²``, one number for each group.
        inner: ``⟨r̂, b̂⟩``, likewise.
        reg_sq: ``‖b̂‖²``, likewise.
        ref_scale: The power of two that was divided out of ``r``, likewise.
        reg_scale: The power of two that was divided out of ``b``, likewise.
    """

    ref_sq: jax.Array
    inner: jax.Array
    reg_sq: jax.Array
    ref_scale: jax.Array
    reg_scale: jax.Array


# Outside jit, the branch below would be compiled anew at each call.
@functools.partial(jax.jit, static_argnames=("rows", "n_rows"), inline=True)
def gramian(
    ref_leaves: list[jax.Array],
    reg_leaves: list[jax.Array],
    rows: tuple[int, ...],
    n_rows: int,
) -> Gramian:
    """The Gramian of each group, in one pass over both lists.

    Args:
        ref_leaves: The leaves of ``r``, real or complex.
        reg_leaves: The leaves of ``b``, shapes as in ``ref_leaves``.
        rows: The group of each leaf.
        n_rows: How many groups there are; one without leaves has a Gramian of zeros.

    Returns:
        Arrays of shape ``(n_rows,)``, in float32 or the widest dtype of the leaves.
    """
    dtype = compute_dtype(*(leaf.dtype for leaf in [*ref_leaves, *reg_leaves]))
    ones = jnp.ones(n_rows, dtype)
    if not ref_leaves:
        return no_gramian(n_rows, dtype)
    members = _members(rows, n_rows)
    sizes = np.zeros(n_rows)
    np.add.at(sizes, list(rows), [leaf.size for leaf in ref_leaves])

    def sums(ref: Sequence[jax.Array], reg: Sequence[jax.Array]) -> jax.Array:
        per_leaf = [
            jnp.stack([inner_product(r, r), inner_product(r, b), inner_product(b, b)]).astype(dtype)
            for r, b in zip(ref, reg, strict=True)
        ]
        return jnp.sum(_gather(jnp.stack(per_leaf, axis=1), members), axis=-1)

    def largest(leaves: Sequence[jax.Array]) -> jax.Array:
        per_leaf = jnp.stack([_max_abs(leaf).astype(dtype) for leaf in leaves])
        return jnp.max(_gather(per_leaf, members), axis=-1)

    def rescaled(ref: Sequence[jax.Array], reg: Sequence[jax.Array]) -> Gramian:
        ref_scale, reg_scale = _power_of_two(largest(ref)), _power_of_two(largest(reg))
        ref = [divided(r, ref_scale[row]) for r, row in zip(ref, rows, strict=True)]
        reg = [divided(b, reg_scale[row]) for b, row in zip(reg, rows, strict=True)]
        ref_sq, inner, reg_sq = sums(ref, reg)
        return Gramian(ref_sq, inner, reg_sq, _along(ref_scale, inner), _along(reg_scale, inner))

    ref_sq, inner, reg_sq = sums(ref_leaves, reg_leaves)
    ones = _along(ones, inner)
    # A cond, not a where: the second look at the leaves is taken only by a step that needs it.
    return jax.lax.cond(
        jnp.all(_in_range(ref_sq, sizes) & _in_range(reg_sq, sizes)),
        lambda ref, reg: Gramian(ref_sq, inner, reg_sq, ones, ones),
        rescaled,
        list(ref_leaves),
        list(reg_leaves),
    )


def no_gramian(n_rows: int, dtype: DTypeLike) -> Gramian:
    """The Gramian of zeros: of groups without leaves, or where nobody needs to look."""
    zeros, ones = jnp.zeros(n_rows, dtype), jnp.ones(n_rows, dtype)
    return Gramian(zeros, zeros, zeros, ones, ones)


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


def change(
    r: jax.Array,
    b: jax.Array,
    ref_shift: jax.Array,
    reg: jax.Array,
    ref_scale: jax.Array,
    reg_scale: jax.Array,
) -> jax.Array:
    """One leaf of ``ref_shift r̂ + reg b̂``: what a rule adds to the loss gradient.

    Args:
        r: The leaf of the reference.
        b: The leaf of the regularizer's gradient, of the same shape.
        ref_shift: The factor of ``r̂``, a scalar.
        reg: The factor of ``b̂``, a scalar.
        ref_scale: The power of two in ``r̂ = r / ref_scale``.
        reg_scale: The power of two in ``b̂ = b / reg_scale``.

    Returns:
        The change, in float32 or wider.
    """
    dtype = compute_dtype(r.dtype, b.dtype)
    r_hat, b_hat = widened(divided(r, ref_scale), dtype), widened(divided(b, reg_scale), dtype)
    return _sum(times(ref_shift.astype(dtype), r_hat), times(reg.astype(dtype), b_hat))


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


def divided(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale`` for a power of two."""
    # To multiply by its reciprocal is exact too, and faster.
    dtype = compute_dtype(x.dtype, scale.dtype)
    return times((1 / scale).astype(dtype), widened(x, dtype))


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


def _max_abs(x: jax.Array) -> jax.Array:
    parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    return jnp.stack([jnp.max(jnp.abs(part), initial=0) for part in parts]).max()


def _power_of_two(x: jax.Array) -> jax.Array:
    info = jnp.finfo(x.dtype)
    _, exponent = jnp.frexp(x)
    # Both the scale and its reciprocal stay normal numbers.
    exponent = jnp.clip(exponent, info.minexp, -info.minexp)
    return jnp.ldexp(jnp.ones((), x.dtype), exponent)


def _in_range(square: jax.Array, sizes: np.ndarray) -> jax.Array:
    # Below the first bound what underflowed could matter against rounding; up to the second,
    # quotients and products of the three sums stay finite.
    info = jnp.finfo(square.dtype)
    lowest = np.maximum(sizes, 1) * float(info.tiny) / float(info.eps)
    return (square >= lowest.astype(square.dtype)) & (square <= float(info.max) ** 0.75)


def _along(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x``; under ``shard_map`` it varies over the mesh axes that ``like`` varies over."""
    return jnp.where(like == like, x, x)


def _members(rows: Sequence[int], n_rows: int) -> np.ndarray:
    """The leaves of each group, filled up to a rectangle with the index past the last leaf."""
    leaves: list[list[int]] = [[] for _ in range(n_rows)]
    for leaf, row in enumerate(rows):
        leaves[row].append(leaf)
    width = max(map(len, leaves))
    return np.array([group + [len(rows)] * (width - len(group)) for group in leaves], np.int32)


def _gather(per_leaf: jax.Array, members: np.ndarray) -> jax.Array:
    # A gather of a few hundred scalars; a scatter-add would be atomic, so unordered, on a GPU.
    padding = [(0, 0)] * (per_leaf.ndim - 1) + [(0, 1)]
    return jnp.pad(per_leaf, padding).at[..., members].get(mode="promise_in_bounds")
