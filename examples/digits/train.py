"""The experiment: sources, fine-tunings, and the training loop of both."""

import collections
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import dtnh_jax
from dtnh_jax import regularizers
from examples.common.epochs import draw_batches
from examples.common.progress import progress
from examples.common.resnet import Network
from examples.digits import data, models
from examples.digits.config import Config
from examples.digits.data import Split
from examples.digits.results import PLAIN, FineTuning, Method, Results
from examples.digits.rules import RULES, is_shared


def run(cfg: Config) -> Results:
    """Fine-tunes with every method from every source, seed by seed.

    All runs of a seed use the same target images in the same batches, and all runs of a seed
    from one source start from the same weights, so that accuracies can be compared in pairs.
    """
    started = time.perf_counter()
    fine_tunings = []
    source_accuracy = {"fitting": [], "unfitting": []}
    n_steps = cfg.seeds * (2 * cfg.source_steps + (1 + 2 * len(methods(cfg))) * cfg.steps)
    with progress(n_steps) as advance:
        for seed in range(cfg.seeds):
            splits = data.load(cfg, seed)
            fine_tunings.append(
                fine_tune("scratch", new_network(seed, cfg), PLAIN, splits, seed, cfg, advance)
            )
            tasks = {
                "fitting": splits.source_train,
                "unfitting": data.with_random_labels(splits.source_train, seed),
            }
            for name, task in tasks.items():
                source = pretrain(task, seed, cfg, advance)
                source_accuracy[name].append(
                    (accuracy(source, task, cfg), accuracy(source, splits.source_held_out, cfg))
                )
                fine_tunings += [
                    fine_tune(name, source, method, splits, seed, cfg, advance)
                    for method in methods(cfg)
                ]
    return Results(fine_tunings, source_accuracy, time.perf_counter() - started)


def methods(cfg: Config) -> list[Method]:
    """Plain fine-tuning, then each regularizer at each weight with each rule."""
    weights = {"l2_sp": cfg.l2_sp_weights, "distillation": cfg.distillation_weights}
    return [PLAIN] + [
        Method(regularizer, rule, reg_weight)
        for regularizer, of_regularizer in weights.items()
        for reg_weight in dict.fromkeys(of_regularizer)
        for rule in dict.fromkeys(("weighted_sum", "dtnh", *cfg.variants))
    ]


def pretrain(task: Split, seed: int, cfg: Config, advance: Callable[[], None]) -> Network:
    """Trains a source network."""
    start = models.init(cfg.widths, 2 * seed + 1)
    steps = training(start, start, task, PLAIN, cfg.source_steps, seed, cfg, advance)
    [(network, _)] = collections.deque(steps, maxlen=1)
    return network


