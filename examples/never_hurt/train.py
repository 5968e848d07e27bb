"""Runs one cell, or at once several cells that share a compiled program."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

import dtnh_jax
from dtnh_jax import regularizers
from examples.common import calibration, objective, resnet
from examples.common.objective import REGULARIZERS, RegularizerInputs
from examples.common.pretrained import Pretrained
from examples.common.resnet import Network, Output, ResNetConfig
from examples.never_hurt import batches, sources
from examples.never_hurt.batches import Plan, Schedule
from examples.never_hurt.cell import NONE, Cell, Result
from examples.never_hurt.images import Images, Splits
from examples.never_hurt.procedures import PROCEDURES, Candidate, best, interpolations
from examples.never_hurt.rules import L2_SP_ONLY, RULES, Setting
from examples.never_hurt.shifts import shifted
from examples.never_hurt.sources import Score
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
        relationship: Of the classes of target and source, for Co-Tuning; None for others.
    """

    images: Any
    labels: Any
    source: Network
    reg_weight: Any
    learning_rate: Any
    relationship: Any = None


class Phase(NamedTuple):
    """What a step does, known when it is compiled.

    Attributes:
        is_due: Whether it computes a held-out gradient.
        head_only: Whether it trains only the head.
    """

    is_due: bool
    head_only: bool


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
        length_ratio: λ‖b‖ / ‖a‖ of the gradients before the rule; None without a regularizer.
    """

    loss: jax.Array
    accuracy: jax.Array
    conflict: dtnh_jax.ConflictStats | None
    length_ratio: jax.Array | None


class Prepared(NamedTuple):
    """A cell with its source and its images.

    Attributes:
        cell: The cell.
        source: The network that training starts from.
        splits: The images of the target.
        source_test: Test images of the task of the source; None if there are none.
    """

    cell: Cell
    source: Pretrained
    splits: Splits
    source_test: Images | None = None


def has_head(regularizer: str) -> bool:
    """Whether a regularizer uses the source's own head."""
    return regularizer in ("distillation", "logit_matching", "label_smoothing", "co_tuning")


def run(prepared: Sequence[Prepared]) -> list[Result]:
    """Runs cells of one program, several of them at once with `jax.vmap`.

    Args:
        prepared: The cells. They share regularizer, rule, shapes and steps.

    Returns:
        Their results, in the same order.

    Raises:
        ValueError: If the cells have different programs or procedures, or one of them has settings
            that do not fit together.
    """
    for each in prepared:
        _check(each.cell)
    [*programs] = {(program_of(each), each.cell.procedure) for each in prepared}
    if len(programs) != 1:
        raise ValueError(
            "Cells that run at once must share regularizer, rule, procedure, shapes and steps."
        )
    [(program, name)] = programs
    trial_losses = [_trial_losses(program, each) for each in prepared]
    starts = []
    for each, losses in zip(prepared, trial_losses, strict=True):
        schedule = batches.schedule(each.cell, each.splits.train.labels)
        helps = losses is None or calibration.is_lower(losses[1], than=losses[0])
        starts.append(_start(program, each, schedule, each.cell.strength if helps else 0.0))
    procedure, stopped = PROCEDURES[name], list[Candidate | None]([None] * len(prepared))
    n_head_only = round(procedure.head_only * program.steps)
    is_due = prepared[0].cell.is_due
    phases = [Phase(is_due(i), head_only=i < n_head_only) for i in range(program.steps)]

    def visit(step: int, networks: Network) -> None:
        """Keeps the best network so far, where the procedure wants it."""
        if procedure.every and (step % procedure.every == 0 or step == program.steps):
            for lane, each in enumerate(prepared):
                candidate = _candidate(program, each, step, _lane(networks, lane))
                stopped[lane] = best(filter(None, (stopped[lane], candidate)))

    networks, histories, seconds = _fit(program, starts, phases, visit)
    results = []
    for each, network, history, losses, stop in zip(
        prepared, networks, histories, trial_losses, stopped, strict=True
    ):
        number = None
        if candidate := stop or _interpolated(program, each, network):
            number, network = candidate.number, candidate.network
        result = _result(program, each, network, history, seconds)
        rounded = losses and [_finite(loss, 4) for loss in losses]
        results.append(replace(result, trial_losses=rounded, chosen=number))
    return results


