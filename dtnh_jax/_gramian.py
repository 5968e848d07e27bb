"""Inner products of two lists of leaves, group by group, and the combination they lead to.

The two passes over memory that every rule is made of. Symbols, here and in ``_weightings``:
one group of leaves is one vector; ``a`` is the loss gradient of a group, ``b`` the regularizer's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dtnh_jax._numerics import compute_dtype, widened


class Gramian(NamedTuple):
    r"""The Gramian of ``â = a / loss_scale`` and ``b̂ = b / reg_scale`` in each group.

    The scales are powers of two, and 1 unless the squares of the group over- or underflow: what
    is computed from the Gramian stays exact, and gradients from 1e-38 to 1e38 keep their angle.

    Attributes:
        loss_sq: ``‖â‖²``, one number for each group.
        inner: ``⟨â, b̂⟩``, likewise.
        reg_sq: ``‖b̂‖²``, likewise.
        loss_scale: The power of two that was divided out of ``a``, likewise.
        reg_scale: The power of two that was divided out of ``b``, likewise.
    """

    loss_sq: jax.Array
    inner: jax.Array
    reg_sq: jax.Array
    loss_scale: jax.Array
    reg_scale: jax.Array


def gramian(
    loss_leaves: Sequence[jax.Array],
    reg_leaves: Sequence[jax.Array],
    rows: Sequence[int],
    n_rows: int,
) -> Gramian:
    """The Gramian of each group, in one pass over both lists.

    Args:
        loss_leaves: The leaves of ``a``, real or complex.
        reg_leaves: The leaves of ``b``, shapes as in ``loss_leaves``.
        rows: The group of each leaf.
        n_rows: How many groups there are; one without leaves has a Gramian of zeros.

    Returns:
        Arrays of shape ``(n_rows,)``, in float32 or the widest dtype of the leaves.
    """
    dtype = compute_dtype(*(leaf.dtype for leaf in [*loss_leaves, *reg_leaves]))
    ones = jnp.ones(n_rows, dtype)
    if not loss_leaves:
        return no_gramian(n_rows, dtype)
    members = _members(rows, n_rows)
    sizes = np.zeros(n_rows)
    np.add.at(sizes, list(rows), [leaf.size for leaf in loss_leaves])

    def sums(loss: Sequence[jax.Array], reg: Sequence[jax.Array]) -> jax.Array:
        per_leaf = [
            jnp.stack([inner_product(a, a), inner_product(a, b), inner_product(b, b)]).astype(dtype)
            for a, b in zip(loss, reg, strict=True)
        ]
        return jnp.sum(_gather(jnp.stack(per_leaf, axis=1), members), axis=-1)

    def largest(leaves: Sequence[jax.Array]) -> jax.Array:
        per_leaf = jnp.stack([_max_abs(leaf).astype(dtype) for leaf in leaves])
        return jnp.max(_gather(per_leaf, members), axis=-1)

    def rescaled(loss: Sequence[jax.Array], reg: Sequence[jax.Array]) -> Gramian:
        loss_scale, reg_scale = _power_of_two(largest(loss)), _power_of_two(largest(reg))
        loss = [divided(a, loss_scale[row]) for a, row in zip(loss, rows, strict=True)]
        reg = [divided(b, reg_scale[row]) for b, row in zip(reg, rows, strict=True)]
        loss_sq, inner, reg_sq = sums(loss, reg)
        return Gramian(loss_sq, inner, reg_sq, loss_scale, reg_scale)

    loss_sq, inner, reg_sq = sums(loss_leaves, reg_leaves)
    # A cond, not a where: the second look at the leaves is taken only by a step that needs it.
    return jax.lax.cond(
        jnp.all(_in_range(loss_sq, sizes) & _in_range(reg_sq, sizes)),
        lambda loss, reg: Gramian(loss_sq, inner, reg_sq, ones, ones),
        rescaled,
        list(loss_leaves),
        list(reg_leaves),
    )


def no_gramian(n_rows: int, dtype: DTypeLike) -> Gramian:
    """The Gramian of zeros: of groups without leaves, or where nobody needs to look."""
    zeros, ones = jnp.zeros(n_rows, dtype), jnp.ones(n_rows, dtype)
    return Gramian(zeros, zeros, zeros, ones, ones)


def element_gramian(a: jax.Array, b: jax.Array) -> Gramian:
    """The Gramian of each element of a leaf: ``â`` and ``b̂`` are signs, the scales magnitudes.

    Args:
        a: One leaf of the loss gradient, real or complex.
        b: The same leaf of the regularizer's gradient, of the same shape.

    Returns:
        Arrays of the leaf's shape.
    """
    dtype = compute_dtype(a.dtype, b.dtype)
    a, b = widened(a, dtype), widened(b, dtype)
    a_unit, b_unit = jnp.sign(a), jnp.sign(b)
    return Gramian(
        loss_sq=_product(a_unit, a_unit),
        inner=_product(a_unit, b_unit),
        reg_sq=_product(b_unit, b_unit),
        loss_scale=jnp.abs(a),
        reg_scale=jnp.abs(b),
    )


def combine(
    a: jax.Array,
    b: jax.Array,
    loss_shift: jax.Array,
    reg: jax.Array,
    loss_scale: jax.Array,
    reg_scale: jax.Array,
) -> jax.Array:
    """One leaf of ``d = a + loss_shift â + reg b̂``, in one pass.

    Args:
        a: The leaf of the loss gradient.
        b: The leaf of the regularizer's gradient, of the same shape.
        loss_shift: The factor of ``â``, a scalar.
        reg: The factor of ``b̂``, a scalar.
        loss_scale: The power of two in ``â = a / loss_scale``.
        reg_scale: The power of two in ``b̂ = b / reg_scale``.

    Returns:
        The direction, in ``a``'s dtype.
    """
    wide_a, wide_b, dtype = _widened_pair(a, b)
    a_unit, b_unit = divided(wide_a, loss_scale), divided(wide_b, reg_scale)
    # a + (change), not α a + β b: without conflict the change is λ b to the last bit.
    return (wide_a + _change(a_unit, b_unit, loss_shift, reg, dtype)).astype(a.dtype)


def combine_elements(
    a: jax.Array, b: jax.Array, loss_shift: jax.Array, reg: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """:func:`combine` with a factor for each element, whose ``â`` and ``b̂`` are signs.

    Returns:
        The direction, and its change ``d - a`` before that was rounded.
    """
    wide_a, wide_b, dtype = _widened_pair(a, b)
    change = _change(jnp.sign(wide_a), jnp.sign(wide_b), loss_shift, reg, dtype)
    return (wide_a + change).astype(a.dtype), change


def _change(
    a_unit: jax.Array, b_unit: jax.Array, loss_shift: jax.Array, reg: jax.Array, dtype: np.dtype
) -> jax.Array:
    return times(loss_shift.astype(dtype), a_unit) + times(reg.astype(dtype), b_unit)


def _widened_pair(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, np.dtype]:
    dtype = compute_dtype(a.dtype, b.dtype)
    wide_a, wide_b = widened(a, dtype), widened(b, dtype)
    if jnp.iscomplexobj(wide_a):
        wide_b = wide_b.astype(wide_a.dtype)
    return wide_a, wide_b, dtype


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


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = compute_dtype(a.dtype, b.dtype)
    product = jnp.real(a).astype(dtype) * jnp.real(b).astype(dtype)
    if jnp.iscomplexobj(a) and jnp.iscomplexobj(b):
        product = product + jnp.imag(a).astype(dtype) * jnp.imag(b).astype(dtype)
    return product


def inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The real inner product of two leaves, a scalar."""
    # Multiply and sum in place: a ravel would gather a sharded leaf on every device.
    return jnp.sum(_product(a, b))


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
