r"""The algebra of each rule: from the geometry of two gradients to the weights of a direction.

In one group of parameters, seen as one vector, `a` is the loss gradient, `b` the regularizer
gradient, `λ` the regularizer weight, and `r` the reference that `b` is compared with: `a` itself,
unless another reference is chosen. With the unit vector `r̂ = r / ‖r‖` a rule makes the direction

    d = a + ref r̂ + reg b.

A *weighting* is a function `weighting(geometry, reg_weight)` that returns the two numbers `ref` and
`reg` as [`Weights`][dtnh_jax.weightings.Weights]. It sees
[`Geometry`][dtnh_jax.weightings.Geometry]: two norms and one projection. Everything is elementwise,
so the same function serves one group (scalars), all groups at once (vectors), and every element of
an array as a group of its own.

[`combine_pair`][dtnh_jax.combine_pair] turns any weighting into an Optax transformation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dtnh_jax._numerics import ratio


class Geometry(NamedTuple):
    r"""How the reference and the regularizer gradient of a group lie to each other.

    Attributes:
        ref_norm: `‖r‖`.
        reg_norm: `‖b‖`.
        along: `⟨r̂, b⟩`, the component of `b` along the reference; 0 where `r = 0`. Negative means
            conflict.

    Examples:
        >>> from dtnh_jax.weightings import Geometry
        >>> Geometry(ref_norm=5.0, reg_norm=2.0, along=-1.0).along < 0
        True
    """

    ref_norm: jax.Array
    reg_norm: jax.Array
    along: jax.Array


class Weights(NamedTuple):
    r"""The numbers of a direction `d = a + ref r̂ + reg b`.

    Attributes:
        ref: What multiplies the unit vector `r̂` of the reference.
        reg: What multiplies the regularizer gradient `b`.

    Examples:
        >>> from dtnh_jax.weightings import Weights
        >>> Weights(ref=0.0, reg=0.1).reg
        0.1
    """

    ref: jax.Array
    reg: jax.Array


Weighting = Callable[[Geometry, jax.Array], Weights]


def weighted_sum(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = a + λ b``."""
    return Weights(jnp.zeros_like(geometry.along), reg_weight)