def fine_tune(
    name: str,
    source: Network,
    method: Method,
    splits: data.Data,
    seed: int,
    cfg: Config,
    advance: Callable[[], None],
) -> FineTuning:
    """Trains on the target task, starting from the backbone of the source and a new head."""
    head = new_network(seed, cfg).params["head"]
    network = source._replace(params=source.params | {"head": head})
    accuracies, measured = [accuracy(network, splits.target_held_out, cfg)], []
    evaluate_at = {(cfg.steps * i) // cfg.evaluations for i in range(1, cfg.evaluations + 1)}
    steps = training(network, source, splits.target_train, method, cfg.steps, seed, cfg, advance)
    for step, (network, of_step) in enumerate(steps, start=1):
        measured.append(of_step)
        if step in evaluate_at:
            accuracies.append(accuracy(network, splits.target_held_out, cfg))
    return FineTuning(
        seed=seed,
        source=name,
        method=method,
        accuracy=np.array(accuracies),
        cosine=np.stack([each.of_batch.per_group.cosine for each in measured]),
        conflict=np.stack([each.of_batch.per_group.conflict for each in measured]),
        removed=np.array([each.by_rule.total.removed for each in measured]),
        groups=measured[0].of_batch.groups,
    )


def new_network(seed: int, cfg: Config) -> Network:
    """Random weights, different from the initial weights of the sources of the seed."""
    return models.init(cfg.widths, 2 * seed)


class Batch(NamedTuple):
    """Training images ``(n, 8, 8, 1)``, their labels ``(n,)``, the source's logits ``(n, 5)``."""

    images: Any
    labels: Any
    source_logits: Any


class TrainState(NamedTuple):
    """The state of training."""

    network: Network
    opt_state: Any


class Measured(NamedTuple):
    """The measurements of a step.

    Attributes:
        of_batch: The conflict of the gradients of the mini-batch, in the same groups for every
            rule.
        by_rule: The conflict of the vectors that the rule compares.
    """

    of_batch: dtnh_jax.ConflictStats
    by_rule: dtnh_jax.ConflictStats


def training(
    start: Network,
    source: Network,
    split: Split,
    method: Method,
    steps: int,
    seed: int,
    cfg: Config,
    advance: Callable[[], None],
) -> Iterator[tuple[Network, Measured]]:
    """Trains from ``start``, regularized towards ``source``; yields after each step."""
    everything = Batch(*split, np.asarray(predict(source, split.images, cfg)))
    opt_state = RULES[method.rule](method.reg_weight, cfg).init(start.params)
    state = TrainState(start, opt_state)
    rng = np.random.default_rng(seed)
    for indices in draw_batches(len(split.labels), cfg.batch_size, steps, rng):
        state, measured = train_step(
            state,
            Batch(*(array[indices] for array in everything)),
            source,
            method.reg_weight,
            regularizer=method.regularizer,
            rule=method.rule,
            cfg=cfg,
        )
        advance()
        yield state.network, measured


# The weight is not static, so that all weights share one compilation.
@functools.partial(jax.jit, static_argnames=("regularizer", "rule", "cfg"))
def train_step(
    state: TrainState,
    batch: Batch,
    source: Network,
    reg_weight: jax.Array,
    *,
    regularizer: str,
    rule: str,
    cfg: Config,
) -> tuple[TrainState, Measured]:
    """One step of fine-tuning."""
    (params, batch_stats), opt_state = state

    @functools.partial(dtnh_jax.value_and_gradient_pair, has_aux=True)
    def objective(params: Any) -> Any:
        student = models.build(Network(params, batch_stats), cfg.widths)
        student.train()
        features = student.features(batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            student.head(features), batch.labels
        )
        if regularizer == "l2_sp":
            reg = regularizers.l2_sp(params, source.params | {"head": None})
        else:
            # Learning without forgetting: on the features of the student, the head of the source
            # is trained to keep the predictions of the source network.
            source_head = models.build(source, cfg.widths).head
            reg = regularizers.distillation(
                source_head(features), batch.source_logits, cfg.temperature
            )
        return (losses.mean(), reg), models.batch_stats(student)

    (_, batch_stats), pair = objective(params)
    updates, opt_state = RULES[rule](reg_weight, cfg).update(pair, opt_state, params)
    network = Network(optax.apply_updates(params, updates), batch_stats)
    measured = Measured(conflict(pair, cfg), dtnh_jax.conflict_stats(opt_state))
    return TrainState(network, opt_state), measured


def conflict(pair: dtnh_jax.GradientPair, cfg: Config) -> dtnh_jax.ConflictStats:
    """Measures the conflict of two gradients."""
    meter = dtnh_jax.weighted_sum(0.0, scope=cfg.scope, mask=is_shared)
    _, state = meter.update(pair, meter.init(pair.loss_grads))
    return dtnh_jax.conflict_stats(state)


@functools.partial(jax.jit, static_argnames="cfg")
def predict(network: Network, images: jax.Array, cfg: Config) -> jax.Array:
    """Computes logits in evaluation mode."""
    model = models.build(network, cfg.widths)
    model.eval()
    return model(images)


def accuracy(network: Network, split: Split, cfg: Config) -> float:
    """The share of images that the network classifies correctly."""
    logits = np.asarray(predict(network, split.images, cfg))
    return float(np.mean(np.argmax(logits, axis=-1) == split.labels))
