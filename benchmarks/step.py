"""A training step, from images to new parameters."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dtnh_jax
from benchmarks import trees
from benchmarks.combination import PRESET
from benchmarks.config import Regularizer, Sizes
from benchmarks.machine import Ceilings
from benchmarks.programs import Program, compile_program
from benchmarks.report import Row, Table
from benchmarks.timing import Samples, compare
from dtnh_jax import regularizers
from examples.common import resnet
from examples.common.resnet import Network, ResNetConfig

REG_WEIGHT = 0.01
LEARNING_RATE = 1e-4
BASE = "weighted sum, one gradient"
PARTS = ("forward", "forward and backward", "optimizer")
WITH_HELD_OUT, BETWEEN = (f"{PRESET}, held out, {which}" for which in ("gradient", "no gradient"))
HELD_OUT_EVERY = (1, 4, 16)


class State(NamedTuple):
    """The state that a step updates."""

    network: Network
    opt_state: Any


class Batch(NamedTuple):
    """The inputs of a step, or their shapes; the source network is an input, not a constant."""

    source: Network
    images: Any
    labels: Any
    held_out_images: Any


class Contestant(NamedTuple):
    """One implementation of a step.

    Attributes:
        function: A function from state and batch to a new state and the loss, or to any result if
            not ``carries``.
        init: A function from params to the optimizer state.
        carries: Whether the function returns a new state and the old one is donated.
    """

    function: Callable[[State, Batch], Any]
    init: Callable[[Any], Any]
    carries: bool = True


def objective(config: ResNetConfig, regularizer: Regularizer) -> Callable[..., Any]:
    """The two terms of the objective.

    Returns:
        A function from params, batch-norm statistics and a batch to ``((loss, reg), statistics)``.
    """

    def terms(params: Any, batch_stats: Any, batch: Batch) -> Any:
        output = resnet.apply(config, Network(params, batch_stats), batch.images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch.labels)
        if regularizer == "l2_sp":
            reg = regularizers.l2_sp(params, pretrained(batch))
        else:
            teacher = resnet.apply(config, batch.source, batch.images, train=False)
            reg = regularizers.distillation(output.logits, teacher.logits, 2.0)
        return (jnp.mean(losses), reg), output.batch_stats

    return terms


def pretrained(batch: Batch) -> Any:
    """The pre-trained params of L2-SP, with a new head."""
    return batch.source.params | {"head": None}


def contestants(config: ResNetConfig, regularizer: Regularizer) -> dict[str, Contestant]:
    """The contestants by name, and the parts that the floor is the sum of."""
    terms = objective(config, regularizer)
    sgd = optax.sgd(LEARNING_RATE, momentum=0.9)

    def term(k: int) -> Callable[..., Any]:
        def of_params(params: Any, *rest: Any) -> Any:
            both, batch_stats = terms(params, *rest)
            return both[k], batch_stats

        return of_params

    def combined(params: Any, *rest: Any) -> Any:
        (loss, reg), batch_stats = terms(params, *rest)
        return loss + REG_WEIGHT * reg, batch_stats

    def one(of_params: Callable[..., Any]) -> Contestant:
        def gradient(*arguments: Any) -> Any:
            return jax.value_and_grad(of_params, has_aux=True)(*arguments)

        return _step(gradient, sgd)

    def pair(*arguments: Any) -> Any:
        ((loss, _), batch_stats), pair = dtnh_jax.value_and_gradient_pair(terms, has_aux=True)(
            *arguments
        )
        return (loss, batch_stats), pair

    def two_gradients(*arguments: Any) -> Any:
        result, loss_grads = jax.value_and_grad(term(0), has_aux=True)(*arguments)
        return result, (loss_grads, jax.grad(term(1), has_aux=True)(*arguments)[0])

    def batched(params: Any, *rest: Any) -> Any:
        (loss, _), pull_back, batch_stats = jax.vjp(
            lambda params: terms(params, *rest), params, has_aux=True
        )
        (grads,) = jax.vmap(pull_back)(tuple(jnp.eye(2, dtype=loss.dtype)))
        return (loss, batch_stats), tuple(
            jax.tree.map(lambda x, k=k: x[k], grads) for k in range(2)
        )

    def closed_form(params: Any, batch_stats: Any, batch: Batch) -> Any:
        result, loss_grads = jax.value_and_grad(term(0), has_aux=True)(params, batch_stats, batch)
        return result, (loss_grads, regularizers.l2_sp_gradient(params, pretrained(batch)))

    def held_out_gradient(params: Any, batch_stats: Any, batch: Batch) -> Any:
        held_out = batch._replace(images=batch.held_out_images)
        return jax.grad(term(0), has_aux=True)(params, batch_stats, held_out)[0]

    def no_gradient(params: Any, batch_stats: Any, batch: Batch) -> Any:
        del batch_stats, batch
        return dtnh_jax.HeldOutGrads(jax.tree.map(jnp.zeros_like, params), is_new=False)

    def with_rule(rule: optax.GradientTransformation) -> Any:
        return optax.chain(rule, sgd)

    dtnh = functools.partial(dtnh_jax.dtnh, REG_WEIGHT)
    by_layer = with_rule(dtnh(scope="layer"))
    preset = functools.partial(dtnh_jax.dtnh_sgd, LEARNING_RATE, REG_WEIGHT, scope="global")
    compared = preset(reference=dtnh_jax.held_out(0.9))
    found = {
        "no regularizer": one(term(0)),
        BASE: one(combined),
        "weighted_sum": _step(
            pair, with_rule(dtnh_jax.weighted_sum(REG_WEIGHT, diagnostics=False))
        ),
        "dtnh global": _step(pair, with_rule(dtnh(scope="global"))),
        "dtnh layer": _step(pair, by_layer),
        "dtnh layer, diagnostics=False": _step(
            pair, with_rule(dtnh(scope="layer", diagnostics=False))
        ),
        "dtnh element": _step(pair, with_rule(dtnh(scope="element"))),
        "dtnh layer, two jax.grad": _step(two_gradients, by_layer),
        PRESET: _step(pair, preset()),
        WITH_HELD_OUT: _step(pair, compared, held_out_gradient),
        BETWEEN: _step(pair, compared, no_gradient),
    }
    if regularizer == "l2_sp":
        found["dtnh layer, closed form"] = _step(closed_form, by_layer)
        found["weighted_sum, closed form"] = _step(
            closed_form, with_rule(dtnh_jax.weighted_sum(REG_WEIGHT, diagnostics=False))
        )
    else:
        found["dtnh layer, batched pull-backs"] = _step(batched, by_layer)

    def forward(state: State, batch: Batch) -> Any:
        return terms(*state.network, batch)

    def forward_and_backward(state: State, batch: Batch) -> Any:
        return jax.value_and_grad(combined, has_aux=True)(*state.network, batch)

    def optimizer(state: State, batch: Batch) -> Any:
        params, batch_stats = state.network
        # Any tree of these shapes can be used as a gradient.
        updates, opt_state = sgd.update(batch.source.params, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        return State(Network(params, batch_stats), opt_state), ()

    return found | {
        "forward": Contestant(forward, sgd.init, carries=False),
        "forward and backward": Contestant(forward_and_backward, sgd.init, carries=False),
        "optimizer": Contestant(optimizer, sgd.init),
    }


def _step(
    gradients: Callable[..., Any],
    tx: optax.GradientTransformation,
    held_out: Callable[..., Any] | None = None,
) -> Contestant:
    extra = optax.with_extra_args_support(tx)

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        params, batch_stats = state.network
        extra_args = {"held_out_grads": held_out(params, batch_stats, batch)} if held_out else {}
        (loss, batch_stats), grads = gradients(params, batch_stats, batch)
        updates, opt_state = extra.update(grads, state.opt_state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        return State(Network(params, batch_stats), opt_state), loss

    return Contestant(step, tx.init)


def shapes_of(config: ResNetConfig, sizes: Sizes, *, multiple_of: int = 1) -> tuple[Network, Batch]:
    """The shapes of the network and the batch; the batch size is a multiple of ``multiple_of``."""
    network = jax.eval_shape(lambda: resnet.init(config, 0))
    batch_size = -(-sizes.batch_size // multiple_of) * multiple_of
    images = batch_size, sizes.image_size, sizes.image_size, 3
    return network, Batch(
        source=network,
        images=jax.ShapeDtypeStruct(images, jnp.float32),
        labels=jax.ShapeDtypeStruct(images[:1], jnp.int32),
        held_out_images=jax.ShapeDtypeStruct(images, jnp.float32),
    )


def network_of(architecture: str, sizes: Sizes) -> ResNetConfig:
    """The network of a step."""
    return ResNetConfig(architecture, n_classes=100, width=sizes.width, dtype=sizes.activations)


@functools.cache
def program(architecture: str, regularizer: Regularizer, name: str, sizes: Sizes) -> Program:
    """A compiled contestant."""
    config = network_of(architecture, sizes)
    network, batch = shapes_of(config, sizes)
    contestant = contestants(config, regularizer)[name]
    state = State(network, jax.eval_shape(contestant.init, network.params))
    donate = (0,) if contestant.carries else ()
    return compile_program(contestant.function, state, batch, donate=donate)


class Carried:
    """A step that donates its state and continues from the new one."""

    def __init__(self, program: Program, state: State, batch: Batch) -> None:
        self.program, self.state, self.batch = program, state, batch

    def __call__(self) -> Any:
        """Runs a step."""
        self.state, measured = self.program.compiled(self.state, self.batch)
        return self.state, measured


def calls(
    architecture: str, regularizer: Regularizer, names: Iterable[str], sizes: Sizes
) -> dict[str, Callable[[], Any]]:
    """Contestants by name, each with its own state."""
    config = network_of(architecture, sizes)
    _, shapes = shapes_of(config, sizes)
    batch = Batch(
        source=resnet.init(config, 1),
        images=trees.random_like(shapes.images, 0),
        labels=jnp.arange(sizes.batch_size, dtype=jnp.int32) % config.n_classes,
        held_out_images=trees.random_like(shapes.held_out_images, 1),
    )
    known = contestants(config, regularizer)
    first = resnet.init(config, 0)
    made: dict[str, Callable[[], Any]] = {}
    for name in names:
        compiled = program(architecture, regularizer, name, sizes)
        network = jax.tree.map(jnp.copy, first)
        state = State(network, known[name].init(network.params))
        made[name] = (
            Carried(compiled, state, batch)
            if known[name].carries
            else functools.partial(compiled.compiled, state, batch)
        )
    return made


def every(k: int) -> str:
    """The name of the preset with a held-out gradient in every ``k``-th step."""
    return f"{PRESET}, held out, every {k}"


def names_of(architecture: str, regularizer: Regularizer, sizes: Sizes) -> list[str]:
    """The names of the contestants to run."""
    known = contestants(network_of(architecture, sizes), regularizer)
    few = {BASE, "dtnh layer", "dtnh layer, closed form", *PARTS}
    return [name for name in known if sizes.all_steps or name in few]


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Times the contestants."""
    del ceilings
    rows: list[Row] = []
    for architecture in sizes.architectures:
        for regularizer in sizes.regularizers:
            names = names_of(architecture, regularizer, sizes)
            samples = compare(
                calls(architecture, regularizer, names, sizes),
                seconds=sizes.seconds,
                repetitions=sizes.repetitions,
            )
            forward, both, optimizer = (samples[part].seconds for part in PARTS)
            backward_passes = 2 if regularizer == "distillation" else 1
            floor = forward + backward_passes * (both - forward) + optimizer
            samples["floor"] = Samples(floor)
            if PRESET in samples:
                with_gradient, between = (samples[x].seconds for x in (WITH_HELD_OUT, BETWEEN))
                for k in HELD_OUT_EVERY:
                    seconds = (with_gradient + (k - 1) * between) / k
                    samples[every(k)] = Samples(seconds)
            compile_seconds = {
                name: program(architecture, regularizer, name, sizes).compile_seconds
                for name in names
            }
            for name, mine in samples.items():
                rows.append(
                    {
                        "step": f"{architecture}, {regularizer}",
                        "contestant": name,
                        **mine.cells(),
                        "× one gradient": mine.over(samples[BASE]),
                        "× floor": mine.over(samples["floor"]),
                        f"× {PRESET}": mine.over(samples[PRESET]) if PRESET in samples else None,
                        "images/s": sizes.batch_size / mine.median,
                        "compile s": compile_seconds.get(name),
                    }
                )
    return Table(
        "step",
        "Training step",
        f"{sizes.batch_size} images of {sizes.image_size} px, activations {sizes.activations}, SGD "
        "with momentum, state donated. The floor is forward + backward (twice for distillation) + "
        "optimizer, each measured separately. Held out: the preset, compared with the gradient of "
        "a batch of the same size, computed in every k-th step; the mean of k steps.",
        rows,
    )
