"""From a pair of gradients to an update: clipping, momentum or Adam, and the rule."""

from typing import Any

import jax
import optax

import dtnh_jax
from examples.finetune.config import BOUNDED_SUM, HELD_OUT, TrainingConfig, TransferConfig

Params = Any
Optimizer = optax.GradientTransformationExtraArgs


def make_optimizer(
    transfer: TransferConfig, training: TrainingConfig, *, mask: Params = None
) -> Optimizer:
    """Makes the optimizer of a fine-tuning.

    Gradients are clipped before momentum or Adam, with every rule.

    Args:
        transfer: The rule and its options.
        training: The optimizer and its options.
        mask: A tree of booleans: which parameters have a regularizer gradient; ``None`` for all.

    Returns:
        A transformation that takes a ``dtnh_jax.GradientPair`` and, with ``transfer.held_out``, the
        extra argument ``held_out_grads``.
    """
    options: dict[str, Any] = {"scope": transfer.groups, "mask": mask}
    if transfer.rule in ("dtnh", "decoupled"):
        options |= {"on_conflict": transfer.on_conflict, "reference": _reference(transfer)}
    if transfer.rule == "dtnh":
        options["max_ratio"] = transfer.max_ratio
    # --8<-- [start:chain]
    clip = optax.clip_by_global_norm(training.clip_norm) if training.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(training.weight_decay, mask=_is_kernel)
    if training.optimizer == "sgd":
        momentum = optax.trace(training.momentum, nesterov=training.nesterov)
        step = optax.chain(clip, decay, momentum)
        rate = scale_by_learning_rate(training)
    else:
        momentum = optax.scale_by_adam(b1=training.momentum, nesterov=training.nesterov)
        step = optax.chain(clip, momentum)
        rate = optax.chain(decay, scale_by_learning_rate(training))

    if transfer.regularizer == "none":
        tx = optax.chain(dtnh_jax.weighted_sum(0.0, diagnostics=False), step, rate)
    elif transfer.rule in ("bounded_dtnh", "bounded_sum"):  # dtnh_sgd or dtnh_adamw, with clipping
        if transfer.max_ratio is not None:
            options["max_ratio"] = transfer.max_ratio
        choices: dict[str, Any] = {"on_conflict": "gate", "max_ratio": 1.0}
        if transfer.rule == "bounded_sum":
            choices = BOUNDED_SUM
        elif transfer.held_out:
            choices = HELD_OUT
        tx = optax.chain(
            dtnh_jax.transform_pair(loss=step, reg=optax.chain(clip, momentum), mask=mask),
            dtnh_jax.dtnh(transfer.weight, **choices | options),
            rate,
        )
    elif transfer.rule == "decoupled":
        tx = dtnh_jax.decoupled(
            optax.chain(step, rate),
            transfer.weight,
            learning_rate=_decoupled_rate(training),
            **options,
        )
    else:
        rule = getattr(dtnh_jax, transfer.rule)
        tx = optax.chain(rule(transfer.weight, **options), step, rate)
    # --8<-- [end:chain]
    if training.accumulate > 1:
        return dtnh_jax.accumulate_pairs(tx, training.accumulate)
    return optax.with_extra_args_support(tx)


def learning_rate(training: TrainingConfig) -> optax.Schedule:
    """The learning rate as a function of the step."""
    peak, rest = training.learning_rate, training.steps - training.warmup_steps
    if training.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest)
    elif training.schedule == "step":
        # decay_at counts the warm-up too.
        at = [round(share * training.steps) - training.warmup_steps for share in training.decay_at]
        decay = optax.piecewise_constant_schedule(peak, dict.fromkeys(at, training.decay_factor))
    else:
        decay = optax.constant_schedule(peak)
    if not training.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, peak, training.warmup_steps)
    return optax.join_schedules([warmup, decay], [training.warmup_steps])


def scale_by_learning_rate(training: TrainingConfig) -> optax.GradientTransformation:
    """Scales by the learning rate, which is another for the head."""
    head = optax.masked(optax.scale(training.head_learning_rate), _is_head)
    return optax.chain(optax.scale_by_learning_rate(learning_rate(training)), head)


def _decoupled_rate(training: TrainingConfig) -> optax.Schedule:
    # With SGD, the regularizer's step is as long as it becomes in momentum elsewhere, so that a
    # weight means the same with all rules.
    gain = 1 / (1 - training.momentum) if training.optimizer == "sgd" else 1.0
    rate = learning_rate(training)
    return lambda count: rate(count) * gain


def _reference(transfer: TransferConfig) -> Any:
    if transfer.held_out:
        return HELD_OUT["reference"]
    return optax.ema(transfer.reference_decay) if transfer.reference_decay else "batch"


def _is_kernel(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _is_head(params: Params) -> Params:
    return {
        name: jax.tree.map(lambda _, name=name: name == "head", subtree)
        for name, subtree in params.items()
    }
