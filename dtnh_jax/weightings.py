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

__all__ = [
    "Geometry",
    "Weights",
    "agem",
    "bounded",
    "cagrad",
    "config",
    "cosine",
    "dynamic_barrier",
    "gate",
    "imtl_g",
    "mgda",
    "orthogonal",
    "pcgrad",
    "project",
    "upgrad",
    "weighted_sum",
]


class Geometry(NamedTuple):
    r"""How the reference and the regularizer gradient of a group lie to each other.

    Attributes:
        ref_norm: `‖r‖`.
        reg_norm: `‖b‖`.
        along: `⟨r̂, b⟩`, the component of `b` along the reference; 0 where `r = 0`. Negative means
            conflict. NaN where `r` or `b` is not finite, or too large for its square: the
            regularizer is then left out, whatever the weights are.

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
    r"""Keeps all of the regularizer gradient.

    $$d = a + \lambda\,b$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.weighted_sum(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.000, 0.500)

    References:
        Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483), whose training this is.
    """
    return Weights(jnp.zeros_like(geometry.along), reg_weight)


def project(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""Removes from the regularizer gradient what conflicts with the reference.

    $$d = a + \lambda\,(b - \min(0, \langle\hat r,b\rangle)\,\hat r)$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.project(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.500, 0.500)

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489).
    """
    return _without(jnp.minimum(geometry.along, 0), reg_weight)


