"""How two gradients become an update: each rule is a whole optimizer, SGD with momentum 0.9.

A constant gradient, of the loss or of the regularizer, moves the weights equally far in all of
them, so that a regularizer weight means the same in each.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import dtnh_jax
from examples.never_hurt import rivals

MOMENTUM = 0.9

Optimizer = optax.GradientTransformationExtraArgs
Mask = Any


class Setting(NamedTuple):
    """The inputs of a rule.

    Attributes:
        reg_weight: λ.
        rate: The learning rate by steps.
        mask: Which parameters the regularizer reaches.
    """

    reg_weight: ArrayLike
    rate: optax.Schedule
    mask: Mask


def sgd(at: Setting) -> optax.GradientTransformation:
    """The optimizer of all rules."""
    return optax.sgd(at.rate, momentum=MOMENTUM)


def before_sgd(rule: Callable[..., Optimizer], **choices: Any) -> Callable[[Setting], Optimizer]:
    """A rule of the library before SGD, by layer unless its choices say otherwise."""
    choices = {"scope": "layer"} | choices

    def optimizer(at: Setting) -> Optimizer:
        return optax.chain(rule(at.reg_weight, mask=at.mask, **choices), sgd(at))

    return optimizer


def preset(**choices: Any) -> Callable[[Setting], Optimizer]:
    """The preset of the library, with other choices than its own if any are given."""
    return lambda at: dtnh_jax.dtnh_sgd(at.rate, at.reg_weight, mask=at.mask, **choices)


def held_out(**choices: Any) -> Callable[[Setting], Optimizer]:
    """The preset, compared with an average gradient of held-out images."""
    choices = {"reference": dtnh_jax.held_out(0.9), "bound_by": "running_max"} | choices
    return preset(**choices)


BOUND = {"scope": "global", "on_conflict": "keep", "bound_by": "running_max"}
running_bound = preset(**BOUND)
"""The weighted sum of the momenta with a bound that does not fade with the loss."""


def placebo(at: Setting) -> Optimizer:
    """A control: the preset, with noise of the same length for the regularizer gradient."""
    return optax.chain(dtnh_jax.transform_pair(reg=noise(), mask=at.mask), preset()(at))


def loss_alone(at: Setting) -> Optimizer:
    """SGD on the loss gradient, which measures conflict by layer."""
    return before_sgd(lambda _, **choices: dtnh_jax.weighted_sum(0.0, **choices))(at)


def spd(at: Setting) -> Optimizer:
    """Selective projection decay."""
    return rivals.selective_projection(loss_alone(at), at.reg_weight)


def ftp(at: Setting) -> Optimizer:
    """Fast trainable projection, which has no λ."""
    return rivals.trainable_projection(loss_alone(at))


def auto_lambda(at: Setting) -> Optimizer:
    """The weighted sum, with a λ that follows the loss of held-out images."""

    def weighted_sum(reg_weight: ArrayLike) -> Optimizer:
        return before_sgd(dtnh_jax.weighted_sum)(at._replace(reg_weight=reg_weight))

    return rivals.auto_lambda(weighted_sum, at.reg_weight)


def noise() -> optax.GradientTransformation:
    """Replaces each array by noise of its length."""

    def scaled(noise: jax.Array, leaf: jax.Array) -> jax.Array:
        return noise * (jnp.linalg.norm(leaf) / jnp.linalg.norm(noise))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state, key = jax.random.split(state)
        return jax.tree.map(scaled, optax.tree.random_like(key, updates), updates), state

    return optax.GradientTransformation(lambda params: jax.random.PRNGKey(0), update)


RULES: Mapping[str, Callable[[Setting], Optimizer]] = {
    "none": lambda at: optax.chain(dtnh_jax.weighted_sum(0.0, diagnostics=False), sgd(at)),
    "weighted_sum": before_sgd(dtnh_jax.weighted_sum),
    # The paper's rule.
    "dtnh_global": before_sgd(dtnh_jax.dtnh, scope="global"),
    "dtnh_layer": before_sgd(dtnh_jax.dtnh),
    # Rules of the literature.
    "orthogonal": before_sgd(dtnh_jax.dtnh, on_conflict="orthogonal"),
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
    "spd": spd,
    "ftp": ftp,
    "auto_lambda": auto_lambda,
    # Choices of this library, on the gradients of the batch.
    "gate": before_sgd(dtnh_jax.dtnh, on_conflict="gate"),
    "gate_bounded": before_sgd(dtnh_jax.dtnh, on_conflict="gate", max_ratio=1.0),
    "gate_bounded_0.3": before_sgd(dtnh_jax.dtnh, on_conflict="gate", max_ratio=0.3),
    "project_bounded": before_sgd(dtnh_jax.dtnh, max_ratio=1.0),
    "cosine_bounded": before_sgd(dtnh_jax.dtnh, on_conflict="cosine", max_ratio=1.0),
    "element_bounded": before_sgd(dtnh_jax.dtnh, scope="element", max_ratio=1.0),
    "keep_bounded": before_sgd(dtnh_jax.dtnh, on_conflict="keep", max_ratio=1.0),
    "average_gate_bounded": before_sgd(
        dtnh_jax.dtnh, on_conflict="gate", reference=optax.ema(0.99), max_ratio=1.0
    ),
    # Choices of this library, on the momenta of both gradients.
    "bounded_dtnh": preset(),
    "momenta_gate": preset(max_ratio=None),
    "momenta_gate_0.3": preset(max_ratio=0.3),
    "momenta_gate_2": preset(max_ratio=2.0),
    "momenta_project": preset(on_conflict="project"),
    "momenta_cosine": preset(on_conflict="cosine"),
    "momenta_keep": preset(on_conflict="keep"),
    "momenta_global": preset(scope="global"),
    "momenta_element": preset(scope="element"),
    "placebo": placebo,
    # The preset, compared with the gradient of held-out images.
    "held_out_global": held_out(scope="global"),
    "held_out_layer": held_out(scope="layer"),
    # The same; its images are trained on in the second half.
    "held_out_returned": held_out(scope="global"),
    "held_out_project": held_out(scope="global", on_conflict="project"),
    "held_out_current": held_out(scope="global", bound_by="current"),
    "held_out_unbounded": held_out(scope="global", max_ratio=None, bound_by="current"),
    # The same, with shorter and longer averages.
    "held_out_0.5": held_out(scope="global", reference=dtnh_jax.held_out(0.5)),
    "held_out_0.99": held_out(scope="global", reference=dtnh_jax.held_out(0.99)),
    # A control: its bound alone.
    "running_bound": running_bound,
    # The same with looser bounds.
    "running_bound_2": preset(**BOUND, max_ratio=2.0),
    "running_bound_4": preset(**BOUND, max_ratio=4.0),
    # The bound alone, if it does better in a trial run than no regularizer.
    "trial_runs": running_bound,
    "trial_runs_2": preset(**BOUND, max_ratio=2.0),
}

L2_SP_ONLY = ("spd", "ftp")
"""Rules that take the gradient of the regularizer to be the deviation from the source."""