def project(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = a + λ (b - min(0, ⟨r̂,b⟩) r̂)``."""
    return _without(jnp.minimum(geometry.along, 0), reg_weight)


def orthogonal(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = a + λ (b - ⟨r̂,b⟩ r̂)``."""
    return _without(geometry.along, reg_weight)


def _without(component: jax.Array, reg_weight: jax.Array) -> Weights:
    return Weights(-reg_weight * component, reg_weight)


def gate(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = a + λ [⟨r̂,b⟩ ≥ 0] b``."""
    return _scaled(geometry.along >= 0, reg_weight)


def cosine(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = a + λ max(0, cos(r, b)) b``; all of ``b`` where ``r = 0`` has nothing to protect."""
    cos = jnp.clip(ratio(geometry.along, geometry.reg_norm), 0, 1)
    return _scaled(jnp.where(geometry.ref_norm > 0, cos, 1), reg_weight)


def _scaled(share: jax.Array, reg_weight: jax.Array) -> Weights:
    reg = reg_weight * share.astype(reg_weight.dtype)
    return Weights(jnp.zeros_like(reg), reg)


def bounded(weights: Weights, geometry: Geometry, max_ratio: jax.typing.ArrayLike) -> Weights:
    """``d - a`` made shorter where it is longer than ``max_ratio ‖r‖``."""
    # Relative to the larger part, so that nothing is squared that could overflow.
    ref, reg = jnp.abs(weights.ref), jnp.abs(weights.reg) * geometry.reg_norm
    largest = jnp.maximum(ref, reg)
    cos = ratio(geometry.along, geometry.reg_norm) * jnp.sign(weights.ref) * jnp.sign(weights.reg)
    ref, reg = ratio(ref, largest), ratio(reg, largest)
    length = largest * jnp.sqrt(jnp.maximum(ref**2 + 2 * cos * ref * reg + reg**2, 0))
    limit = jnp.asarray(max_ratio, length.dtype) * geometry.ref_norm
    kept = jnp.where(length > limit, ratio(limit, length), 1)
    return Weights(kept * weights.ref, kept * weights.reg)


def dynamic_barrier(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = a + λ b - min(λ ⟨â,b⟩, ‖a‖) â``."""
    along = reg_weight * geometry.along
    return Weights(-jnp.minimum(along, geometry.ref_norm), reg_weight)


def agem(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = g - min(0, ⟨g,â⟩) â``, ``g = a + λ b``."""
    along = geometry.ref_norm + reg_weight * geometry.along
    return Weights(-jnp.minimum(along, 0), reg_weight)


def pcgrad(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``a - min(0, ⟨a,b̂⟩) b̂`` and ``λ b - min(0, ⟨λb,â⟩) â`` together."""
    against = jnp.minimum(geometry.along, 0)
    # Where λ = 0 there is no second task for a to be held against.
    cos_share = ratio(against, geometry.reg_norm)
    held = jnp.where(reg_weight > 0, ratio(geometry.ref_norm * cos_share, geometry.reg_norm), 0)
    return Weights(-reg_weight * against, reg_weight - held)


def upgrad(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """Half of PCGrad's sum."""
    twice = pcgrad(geometry, reg_weight)
    return Weights((twice.ref - geometry.ref_norm) / 2, twice.reg / 2)


def mgda(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """The shortest ``t a + (1-t) λ b``, ``t = clip((‖λb‖² - ⟨a,λb⟩) / ‖a - λb‖², 0, 1)``."""
    aa, ab, bb = _relative_products(geometry, reg_weight)
    distance = aa - 2 * ab + bb
    beta = jnp.where(distance > 0, jnp.clip(ratio(aa - ab, distance), 0, 1), 0.5)
    return _of_shares(-beta, beta, geometry, reg_weight)


def imtl_g(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = (‖λb‖ a + ‖a‖ λb) / (‖a‖ + ‖λb‖)``: the same projection onto both."""
    a_norm, b_norm, _ = _relative_norms(geometry, reg_weight)
    beta = ratio(a_norm, a_norm + b_norm)
    return _of_shares(-beta, beta, geometry, reg_weight)


def cagrad(geometry: Geometry, reg_weight: jax.Array, c: float = 0.5) -> Weights:
    """``d = g₀ + c ‖g₀‖ g_w / ‖g_w‖`` for the mean ``g₀`` and the worst ``g_w = t a + (1-t) λ b``.

    ``t`` in [0, 1] minimises ``⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖``: with ``S = ‖a - λb‖²``,
    ``μ = (‖λb‖² - ⟨a,λb⟩)/S``, ``q = ‖λb‖² - S μ²``, ``A = (‖a‖² - ‖λb‖²)/2``, ``K = c ‖g₀‖`` it is
    ``μ - A sqrt(q / (S (K² S - A²)))`` where ``K² S > A²``, and at an end elsewhere.
    """
    aa, ab, bb = _relative_products(geometry, reg_weight)
    s = jnp.maximum(aa - 2 * ab + bb, 0)
    mean_norm = jnp.sqrt(jnp.maximum(aa + 2 * ab + bb, 0)) / 2
    mu = ratio(bb - ab, s)
    q = jnp.maximum(bb - s * mu**2, 0)
    half = (aa - bb) / 2
    curvature = (c * mean_norm) ** 2 * s - half**2
    inside = mu - half * jnp.sqrt(jnp.where(curvature > 0, ratio(q, s * curvature), 0))
    at_an_end = (half <= 0).astype(aa.dtype)
    t = jnp.where(curvature > 0, jnp.clip(inside, 0, 1), at_an_end)
    worst_norm = jnp.sqrt(jnp.maximum(t**2 * aa + 2 * t * (1 - t) * ab + (1 - t) ** 2 * bb, 0))
    pull = c * ratio(mean_norm, worst_norm)
    return _of_shares(pull * t - 0.5, 0.5 + pull * (1 - t), geometry, reg_weight)


def config(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    """``d = (⟨a,v⟩ + ⟨λb,v⟩) v`` along ``v``, the bisector of ``a`` and ``b``.

    For two gradients the method's ``v = U(U(O(a,b)) + U(O(b,a)))`` is the bisector of their unit
    vectors, and the whole ``(‖a‖ + ‖λb‖)/2 (â + b̂)``.
    """
    half = (geometry.ref_norm + reg_weight * geometry.reg_norm) / 2
    ref = jnp.where(geometry.ref_norm > 0, half, 0) - geometry.ref_norm
    return Weights(ref, jnp.where(reg_weight > 0, ratio(half, geometry.reg_norm), 0))


def _relative_norms(
    geometry: Geometry, reg_weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``‖a‖`` and ``‖λb‖`` over the larger of the two, so that no square overflows; the cosine."""
    a_norm, b_norm = geometry.ref_norm, reg_weight * geometry.reg_norm
    largest = jnp.maximum(a_norm, b_norm)
    cos = ratio(geometry.along, geometry.reg_norm)
    return ratio(a_norm, largest), ratio(b_norm, largest), cos


def _relative_products(
    geometry: Geometry, reg_weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``‖a‖²``, ``⟨a,λb⟩``, ``‖λb‖²``, all divided by the larger of the squares."""
    a_norm, b_norm, cos = _relative_norms(geometry, reg_weight)
    return a_norm**2, cos * a_norm * b_norm, b_norm**2


def _of_shares(
    alpha_shift: jax.Array, beta: jax.Array, geometry: Geometry, reg_weight: jax.Array
) -> Weights:
    """The weights of ``d = (1 + alpha_shift) a + beta λ b``."""
    # 1 is left out, because a small λ changes α by less than 1 is rounded.
    return Weights(alpha_shift * geometry.ref_norm, beta * reg_weight)
