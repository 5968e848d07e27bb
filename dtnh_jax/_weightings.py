"""From the Gramian of a group to the weights of its direction: the algebra of each rule.

Symbols: ``a`` and ``b`` are the loss and regularizer gradients of one group, ``λ`` the
regularizer weight, ``d = α a + β b`` the direction. The Gramian is that of ``â = a / loss_scale``
and ``b̂ = b / reg_scale``; a weighting returns ``(α - 1) loss_scale`` and ``β reg_scale``, so
that ``d = a + loss_shift â + reg b̂``. It returns ``α - 1``, not ``α``, because a small ``λ``
changes ``α`` by less than 1 is rounded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dtnh_jax._gramian import Gramian


class Weights(NamedTuple):
    """What multiplies ``â`` and ``b̂``, one number for each group.

    Attributes:
        loss_shift: ``(α - 1) loss_scale``.
        reg: ``β reg_scale``.
    """

    loss_shift: jax.Array
    reg: jax.Array


def weighted_sum(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ b``."""
    return Weights(jnp.zeros_like(gram.inner), reg_weight * gram.reg_scale)


def conflict(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ (b - c⁻ a)``, ``c⁻ = min(0, ⟨a,b⟩ / ‖a‖²)``."""
    return _projected(gram, reg_weight, jnp.minimum(gram.inner, 0))


def orthogonal(gram: Gramian, reg_weight: jax.Array) -> Weights:
    """``d = a + λ (b - c a)``, ``c = ⟨a,b⟩ / ‖a‖²``."""
    return _projected(gram, reg_weight, gram.inner)


def _projected(gram: Gramian, reg_weight: jax.Array, inner: jax.Array) -> Weights:
    # A zero loss gradient has no direction to protect: c is 0 there, by value and not by an
    # epsilon, which would leave conflicts of small gradients in place.
    nonzero = gram.loss_sq > 0
    c = jnp.where(nonzero, inner / jnp.where(nonzero, gram.loss_sq, 1), 0)
    reg = reg_weight * gram.reg_scale
    return Weights(-reg * c, reg)
