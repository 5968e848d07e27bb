"""How the two gradients become an update: each rule is a whole optimizer, SGD with momentum."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

import dtnh_jax

Optimizer = optax.GradientTransformationExtraArgs


def weighted_sum(learning_rate: optax.ScalarOrSchedule, reg_weight: ArrayLike) -> Optimizer:
    """The gradient of the loss plus the weighted gradient of the regularizer."""
    rule = dtnh_jax.weighted_sum(reg_weight, mask=not_the_head)
    return optax.chain(rule, optax.sgd(learning_rate, momentum=0.9))


def dtnh(learning_rate: optax.ScalarOrSchedule, reg_weight: ArrayLike) -> Optimizer:
    """The paper's rule, layer by layer."""
    rule = dtnh_jax.dtnh(reg_weight, scope="layer", mask=not_the_head)
    return optax.chain(rule, optax.sgd(learning_rate, momentum=0.9))


def dtnh_sgd(learning_rate: optax.ScalarOrSchedule, reg_weight: ArrayLike) -> Optimizer:
    """The library's preset."""
    return dtnh_jax.dtnh_sgd(learning_rate, reg_weight, mask=not_the_head)


def bounded(learning_rate: optax.ScalarOrSchedule, reg_weight: ArrayLike) -> Optimizer:
    """The preset without its gate, bounded by twice the largest momentum so far: for trial runs."""
    return dtnh_jax.dtnh_sgd(
        learning_rate,
        reg_weight,
        scope="global",
        on_conflict="keep",
        max_ratio=2.0,
        bound_by="running_max",
        mask=not_the_head,
    )


RULES: Mapping[str, Callable[[optax.ScalarOrSchedule, ArrayLike], Optimizer]] = {
    "weighted_sum": weighted_sum,
    "dtnh": dtnh,
    "dtnh_sgd": dtnh_sgd,
    "bounded": bounded,
}


def not_the_head(params: Any) -> Any:
    """What the regularizer acts on: the new head has no pre-trained weights."""
    return {name: name != "head" for name in params}