def orthogonal(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""Removes from the regularizer gradient its component along the reference.

    $$d = a + \lambda\,(b - \langle\hat r,b\rangle\,\hat r)$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.orthogonal(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.500, 0.500)

    References:
        Xiong et al., *GrOD*, ACM TKDD 2022 (doi:10.1145/3530836), in the authors' published code.
    """
    return _without(geometry.along, reg_weight)


def _without(component: jax.Array, reg_weight: jax.Array) -> Weights:
    return Weights(-reg_weight * component, reg_weight)


def gate(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""Drops the regularizer gradient on conflict.

    $$d = a + \lambda\,[\langle\hat r,b\rangle \ge 0]\,b$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.gate(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.000, 0.000)

    References:
        Du et al., 2018 (arXiv:1812.02224), the unweighted form.
    """
    return _scaled(geometry.along >= 0, reg_weight)


def cosine(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""Scales the regularizer gradient by its cosine with the reference, or by 1 where $r = 0$.

    $$d = a + \lambda\,\max(0, \cos(r, b))\,b$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.cosine(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.000, 0.000)

    References:
        Du et al., 2018 (arXiv:1812.02224).
    """
    cos = jnp.clip(ratio(geometry.along, geometry.reg_norm), 0, 1)
    return _scaled(jnp.where(geometry.ref_norm > 0, cos, 1), reg_weight)


def _scaled(share: jax.Array, reg_weight: jax.Array) -> Weights:
    reg = reg_weight * share.astype(reg_weight.dtype)
    return Weights(jnp.zeros_like(reg), reg)


def bounded(weights: Weights, geometry: Geometry, limit: jax.Array) -> Weights:
    r"""Shortens what a weighting adds to the loss gradient, where it is longer than a limit.

    $$d - a \;\mapsto\; \min\left(1, \frac{\ell}{\lVert d - a\rVert}\right)(d - a)$$

    Args:
        weights: What a weighting returned.
        geometry: What it was called with.
        limit: $\ell \ge 0$, an array like those of `geometry`. `max_ratio` of
            [`dtnh`][dtnh_jax.dtnh] sets it to $\kappa\,\lVert a\rVert$.

    Returns:
        The weights, both multiplied by the same number in [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> geometry = weightings.Geometry(*jnp.array([5.0, 2.0, 1.0]))
        >>> weights = weightings.weighted_sum(geometry, jnp.array(100.0))
        >>> print(weightings.bounded(weights, geometry, limit=jnp.array(5.0)).reg)
        2.5

    References:
        A bound by the ratio of two gradients' norms: He et al., *MetaBalance*, WWW 2022.
    """
    length = added_length(weights, geometry)
    length = jnp.where(jnp.isfinite(length), length, jnp.inf)
    kept = jnp.where(length > limit, ratio(limit, length), 1)
    # If only one of two numbers underflowed, the other would be left alone.
    is_lost = jnp.abs(kept * weights.reg) < jnp.finfo(kept.dtype).tiny
    kept = jnp.where(is_lost & (weights.reg != 0), 0, kept)
    # A norm that is too small to be told from 0 is no bound on b.
    reg = jnp.where(geometry.reg_norm > 0, kept * weights.reg, 0)
    return Weights(kept * weights.ref, reg)


def added_length(weights: Weights, geometry: Geometry) -> jax.Array:
    """``‖d - a‖``, or a little more where its two parts nearly cancel."""
    # Relative to the larger part, so that nothing is squared that could overflow.
    ref, reg = jnp.abs(weights.ref), jnp.abs(weights.reg) * geometry.reg_norm
    largest = jnp.maximum(ref, reg)
    cos = ratio(geometry.along, geometry.reg_norm) * jnp.sign(weights.ref) * jnp.sign(weights.reg)
    # What is left of two parts that cancel is not known better than they are rounded.
    cos = cos + 8 * jnp.finfo(cos.dtype).eps
    ref, reg = ratio(ref, largest), ratio(reg, largest)
    return largest * jnp.sqrt(jnp.maximum(ref**2 + 2 * cos * ref * reg + reg**2, 0))


def dynamic_barrier(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""Removes the component along the loss gradient, up to a barrier.

    $$d = a + \lambda\,b - \min(\lambda\langle\hat a,b\rangle, \lVert a\rVert)\,\hat a$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.dynamic_barrier(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.500, 0.500)

    References:
        Gong, Liu, Liu, NeurIPS 2021, in the form of arXiv:2402.02998.
    """
    along = reg_weight * geometry.along
    return Weights(-jnp.minimum(along, geometry.ref_norm), reg_weight)


def agem(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""Projects the weighted sum where it opposes the loss gradient.

    $$g = a + \lambda b, \qquad d = g - \min(0, \langle g,\hat a\rangle)\,\hat a$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.agem(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (-0.000, 0.500)

    References:
        Chaudhry et al., ICLR 2019 (arXiv:1812.00420), eq. 11.
    """
    along = geometry.ref_norm + reg_weight * geometry.along
    return Weights(-jnp.minimum(along, 0), reg_weight)


def pcgrad(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""On conflict, projects each gradient off the other before it adds them.

    $$d = (a - \min(0, \langle a,\hat b\rangle)\,\hat b)
    + \lambda\,(b - \min(0, \langle b,\hat a\rangle)\,\hat a)$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.pcgrad(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.500, 0.750)

    References:
        Yu et al., NeurIPS 2020 (arXiv:2001.06782), algorithm 1 for two tasks.
    """
    against = jnp.minimum(geometry.along, 0)
    # Where λ = 0 there is no second gradient to project a off.
    cos_share = ratio(against, geometry.reg_norm)
    held = jnp.where(reg_weight > 0, ratio(geometry.ref_norm * cos_share, geometry.reg_norm), 0)
    return Weights(-reg_weight * against, reg_weight - held)


def upgrad(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""The mean of both gradients, each projected off the other on conflict.

    $$d = \tfrac12\,d_{\text{PCGrad}}$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.upgrad(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (-0.250, 0.375)

    References:
        Quinton, Rey, 2024 (arXiv:2406.16232), for two gradients.
    """
    twice = pcgrad(geometry, reg_weight)
    return Weights((twice.ref - geometry.ref_norm) / 2, twice.reg / 2)


def mgda(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""The shortest vector between the two gradients.

    $$d = t\,a + (1-t)\,\lambda b, \qquad
    t = \mathrm{clip}\left(\frac{\lVert\lambda b\rVert^2 - \langle a,\lambda b\rangle}
    {\lVert a - \lambda b\rVert^2}, 0, 1\right)$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.mgda(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (-0.500, 0.250)

    References:
        Désidéri, 2012; Sener, Koltun, NeurIPS 2018 (arXiv:1810.04650), algorithm 1.
    """
    aa, ab, bb = _relative_products(geometry, reg_weight)
    distance = aa - 2 * ab + bb
    beta = jnp.where(distance > 0, jnp.clip(ratio(aa - ab, distance), 0, 1), 0.5)
    return _of_shares(-beta, beta, geometry, reg_weight)


def imtl_g(geometry: Geometry, reg_weight: jax.Array) -> Weights:
    r"""The combination whose projections onto both gradients are equally long.

    $$d = \frac{\lVert\lambda b\rVert\,a
    + \lVert a\rVert\,\lambda b}{\lVert a\rVert + \lVert\lambda b\rVert}$$

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.imtl_g(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (-0.500, 0.250)

    References:
        Liu et al., *Towards Impartial Multi-Task Learning*, ICLR 2021.
    """
    a_norm, b_norm, _ = _relative_norms(geometry, reg_weight)
    beta = ratio(a_norm, a_norm + b_norm)
    return _of_shares(-beta, beta, geometry, reg_weight)


def cagrad(geometry: Geometry, reg_weight: jax.Array, c: float = 0.5) -> Weights:
    r"""The best for the worse-off objective within a ball around the mean gradient.

    $$d = g_0 + c\,\lVert g_0\rVert\,\frac{g_t}{\lVert g_t\rVert}, \qquad
    g_0 = \tfrac12(a + \lambda b), \quad g_t = t\,a + (1-t)\,\lambda b$$

    With $S = \lVert a - \lambda b\rVert^2$, $\mu = (\lVert\lambda b\rVert^2 - \langle a,\lambda b
    \rangle)/S$, $q = \lVert\lambda b\rVert^2 - S\mu^2$, $A = (\lVert a\rVert^2 -
    \lVert\lambda b\rVert^2)/2$ and $K = c\,\lVert g_0\rVert$, the minimum of $\langle g_t,
    g_0\rangle + K\,\lVert g_t\rVert$ over $t \in [0, 1]$ is at $\mu - A\sqrt{q/(S(K^2S - A^2))}$
    where $K^2S > A^2$, and at an end of the interval elsewhere.

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.
        c: The radius of the ball relative to the mean gradient, in [0, 1).

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.cagrad(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (-0.250, 0.375)

    References:
        Liu et al., NeurIPS 2021 (arXiv:2110.14048), algorithm 1.
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
    r"""Along the bisector of the two gradients, as far as both together reach.

    $$d = \tfrac12\,(\lVert a\rVert + \lVert\lambda b\rVert)\,(\hat a + \hat b)$$

    For two gradients the method's $v = U(U(O(a,b)) + U(O(b,a)))$ bisects them, and this form also
    holds for parallel ones.

    Args:
        geometry: Of one group, or arrays with one number for each of many.
        reg_weight: $\lambda$, a scalar, or an array like those of `geometry`.

    Returns:
        The weights, arrays like those of `geometry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import weightings
        >>> opposing = weightings.Geometry(*jnp.array([1.0, 2.0, -1.0]))
        >>> ref, reg = weightings.config(opposing, jnp.array(0.5))
        >>> print(f"({ref:.3f}, {reg:.3f})")
        (0.000, 0.500)

    References:
        Liu, Chu, Thuerey, 2024 (arXiv:2408.11104), for two losses.
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
