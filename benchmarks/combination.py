"""The time of each rule alone, on a given pair of gradients."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dtnh_jax
from benchmarks import trees
from benchmarks.config import Sizes
from benchmarks.machine import Ceilings
from benchmarks.programs import Program, compile_program
from benchmarks.report import Row, Table
from benchmarks.timing import compare
from dtnh_jax import regularizers

REG_WEIGHT = 0.1
BASE = "weighted_sum, diagnostics=False"
LITERAL = "a + λ b by jax.tree.map"
PRESET = "dtnh_sgd"
SGD = "weighted_sum, sgd with momentum"

SCOPES = ("global", "layer", "leaf", "element")
RIVALS = tuple(
    name
    for name in dtnh_jax.__all__
    if getattr(getattr(dtnh_jax, name), "__module__", None) == dtnh_jax.bloop.__module__
)
THEIR_RULES = ("bloop_direction", "pcgrad_direction")


class Inputs(NamedTuple):
    """Trees of the same structure: the pair, the parameters and the pre-trained parameters."""

    loss_grads: Any
    reg_grads: Any
    params: Any
    pretrained: Any


class Contestant(NamedTuple):
    """One way to combine two gradients.

    Attributes:
        function: The function to compile.
        arguments: Its arguments.
        passes: The number of trees that it reads or writes if no group fits into a cache; ``None``
            if unknown.
    """

    function: Callable[..., Any]
    arguments: Callable[[Inputs], tuple[Any, ...]]
    passes: int | None = None


def link(tx: optax.GradientTransformation, passes: int | None = None) -> Contestant:
    """A link of an Optax chain."""

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        pair = dtnh_jax.GradientPair(inputs.loss_grads, inputs.reg_grads)
        return pair, tx.init(inputs.params)

    return Contestant(tx.update, arguments, passes)


def closed_form(tx: optax.GradientTransformation, passes: int) -> Contestant:
    """A link of an Optax chain, with the gradient of L2-SP in closed form."""

    def update(loss_grads: Any, params: Any, pretrained: Any, state: Any) -> Any:
        pull = regularizers.l2_sp_gradient(params, pretrained)
        return tx.update(dtnh_jax.GradientPair(loss_grads, pull), state)

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        return inputs.loss_grads, inputs.params, inputs.pretrained, tx.init(inputs.params)

    return Contestant(update, arguments, passes)


def compared(tx: optax.GradientTransformationExtraArgs) -> Contestant:
    """A link of an Optax chain that compares with a third tree of gradients."""

    def update(pair: dtnh_jax.GradientPair, held_out_grads: Any, state: Any) -> Any:
        return tx.update(pair, state, held_out_grads=held_out_grads)

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        pair = dtnh_jax.GradientPair(inputs.loss_grads, inputs.reg_grads)
        return pair, inputs.params, tx.init(inputs.params)

    return Contestant(update, arguments)


def literal(a: Any, b: Any) -> Any:
    """The weighted sum without the library."""
    return jax.tree.map(lambda a, b: a + REG_WEIGHT * b, a, b)


def dtnh_by_hand(scope: Literal["global", "leaf"]) -> Callable[..., Any]:
    """The rule without the library, and without masks and diagnostics."""

    def update(a: Any, b: Any) -> Any:
        inner = jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)
        square = jax.tree.map(lambda a: jnp.sum(a * a), a)
        if scope == "global":
            of_all = optax.tree.sum(inner), optax.tree.sum(square)
            inner, square = (jax.tree.map(lambda _, x=x: x, a) for x in of_all)
        return jax.tree.map(
            lambda a, b, inner, square: a + REG_WEIGHT * (b - jnp.minimum(0, inner / square) * a),
            *(a, b, inner, square),
        )

    return update


def plain(function: Callable[[Any, Any], Any], passes: int) -> Contestant:
    """A function of the two gradients."""
    return Contestant(function, lambda inputs: (inputs.loss_grads, inputs.reg_grads), passes)


def ml_bloop() -> ModuleType | None:
    """The published BLOOP package, if it is installed."""
    try:
        return importlib.import_module("bloop.optim")
    except ImportError:  # not installed, or another package of that name
        return None


def theirs(published: ModuleType, direction: str) -> Contestant:
    """A rule of the published BLOOP package."""
    init = {"bloop_direction": "init_bloop", "pcgrad_direction": "init_pcgrad"}[direction]

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        state = getattr(published, init)(jax.random.key(0), inputs.loss_grads, lbda=REG_WEIGHT)
        return inputs.loss_grads, inputs.reg_grads, jax.tree.map(jnp.asarray, state)

    return Contestant(getattr(published, direction), arguments)


def contestants(*, all_rules: bool) -> dict[str, Contestant]:
    """The contestants by name."""
    bare = functools.partial(dtnh_jax.dtnh, REG_WEIGHT, diagnostics=False)
    found = {
        BASE: link(dtnh_jax.weighted_sum(REG_WEIGHT, diagnostics=False), 3),
        LITERAL: plain(literal, 3),
        "dtnh global by hand": plain(dtnh_by_hand("global"), 5),
        "dtnh leaf by hand": plain(dtnh_by_hand("leaf"), 5),
    }
    for scope in SCOPES:
        found[f"dtnh {scope}"] = link(dtnh_jax.dtnh(REG_WEIGHT, scope=scope), 5)
    found["dtnh element, diagnostics=False"] = link(bare(scope="element"), 3)
    published = ml_bloop()
    if published:
        for direction in THEIR_RULES:
            found[f"ml-bloop {direction}"] = theirs(published, direction)
    found["bloop global"] = link(dtnh_jax.bloop(REG_WEIGHT, decay=0.9))
    found["pcgrad global"] = link(dtnh_jax.pcgrad(REG_WEIGHT), 5)
    found["weighted_sum of L2-SP"] = closed_form(
        dtnh_jax.weighted_sum(REG_WEIGHT, diagnostics=False), 4
    )
    found["dtnh layer of L2-SP"] = closed_form(dtnh_jax.dtnh(REG_WEIGHT, scope="layer"), 7)
    if not all_rules:
        return found
    for scope in ("global", "layer", "leaf"):
        found[f"dtnh {scope}, diagnostics=False"] = link(bare(scope=scope), 5)
    found["weighted_sum"] = link(dtnh_jax.weighted_sum(REG_WEIGHT, scope="layer"), 5)
    for rule in RIVALS:
        found[f"{rule} layer"] = link(getattr(dtnh_jax, rule)(REG_WEIGHT, scope="layer"))
    ema = optax.ema(0.99, debias=False)
    found["dtnh layer, reference=ema"] = link(
        dtnh_jax.dtnh(REG_WEIGHT, scope="layer", reference=ema)
    )
    sgd = optax.sgd(0.1)
    found["decoupled layer"] = link(
        dtnh_jax.decoupled(sgd, REG_WEIGHT, learning_rate=0.1, scope="layer"), 5
    )
    # For comparison with the preset, which includes momenta.
    found["dtnh layer, momentum"] = link(
        optax.chain(dtnh_jax.dtnh(REG_WEIGHT, scope="layer"), optax.trace(0.9))
    )
    found[PRESET] = link(dtnh_jax.dtnh_sgd(0.1, REG_WEIGHT))
    found[SGD] = link(
        optax.chain(
            dtnh_jax.weighted_sum(REG_WEIGHT, diagnostics=False), optax.sgd(0.1, momentum=0.9)
        )
    )
    found["bounded sum layer"] = link(
        dtnh_jax.dtnh(REG_WEIGHT, on_conflict="keep", max_ratio=1.0, scope="layer")
    )
    found["dtnh global, reference=held_out"] = compared(
        dtnh_jax.dtnh(REG_WEIGHT, reference="held_out")
    )
    return found


@functools.cache
def program(name: str, of_contestant: str) -> Program:
    """A compiled contestant, on one tree."""
    inputs = Inputs(*(trees.tree(name) for _ in Inputs._fields))
    contestant = contestants(all_rules=True)[of_contestant]
    return compile_program(contestant.function, *jax.eval_shape(contestant.arguments, inputs))


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Times the contestants."""
    rows: list[Row] = []
    for name in sizes.trees:
        all_rules = name in sizes.all_rules_on
        shapes = trees.tree(name)
        running = contestants(all_rules=all_rules)
        inputs = Inputs(*(trees.random_like(shapes, seed) for seed, _ in enumerate(Inputs._fields)))
        calls = {
            of_contestant: functools.partial(
                program(name, of_contestant).compiled, *contestant.arguments(inputs)
            )
            for of_contestant, contestant in running.items()
        }
        samples = compare(calls, seconds=sizes.seconds, repetitions=sizes.repetitions)
        for of_contestant, contestant in running.items():
            mine = samples[of_contestant]
            n_bytes = contestant.passes and contestant.passes * trees.n_bytes(shapes)
            row: Row = {
                "tree": name,
                "leaves": len(jax.tree.leaves(shapes)),
                "M numbers": trees.n_bytes(shapes) / 4e6,
                "contestant": of_contestant,
                **mine.cells(),
                "× weighted sum": mine.over(samples[BASE]),
                "passes": contestant.passes,
                "GB/s": n_bytes and n_bytes / mine.median / 1e9,
                "× floor": n_bytes and mine.median / (n_bytes / ceilings.triad),
            }
            for direction in THEIR_RULES:
                their = samples.get(f"ml-bloop {direction}")
                row[f"× {direction}"] = their and mine.over(their)
            row["launches"] = program(name, of_contestant).hlo.launches()
            row["compile s"] = program(name, of_contestant).compile_seconds
            rows.append(row)
    return Table(
        "combination",
        "The combination alone",
        "The time of each rule on a given pair of gradients. Ratios are medians over repetitions; "
        "the floor is passes × bytes of the tree / measured triad bandwidth.",
        rows,
    )
