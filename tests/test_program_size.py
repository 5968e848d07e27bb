"""What the compiled programs consist of may not grow unnoticed. Nothing is timed.

The bounds are those of the compiler that the tests run with; a failure says what was found. Where a
change makes programs smaller, tighten them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dtnh_jax
from benchmarks.programs import compile_program

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),  # for optax.ema
    pytest.mark.skipif(
        jax.__version_info__ < (0, 10), reason="The bounds are those of newer compilers."
    ),
]

N_LEAVES = 40
# A kernel is larger than what a compiler keeps at hand for its own ends.
SHAPES = {"kernel": (256, 128), "bias": (128,)}


class Bound(NamedTuple):
    """The most that a program may have.

    Attributes:
        launches: Instructions that a usual run launches, for each leaf.
        instructions: Instructions in all, within fusions too, for each leaf.
        temporary: Memory besides arguments and outputs, in trees of params.
        messages: Collectives of a usual run, with every leaf cut over 8 devices.
        message_bytes: The size of their results, for each leaf.
        conditionals: Branches, of which the run waits for the one that it takes.
    """

    launches: float
    instructions: float
    temporary: float
    messages: int
    message_bytes: float
    conditionals: int


def rule(name, **choices):
    """From a tree, a rule's update and what it is called with."""
    return of_pair(getattr(dtnh_jax, name)(0.1, **choices))


def of_pair(tx):
    return lambda tree: (tx.update, dtnh_jax.GradientPair(tree, tree), state_of(tx, tree))


def of_l2_sp(tx):
    """The same, where the regularizer's gradient is computed on the way, in closed form."""

    def update(loss_grads, params, pretrained, state):
        pull = dtnh_jax.regularizers.l2_sp_gradient(params, pretrained)
        return tx.update(dtnh_jax.GradientPair(loss_grads, pull), state)

    return lambda tree: (update, tree, tree, tree, state_of(tx, tree))


def state_of(tx, tree):
    """The shapes of a state; averages lie as the leaves of their shapes do."""
    shardings = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(tree)}
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=shardings.get(leaf.shape)
        ),
        jax.eval_shape(tx.init, tree),
    )


# What `dtnh_sgd` is before its learning rate.
MOMENTA = optax.chain(
    dtnh_jax.transform_pair(loss=optax.trace(0.9), reg=optax.trace(0.9)),
    dtnh_jax.dtnh(0.1, scope="layer", on_conflict="gate", max_ratio=1.0),
)

PROGRAMS = {
    "weighted_sum": rule("weighted_sum", diagnostics=False),
    "dtnh global": rule("dtnh"),
    "dtnh layer": rule("dtnh", scope="layer"),
    "dtnh leaf": rule("dtnh", scope="leaf"),
    "dtnh element": rule("dtnh", scope="element"),
    "dtnh element, diagnostics=False": rule("dtnh", scope="element", diagnostics=False),
    "dtnh layer, reference=ema": rule("dtnh", scope="layer", reference=optax.ema(0.99)),
    "dtnh layer of L2-SP": of_l2_sp(dtnh_jax.dtnh(0.1, scope="layer")),
    "pcgrad layer": rule("pcgrad", scope="layer"),
    "decoupled layer": of_pair(
        dtnh_jax.decoupled(optax.sgd(0.1), 0.1, learning_rate=0.1, scope="layer")
    ),
    "momenta": of_pair(MOMENTA),
}

# About a tenth above what was found: launches and instructions change a little between compilers.
BOUNDS = {
    # One loop for each leaf, and the step's counter.
    "weighted_sum": Bound(1.1, 8, 0, 0, 0, 0),
    # Each leaf's three inner products take two loops each, and its change one; all sums are one
    # message of three numbers for each leaf.
    "dtnh global": Bound(8.2, 36, 0.02, 1, 12, 0),
    "dtnh layer": Bound(8.5, 44, 0.02, 1, 12, 0),
    "dtnh leaf": Bound(9.1, 43, 0.02, 1, 12, 0),
    # Its diagnostics keep the changes of all leaves, and send their squares too.
    "dtnh element": Bound(11.8, 74, 1.1, 1, 16, 0),
    # Without them no leaf is looked at twice.
    "dtnh element, diagnostics=False": Bound(1.1, 24, 0, 0, 0, 0),
    # The average is an output, not temporary.
    "dtnh layer, reference=ema": Bound(10.8, 55, 0.1, 1, 12, 0),
    # The regularizer's gradient is at least not kept for all leaves.
    "dtnh layer of L2-SP": Bound(9.1, 47, 0.55, 1, 12, 0),
    "pcgrad layer": Bound(9.1, 54, 0.02, 1, 12, 0),
    "decoupled layer": Bound(8.5, 47, 0.02, 1, 12, 0),
    # Two momenta more, which are outputs.
    "momenta": Bound(12.4, 83, 0.02, 1, 12, 0),
}


def tree_of(n_leaves, sharding=None):
    return {
        f"layer{i:02}": {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            for name, shape in SHAPES.items()
        }
        for i in range(n_leaves // 2)
    }


def measured(make, n_leaves=N_LEAVES):
    tree = tree_of(n_leaves)
    whole = compile_program(*make(tree))
    cut = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    usual, _ = compile_program(*make(tree_of(n_leaves, cut))).hlo.collectives()
    return Bound(
        launches=whole.hlo.launches() / n_leaves,
        instructions=whole.hlo.size() / n_leaves,
        temporary=whole.memory(sum(4 * leaf.size for leaf in jax.tree.leaves(tree)))["temporary"],
        messages=sum(usual.counts.values()),
        message_bytes=usual.n_bytes / n_leaves,
        conditionals=whole.hlo.count("conditional"),
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_no_larger_than_its_bound(name):
    found = measured(PROGRAMS[name])
    grown = {
        quantity: f"{now:.4g} > {bound}"
        for quantity, now, bound in zip(Bound._fields, found, BOUNDS[name], strict=True)
        if now > bound
    }
    assert not grown


@pytest.mark.parametrize("name", ["dtnh global", "dtnh layer"])
def test_twice_the_leaves_make_twice_the_program_and_as_many_messages(name):
    few, many = (measured(PROGRAMS[name], n_leaves) for n_leaves in (N_LEAVES // 2, N_LEAVES))
    assert many.instructions < 1.1 * few.instructions
    assert many.launches < 1.1 * few.launches
    assert many.messages == few.messages


if __name__ == "__main__":  # what the bounds are made from
    for of_program, make in PROGRAMS.items():
        print(of_program, measured(make))
