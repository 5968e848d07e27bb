"""The update of each rule alone, on a given pair of gradients."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
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

SCOPES = ("global", "layer", "leaf", "element")
RIVALS = (
    "bloop",
    "gradient_cosine",
    "dynamic_barrier",
    "agem",
    "pcgrad",
    "upgrad",
    "mgda",
    "imtl_g",
    "cagrad",
    "config",
)
THEIR_RULES = ("bloop_direction", "pcgrad_direction")


class Contestant(NamedTuple):
    """One way to combine two gradients.

    Attributes:
        make: From the inputs, the function to compile and its arguments.
        passes: How many trees it must read or write, if no group fits into a cache; ``None`` where
            nobody has counted.
    """

    make: Callable[["Inputs"], tuple[Callable[..., Any], tuple[Any, ...]]]
    passes: int | None = None


class Inputs(NamedTuple):
    """Trees of one structure: the pair, and the weights now and before."""

    loss_grads: Any
    reg_grads: Any
    params: Any
    pretrained: Any


def link(tx: optax.GradientTransformation, passes: int | None = None) -> Contestant:
    """A link of an Optax chain."""

    def make(inputs: Inputs) -> Any:
        pair = dtnh_jax.GradientPair(inputs.loss_grads, inputs.reg_grads)
        return tx.update, (pair, tx.init(inputs.params))

    return Contestant(make, passes)


def closed_form(tx: optax.GradientTransformation, passes: int) -> Contestant:
    """A link of an Optax chain, fed with the gradient of L2-SP in closed form."""

    def make(inputs: Inputs) -> Any:
        def update(loss_grads: Any, params: Any, pretrained: Any, state: Any) -> Any:
            pull = regularizers.l2_sp_gradient(params, pretrained)
            return tx.update(dtnh_jax.GradientPair(loss_grads, pull), state)

        arguments = inputs.loss_grads, inputs.params, inputs.pretrained
        return update, (*arguments, tx.init(inputs.params))

    return Contestant(make, passes)


def literal(inputs: Inputs) -> Any:
    """What one writes by hand."""

    def update(a: Any, b: Any) -> Any:
        return jax.tree.map(lambda a, b: a + REG_WEIGHT * b, a, b)

    return update, (inputs.loss_grads, inputs.reg_grads)


def ml_bloop() -> ModuleType | None:
    """The published code of BLOOP, if it is installed."""
    try:
        return importlib.import_module("bloop.optim")
    except ImportError:  # none, or another package of that name
        return None


def theirs(published: ModuleType, direction: str) -> Contestant:
    """A rule of the published code of BLOOP."""
    init = {"bloop_direction": "init_bloop", "pcgrad_direction": "init_pcgrad"}[direction]

    def make(inputs: Inputs) -> Any:
        state = getattr(published, init)(jax.random.key(0), inputs.loss_grads, lbda=REG_WEIGHT)
        return getattr(published, direction), (inputs.loss_grads, inputs.reg_grads, state)

    return Contestant(make)


def contestants(*, all_rules: bool) -> dict[str, Contestant]:
    """The contestants by name."""
    bare = functools.partial(dtnh_jax.dtnh, REG_WEIGHT, diagnostics=False)
    found = {
        BASE: link(dtnh_jax.weighted_sum(REG_WEIGHT, diagnostics=False), 3),
        LITERAL: Contestant(literal, 3),
    }
    for scope in SCOPES:
        found[f"dtnh {scope}"] = link(dtnh_jax.dtnh(REG_WEIGHT, scope=scope), 5)
    found["dtnh element, diagnostics=False"] = link(bare(scope="element"), 3)
    published = ml_bloop()
    if published:
        for direction in THEIR_RULES:
            found[f"ml-bloop {direction}"] = theirs(published, direction)
    found["bloop global"] = link(dtnh_jax.bloop(REG_WEIGHT, ema=0.1))
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
    return found


@functools.cache
def programs(name: str, all_rules: bool) -> dict[str, Program]:
    """The compiled contestants on one tree."""
    shapes = trees.tree(name)
    inputs = Inputs(*(trees.random_like(shapes, seed) for seed in range(4)))
    made = {}
    for of_contestant, contestant in contestants(all_rules=all_rules).items():
        function, arguments = contestant.make(inputs)
        made[of_contestant] = compile_program(function, *arguments)
    return made


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """The table of times."""
    rows: list[Row] = []
    for name in sizes.trees:
        all_rules = name in sizes.all_rules_on
        shapes = trees.tree(name)
        compiled = programs(name, all_rules)
        samples = compare(compiled, seconds=sizes.seconds, repetitions=sizes.repetitions)
        for of_contestant, contestant in contestants(all_rules=all_rules).items():
            mine = samples[of_contestant]
            floor = contestant.passes and contestant.passes * trees.n_bytes(shapes) / ceilings.triad
            row: Row = {
                "tree": name,
                "leaves": len(jax.tree.leaves(shapes)),
                "M numbers": trees.n_bytes(shapes) / 4e6,
                "contestant": of_contestant,
                **mine.cells(),
                "× weighted sum": mine.over(samples[BASE]),
                "passes": contestant.passes,
                "× floor": floor and mine.median / floor,
            }
            for direction in THEIR_RULES:
                their = samples.get(f"ml-bloop {direction}")
                row[f"× {direction}"] = their and mine.over(their)
            row["launches"] = compiled[of_contestant].hlo.launches()
            row["compile s"] = compiled[of_contestant].compile_seconds
            rows.append(row)
    return Table(
        "combination",
        "The combination alone",
        "The update of each rule on a given pair. Ratios are medians over repetitions; the floor is "
        "passes × bytes of the tree at the measured triad bandwidth.",
        rows,
    )
