"""The experiment, from the top: sources, fine-tunings, and one training loop for both."""

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
from examples.digits import data, models
from examples.digits.config import Config
from examples.digits.data import Split
from examples.digits.models import Network
from examples.digits.progress import progress
from examples.digits.results import PLAIN, FineTuning, Method, Results

RULES = {"weighted_sum": dtnh_jax.weighted_sum, "dtnh": dtnh_jax.dtnh}


def run(cfg: Config) -> Results:
    """Fine-tunes with every method from every source, seed by seed.

    All runs of a seed see the same target images in the same batches, and all runs of a seed
    from one source start from the same weights: their accuracies may be compared in pairs.
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
        for reg_weight in of_regularizer
        for rule in RULES
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
    """Trains on the target task, from the source's backbone and a new head."""
    head = new_network(seed, cfg).params["head"]
    network = source._replace(params=source.params | {"head": head})
    accuracies, stats = [accuracy(network, splits.target_held_out, cfg)], []
    evaluate_at = {(cfg.steps * i) // cfg.evaluations for i in range(1, cfg.evaluations + 1)}
    steps = training(network, source, splits.target_train, method, cfg.steps, seed, cfg, advance)
    for step, (network, step_stats) in enumerate(steps, start=1):
        stats.append(step_stats)
        if step in evaluate_at:
            accuracies.append(accuracy(network, splits.target_held_out, cfg))
    return FineTuning(
        seed=seed,
        source=name,
        method=method,
        accuracy=np.array(accuracies),
        cosine=np.stack([each.per_group.cosine for each in stats]),
        conflict=np.stack([each.per_group.conflict for each in stats]),
        groups=stats[0].groups,
    )


def new_network(seed: int, cfg: Config) -> Network:
    """Random weights for the target task, other ones than the sources of the seed begin with."""
    return models.init(cfg.widths, 2 * seed)


class Batch(NamedTuple):
    """Training images ``(n, 8, 8, 1)``, their labels ``(n,)``, the source's logits ``(n, 5)``."""

    images: Any
    labels: Any
    source_logits: Any


class TrainState(NamedTuple):
    """What changes in training."""

    network: Network
    opt_state: Any


def training(
    start: Network,
    source: Network,
    split: Split,
    method: Method,
    steps: int,
    seed: int,
    cfg: Config,
    advance: Callable[[], None],
) -> Iterator[tuple[Network, dtnh_jax.ConflictStats]]:
    """Trains from ``start``, regularized towards ``source``; yields after each step."""
    everything = Batch(*split, np.asarray(predict(source, split.images, cfg)))
    opt_state = optimizer(method.rule, method.reg_weight, cfg).init(start.params)
    state = TrainState(start, opt_state)
    for indices in data.batches(len(split.labels), cfg.batch_size, steps, seed):
        state, stats = train_step(
            state,
            Batch(*(array[indices] for array in everything)),
            source,
            method.reg_weight,
            regularizer=method.regularizer,
            rule=method.rule,
            cfg=cfg,
        )
        advance()
        yield state.network, stats


# The weight is an argument like the batch, so that one compilation serves all weights.
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
) -> tuple[TrainState, dtnh_jax.ConflictStats]:
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
            # Learning without forgetting: with the student's features, the source's head shall
            # go on to say what the source network said.
            source_head = models.build(source, cfg.widths).head
            reg = regularizers.distillation(
                source_head(features), batch.source_logits, cfg.temperature
            )
        return (losses.mean(), reg), models.batch_stats(student)

    (_, batch_stats), pair = objective(params)
    updates, opt_state = optimizer(rule, reg_weight, cfg).update(pair, opt_state, params)
    network = Network(optax.apply_updates(params, updates), batch_stats)
    return TrainState(network, opt_state), dtnh_jax.conflict_stats(opt_state)


def optimizer(
    rule: str, reg_weight: jax.typing.ArrayLike, cfg: Config
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum, behind the rule that joins the two gradients into one."""

    def is_shared(params: Any) -> Any:
        return {name: name != "head" for name in params}

    join = RULES[rule](reg_weight, scope=cfg.scope, mask=is_shared)
    return optax.chain(join, optax.sgd(cfg.learning_rate, momentum=0.9))


@functools.partial(jax.jit, static_argnames="cfg")
def predict(network: Network, images: jax.Array, cfg: Config) -> jax.Array:
    """Logits, with the running averages of batch norm."""
    model = models.build(network, cfg.widths)
    model.eval()
    return model(images)


def accuracy(network: Network, split: Split, cfg: Config) -> float:
    """The share of images that the network gets right."""
    logits = np.asarray(predict(network, split.images, cfg))
    return float(np.mean(np.argmax(logits, axis=-1) == split.labels))
