"""Fine-tunes a network. Read this file from the top, and copy what you need.

The order is: trial runs, setup, state, objective, step, compilation, loop, evaluation, export.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import dtnh_jax
from examples.common import data, objective, pretrained, resnet
from examples.common.data import Batch, Dataset
from examples.common.objective import REGULARIZERS, RegularizerInputs
from examples.common.resnet import Network, Output, ResNetConfig
from examples.common.standardisation import channel_statistics, standardise
from examples.finetune import devices, directory, logs, metrics, trials
from examples.finetune.batches import TrainingBatches, load
from examples.finetune.checkpoint import Checkpoints, Progress
from examples.finetune.config import Config
from examples.finetune.display import Display, announce, introduce
from examples.finetune.divergence import check_finite
from examples.finetune.fingerprint import fingerprint
from examples.finetune.freeze import complete, trained
from examples.finetune.logs import Logs, Record
from examples.finetune.meter import Measured, Meter, Throughput
from examples.finetune.metrics import Metrics, Predictions
from examples.finetune.optimizer import Optimizer, Params, make_optimizer
from examples.finetune.preemption import StoppedError, stop_signal
from examples.finetune.report import Outcome, report
from examples.finetune.source import Source, estimate, load_source, with_features
from examples.finetune.trials import Trial


def run(config: Config) -> Outcome:
    """Fine-tunes on training images, chooses a step on validation images, and tests it once.

    Args:
        config: The settings.

    Returns:
        The results, which are also printed. The output directory has them and the chosen network,
        ``model.safetensors``.

    Raises:
        ValueError: If the settings, the data and the weights do not fit together.
        DirectoryError: If another run uses the output directory, or an earlier one did.
        CheckpointError: If a checkpoint cannot be written, or is of another run.
        DivergedError: If the loss is not finite.
        StoppedError: After a signal; the state has been saved.
    """
    devices.start_processes(config.devices)
    is_first = jax.process_index() == 0
    with directory.claim(config):
        dataset = load(config)
        if is_first:
            introduce(dataset)
        if config.output.overwrite:
            if is_first:
                directory.clear(config.output.out)
            multihost_utils.sync_global_devices("cleared")
        trial = try_regularizer(config, dataset) if config.transfer.trial_share else None
        decided = trials.settings(config, has_regularizer=trial.helps) if trial else config
        task, program, best_step, throughput, state = fit(decided, dataset)
        validation = evaluate(task, program, state.evaluated, dataset.validation)
        test = evaluate(task, program, state.evaluated, dataset.test)
        export(task, dataset, state.evaluated)
        outcome = Outcome(
            config=config,
            architecture=task.model.architecture,
            throughput=throughput,
            best_step=best_step,
            validation=validation,
            test=test,
            class_names=dataset.class_names,
            records=logs.read(config.output.out),
            layer_order=resnet.layer_names(task.model),
            trial=trial,
        )
        if is_first:
            report(outcome, config.output.out)
    return outcome


# --8<-- [start:trial]
def try_regularizer(config: Config, dataset: Dataset) -> Trial:
    """Runs a share of the steps without the regularizer, and with it.

    Each is a run with checkpoints of its own, in a directory in the output directory. It has the
    learning rate schedule of a whole run. After its last step it is compared by the calibrated
    loss: short runs differ in confidence, too.
    """
    losses = {}
    for has_regularizer in (True, False):  # what is wrong with the regularizer shows at once
        short = trials.shortened(config, has_regularizer=has_regularizer)
        if jax.process_index() == 0:
            announce(f"Trial run {'with' if has_regularizer else 'without'} the regularizer:")
        with directory.claim(short):
            task, program, _, _, state = fit(short, dataset)
        found = evaluate(task, program, state.evaluated, dataset.validation)
        losses[has_regularizer] = found.calibrated_loss
    trial = Trial(short.training.steps, loss_without=losses[False], loss_with=losses[True])
    if jax.process_index() == 0:
        announce(str(trial))
    return trial


# --8<-- [end:trial]


class Fitted(NamedTuple):
    """A finished training.

    Attributes:
        task: What was constant.
        program: The compiled functions.
        best_step: The step that was best on validation images.
        throughput: The speed.
        state: The state at the best step.
    """

    task: "Task"
    program: "Program"
    best_step: int
    throughput: Throughput
    state: "TrainState"


def fit(config: Config, dataset: Dataset) -> Fitted:
    """Fine-tunes, and restores the step that is best on validation images."""
    task = setup(config, dataset)
    program = make_program(task)
    with Checkpoints(config.output.out / "checkpoints", config, task.made_from) as checkpoints:
        best_step, throughput = train(task, program, dataset, checkpoints)
        best_step, state = checkpoints.restore_best(best_step, program.like)
    return Fitted(task, program, best_step, throughput, state)


class Task(NamedTuple):
    """What is constant during a run.

    Attributes:
        config: The settings, with the feature maps of the regularizer.
        mesh: The devices.
        model: The network that is fine-tuned.
        initial: Its arrays before the first step.
        source_model: The pre-trained network.
        source: Its arrays and what was estimated from them, on every device.
        mean: Mean of the channels, from 0 to 1, ``(1, 1, 1, 3)``.
        std: Standard deviation of the channels.
        made_from: The fingerprint of the images and of the pre-trained weights.
    """

    config: Config
    mesh: Mesh
    model: ResNetConfig
    initial: Network
    source_model: ResNetConfig
    source: Source
    mean: np.ndarray
    std: np.ndarray
    made_from: dict[str, Any]


def setup(config: Config, dataset: Dataset) -> Task:
    """Arranges the devices, loads the weights, and estimates what the regularizer needs."""
    training, n_classes = config.training, len(dataset.class_names)
    mesh = devices.make_mesh(config.devices, training.batch_size // training.accumulate)
    loaded = load_source(config, n_classes)
    model, initial = loaded.config, loaded.network
    if config.model.init is not None:
        model, initial = pretrained.with_new_head(loaded, n_classes, training.seed)
    model = dataclasses.replace(model, frozen_batch_norm=config.model.frozen_batch_norm)
    mean, std = channel_statistics(loaded.metadata, mean=config.model.mean, std=config.model.std)
    config = dataclasses.replace(config, transfer=with_features(config.transfer, model))
    estimates = estimate(loaded, config, dataset, mean, std)
    kept = devices.replicate(Source(loaded.network, estimates), mesh)
    made_from = fingerprint(dataset, None if config.model.init is None else loaded.network)
    return Task(config, mesh, model, initial, loaded.config, kept, mean, std, made_from)


class TrainState(NamedTuple):
    """What changes during a run.

    Attributes:
        seen: The number of micro-batches so far. Random numbers are derived from it.
        network: Parameters and batch norm's averages.
        opt_state: The state of the optimizer and of the rule.
        average: The exponential average of the network, or ``None``.
        diverged_at: The first step with a loss that is not finite, or 0.
    """

    seen: jax.Array
    network: Network
    opt_state: Any
    average: Network | None
    diverged_at: jax.Array

    @property
    def evaluated(self) -> Network:
        """The network that is evaluated: the average, if there is one."""
        return self.network if self.average is None else self.average


def initial_state(task: Task, optimizer: Optimizer) -> TrainState:
    """The state before the first step."""
    return TrainState(
        seen=jnp.zeros([], jnp.int32),
        network=task.initial,
        opt_state=optimizer.init(trained(task.initial.params, task.config.model.freeze)),
        average=None if task.config.training.average_decay is None else task.initial,
        diverged_at=jnp.zeros([], jnp.int32),
    )


# --8<-- [start:objective]
def loss_of(
    task: Task, network: Network, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Output]:
    """The loss of standardised images, and the output of the network in training mode."""
    output = resnet.apply(task.model, network, images, train=True)
    smoothing = task.config.training.label_smoothing
    return objective.cross_entropy(output.logits, labels, smoothing), output


def gradients(task: Task, network: Network, source: Source, batch: Batch, key: jax.Array) -> Any:
    """Returns ``((loss, reg), output), pair`` of a micro-batch."""
    transfer = task.config.transfer
    images = standardise(batch.images, task.mean, task.std)
    source_output = resnet.apply(task.source_model, source.network, images, train=False)

    def loss_and_reg(params: Params) -> Any:
        current = network._replace(params=complete(params, network.params))
        loss, output = loss_of(task, current, images, batch.labels)
        reg = REGULARIZERS[transfer.regularizer](
            RegularizerInputs(
                params=params,
                output=output,
                source_params=source.network.params,
                source_output=source_output,
                images=images,
                labels=batch.labels,
                predict=lambda x: resnet.apply(task.model, current, x, train=False).logits,
                key=key,
                features=transfer.features,
                temperature=transfer.temperature,
                epsilon=jnp.asarray(transfer.epsilon / task.std),
                **source.estimates,
            )
        )
        return (loss, reg), Output(output.logits, {}, output.batch_stats)

    value_and_pair = dtnh_jax.value_and_gradient_pair(loss_and_reg, has_aux=True)
    return value_and_pair(trained(network.params, task.config.model.freeze))


# --8<-- [end:objective]


# --8<-- [start:held_out]
def held_out_gradient(task: Task, network: Network, batch: Batch, so_far: Params | None) -> Params:
    """Adds the loss gradient of a micro-batch of held-out images to those of the step.

    Batch norm's averages of these images are not kept.
    """
    images = standardise(batch.images, task.mean, task.std)

    def loss(params: Params) -> jax.Array:
        current = network._replace(params=complete(params, network.params))
        return loss_of(task, current, images, batch.labels)[0] / task.config.training.accumulate

    grads = jax.grad(loss)(trained(network.params, task.config.model.freeze))
    return grads if so_far is None else jax.tree.map(jnp.add, so_far, grads)


# --8<-- [end:held_out]


# --8<-- [start:step]
def train_step(
    task: Task,
    optimizer: Optimizer,
    state: TrainState,
    source: Source,
    batch: Batch,
    held_out_grads: Params | None = None,
) -> tuple[TrainState, Measured]:
    """Processes one micro-batch. Of ``task``, it uses no array of a network."""
    training, network = task.config.training, state.network
    key = jax.random.fold_in(jax.random.key(training.seed), state.seen)
    ((loss, reg), output), pair = gradients(task, network, source, batch, key)
    params = trained(network.params, task.config.model.freeze)
    extra_args = {}
    if task.config.transfer.held_out:
        is_new = held_out_grads is not None
        held_out_grads = held_out_grads if is_new else jax.tree.map(jnp.zeros_like, params)
        extra_args["held_out_grads"] = dtnh_jax.HeldOutGrads(held_out_grads, is_new)
    updates, opt_state = optimizer.update(pair, state.opt_state, params, **extra_args)
    params = complete(optax.apply_updates(params, updates), network.params)
    network = Network(params, output.batch_stats)

    seen = state.seen + 1
    step = (seen + training.accumulate - 1) // training.accumulate
    average = state.average
    if average is not None and training.average_decay is not None:
        # Close to a plain mean in the first steps.
        decay = jnp.minimum(training.average_decay, (1.0 + step) / (10.0 + step))
        decay = jnp.where(seen % training.accumulate == 0, decay, 1.0)
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, network)
    diverges = ~jnp.isfinite(loss + reg) & (state.diverged_at == 0)
    state = TrainState(
        seen=seen,
        network=network,
        opt_state=opt_state,
        average=average,
        diverged_at=jnp.where(diverges, step, state.diverged_at),
    )
    has_regularizer = task.config.transfer.regularizer != "none"
    return state, Measured(
        loss=loss,
        reg=reg,
        accuracy=jnp.mean(jnp.argmax(output.logits, axis=-1) == batch.labels),
        grad_norm=optax.tree.norm(pair.loss_grads),
        conflict=dtnh_jax.conflict_stats(opt_state) if has_regularizer else None,
    )


# --8<-- [end:step]


def evaluation_step(task: Task, network: Network, batch: Batch) -> Predictions:
    """Predicts the classes of a batch, with the running averages of batch norm."""
    images = standardise(batch.images, task.mean, task.std)
    logits = resnet.apply(task.model, network, images, train=False).logits
    return metrics.predict(logits, batch.labels, batch.valid)


class Program(NamedTuple):
    """The compiled functions of a run.

    Attributes:
        init: Returns the state before the first step, on the devices.
        like: The shapes, dtypes and shardings of the state.
        train: From state, source, batch and held-out gradient to the next state and
            :class:`Measured`. It donates the buffers of the state. With and without a held-out
            gradient, these are two programs: in a branch of one, convolutions are slow on a CPU.
        held_out: From network, held-out batch and the sum so far, or ``None``, to the next sum.
        evaluate: From network and batch to predictions.
    """

    init: Callable[[], TrainState]
    like: TrainState
    train: Callable[..., tuple[TrainState, Measured]]
    held_out: Callable[[Network, Batch, Params | None], Params]
    evaluate: Callable[[Network, Batch], Predictions]


# --8<-- [start:compile]
def make_program(task: Task) -> Program:
    """Compiles the functions of a run."""
    config, replicated = task.config, devices.replicated(task.mesh)
    optimizer = make_optimizer(config.transfer, config.training, mask=regularized(task))
    init = functools.partial(initial_state, task, optimizer)
    shardings = devices.state_sharding(jax.eval_shape(init), task.mesh)
    of_params = trained(shardings.network.params, config.model.freeze)
    train = functools.partial(train_step, task, optimizer)
    return Program(
        init=lambda: devices.place(init(), shardings),
        like=devices.abstract(jax.eval_shape(init), shardings),
        train=jax.jit(train, donate_argnums=0, out_shardings=(shardings, replicated)),
        held_out=jax.jit(functools.partial(held_out_gradient, task), out_shardings=of_params),
        evaluate=jax.jit(functools.partial(evaluation_step, task), out_shardings=replicated),
    )


# --8<-- [end:compile]


def regularized(task: Task) -> Params:
    """Which of the trained parameters have a regularizer gradient, as a tree of booleans."""
    size, params = task.config.data.image_size, task.initial.params
    images = jnp.zeros((2, size, size, 3), jnp.uint8)
    batch = Batch(images, jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.bool_))
    of_batch = functools.partial(gradients, task)
    _, pair = jax.eval_shape(of_batch, task.initial, task.source, batch, jax.random.key(0))
    return jax.tree.map(
        lambda _, grad: grad is not None, trained(params, task.config.model.freeze), pair.reg_grads
    )


# --8<-- [start:loop]
def train(
    task: Task, program: Program, dataset: Dataset, checkpoints: Checkpoints
) -> tuple[int, Throughput]:
    """Makes the remaining steps, and saves the best and the last.

    Returns:
        The step that was best on validation images, and the speed.
    """
    training, output = task.config.training, task.config.output
    held_out_every = task.config.transfer.held_out_every
    batches = TrainingBatches(task.config, dataset, task.mesh)
    restored = checkpoints.restore_last(program.like)
    if restored is None:
        step, best, meter_state, evaluated, state = 0, None, None, True, program.init()
    else:
        (step, place, best, meter_state, evaluated), state = restored
        batches.set_state(place)
    meter = Meter(training, batches, meter_state)
    first = jax.process_index() == 0
    with (
        batches,
        Logs(output.out, step or None, tensorboard=output.tensorboard, enabled=first) as written,
        Display(training.steps, training.batch_size, start=step, enabled=first) as display,
        stop_signal() as must_stop,
    ):

        def log(record: Record) -> None:
            written.write(record)
            display.show(record)

        def better(step: int, found: Metrics, best: tuple[int, float] | None) -> tuple[int, float]:
            score = metrics.score(found, training.choose_by)
            return (step, score) if best is None or score > best[1] else best

        if dataset.held_out is not None:
            n = len(dataset.held_out)
            display.message(
                f"{n} of {n + len(dataset.train)} training images are held out. The regularizer is "
                "compared with their gradient."
            )
        best_is_lost = best is None and step >= training.evaluate_every
        if best_is_lost or not evaluated:
            validation = evaluate(task, program, state.evaluated, dataset.validation, must_stop)
            best = better(step, validation, best)
            if not evaluated:
                log(logs.of_metrics(step, "validation", validation))
        display.message("Compiling the first step.")
        while step < training.steps:
            held_out_grads = None  # in the steps that have none
            if batches.held_out is not None and step % held_out_every == 0:
                for _ in range(training.accumulate):
                    batch = next(batches.held_out)
                    held_out_grads = program.held_out(state.network, batch, held_out_grads)
            for _ in range(training.accumulate):
                batch = next(batches.train)
                state, measured = program.train(state, task.source, batch, held_out_grads)
                meter.add(measured)
            step += 1
            display.advance()

            stop, last = must_stop(step), step == training.steps
            log_now = step % output.log_every == 0 or last
            evaluate_now = step % training.evaluate_every == 0 or last
            save_now = step % task.config.checkpoint_every == 0 or last or stop
            if log_now or evaluate_now or save_now:
                check_finite(state.diverged_at, checkpoints.steps)
            if log_now:
                log(meter.read(step))
            with meter.paused():
                if evaluate_now and not stop:
                    try:
                        validation = evaluate(
                            task, program, state.evaluated, dataset.validation, must_stop
                        )
                    except StoppedError as stopped:
                        stop = stopped.number
                    else:
                        log(logs.of_metrics(step, "validation", validation))
                        best = better(step, validation, best)
                if save_now or stop or (best and best[0] == step):
                    evaluated = not (evaluate_now and stop)  # else it is when the run continues
                    progress = Progress(
                        step, batches.get_state(), best, meter.get_state(), evaluated
                    )
                    checkpoints.save(progress, state)
            if stop:
                raise StoppedError(
                    f"Stopped by a signal at step {step} of {training.steps}. The state is saved; "
                    "continue with --resume.",
                    stop,
                )
    assert best is not None
    return best[0], meter.throughput()


# --8<-- [end:loop]


def evaluate(
    task: Task,
    program: Program,
    network: Network,
    images: data.Source,
    must_stop: Callable[[], int] = lambda: 0,
) -> Metrics:
    """The metrics of a network on all images of a split.

    Raises:
        StoppedError: If ``must_stop()`` is the number of a signal.
    """

    def predictions(on_devices: Iterable[Batch]) -> Iterator[Predictions]:
        for batch in on_devices:
            if number := must_stop():
                raise StoppedError(
                    "Stopped by a signal in an evaluation. Continue with --resume.", number
                )
            yield program.evaluate(network, batch)

    config, n_devices = task.config, task.mesh.size
    batch_size = -(-config.training.evaluation_batch_size // n_devices) * n_devices
    batches = data.evaluation_batches(
        images, config.data, batch_size=batch_size, **devices.process()
    )
    with data.to_device(batches, devices.batch_sharding(task.mesh)) as on_devices:
        return metrics.summarise(predictions(on_devices), task.model.n_classes)


def export(task: Task, dataset: Dataset, network: Network) -> None:
    """Writes a safetensors file with the network and what is needed to use it."""
    network = devices.gather(network, task.mesh)
    if jax.process_index() == 0:
        metadata = {
            "class_names": list(dataset.class_names),
            "image_size": task.config.data.image_size,
            "resize": task.config.data.short_side,
            "mean": task.mean.ravel().tolist(),
            "std": task.std.ravel().tolist(),
        }
        pretrained.export(
            task.config.output.out / "model.safetensors",
            task.model,
            network,
            metadata={name: json.dumps(value) for name, value in metadata.items()},
        )
