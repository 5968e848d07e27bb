"""How two gradients become an update: each rule is a whole optimizer, SGD with momentum 0.9.

A gradient that stays the same moves the weights equally far in all of them, be it the loss's or
the regularizer's. So a regularizer weight means the same in each.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import dtnh_jax

MOMENTUM = 0.9

Optimizer = optax.GradientTransformationExtraArgs
Mask = Any


class Setting(NamedTuple):
    """What a rule is made for.

    Attributes:
        reg_weight: λ.
        rate: The learning rate by steps.
        mask: Which parameters the regularizer reaches.
    """

    reg_weight: ArrayLike
    rate: optax.Schedule
    mask: Mask


def sgd(at: Setting) -> optax.GradientTransformation:
    """What all rules train with."""
    return optax.sgd(at.rate, momentum=MOMENTUM)


def before_sgd(rule: Callable[..., Optimizer], **choices: Any) -> Callable[[Setting], Optimizer]:
    """A rule of the library as the first link, by layer unless its choices say otherwise."""
    choices = {"scope": "layer"} | choices

    def optimizer(at: Setting) -> Optimizer:
        return optax.chain(rule(at.reg_weight, mask=at.mask, **choices), sgd(at))

    return optimizer


def instead_of_momentum(**choices: Any) -> Callable[[Setting], Optimizer]:
    """The preset, with other choices than its own if any are given."""

    def optimizer(at: Setting) -> Optimizer:
        rule = dtnh_jax.bounded_dtnh(at.reg_weight, mask=at.mask, **choices)
        return optax.chain(rule, optax.scale_by_learning_rate(at.rate))

    return optimizer


def placebo(at: Setting) -> Optimizer:
    """A control: the preset with noise for the regularizer's gradient, as long as it by array."""
    rule = dtnh_jax.bounded_dtnh(at.reg_weight, mask=at.mask)
    return optax.chain(_noise(), rule, optax.scale_by_learning_rate(at.rate))


def _noise() -> optax.GradientTransformation:
    def as_long(noise: jax.Array, leaf: jax.Array) -> jax.Array:
        return noise * (jnp.linalg.norm(leaf) / jnp.linalg.norm(noise))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state, key = jax.random.split(state)
        noise = optax.tree.random_like(key, updates.reg_grads)
        noise = jax.tree.map(as_long, noise, updates.reg_grads)
        return updates._replace(reg_grads=noise), state

    return optax.GradientTransformation(lambda params: jax.random.PRNGKey(0), update)


RULES: Mapping[str, Callable[[Setting], Optimizer]] = {
    "none": lambda at: optax.chain(dtnh_jax.weighted_sum(0.0, diagnostics=False), sgd(at)),
    "weighted_sum": before_sgd(dtnh_jax.weighted_sum),
    # The paper's rule.
    "dtnh_global": before_sgd(dtnh_jax.dtnh, scope="global"),
    "dtnh_layer": before_sgd(dtnh_jax.dtnh),
    # The rivals.
    "orthogonal": before_sgd(dtnh_jax.dtnh, mode="orthogonal"),
    "bloop": before_sgd(dtnh_jax.bloop),
    "pcgrad": before_sgd(dtnh_jax.pcgrad),
    "dynamic_barrier": before_sgd(dtnh_jax.dynamic_barrier),
    "gradient_cosine": before_sgd(dtnh_jax.gradient_cosine),
    "agem": before_sgd(dtnh_jax.agem),
    "mgda": before_sgd(dtnh_jax.mgda),
    "imtl_g": before_sgd(dtnh_jax.imtl_g),
    "upgrad": before_sgd(dtnh_jax.upgrad),
    "cagrad": before_sgd(dtnh_jax.cagrad),
    "config": before_sgd(dtnh_jax.config),
    # Ours, on the gradients of the batch.
    "gate": before_sgd(dtnh_jax.dtnh, action="gate"),
    "gate_bounded": before_sgd(dtnh_jax.dtnh, action="gate", max_ratio=1.0),
    "gate_bounded_0.3": before_sgd(dtnh_jax.dtnh, action="gate", max_ratio=0.3),
    "project_bounded": before_sgd(dtnh_jax.dtnh, max_ratio=1.0),
    "cosine_bounded": before_sgd(dtnh_jax.dtnh, action="cosine", max_ratio=1.0),
    "element_bounded": before_sgd(dtnh_jax.dtnh, scope="element", max_ratio=1.0),
    "keep_bounded": before_sgd(dtnh_jax.dtnh, action="keep", max_ratio=1.0),
    "average_gate_bounded": before_sgd(
        dtnh_jax.dtnh, action="gate", reference=optax.ema(0.99), max_ratio=1.0
    ),
    # Ours, on the momenta of both.
    "bounded_dtnh": instead_of_momentum(),
    "momenta_gate": instead_of_momentum(max_ratio=None),
    "momenta_gate_0.3": instead_of_momentum(max_ratio=0.3),
    "momenta_gate_2": instead_of_momentum(max_ratio=2.0),
    "momenta_project": instead_of_momentum(action="project"),
    "momenta_cosine": instead_of_momentum(action="cosine"),
    "momenta_keep": instead_of_momentum(action="keep"),
    "momenta_global": instead_of_momentum(scope="global"),
    "momenta_element": instead_of_momentum(scope="element"),
    "placebo": placebo,
}
