"""Runs one cell, or at once several cells that share a compiled program."""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

import dtnh_jax
from examples.common import objective, resnet
from examples.common.objective import REGULARIZERS, RegularizerInputs
from examples.common.pretrained import Pretrained
from examples.common.resnet import Network, Output, ResNetConfig
from examples.never_hurt import batches, sources
from examples.never_hurt.batches import Plan, Schedule
from examples.never_hurt.cell import NONE, Cell, Result
from examples.never_hurt.images import Splits
from examples.never_hurt.rules import RULES, Setting
from examples.never_hurt.version import version

QUARTERS = 4


class Program(NamedTuple):
    """The static settings of a cell. Cells with equal programs share one compilation."""

    regularizer: str
    rule: str
    steps: int
    source: ResNetConfig
    model: ResNetConfig
    held_out: tuple[int, int, float, float]


class Task(NamedTuple):
    """The arrays and scalars of a cell.

    Attributes:
        images: All training images, ``(n, size, size, 3)``, uint8.
        labels: Their labels, ``(n,)``.
        source: The network that training starts from, with its own head.
        reg_weight: λ.
        learning_rate: At the beginning.
    """

    images: Any
    labels: Any
    source: Network
    reg_weight: Any
    learning_rate: Any


class State(NamedTuple):
    """The state of training."""

    network: Network
    opt_state: Any


class Measured(NamedTuple):
    """The measurements of a step.

    Attributes:
        loss: On the batch.
        accuracy: On the batch.
        conflict: Of the two gradients, by layer; None without a regularizer.
    """

    loss: jax.Array
    accuracy: jax.Array
    conflict: dtnh_jax.ConflictStats | None


class Prepared(NamedTuple):
    """A cell with its source and its images."""

    cell: Cell
    source: Pretrained
    splits: Splits


def has_head(regularizer: str) -> bool:
    """Whether a regularizer uses the source's own head."""
    return regularizer in ("distillation", "logit_matching", "label_smoothing")


def run(prepared: Sequence[Prepared]) -> list[Result]:
    """Runs cells of one program, several of them at once with `jax.vmap`.

    Args:
        prepared: The cells. They share regularizer, rule, shapes and steps.

    Returns:
        Their results, in the same order.

    Raises:
        ValueError: If the cells have different programs.
    """
    [*programs] = {program_of(each) for each in prepared}
    if len(programs) != 1:
        raise ValueError("Cells that run at once must share regularizer, rule, shapes and steps.")
    [program] = programs
    trial_losses = [_trial_losses(program, each) for each in prepared]
    starts = []
    for each, losses in zip(prepared, trial_losses, strict=True):
        schedule = batches.schedule(each.cell, each.splits.train.labels)
        helps = losses is None or losses[1] < losses[0]
        starts.append(_start(program, each, schedule, each.cell.strength if helps else 0.0))
    due = [prepared[0].cell.is_due(i) for i in range(program.steps)]
    networks, histories, seconds = _fit(program, starts, due)
    return [
        _result(program, each, network, history, losses, seconds)
        for each, network, history, losses in zip(
            prepared, networks, histories, trial_losses, strict=True
        )
    ]


def _trial_losses(program: Program, prepared: Prepared) -> list[float] | None:
    """The loss on held-out images after the trial run without the regularizer and with it."""
    cell, _, splits = prepared
    if not cell.trial:
        return None
    schedule, views = batches.trial_schedule(cell, splits.train.labels)
    steps = len(schedule.train.which)
    short = program._replace(steps=steps)
    # One after the other: on a CPU, jax.vmap makes convolutions slow.
    networks = [
        _fit(short, [_start(short, prepared, schedule, strength)], [False] * steps)[0][0]
        for strength in (0.0, cell.strength)
    ]
    images, labels = splits.train.images, splits.train.labels[views.which]
    return [float(_loss_of_views(program.model, net, images, labels, views)) for net in networks]


@functools.partial(jax.jit, static_argnums=0)
def _loss_of_views(
    model: ResNetConfig, network: Network, images: jax.Array, labels: jax.Array, views: Plan
) -> jax.Array:
    """The mean loss of views of images, in evaluation mode."""
    output = resnet.apply(model, network, batches.views(images, views), train=False)
    return objective.cross_entropy(output.logits, labels)


