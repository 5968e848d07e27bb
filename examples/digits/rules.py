"""How two gradients become an update: each rule is a whole optimizer, SGD with momentum.

A constant gradient, of the loss or of the regularizer, moves the weights equally far in all of them,
so that a regularizer weight means the same in each.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import dtnh_jax
from examples.digits.config import Config

MOMENTUM = 0.9

Optimizer = optax.GradientTransformationExtraArgs


def weighted_sum(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """The gradient of the loss plus the weighted regularizer."""
    return optax.chain(dtnh_jax.weighted_sum(reg_weight, mask=is_shared), sgd(cfg))


def dtnh(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """The paper's rule: removes what conflicts with the loss gradient of the mini-batch."""
    return optax.chain(dtnh_jax.dtnh(reg_weight, scope=cfg.scope, mask=is_shared), sgd(cfg))


def gate(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """Drops the regularizer gradient of a layer on conflict."""
    rule = dtnh_jax.dtnh(reg_weight, scope=cfg.scope, on_conflict="gate", mask=is_shared)
    return optax.chain(rule, sgd(cfg))


def bounded_dtnh(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """The library's preset: a gate on the momenta of both gradients, and a bound."""
    return dtnh_jax.dtnh_sgd(cfg.learning_rate, reg_weight, scope=cfg.scope, mask=is_shared)


def decoupled(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """Outside the momentum, compared with a slow average of the loss gradient by element."""
    return outside_momentum(reg_weight, cfg, reference=optax.ema(0.99))


def momentum_first(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """Momentum for each of the two gradients, then the paper's rule, element by element."""
    rule = dtnh_jax.dtnh(reg_weight, scope="element", mask=is_shared)
    return optax.chain(MOMENTA, rule, optax.scale_by_learning_rate(cfg.learning_rate))


def decoupled_sum(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """A control for ``decoupled``: compared with 0 there is no conflict; nothing is removed."""
    return outside_momentum(reg_weight, cfg, reference=optax.set_to_zero())


def same_length(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """A control for ``momentum_first``: all elements of an array, scaled to the same length."""
    by_element = dtnh_jax.dtnh(reg_weight, scope="element", mask=is_shared)

    def scaled(b: Any, a: Any, direction: Any) -> Any:
        if b is None:
            return direction
        length = jnp.maximum(jnp.linalg.norm(b), jnp.finfo(b.dtype).tiny)
        return a + b * (jnp.linalg.norm(direction - a) / length)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        a, b = updates
        direction, state = by_element.update(updates, state, params)
        return jax.tree.map(scaled, b, a, direction, is_leaf=lambda x: x is None), state

    rule = optax.GradientTransformation(by_element.init, update)
    return optax.chain(MOMENTA, rule, optax.scale_by_learning_rate(cfg.learning_rate))


MOMENTA = dtnh_jax.transform_pair(
    loss=optax.trace(MOMENTUM), reg=optax.trace(MOMENTUM), mask=lambda params: is_shared(params)
)
"""Momentum for both gradients. Their sum would be SGD's momentum."""

RULES: Mapping[str, Callable[[ArrayLike, Config], Optimizer]] = {
    "weighted_sum": weighted_sum,
    "dtnh": dtnh,
    "gate": gate,
    "bounded_dtnh": bounded_dtnh,
    "decoupled": decoupled,
    "momentum_first": momentum_first,
    "decoupled_sum": decoupled_sum,
    "same_length": same_length,
}


def is_shared(params: Any) -> Any:
    """All but the head, which no source has."""
    return {name: name != "head" for name in params}


def sgd(cfg: Config) -> optax.GradientTransformation:
    """What all rules train with."""
    return optax.sgd(cfg.learning_rate, momentum=MOMENTUM)


def outside_momentum(
    reg_weight: ArrayLike, cfg: Config, reference: optax.GradientTransformation
) -> Optimizer:
    """The regularizer's step outside SGD, as long as its momentum would have made it."""
    return dtnh_jax.decoupled(
        sgd(cfg),
        reg_weight,
        learning_rate=cfg.learning_rate / (1 - MOMENTUM),
        scope="element",
        reference=reference,
        mask=is_shared,
    )