def _trial_losses(program: Program, prepared: Prepared) -> list[float] | None:
    """The calibrated loss on held-out images after trial runs without the regularizer and with."""
    cell, splits = prepared.cell, prepared.splits
    if not cell.trial:
        return None
    schedule, views = batches.trial_schedule(cell, splits.train.labels)
    short = program._replace(steps=len(schedule.train.which))
    phases = [Phase(is_due=False, head_only=False)] * short.steps
    # One after the other: on a CPU, jax.vmap makes convolutions slow.
    networks = [
        _fit(short, [_start(short, prepared, schedule, strength)], phases)[0][0]
        for strength in (0.0, cell.strength)
    ]
    images, labels = splits.train.images, splits.train.labels[views.which]
    losses = (_loss_of_views(program.model, net, images, labels, views) for net in networks)
    return [float(loss) for loss in losses]


@functools.partial(jax.jit, static_argnums=0)
def _loss_of_views(
    model: ResNetConfig, network: Network, images: jax.Array, labels: jax.Array, views: Plan
) -> jax.Array:
    """The calibrated loss of views of images, in evaluation mode."""
    output = resnet.apply(model, network, batches.views(images, views), train=False)
    return calibration.calibrated_loss(output.logits, labels)


def _fit(
    program: Program,
    starts: Sequence[tuple[Task, State, Schedule]],
    phases: Sequence[Phase],
    visit: Callable[[int, Network], None] = lambda step, networks: None,
) -> tuple[list[Network], list[Measured], float]:
    """Trains several cells at once, by lane.

    Args:
        program: The program of all.
        starts: What each starts from.
        phases: What each step does.
        visit: Called after each step with the number of steps so far and all networks.

    Returns:
        The networks, what was measured in each step, and the seconds of each.
    """
    task, state, schedule = _stack(starts)
    measured = []
    started = 0.0
    for i, phase in enumerate(phases):
        now = jax.tree.map(lambda x, i=i: x[:, i], schedule)
        state, of_step = _step_of_lanes(program, phase, state, task, now)
        measured.append(of_step)
        visit(i + 1, state.network)
        if i == 0:  # a step that compiles
            jax.block_until_ready(state)
            started = time.perf_counter()
    history = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves], 1), *measured)
    seconds = (time.perf_counter() - started) / len(starts)
    lanes = range(len(starts))
    networks, histories = (
        [_lane(stacked, lane) for lane in lanes] for stacked in (state.network, history)
    )
    return networks, histories, seconds


def _check(cell: Cell) -> None:
    """Raises an error for settings that do not fit together."""
    if cell.procedure not in PROCEDURES:
        raise ValueError(
            f"There is no procedure {cell.procedure}: there are {', '.join(PROCEDURES)}."
        )
    if PROCEDURES[cell.procedure].chooses and not cell.held_out:
        raise ValueError(
            f"The procedure {cell.procedure} chooses on held-out images: set held_out above 0."
        )
    if cell.rule in L2_SP_ONLY and cell.regularizer != "l2_sp":
        raise ValueError(
            f"The rule {cell.rule} is defined for the regularizer l2_sp; got {cell.regularizer}."
        )


def _lane(trees: Any, lane: int) -> Any:
    return jax.tree.map(lambda x: x[lane], trees)


def _candidate(program: Program, prepared: Prepared, number: float, network: Network) -> Candidate:
    return Candidate(number, network, *_held_out_score(program, prepared, network))


def _interpolated(program: Program, prepared: Prepared, network: Network) -> Candidate | None:
    """The best of the procedure's interpolations with the source; None without any."""
    procedure = PROCEDURES[prepared.cell.procedure]
    found = interpolations(procedure, prepared.source.network, network)
    if procedure.chooses:
        candidates = (_candidate(program, prepared, *each) for each in found)
    else:
        candidates = (Candidate(*each, math.nan, math.nan) for each in found)
    return best(candidates) if procedure.shares else None