def _fit(
    program: Program, starts: Sequence[tuple[Task, State, Schedule]], due: Sequence[bool]
) -> tuple[list[Network], list[Measured], float]:
    """Trains; returns the networks, what was measured in each step, and the seconds of each."""
    task, state, schedule = _stack(starts)
    measured = []
    started = 0.0
    for i, is_due in enumerate(due):
        now = jax.tree.map(lambda x, i=i: x[:, i], schedule)
        state, of_step = _step_of_lanes(program, is_due, state, task, now)
        measured.append(of_step)
        if i == 0:  # a step that compiles
            jax.block_until_ready(state)
            started = time.perf_counter()
    history = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves], 1), *measured)
    seconds = (time.perf_counter() - started) / len(starts)
    networks, histories = (
        [jax.tree.map(lambda x, lane=lane: x[lane], stacked) for lane in range(len(starts))]
        for stacked in (state.network, history)
    )
    return networks, histories, seconds


def program_of(prepared: Prepared) -> Program:
    """The program of a cell."""
    cell, source, splits = prepared
    # Sources have different heads. Where the head is not used, sources share a program.
    n_classes = source.config.n_classes if has_head(cell.regularizer) else 1
    return Program(
        cell.regularizer,
        cell.rule,
        cell.steps,
        replace(source.config, n_classes=n_classes),
        ResNetConfig(cell.architecture, splits.n_classes),
        (cell.held_out, cell.held_out_every, cell.returned_at, cell.trial),
    )


def _start(
    program: Program, prepared: Prepared, schedule: Schedule, strength: float
) -> tuple[Task, State, Schedule]:
    cell, source, splits = prepared
    weight = strength * REGULARIZERS[cell.regularizer].weight
    network = source.network
    if not has_head(cell.regularizer):
        network = _with_head(network, program.source)
    task = Task(
        jnp.asarray(splits.train.images),
        jnp.asarray(splits.train.labels),
        network,
        jnp.float32(weight),
        jnp.float32(cell.learning_rate),
    )
    head = resnet.init_head(program.model, cell.seed)
    network = source.network._replace(params=source.network.params | {"head": head})
    optimizer = make_optimizer(program, task)
    return task, State(network, optimizer.init(network.params)), schedule


def make_optimizer(program: Program, task: Task) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a cell, from pairs of gradients to updates."""
    rate = optax.cosine_decay_schedule(1.0, program.steps)
    return RULES[program.rule](
        Setting(task.reg_weight, lambda count: task.learning_rate * rate(count), _mask(program))
    )


@functools.cache
def _mask(program: Program) -> Any:
    """Which parameters the regularizer reaches, as a tree of booleans."""

    def both() -> tuple[Any, Any]:
        source = resnet.init(program.source, 0)
        task = Task(jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros(1, jnp.int32), source, 0.0, 0.0)
        network = _with_head(source, program.model)
        plan = Plan(jnp.zeros(2, jnp.int32), jnp.zeros(2, bool), jnp.zeros((2, 2), jnp.int32))
        return network.params, _gradients(program, network, task, plan)[1].reg_grads

    params, reg_grads = jax.eval_shape(both)
    return jax.tree.map(lambda _, reg: reg is not None, params, reg_grads)


def _with_head(network: Network, config: ResNetConfig) -> Network:
    """The network with a head of zeros of the shape of ``config``."""
    kernel = jnp.zeros((config.last_width, config.n_classes))
    head = {"kernel": kernel, "bias": jnp.zeros(config.n_classes)}
    return network._replace(params=network.params | {"head": head})


def _step(
    program: Program, is_due: bool, state: State, task: Task, schedule: Schedule
) -> tuple[State, Measured]:
    optimizer = make_optimizer(program, task)
    plan, held_out = schedule.train, schedule.held_out
    ((loss, _), output), pair = _gradients(program, state.network, task, plan)
    params = state.network.params
    extra_args = {}
    if held_out is not None:
        # Two programs, and not a branch in one: on a CPU, XLA makes convolutions in branches slow.
        held_out_grads = (
            _held_out_gradient(program, state.network, task, held_out)
            if is_due
            else jax.tree.map(jnp.zeros_like, params)
        )
        extra_args["held_out_grads"] = dtnh_jax.HeldOutGrads(held_out_grads, is_due)
    updates, opt_state = optimizer.update(pair, state.opt_state, params, **extra_args)
    network = Network(optax.apply_updates(params, updates), output.batch_stats)
    right = jnp.argmax(output.logits, axis=-1) == task.labels[plan.which]
    conflict = None if program.regularizer == NONE else dtnh_jax.conflict_stats(opt_state)
    return State(network, opt_state), Measured(loss, jnp.mean(right), conflict)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_of_lanes(
    program: Program, is_due: bool, state: State, task: Task, schedule: Schedule
) -> Any:
    """A step of all lanes."""
    step = functools.partial(_step, program, is_due)
    if len(schedule.train.which) > 1:
        return jax.vmap(step)(state, task, schedule)
    # On a CPU, jax.vmap makes convolutions slow even for a single lane.
    only = jax.tree.map(lambda x: x[0], (state, task, schedule))
    return jax.tree.map(lambda x: x[None], step(*only))


def _held_out_gradient(program: Program, network: Network, task: Task, plan: Plan) -> Any:
    """The gradient of the loss of held-out images; batch norm's statistics are not kept."""
    images, labels = batches.views(task.images, plan), task.labels[plan.which]

    def loss(params: Any) -> jax.Array:
        output = resnet.apply(program.model, network._replace(params=params), images, train=True)
        return objective.cross_entropy(output.logits, labels)

    return jax.grad(loss)(network.params)


