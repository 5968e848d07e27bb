"""A fine-tuning, from the top: the run, the loop, and how good a network is."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.common import data, pretrained, resnet
from examples.common.data import Dataset, DeviceBatches, Source
from examples.common.resnet import Network
from examples.finetune import devices, metrics, optimizer
from examples.finetune.checkpoint import CheckpointError, Checkpoints, Progress
from examples.finetune.config import Config
from examples.finetune.logs import Display, Logs, Record, of_conflict, read
from examples.finetune.metrics import Counts, Metrics
from examples.finetune.report import Outcome
from examples.finetune.step import Measured, Program, TrainState, make_program
from examples.finetune.task import Task, make_task

WEIGHTS = "model.safetensors"


class DivergedError(Exception):
    """The loss is no longer finite."""


class StoppedError(Exception):
    """The run was told to stop, and has saved."""


def run(config: Config) -> Outcome:
    """Fine-tunes on the training images, chooses a step on validation images, and tests it once.

    Args:
        config: What the user chose.

    Returns:
        What came out. The chosen network is in ``model.safetensors`` in the output directory.

    Raises:
        ValueError: If the choices, the data and the weights do not fit.
        CheckpointError: If a checkpoint cannot be written, or is not of this run.
        DivergedError: If the loss is no longer finite.
        StoppedError: After SIGTERM, with everything saved.
    """
    devices.start_processes(config.devices)
    dataset = data.load(config.data)
    task = make_task(config, dataset)
    program = make_program(task)
    with Checkpoints(config.output.out / "checkpoints", config) as checkpoints:
        trained = train(task, program, dataset, checkpoints)
        network = checkpoints.restore(trained.best_step, program.like).evaluated
    validation, test = (
        evaluate(task, program, network, source) for source in (dataset.validation, dataset.test)
    )
    export(task, dataset, network)
    return Outcome(
        config=config,
        architecture=task.model.architecture,
        seconds=trained.seconds,
        images_per_second=trained.images_per_second,
        waiting=trained.waiting,
        best_step=trained.best_step,
        validation=metrics.summarise(validation),
        test=test,
        class_names=dataset.class_names,
        records=read(config.output.out),
        layer_order=resnet.layer_names(task.model),
    )


class Trained(NamedTuple):
    """What comes out of the loop.

    Attributes:
        best_step: The step that was best on validation images.
        seconds: What the steps took, with compilation and evaluations.
        images_per_second: Over the steps alone, without the first ones, which compile.
        waiting: The share of that time in which the loop waited for images.
    """

    best_step: int
    seconds: float
    images_per_second: float
    waiting: float


def train(task: Task, program: Program, dataset: Dataset, checkpoints: Checkpoints) -> Trained:
    """Makes the steps that are left, and keeps the best and the last of them.

    Args:
        task: What is done.
        program: How.
        dataset: The images.
        checkpoints: Where the run goes on from, and where it saves.

    Returns:
        What came out.
    """
    config, training, started = task.config, task.config.training, time.perf_counter()
    batches = training_batches(task, dataset.train)
    before = 0.0
    if config.output.resume and (restored := checkpoints.restore_last(program.like)):
        (step, place, best, before), state = restored
        batches.set_state(place)
    elif checkpoints.steps:
        raise CheckpointError(
            f"{config.output.out} has the checkpoints of an earlier run. Go on with it by --resume,"
            " or give another --out."
        )
    else:
        step, state, best = 0, program.init(), None

    def seconds() -> float:
        return before + time.perf_counter() - started

    is_first = jax.process_index() == 0
    meter = Meter(task, batches)
    with (
        batches,
        Logs(
            config.output.out,
            resume_step=step or None,
            tensorboard=config.output.tensorboard,
            enabled=is_first,
        ) as logs,
        Display(
            training.steps, images_per_step=training.batch_size, start=step, enabled=is_first
        ) as display,
        stop_signal() as is_told_to_stop,
    ):
        while step < training.steps:
            for _ in range(training.accumulate):
                state, measured = program.train(state, task.source, next(batches))
                meter.add(measured)
            step += 1
            display.advance()

            is_last, must_stop = step == training.steps, is_told_to_stop(step)
            if step % config.output.log_every == 0 or is_last or must_stop:
                record = meter.read(step)
                check_finite(state, checkpoints)
                logs.write(record)
                display.show(record)
            if step % training.evaluate_every == 0 or is_last:
                check_finite(state, checkpoints)
                with meter.paused():
                    held_out = metrics.summarise(
                        evaluate(task, program, state.evaluated, dataset.validation)
                    )
                record = of_metrics(step, held_out)
                logs.write(record)
                display.show(record)
                best = better(best, (step, value(held_out, training.choose_by)))
            is_due = step % config.checkpoint_every == 0 or is_last or must_stop
            if is_due or (best is not None and best[0] == step):
                check_finite(state, checkpoints)
                with meter.paused():
                    checkpoints.save(Progress(step, batches.get_state(), best, seconds()), state)
            if must_stop and not is_last:
                raise StoppedError(
                    f"Stopped by a signal at step {step} of {training.steps}, and saved. "
                    "Go on with --resume."
                )
    assert best is not None
    return Trained(best[0], seconds(), *meter.whole())


def training_batches(task: Task, source: Source) -> DeviceBatches:
    """Endless training batches on the devices."""
    training = task.config.training
    batches = data.train_batches(
        source,
        task.config.data,
        batch_size=training.batch_size // training.accumulate,
        seed=training.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    sharding = devices.batch_sharding(task.mesh)
    return data.to_device(batches, sharding, task.config.devices.prefetch)


def evaluate(task: Task, program: Program, network: Network, source: Source) -> Counts:
    """Counts what a network gets right of all images of a source."""
    n_devices = task.mesh.size
    batch_size = -(-task.config.training.evaluation_batch_size // n_devices) * n_devices
    batches = data.evaluation_batches(
        source,
        task.config.data,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    counts = metrics.zeros(task.model.n_classes)
    with data.to_device(batches, devices.batch_sharding(task.mesh)) as on_devices:
        for batch in on_devices:
            counts = metrics.add(counts, jax.device_get(program.evaluate(network, batch)))
    return counts


def export(task: Task, dataset: Dataset, network: Network) -> None:
    """Writes the network to a file that tells all that is needed to use it."""
    gather = jax.jit(lambda network: network, out_shardings=devices.replicated(task.mesh))
    network = jax.device_get(gather(network))
    if jax.process_index() == 0:
        metadata = {
            "class_names": list(dataset.class_names),
            "image_size": task.config.data.image_size,
            "resize": task.config.data.short_side,
            "mean": task.mean.ravel().tolist(),
            "std": task.std.ravel().tolist(),
        }
        pretrained.export(
            task.config.output.out / WEIGHTS,
            task.model,
            network,
            metadata={name: json.dumps(content) for name, content in metadata.items()},
        )


def check_finite(state: TrainState, checkpoints: Checkpoints) -> None:
    """Stops a run whose loss is no longer finite, before its weights are saved."""
    if failed := int(state.diverged_at):
        kept = checkpoints.steps
        advice = f"The checkpoint of step {kept[-1]} is kept. " if kept else ""
        raise DivergedError(
            f"The loss of step {failed} is not finite. {advice}Try a smaller learning rate, a "
            "warm-up, or --clip-norm 1."
        )


def value(held_out: Metrics, choose_by: str) -> float:
    """What a step is chosen by; the larger the better."""
    return -held_out.loss if choose_by == "loss" else getattr(held_out, choose_by)


def better(best: tuple[int, float] | None, now: tuple[int, float]) -> tuple[int, float]:
    """The better of two steps; of equal ones the earlier."""
    return now if best is None or now[1] > best[1] else best


def of_metrics(step: int, held_out: Metrics) -> Record:
    """The metrics of validation images, for the logs."""
    return Record(
        step,
        "validation",
        loss=held_out.loss,
        accuracy=held_out.accuracy,
        top5=held_out.top5,
        balanced_accuracy=held_out.balanced_accuracy,
    )


class Meter:
    """The means since the last record, and how fast the steps go."""

    def __init__(self, task: Task, batches: DeviceBatches):
        """Starts the clock.

        Args:
            task: What is done.
            batches: Knows how long it was waited for.
        """
        training = task.config.training
        self._accumulate, self._batch_size = training.accumulate, training.batch_size
        self._learning_rate = optimizer.learning_rate(training)
        self._batches = batches
        self._since_record: list[Measured] = []
        self._start, self._waited = time.perf_counter(), batches.waited_seconds
        # Of the whole run: images, seconds, seconds of waiting.
        self._whole: list[tuple[int, float, float]] = []

    def add(self, measured: Measured) -> None:
        """Takes up a micro-batch. The devices may be one behind, so that they are never idle."""
        if self._since_record:
            jax.block_until_ready(self._since_record[-1])
        self._since_record.append(measured)

    def read(self, step: int) -> Record:
        """Waits for the devices, and gives the means since the last record."""
        since = jax.device_get(self._since_record)
        loss, reg, accuracy, grad_norm = (
            float(np.mean([getattr(each, name) for each in since]))
            for name in ("loss", "reg", "accuracy", "grad_norm")
        )
        # The rule acts on the last micro-batch of a step.
        conflicts = [each.conflict for each in since[self._accumulate - 1 :: self._accumulate]]
        conflict = jax.tree.map(lambda *steps: np.mean(steps, axis=0), *conflicts)
        seconds = time.perf_counter() - self._start
        waited = self._batches.waited_seconds - self._waited
        n_images = len(since) * self._batch_size // self._accumulate
        self._whole.append((n_images, seconds, waited))
        self._since_record = []
        self._start, self._waited = time.perf_counter(), self._batches.waited_seconds
        return Record(
            step,
            "train",
            loss=loss,
            reg=reg,
            accuracy=accuracy,
            grad_norm=grad_norm,
            learning_rate=float(np.asarray(self._learning_rate(step - 1))),
            images_per_second=n_images / seconds,
            waiting=waited / seconds,
            **({} if conflict is None else of_conflict(conflict)),
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time of what is done within."""
        paused = time.perf_counter()
        yield
        self._start += time.perf_counter() - paused

    def whole(self) -> tuple[float, float]:
        """Images a second and the share of waiting, without the first record, if there are more."""
        records = self._whole[1:] or self._whole
        n_images, seconds, waited = np.sum(records, axis=0) if records else (0, 1.0, 0.0)
        return float(n_images / seconds), float(waited / seconds)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Listens for SIGTERM, which a cluster sends before it takes a machine away.

    Yields:
        Tells, given the step, whether to stop: in all processes at the same step.
    """
    if jax.process_count() > 1:
        # JAX listens, and agrees on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    told = False

    def remember(*_: Any) -> None:
        nonlocal told
        told = True

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda step: told
    finally:
        signal.signal(signal.SIGTERM, before)
