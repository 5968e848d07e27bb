"""Is what came a pair? Both call styles, and the errors that show them."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from dtnh_jax._gradients import GradientPair
from dtnh_jax._tree import PyTree, is_absent

RIGHT_CALLS = (
    "Call tx.update(dtnh_jax.GradientPair(loss_grads, reg_grads), state, params), "
    "or tx.update(loss_grads, state, params, reg_grads=reg_grads)"
)


def takes_pairs(
    init: optax.TransformInitFn, update: Callable[..., tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation that takes a pair in both call styles.

    Args:
        init: From params to the state.
        update: ``update(pair, state, params, **extra_args)``, which returns updates and state.

    Returns:
        The transformation; a call that has no pair is an error that shows both styles.
    """

    def update_either(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        reg_grads: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        return update(_unpack(updates, reg_grads, params), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update_either)


def _unpack(updates: PyTree, reg_grads: PyTree | None, params: PyTree | None) -> GradientPair:
    """The pair out of either call style, or an error that shows both."""
    pair = _as_pair(updates)
    if reg_grads is not None:
        if isinstance(updates, GradientPair) or (
            pair is not None
            and not _same_structure(updates, reg_grads)
            and _same_structure(pair.loss_grads, reg_grads)
        ):
            raise TypeError(
                "reg_grads came twice: in the pair and as reg_grads=. "
                f"{RIGHT_CALLS}; not both at once."
            )
        _refuse_multi_steps()
        return GradientPair(updates, reg_grads)
    is_params_like = params is not None and _same_structure(updates, params)
    if pair is None or (is_params_like and not isinstance(updates, GradientPair)):
        raise TypeError(
            "A dtnh_jax rule wants the gradients of loss and regularizer as a pair; got one "
            f"tree ({type(updates).__name__}) and no reg_grads=. {RIGHT_CALLS}."
        )
    return pair


def _refuse_multi_steps() -> None:
    # MultiSteps averages the updates that it is given and passes keyword arguments on as they
    # are: reg_grads would be the last micro-batch's, in silence. Nothing that reaches the rule
    # tells, so it looks who is calling; this happens once a trace.
    frame = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), optax.MultiSteps):
            raise TypeError(
                "optax.MultiSteps averages the loss gradients of its micro-batches but hands on "
                "the reg_grads of the last one alone. Use dtnh_jax.accumulate_pairs(tx, every_k) "
                "in its place, which averages both; to skip steps that are not finite, use "
                "optax.apply_if_finite."
            )
        frame = frame.f_back


def _as_pair(updates: PyTree) -> GradientPair | None:
    if isinstance(updates, GradientPair):
        return updates
    if type(updates) is tuple and len(updates) == 2:
        return GradientPair(*updates)
    # nnx.Optimizer.update(model, pair) turns the tuple into an nnx.State by its indices, and a
    # GradientPair into one by its field names. A dict is params of somebody, never a pair.
    if isinstance(updates, Mapping) and not isinstance(updates, dict):
        for keys in ((0, 1), GradientPair._fields):
            if set(updates) == set(keys):
                return GradientPair(*(updates[key] for key in keys))
    return None


def _same_structure(one: PyTree, other: PyTree) -> bool:
    return jax.tree.structure(one, is_leaf=is_absent) == jax.tree.structure(
        other, is_leaf=is_absent
    )
