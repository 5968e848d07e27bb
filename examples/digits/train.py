"""The experiment: sources, fine-tunings, trial runs, and the training loop of all of them."""

import collections
import dataclasses
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dtnh_jax
from dtnh_jax import regularizers
from examples.common import calibration
from examples.common.epochs import draw_batches
from examples.common.progress import progress
from examples.common.resnet import Network
from examples.digits import data, models
from examples.digits.config import Config
from examples.digits.data import Split
from examples.digits.results import METHODS, SOURCES, FineTuning, Results
from examples.digits.rules import RULES

SOURCE_LEARNING_RATE = 0.01


def run(cfg: Config) -> Results:
    """Fine-tunes with every method from every source, for every seed.

    All runs of a seed use the same target images in the same batches, and all runs of a seed
    from one source start from the same weights, so that accuracies can be compared in pairs.
    """
    started = time.perf_counter()
    lock, over = threading.Lock(), threading.Event()

    def count() -> None:
        if over.is_set():
            raise CancelledError
        with lock:
            advance()

    # A step is too small to keep more than one core busy, so each thread takes a seed.
    threads = ThreadPoolExecutor(os.cpu_count())
    with progress(cfg.seeds * steps_of_a_seed(cfg)) as advance, threads:
        try:
            of_seeds = list(threads.map(lambda seed: run_seed(seed, cfg, count), range(cfg.seeds)))
        finally:
            over.set()  # after an error or Ctrl-C, so that no thread goes on
    fine_tunings, source_accuracies = zip(*of_seeds, strict=True)
    return Results(
        fine_tunings=list(itertools.chain.from_iterable(fine_tunings)),
        source_accuracy={
            name: [of_seed[name] for of_seed in source_accuracies] for name in SOURCES
        },
        seconds=time.perf_counter() - started,
    )


def run_seed(
    seed: int, cfg: Config, advance: Callable[[], None]
) -> tuple[list[FineTuning], dict[str, tuple[float, float]]]:
    """The fine-tunings of a seed, and the accuracies of its sources."""
    splits = data.load(cfg, seed)
    new = models.init(cfg.widths, 2 * seed)
    scratch = Start("scratch", new, new.params, seed, advance)
    fine_tunings, source_accuracy = [fine_tune(scratch, "plain", splits, cfg)], {}
    for name in SOURCES:
        task = splits.source
        if name == "unfitting":
            task = data.with_permuted_labels(task, seed)
        source = pretrain(name, task, seed, cfg, advance)
        source_accuracy[name] = (
            accuracy(source, task, cfg),
            accuracy(source, splits.held_out, cfg),
        )
        with_new_head = source._replace(params=source.params | {"head": new.params["head"]})
        start = Start(name, with_new_head, source.params, seed, advance)
        fine_tunings += [fine_tune(start, method, splits, cfg) for method in METHODS]
    return fine_tunings, source_accuracy


def steps_of_a_seed(cfg: Config) -> int:
    """Training steps of everything, for the progress bar."""
    fine_tunings = 1 + len(SOURCES) * len(METHODS)
    trials = len(SOURCES) * 2 * cfg.folds
    return (
        cfg.source_steps + cfg.memorize_steps + fine_tunings * cfg.steps + trials * trial_steps(cfg)
    )


def trial_steps(cfg: Config) -> int:
    """Training steps of a trial run."""
    return cfg.steps // 3


class Start(NamedTuple):
    """Where trainings start.

    Attributes:
        source: The name of the source.
        network: The initial weights.
        pretrained: The weights that L2-SP pulls towards.
        seed: Draws the batches.
        advance: Counts a step in the progress bar.
    """

    source: str
    network: Network
    pretrained: Any
    seed: int
    advance: Callable[[], None]


def pretrain(
    name: str, task: Split, seed: int, cfg: Config, advance: Callable[[], None]
) -> Network:
    """Trains a source network, the same for every learning rate of the fine-tunings."""
    cfg = dataclasses.replace(cfg, learning_rate=SOURCE_LEARNING_RATE)
    new = models.init(cfg.widths, 2 * seed + 1)
    steps = cfg.source_steps if name == "fitting" else cfg.memorize_steps
    start = Start(name, new, new.params, seed, advance)
    return last(training(start, task, "weighted_sum", 0.0, steps, cfg))