def _held_out_score(program: Program, prepared: Prepared, network: Network) -> Score:
    """On the images that are not trained on, without augmentation."""
    train_images = prepared.splits.train
    which = batches.held_out_images(prepared.cell, train_images.labels)
    held_out = Images(train_images.images[which], train_images.labels[which])
    return sources.score(program.model, network, held_out, chunk=min(len(which), 256))


def program_of(prepared: Prepared) -> Program:
    """The program of a cell."""
    cell, source, splits, _ = prepared
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
    cell, source, splits, _ = prepared
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
        _relationship(prepared) if _needs_relationship(program) else None,
    )
    head = resnet.init_head(program.model, cell.seed)
    network = source.network._replace(params=source.network.params | {"head": head})
    optimizer = make_optimizer(program, task)
    return task, State(network, optimizer.init(network.params)), schedule


def _needs_relationship(program: Program) -> bool:
    return "relationship" in REGULARIZERS[program.regularizer].needs


def _relationship(prepared: Prepared) -> jax.Array:
    """Co-Tuning's, from the predictions of the source on the images that are trained on."""
    cell, source, splits, _ = prepared
    images, labels = splits.train
    is_held_out = np.isin(np.arange(len(labels)), batches.held_out_images(cell, labels))
    logits = sources.logits(source.config, source.network, images[~is_held_out])
    return regularizers.co_tuning_relationship(
        logits, jnp.asarray(labels[~is_held_out]), splits.n_classes
    )


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
        shape = program.model.n_classes, program.source.n_classes
        relationship = jnp.zeros(shape) if _needs_relationship(program) else None
        images, labels = jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros(1, jnp.int32)
        task = Task(images, labels, source, 0.0, 0.0, relationship)
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
    program: Program, phase: Phase, state: State, task: Task, schedule: Schedule
) -> tuple[State, Measured]:
    optimizer = make_optimizer(program, task)
    plan, held_out = schedule.train, schedule.held_out
    is_training = not phase.head_only
    ((loss, _), output), pair = _gradients(program, state.network, task, plan, is_training)
    if phase.head_only:
        pair = dtnh_jax.GradientPair(*map(_of_head, pair))
    params = state.network.params
    extra_args = {}
    if held_out is not None:
        # Two programs, and not a branch in one: on a CPU, XLA makes convolutions in branches slow.
        held_out_grads = (
            _held_out_gradient(program, state.network, task, held_out)
            if phase.is_due
            else jax.tree.map(jnp.zeros_like, params)
        )
        extra_args["held_out_grads"] = dtnh_jax.HeldOutGrads(held_out_grads, phase.is_due)
    updates, opt_state = optimizer.update(pair, state.opt_state, params, **extra_args)
    network = Network(optax.apply_updates(params, updates), output.batch_stats)
    right = jnp.argmax(output.logits, axis=-1) == task.labels[plan.which]
    conflict = length_ratio = None
    if program.regularizer != NONE:
        conflict = dtnh_jax.conflict_stats(opt_state)
        length_ratio = task.reg_weight * _length_ratio(pair)
    return State(network, opt_state), Measured(loss, jnp.mean(right), conflict, length_ratio)


def _length_ratio(pair: dtnh_jax.GradientPair) -> jax.Array:
    """The length of the regularizer's gradient divided by that of the loss where it reaches."""
    reached = jax.tree.map(lambda a, b: None if b is None else a, pair.loss_grads, pair.reg_grads)
    return optax.tree.norm(pair.reg_grads) / optax.tree.norm(reached)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_of_lanes(
    program: Program, phase: Phase, state: State, task: Task, schedule: Schedule
) -> Any:
    """A step of all lanes."""
    step = functools.partial(_step, program, phase)
    if len(schedule.train.which) > 1:
        return jax.vmap(step)(state, task, schedule)
    # On a CPU, jax.vmap makes convolutions slow even for a single lane.
    only = jax.tree.map(lambda x: x[0], (state, task, schedule))
    return jax.tree.map(lambda x: x[None], step(*only))