def _gradients(program: Program, network: Network, task: Task, plan: Plan) -> Any:
    images = batches.views(task.images, plan)
    labels = task.labels[plan.which]
    regularizer = REGULARIZERS[program.regularizer]
    source_output = (
        resnet.apply(program.source, task.source, images, train=False)
        if "source_output" in regularizer.needs
        else None
    )

    @functools.partial(dtnh_jax.value_and_gradient_pair, has_aux=True)
    def both(params: Any) -> Any:
        output = resnet.apply(program.model, network._replace(params=params), images, train=True)
        loss = objective.cross_entropy(output.logits, labels)
        reg = regularizer(
            RegularizerInputs(
                params=params,
                output=output,
                source_params=task.source.params,
                source_output=source_output,
                features=objective.default_features(program.regularizer, program.model),
            )
        )
        return (loss, reg), Output(output.logits, {}, output.batch_stats)

    return both(network.params)


def _result(
    program: Program,
    prepared: Prepared,
    network: Network,
    history: Measured,
    trial_losses: list[float] | None,
    seconds: float,
) -> Result:
    cell, _, splits = prepared
    last = max(1, cell.steps // 10)
    conflict, removed = {}, []
    if history.conflict is not None:
        by_layer = _by_quarter(history.conflict.per_group.conflict)
        conflict = {
            name: [round(share, 2) for share in shares]
            for name, shares in zip(history.conflict.groups, by_layer.tolist(), strict=True)
        }
        by_quarter = _by_quarter(history.conflict.total.removed).tolist()
        removed = [_finite(share, 3) for share in by_quarter]
    return Result(
        cell=cell,
        validation=round(sources.accuracy(program.model, network, splits.validation), 5),
        test=round(sources.accuracy(program.model, network, splits.test), 5) if cell.test else None,
        train_accuracy=round(float(np.mean(history.accuracy[-last:])), 4),
        train_loss=_finite(float(np.mean(history.loss[-last:])), 4),
        conflict=conflict,
        removed=removed,
        trial_losses=trial_losses and [round(loss, 4) for loss in trial_losses],
        seconds=round(seconds, 3),
        version=version(),
    )


def _by_quarter(of_steps: ArrayLike) -> np.ndarray:
    """Means over the quarters of training: ``(steps, ...)`` becomes ``(..., quarters)``."""
    quarters = np.array_split(np.asarray(of_steps, np.float64), QUARTERS)
    return np.stack([quarter.mean(axis=0) for quarter in quarters], axis=-1)


def _finite(value: float, digits: int) -> float | None:
    """Rounds a number; None if it is not finite, which JSON cannot represent."""
    return round(value, digits) if math.isfinite(value) else None


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *trees)