def fine_tune(start: Start, method: str, splits: data.Data, cfg: Config) -> FineTuning:
    """Trains on all target images."""
    if method == "trial_runs":
        regularized, rule = trials_say_regularize(start, splits.target, cfg), "bounded"
    else:
        regularized, rule = method != "plain", method
    if not regularized:
        rule = "weighted_sum"
    steps = training(start, splits.target, rule, cfg.reg_weight * regularized, cfg.steps, cfg)
    evaluate_at = {(cfg.steps * i) // cfg.evaluations for i in range(cfg.evaluations + 1)}
    accuracies, network = [accuracy(start.network, splits.held_out, cfg)], start.network
    for step, network in enumerate(steps, start=1):
        if step in evaluate_at:
            accuracies.append(accuracy(network, splits.held_out, cfg))
    return FineTuning(
        seed=start.seed,
        source=start.source,
        method=method,
        regularized=regularized,
        accuracy=np.array(accuracies),
        diverged=not np.isfinite(loss(network, splits.held_out, cfg)),
    )


def trials_say_regularize(start: Start, target: Split, cfg: Config) -> bool:
    """Compares two short runs, with and without the regularizer, on images held out of both."""
    losses = dict.fromkeys((0.0, cfg.reg_weight), 0.0)
    for fold in range(cfg.folds):
        rest, held_out = data.hold_out(target, fold)
        for weight in losses:
            network = last(training(start, rest, "bounded", weight, trial_steps(cfg), cfg))
            logits = predict(network, held_out.images, widths=cfg.widths)
            losses[weight] += float(calibration.calibrated_loss(logits, held_out.labels))
    return calibration.is_lower(losses[cfg.reg_weight], than=losses[0.0])


def training(
    start: Start, split: Split, rule: str, reg_weight: float, steps: int, cfg: Config
) -> Iterator[Network]:
    """Trains; yields after each step."""
    network, opt_state = start.network, RULES[rule](0.0, reg_weight).init(start.network.params)
    counts = np.arange(steps, dtype=np.float32)
    rates = np.asarray(optax.cosine_decay_schedule(cfg.learning_rate, steps)(counts))
    rng = np.random.default_rng(start.seed)
    batches = draw_batches(len(split.labels), cfg.batch_size, steps, rng)
    for indices, rate in zip(batches, rates, strict=True):
        network, opt_state = train_step(
            network,
            opt_state,
            Split(split.images[indices], split.labels[indices]),
            start.pretrained,
            reg_weight,
            rate,
            rule=rule,
            widths=cfg.widths,
        )
        start.advance()
        yield network


# Weight and learning rate are not static, so that each rule is compiled once.
@functools.partial(jax.jit, static_argnames=("rule", "widths"))
def train_step(
    network: Network,
    opt_state: Any,
    batch: Split,
    pretrained: Any,
    reg_weight: jax.Array,
    learning_rate: jax.Array,
    *,
    rule: str,
    widths: tuple[int, int, int],
) -> tuple[Network, Any]:
    """One step of training; returns the network and the state of the optimizer."""

    @functools.partial(dtnh_jax.value_and_gradient_pair, has_aux=True)
    def objective(params: Any) -> Any:
        model = models.build(Network(params, network.batch_stats), widths)
        model.train()
        logits = model(jnp.asarray(batch.images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        reg = regularizers.l2_sp(params, pretrained | {"head": None})
        return (losses.mean(), reg), models.batch_stats(model)

    (_, batch_stats), pair = objective(network.params)
    tx = RULES[rule](learning_rate, reg_weight)
    updates, opt_state = tx.update(pair, opt_state, network.params)
    return Network(optax.apply_updates(network.params, updates), batch_stats), opt_state


def last(networks: Iterator[Network]) -> Network:
    """The network after the last step."""
    return collections.deque(networks, maxlen=1).pop()


@functools.partial(jax.jit, static_argnames="widths")
def predict(network: Network, images: jax.Array, *, widths: tuple[int, int, int]) -> jax.Array:
    """Computes logits in evaluation mode."""
    model = models.build(network, widths)
    model.eval()
    return model(images)


def accuracy(network: Network, split: Split, cfg: Config) -> float:
    """The share of images that the network classifies correctly."""
    logits = np.asarray(predict(network, split.images, widths=cfg.widths))
    return float(np.mean(np.argmax(logits, axis=-1) == split.labels))


def loss(network: Network, split: Split, cfg: Config) -> float:
    """The mean cross-entropy."""
    logits = predict(network, split.images, widths=cfg.widths)
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean())