def _of_head(grads: Any) -> Any:
    """Gradients with zeros for all arrays but the head's."""
    return jax.tree.map(jnp.zeros_like, grads) | {"head": grads["head"]}


def _held_out_gradient(program: Program, network: Network, task: Task, plan: Plan) -> Any:
    """The gradient of the loss of held-out images; batch norm's statistics are not kept."""
    images, labels = batches.views(task.images, plan), task.labels[plan.which]

    def loss(params: Any) -> jax.Array:
        output = resnet.apply(program.model, network._replace(params=params), images, train=True)
        return objective.cross_entropy(output.logits, labels)

    return jax.grad(loss)(network.params)


def _gradients(
    program: Program, network: Network, task: Task, plan: Plan, is_training: bool = True
) -> Any:
    """Both gradients; ``is_training`` is the mode of batch norm."""
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
        network_now = network._replace(params=params)
        output = resnet.apply(program.model, network_now, images, train=is_training)
        loss = objective.cross_entropy(output.logits, labels)
        reg = regularizer(
            RegularizerInputs(
                params=params,
                output=output,
                source_params=task.source.params,
                source_output=source_output,
                labels=labels,
                relationship=task.relationship,
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
    seconds: float,
) -> Result:
    cell, splits = prepared.cell, prepared.splits
    last = max(1, cell.steps // 10)
    conflict, removed, length_ratio = {}, [], []
    if history.conflict is not None:
        by_layer = _by_quarter(history.conflict.per_group.conflict)
        conflict = {
            name: [round(share, 2) for share in shares]
            for name, shares in zip(history.conflict.groups, by_layer.tolist(), strict=True)
        }
        by_quarter = _by_quarter(history.conflict.total.removed).tolist()
        removed = [_finite(share, 3) for share in by_quarter]
    if history.length_ratio is not None:
        medians = _by_quarter(history.length_ratio, np.median).tolist()
        length_ratio = [_finite(float(f"{ratio:.3g}"), 12) for ratio in medians]
    is_held_out = cell.held_out and not cell.trial
    held_out = _held_out_score(program, prepared, network) if is_held_out else None
    return Result(
        cell=cell,
        validation=round(sources.accuracy(program.model, network, splits.validation), 5),
        test=round(sources.accuracy(program.model, network, splits.test), 5) if cell.test else None,
        train_accuracy=round(float(np.mean(history.accuracy[-last:])), 4),
        train_loss=_finite(float(np.mean(history.loss[-last:])), 4),
        conflict=conflict,
        removed=removed,
        seconds=round(seconds, 3),
        version=version(),
        held_out_accuracy=round(held_out.accuracy, 5) if held_out else None,
        held_out_loss=_finite(held_out.loss, 4) if held_out else None,
        shifted=round(sources.accuracy(program.model, network, shifted(splits.test)), 5)
        if cell.test
        else None,
        source_accuracy=_source_accuracy(prepared, network) if cell.test else None,
        length_ratio=length_ratio,
    )


def _source_accuracy(prepared: Prepared, network: Network) -> float | None:
    """On the task of the source, with its own head."""
    _, source, _, images = prepared
    if images is None:
        return None
    network = network._replace(params=network.params | {"head": source.network.params["head"]})
    return round(sources.accuracy(source.config, network, images), 5)


def _by_quarter(of_steps: ArrayLike, average: Callable[..., np.ndarray] = np.mean) -> np.ndarray:
    """Averages over quarters of training: ``(steps, ...)`` becomes ``(..., quarters)``."""
    quarters = np.array_split(np.asarray(of_steps, np.float64), QUARTERS)
    return np.stack([average(quarter, axis=0) for quarter in quarters], axis=-1)


def _finite(value: float, digits: int) -> float | None:
    """Rounds a number; None if it is not finite, which JSON cannot represent."""
    return round(value, digits) if math.isfinite(value) else None


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *trees)
