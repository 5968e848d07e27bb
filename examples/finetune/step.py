"""One step, as a pure function of the state, the source and a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dtnh_jax
from examples.common import resnet
from examples.common.data import Batch
from examples.common.resnet import Network, Output
from examples.finetune import devices, metrics, objective
from examples.finetune.metrics import Counts
from examples.finetune.objective import REGULARIZERS, Situation, Source, standardise
from examples.finetune.optimizer import Optimizer, Params, complete, make_optimizer, trained
from examples.finetune.task import Task


class TrainState(NamedTuple):
    """What changes in training.

    Attributes:
        seen: Micro-batches that were seen. The random numbers of a step follow from it.
        network: The weights.
        opt_state: The optimizer's momenta and the rule's memory.
        average: The average of the weights, if there is one.
        diverged_at: The first step whose loss was not finite; 0 if there was none.
    """

    seen: jax.Array
    network: Network
    opt_state: Any
    average: Network | None
    diverged_at: jax.Array

    @property
    def evaluated(self) -> Network:
        """The network that is looked at: the average of the weights, where there is one."""
        return self.network if self.average is None else self.average


class Measured(NamedTuple):
    """What a micro-batch leaves behind.

    Attributes:
        loss: A scalar, as are the next three.
        reg: The regularizer.
        accuracy: The share of images that were right, before the step.
        grad_norm: Of the loss's gradient.
        conflict: Where the regularizer fought the loss in the step that was made last; ``None``
            without a regularizer.
    """

    loss: jax.Array
    reg: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array
    conflict: dtnh_jax.ConflictStats | None


class Program(NamedTuple):
    """The functions that a run calls, compiled for its devices.

    Attributes:
        init: Makes the state before the first step, on the devices.
        like: The shapes, dtypes and shardings of the state.
        train: From state, source and batch to the next state and :class:`Measured`. The state
            that it is given is used up.
        evaluate: From a network and a batch to counts.
    """

    init: Callable[[], TrainState]
    like: TrainState
    train: Callable[[TrainState, Source, Batch], tuple[TrainState, Measured]]
    evaluate: Callable[[Network, Batch], Counts]


def make_program(task: Task) -> Program:
    """Makes the functions of a run."""
    everywhere = devices.replicated(task.mesh)
    optimizer = make_optimizer(task.config.transfer, task.config.training, mask=regularized(task))
    init = functools.partial(first_state, task, optimizer)
    shapes = jax.eval_shape(init)
    shardings = devices.state_sharding(shapes, task.mesh)
    train = functools.partial(micro_step, task, optimizer)
    return Program(
        init=lambda: devices.place(init(), shardings),
        like=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        ),
        train=jax.jit(train, donate_argnums=0, out_shardings=(shardings, everywhere)),
        evaluate=jax.jit(functools.partial(evaluation_step, task), out_shardings=everywhere),
    )


def first_state(task: Task, optimizer: Optimizer) -> TrainState:
    """The state before the first step."""
    has_average = task.config.training.average_decay is not None
    return TrainState(
        seen=jnp.zeros([], jnp.int32),
        network=task.first,
        opt_state=optimizer.init(trained(task.first.params, task.config.model.freeze)),
        average=task.first if has_average else None,
        diverged_at=jnp.zeros([], jnp.int32),
    )


def micro_step(
    task: Task, optimizer: Optimizer, state: TrainState, source: Source, batch: Batch
) -> tuple[TrainState, Measured]:
    """Sees one micro-batch, and makes a step if it is the last of its step.

    Args:
        task: What is done. The arrays of its networks are not looked at.
        optimizer: From a pair of gradients to updates.
        state: The state.
        source: The pre-trained network.
        batch: The images, on all devices.

    Returns:
        The new state, and what was measured.
    """
    training = task.config.training
    key = jax.random.fold_in(jax.random.key(training.seed), state.seen)
    ((loss, reg), output), pair = gradients(task, state.network, source, batch, key)
    params = trained(state.network.params, task.config.model.freeze)
    updates, opt_state = optimizer.update(pair, state.opt_state, params)
    params = complete(optax.apply_updates(params, updates), state.network.params)
    network = Network(params, output.batch_stats)

    seen = state.seen + 1
    step = (seen + training.accumulate - 1) // training.accumulate
    average = state.average
    if average is not None and training.average_decay is not None:
        # As a mean of what there was, until there was enough.
        decay = jnp.minimum(training.average_decay, (1.0 + step) / (10.0 + step))
        decay = jnp.where(seen % training.accumulate == 0, decay, 1.0)
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, network)
    is_first_failure = ~jnp.isfinite(loss + reg) & (state.diverged_at == 0)
    state = TrainState(
        seen=seen,
        network=network,
        opt_state=opt_state,
        average=average,
        diverged_at=jnp.where(is_first_failure, step, state.diverged_at),
    )
    measured = Measured(
        loss=loss,
        reg=reg,
        accuracy=jnp.mean(jnp.argmax(output.logits, axis=-1) == batch.labels),
        grad_norm=optax.tree.norm(pair.loss_grads),
        conflict=None
        if task.config.transfer.regularizer == "none"
        else dtnh_jax.conflict_stats(opt_state),
    )
    return state, measured


def gradients(task: Task, network: Network, source: Source, batch: Batch, key: jax.Array) -> Any:
    """Loss and regularizer, what the network made of the batch, and both gradients.

    Returns:
        ``((loss, reg), output), pair``, without the output's feature maps.
    """
    config = task.config
    images = standardise(batch.images, task.mean, task.std)
    teacher = resnet.apply(task.source_model, source.network, images, train=False)
    everything, batch_stats = network

    @functools.partial(dtnh_jax.value_and_gradient_pair, has_aux=True)
    def objective_of(params: Params) -> Any:
        network = Network(complete(params, everything), batch_stats)

        def predict(images: jax.Array) -> jax.Array:
            return resnet.apply(task.model, network, images, train=False).logits

        output = resnet.apply(task.model, network, images, train=True)
        loss = objective.cross_entropy(output.logits, batch.labels, config.training.label_smoothing)
        reg = REGULARIZERS[config.transfer.regularizer](
            Situation(
                params=params,
                output=output,
                predict=predict,
                teacher=teacher,
                source=source,
                images=images,
                labels=batch.labels,
                epsilon=jnp.asarray(config.transfer.epsilon / task.std),
                key=key,
                config=config.transfer,
            )
        )
        return (loss, reg), Output(output.logits, {}, output.batch_stats)

    return objective_of(trained(everything, config.model.freeze))


def regularized(task: Task) -> Params:
    """Which parameters the regularizer reaches, as a tree of booleans over those trained."""
    size = task.config.data.image_size
    batch = Batch(
        images=jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8),
        labels=jax.ShapeDtypeStruct((2,), jnp.int32),
        valid=jax.ShapeDtypeStruct((2,), jnp.bool_),
    )
    of_batch = functools.partial(gradients, task)
    _, pair = jax.eval_shape(of_batch, task.first, task.source, batch, jax.random.key(0))
    return jax.tree.map(
        lambda mine, of_reg: of_reg is not None,
        trained(task.first.params, task.config.model.freeze),
        pair.reg_grads,
    )


def evaluation_step(task: Task, network: Network, batch: Batch) -> Counts:
    """Counts what a network gets right, with the running averages of batch norm."""
    images = standardise(batch.images, task.mean, task.std)
    logits = resnet.apply(task.model, network, images, train=False).logits
    return metrics.count(logits, batch.labels, batch.valid)
