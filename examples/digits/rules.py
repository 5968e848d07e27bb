"""How two gradients become an update: each rule is a whole optimizer, SGD with momentum.

A gradient that stays the same moves the weights equally far in all of them, be it the loss's or
the regularizer's. So a regularizer weight means the same in each.
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
    """The gradient of loss plus weighted regularizer, as ever."""
    return optax.chain(dtnh_jax.weighted_sum(reg_weight, mask=is_shared), sgd(cfg))


def dtnh(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """The paper: the part that conflicts with the mini-batch's loss gradient is taken out."""
    return optax.chain(dtnh_jax.dtnh(reg_weight, scope=cfg.scope, mask=is_shared), sgd(cfg))


def gate(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """In conflict the regularizer's gradient is dropped, all of it."""
    rule = dtnh_jax.dtnh(reg_weight, scope=cfg.scope, action="gate", mask=is_shared)
    return optax.chain(rule, sgd(cfg))


def bounded_dtnh(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """The library's preset: by the momenta of both gradients, and never longer than the loss's."""
    rule = dtnh_jax.bounded_dtnh(reg_weight, scope=cfg.scope, mask=is_shared)
    return optax.chain(rule, optax.scale_by_learning_rate(cfg.learning_rate))


def decoupled(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """Number by number against a slow average of the loss gradient, outside the momentum."""
    return outside_momentum(reg_weight, cfg, reference=optax.ema(0.99))


def momentum_first(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """Momentum for each of the two gradients, and then DTNH, number by number."""
    rule = dtnh_jax.dtnh(reg_weight, scope="element", mask=is_shared)
    return optax.chain(momentum_of_each(), rule, optax.scale_by_learning_rate(cfg.learning_rate))


def decoupled_sum(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """A control for ``decoupled``: against 0 there is no conflict, and nothing is taken out."""
    return outside_momentum(reg_weight, cfg, reference=optax.set_to_zero())


def same_length(reg_weight: ArrayLike, cfg: Config) -> Optimizer:
    """A control for ``momentum_first``: all numbers of an array, made as short as its choice."""
    rule = dtnh_jax.dtnh(reg_weight, scope="element", mask=is_shared)

    def as_long(b: Any, a: Any, direction: Any) -> Any:
        if b is None:
            return direction
        length = jnp.maximum(jnp.linalg.norm(b), jnp.finfo(b.dtype).tiny)
        return a + b * (jnp.linalg.norm(direction - a) / length)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        a, b = updates
        direction, state = rule.update(updates, state, params)
        return jax.tree.map(as_long, b, a, direction, is_leaf=lambda x: x is None), state

    link = optax.GradientTransformation(rule.init, update)
    return optax.chain(momentum_of_each(), link, optax.scale_by_learning_rate(cfg.learning_rate))


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
    """The regularizer's step beside SGD's, as long as momentum would have made it."""
    return dtnh_jax.decoupled(
        sgd(cfg),
        reg_weight,
        learning_rate=cfg.learning_rate / (1 - MOMENTUM),
        scope="element",
        reference=reference,
        mask=is_shared,
    )


def momentum_of_each() -> optax.GradientTransformation:
    """SGD's momentum for both gradients of a pair. Added up they would be SGD's again."""
    of_loss = optax.trace(MOMENTUM)
    of_reg = optax.masked(optax.trace(MOMENTUM), is_shared)

    def init(params: Any) -> Any:
        return of_loss.init(params), of_reg.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        loss_grads, loss_state = of_loss.update(updates.loss_grads, state[0], params)
        reg_grads, reg_state = of_reg.update(updates.reg_grads, state[1], params)
        return dtnh_jax.GradientPair(loss_grads, reg_grads), (loss_state, reg_state)

    return optax.GradientTransformation(init, update)
