"""How two gradients become an update: the rule, and the optimizer that comes after it."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import optax

import dtnh_jax
from examples.finetune.config import TrainingConfig, TransferConfig

Params = Any
Optimizer = optax.GradientTransformationExtraArgs


def make_optimizer(
    transfer: TransferConfig, training: TrainingConfig, *, mask: Params = None
) -> Optimizer:
    """From a pair of gradients to updates of the parameters.

    The order is: micro-batches, rule, clipping, weight decay, momentum, learning rate. With
    ``decoupled`` the loss's gradient alone goes all the way, and the regularizer's step is added;
    ``bounded_dtnh`` has a momentum for each gradient, and stands between it and the clipping.

    Args:
        transfer: Which rule.
        training: Which optimizer.
        mask: Which parameters the rule minds, a tree of booleans; ``None`` for all.

    Returns:
        A transformation that takes a ``dtnh_jax.GradientPair``.
    """
    after = _after_the_rule(training)
    if transfer.regularizer == "none":
        # Of a pair, the loss's gradient is taken.
        optimizer = optax.chain(dtnh_jax.weighted_sum(0.0, diagnostics=False), after)
    elif transfer.rule == "decoupled":
        # As long as the step would become in momentum, so that λ means the same as elsewhere.
        sgd_gain = 1 / (1 - training.momentum) if training.optimizer == "sgd" else 1.0
        rate = learning_rate(training)
        optimizer = dtnh_jax.decoupled(
            after,
            transfer.weight,
            learning_rate=lambda count: rate(count) * sgd_gain,
            scope=transfer.scope,
            mode=transfer.mode,
            action=transfer.action,
            reference=_reference(transfer),
            mask=mask,
        )
    elif transfer.rule == "bounded_dtnh":
        optimizer = _bounded(transfer, training, mask)
    else:
        optimizer = optax.chain(_rule(transfer, mask), after)
    if training.accumulate > 1:
        return dtnh_jax.accumulate_pairs(optimizer, training.accumulate)
    return optax.with_extra_args_support(optimizer)


def learning_rate(training: TrainingConfig) -> optax.Schedule:
    """The learning rate by steps of the optimizer."""
    peak, rest = training.learning_rate, training.steps - training.warmup_steps
    if training.schedule == "cosine":
        falling = optax.cosine_decay_schedule(peak, rest)
    elif training.schedule == "step":
        # Shares of all steps, those of the warm-up included.
        at = [round(share * training.steps) - training.warmup_steps for share in training.decay_at]
        falling = optax.piecewise_constant_schedule(peak, dict.fromkeys(at, training.decay_factor))
    else:
        falling = optax.constant_schedule(peak)
    if not training.warmup_steps:
        return falling
    rising = optax.linear_schedule(0.0, peak, training.warmup_steps)
    return optax.join_schedules([rising, falling], [training.warmup_steps])


def trained(params: Params, frozen: Sequence[str]) -> Params:
    """The parameters that are trained; ``None`` in the place of those that are frozen.

    Args:
        params: All of them.
        frozen: Globs on paths, such as ``"conv1"`` or ``"layer1/*"``, which take a subtree whole.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: If a glob takes nothing, or nothing is left.
    """
    paths = [_path(keys) for keys, _ in jax.tree.leaves_with_path(params)]
    for pattern in frozen:
        if not any(_takes(pattern, path) for path in paths):
            raise ValueError(
                f"freeze: {pattern!r} is no parameter. Paths look like {paths[0]}, {paths[-1]}."
            )
    if all(any(_takes(pattern, path) for pattern in frozen) for path in paths):
        raise ValueError(f"freeze={tuple(frozen)} leaves no parameter to train.")
    return jax.tree.map_with_path(
        lambda keys, leaf: None if any(_takes(each, _path(keys)) for each in frozen) else leaf,
        params,
    )


def complete(params: Params, everything: Params) -> Params:
    """``params`` with the frozen ones, which it lacks, from ``everything``."""
    return jax.tree.map(
        lambda param, value: value if param is None else param,
        params,
        everything,
        is_leaf=lambda x: x is None,
    )


def _rule(transfer: TransferConfig, mask: Params) -> Optimizer:
    if transfer.rule == "dtnh":
        return dtnh_jax.dtnh(
            transfer.weight,
            scope=transfer.scope,
            mode=transfer.mode,
            action=transfer.action,
            reference=_reference(transfer),
            max_ratio=transfer.max_ratio,
            mask=mask,
        )
    rule = getattr(dtnh_jax, transfer.rule)
    return rule(transfer.weight, scope=transfer.scope, mask=mask)


def _reference(transfer: TransferConfig) -> Any:
    return optax.ema(transfer.reference_decay) if transfer.reference_decay else "batch"


def _bounded(transfer: TransferConfig, training: TrainingConfig, mask: Params) -> Optimizer:
    rule = dtnh_jax.bounded_dtnh(
        transfer.weight,
        each=_step_of_a_gradient(training),
        scope=transfer.scope,
        max_ratio=1.0 if transfer.max_ratio is None else transfer.max_ratio,
        mask=mask,
    )
    clipping = [] if training.clip_norm is None else [_clipping(training.clip_norm)]
    if training.optimizer == "sgd":
        links = [_of_the_loss(_decay(training)), rule, *clipping]
    else:
        links = [rule, *clipping, _decay(training)]
    return optax.chain(*links, _rates(training))


def _after_the_rule(training: TrainingConfig) -> optax.GradientTransformation:
    links = [] if training.clip_norm is None else [_clipping(training.clip_norm)]
    if training.optimizer == "sgd":
        links += [_decay(training), _step_of_a_gradient(training)]
    else:
        links += [_step_of_a_gradient(training), _decay(training)]
    return optax.chain(*links, _rates(training))


def _clipping(norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(norm)


def _decay(training: TrainingConfig) -> optax.GradientTransformation:
    return optax.add_decayed_weights(training.weight_decay, mask=_is_kernel)


def _step_of_a_gradient(training: TrainingConfig) -> optax.GradientTransformation:
    if training.optimizer == "sgd":
        return optax.trace(training.momentum, nesterov=training.nesterov)
    return optax.scale_by_adam(b1=training.momentum, nesterov=training.nesterov)


def _rates(training: TrainingConfig) -> optax.GradientTransformation:
    links = [optax.scale_by_learning_rate(learning_rate(training))]
    if training.head_learning_rate != 1:
        links.append(optax.masked(optax.scale(training.head_learning_rate), _is_head))
    return optax.chain(*links)


def _of_the_loss(link: optax.GradientTransformation) -> optax.GradientTransformation:
    """A link that acts on the loss's gradient of a pair alone."""

    def update(updates: Any, state: Any, params: Params = None) -> tuple[Any, Any]:
        loss_grads, state = link.update(updates.loss_grads, state, params)
        return updates._replace(loss_grads=loss_grads), state

    return optax.GradientTransformation(link.init, update)


def _is_kernel(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _is_head(params: Params) -> Params:
    return jax.tree.map_with_path(lambda keys, _: _path(keys).startswith("head/"), params)


def _takes(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
