"""From the Gramian of a group to the weights of its direction: the algebra of each rule.

Symbols: ``a`` and ``b`` are the loss and regularizer gradients of one group, ``r`` the reference
that ``b`` is held against (``a``, where a rule does not say otherwise), ``λ`` the regularizer
weight, ``d`` the direction. The Gramian is that of ``r̂ = r / ref_scale`` and
``b̂ = b / reg_scale``; a weighting returns the factors of ``d - a = ref_shift r̂ + reg b̂``. For
``d = α a + β b`` these are ``(α - 1) ref_scale`` and ``β reg_scale``: ``α - 1``, not ``α``, because
a small ``λ`` changes ``α`` by less than 1 is rounded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dtnh_jax._gramian import Gramian
from dtnh_jax._numerics import ratio


class Weights(NamedTuple):
    """What multiplies ``r̂`` and ``b̂`` in ``d - a``, one number for each group."""

    ref_shift: jax.Array
    reg: jax.Array


def weighted_sum(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ b``."""
    return Weights(jnp.zeros_like(gram.inner), reg_weight * gram.reg_scale)


def project(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ (b - c⁻ r)``, ``c⁻ = min(0, ⟨r,b⟩ / ‖r‖²)``."""
    reg = reg_weight * gram.reg_scale
    return Weights(-reg * ratio(jnp.minimum(gram.inner, 0), gram.ref_sq), reg)


def orthogonal(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ (b - c r)``, ``c = ⟨r,b⟩ / ‖r‖²``."""
    reg = reg_weight * gram.reg_scale
    return Weights(-reg * ratio(gram.inner, gram.ref_sq), reg)


def gate(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ [⟨r,b⟩ ≥ 0] b``."""
    reg = reg_weight * gram.reg_scale
    return Weights(jnp.zeros_like(reg), jnp.where(gram.inner >= 0, reg, 0))


def cosine(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ max(0, cos(r, b)) b``; all of ``b`` where ``r = 0`` has nothing to protect."""
    reg = reg_weight * gram.reg_scale
    cos = ratio(gram.inner, jnp.sqrt(gram.ref_sq) * jnp.sqrt(gram.reg_sq))
    kept = jnp.where(gram.ref_sq > 0, jnp.clip(cos, 0, 1), 1)
    return Weights(jnp.zeros_like(reg), reg * kept)


def bounded(weights: Weights, gram: Gramian, max_ratio: jax.typing.ArrayLike) -> Weights:
    """``d - a`` made shorter where it is longer than ``max_ratio ‖r‖``."""
    # Relative to the larger part, so that nothing is squared that could overflow.
    shift = jnp.abs(weights.ref_shift) * jnp.sqrt(gram.ref_sq)
    reg = jnp.abs(weights.reg) * jnp.sqrt(gram.reg_sq)
    largest = jnp.maximum(shift, reg)
    cos = ratio(gram.inner, jnp.sqrt(gram.ref_sq) * jnp.sqrt(gram.reg_sq))
    cos = cos * jnp.sign(weights.ref_shift) * jnp.sign(weights.reg)
    shift, reg = ratio(shift, largest), ratio(reg, largest)
    length = largest * jnp.sqrt(jnp.maximum(shift**2 + 2 * cos * shift * reg + reg**2, 0))
    limit = jnp.asarray(max_ratio, length.dtype) * (gram.ref_scale * jnp.sqrt(gram.ref_sq))
    kept = jnp.where(length > limit, ratio(limit, length), 1)
    return Weights(kept * weights.ref_shift, kept * weights.reg)


def dynamic_barrier(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ (b - min(c, 1/λ) a)``, ``c = ⟨a,b⟩ / ‖a‖²``."""
    reg = reg_weight * gram.reg_scale
    return Weights(-jnp.minimum(reg * ratio(gram.inner, gram.ref_sq), gram.ref_scale), reg)


def agem(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = g - min(0, ⟨g,a⟩ / ‖a‖²) a``, ``g = a + λ b``."""
    reg = reg_weight * gram.reg_scale
    along = gram.ref_scale + reg * ratio(gram.inner, gram.ref_sq)
    return Weights(-jnp.minimum(along, 0), reg)


def pcgrad(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a - c⁻ a`` and ``λ b - k⁻ λ b`` together: each of ``a``, ``λ b`` against the other."""
    reg = reg_weight * gram.reg_scale
    against = jnp.minimum(gram.inner, 0)
    # Where λ = 0 there is no second task for a to be held against.
    held = jnp.where(reg > 0, gram.ref_scale * ratio(against, gram.reg_sq), 0)
    return Weights(-reg * ratio(against, gram.ref_sq), reg - held)


def upgrad(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """Half of PCGrad's sum."""
    twice = pcgrad(gram, reg_weight)
    return Weights((twice.ref_shift - gram.ref_scale) / 2, twice.reg / 2)


def mgda(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """The shortest ``t a + (1-t) λ b``, ``t = clip((‖λb‖² - ⟨a,λb⟩) / ‖a - λb‖², 0, 1)``."""
    aa, ab, bb = _relative(gram, reg_weight)
    distance = aa - 2 * ab + bb
    beta = jnp.where(distance > 0, jnp.clip(ratio(aa - ab, distance), 0, 1), 0.5)
    return _scaled(-beta, beta, gram, reg_weight)


def imtl_g(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = (‖λb‖ a + ‖a‖ λb) / (‖a‖ + ‖λb‖)``: the same projection onto both."""
    aa, _, bb = _relative(gram, reg_weight)
    a_norm, b_norm = jnp.sqrt(aa), jnp.sqrt(bb)
    beta = ratio(a_norm, a_norm + b_norm)
    return _scaled(-beta, beta, gram, reg_weight)


def cagrad(gram: Gramian, reg_weight: jax.Array, c: float) -> Weights:
    """``d = g₀ + c ‖g₀‖ g_w / ‖g_w‖`` for the mean ``g₀`` and the worst ``g_w = t a + (1-t) λ b``.

    ``t`` in [0, 1] minimises ``⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖``: with ``S = ‖a - λb‖²``,
    ``μ = (‖λb‖² - ⟨a,λb⟩)/S``, ``q = ‖λb‖² - S μ²``, ``A = (‖a‖² - ‖λb‖²)/2``, ``K = c ‖g₀‖`` it is
    ``μ - A sqrt(q / (S (K² S - A²)))`` where ``K² S > A²``, and at an end elsewhere.
    """
    aa, ab, bb = _relative(gram, reg_weight)
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
    return _scaled(pull * t - 0.5, 0.5 + pull * (1 - t), gram, reg_weight)


def config(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = (⟨a,v⟩ + ⟨λb,v⟩) v`` along ``v``, the bisector of ``a`` and ``b``.

    For two gradients the method's ``v = U(U(O(a,b)) + U(O(b,a)))`` is the bisector of their unit
    vectors, and the whole ``(‖a‖ + ‖λb‖)/2 (a/‖a‖ + b/‖b‖)``.
    """
    a_norm, b_norm = jnp.sqrt(gram.ref_sq), jnp.sqrt(gram.reg_sq)
    half = (a_norm * gram.ref_scale + reg_weight * (b_norm * gram.reg_scale)) / 2
    reg = jnp.where(reg_weight > 0, ratio(half, b_norm), 0)
    return Weights(ratio(half, a_norm) - gram.ref_scale, reg)


def _relative(gram: Gramian, reg_weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``‖a‖²``, ``⟨a,λb⟩``, ``‖λb‖²``, all divided by the larger of the squares."""
    a_norm, b_norm = jnp.sqrt(gram.ref_sq), jnp.sqrt(gram.reg_sq)
    cos = ratio(gram.inner, a_norm * b_norm)
    a_norm, b_norm = a_norm * gram.ref_scale, b_norm * (reg_weight * gram.reg_scale)
    largest = jnp.maximum(a_norm, b_norm)
    a_norm, b_norm = ratio(a_norm, largest), ratio(b_norm, largest)
    return a_norm**2, cos * a_norm * b_norm, b_norm**2


def _scaled(
    alpha_shift: jax.Array, beta: jax.Array, gram: Gramian, reg_weight: jax.Array
) -> Weights:
    """The weights of ``d = (1 + alpha_shift) a + beta λ b``."""
    return Weights(alpha_shift * gram.ref_scale, beta * (reg_weight * gram.reg_scale))
