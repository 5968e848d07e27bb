"""What the compiled programs consist of may not grow unnoticed. Nothing is timed.

How many instructions a formula takes, and how many of them are launched, differs between versions
of XLA. So they are counted beyond those of a baseline, the formula by hand, which the same XLA
compiles. Traffic, memory and messages are those of the algorithm, and are bounded as they are. A
failure says what was found. Where a change makes programs smaller, tighten the bounds.
"""

import functools
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
        jax.__version_info__ < (0, 10), reason="The bounds hold for JAX 0.10 and newer."
    ),
]

N_LEAVES = 40
# A kernel is larger than what a compiler keeps at hand for its own ends.
SHAPES = {"kernel": (256, 128), "bias": (128,)}


class Size(NamedTuple):
    """What a program consists of.

    Attributes:
        launches: Instructions that a usual run launches, for each leaf.
        instructions: Instructions in all, within fusions too, for each leaf.
        traffic: Memory that is read and written, in trees of params.
        temporary: Memory besides arguments and outputs, in trees of params.
        messages: Collectives of a usual run, with every leaf cut over 8 devices.
        message_bytes: The size of their results, for each leaf.
        conditionals: Branches, of which the run waits for the one that it takes.
    """

    launches: float
    instructions: float
    traffic: float
    temporary: float
    messages: int
    message_bytes: float
    conditionals: int


class Bound(NamedTuple):
    """The most that a program may have.

    Attributes:
        baseline: The program by hand that it is held against.
        launches: Beyond those of the baseline.
        instructions: Likewise.
        traffic: Absolute, as are all that follow.
        temporary: See `Size`.
        messages: See `Size`.
        message_bytes: See `Size`.
        conditionals: See `Size`.
    """

    baseline: str
    launches: float
    instructions: float
    traffic: float
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


def sum_by_hand(tree):
    """``a + λ b``."""
    return lambda a, b: jax.tree.map(lambda x, y: x + 0.1 * y, a, b), tree, tree


def projection_by_hand(leaves_of_groups):
    """``a + λ (b - min(⟨a,b⟩, 0) / ‖a‖² a)`` in each group, and the inner products as diagnostics.

    Args:
        leaves_of_groups: From how many leaves there are, the indices of the leaves of each group.
    """

    def total(xs, ys):
        products = jnp.stack([jnp.sum(x * y) for x, y in zip(xs, ys, strict=True)])
        # The library has this barrier too: it sums once, not anew in the fusion of each leaf.
        return jnp.sum(jax.lax.optimization_barrier(products)) if len(xs) > 1 else products[0]

    def update(a, b):
        a, treedef = jax.tree.flatten(a)
        b = jax.tree.leaves(b)
        directions, sums = [None] * len(a), []
        for group in leaves_of_groups(len(a)):
            of_a, of_b = [a[i] for i in group], [b[i] for i in group]
            a_sq, inner, b_sq = total(of_a, of_a), total(of_a, of_b), total(of_b, of_b)
            c = jnp.minimum(inner, 0) / a_sq
            for i in group:
                directions[i] = a[i] + 0.1 * (b[i] - c * a[i])
            sums.append(jnp.stack([a_sq, inner, b_sq]))
        return treedef.unflatten(directions), jnp.stack(sums)

    return lambda tree: (update, tree, tree)


BASELINES = {
    "sum": sum_by_hand,
    "global": projection_by_hand(lambda n: [range(n)]),
    "layer": projection_by_hand(lambda n: [range(i, i + len(SHAPES)) for i in range(0, n, 2)]),
    "leaf": projection_by_hand(lambda n: [[i] for i in range(n)]),
}

# Launches: 0.4 above what was found (0.1 where nothing is summed), and so less than what one more
# loop over every second leaf takes. Instructions and traffic: a little above what was found.
BOUNDS = {
    # Nothing but the sum, and the step's counter.
    "weighted_sum": Bound("sum", 0.1, 4, 3.02, 0, 0, 0, 0),
    # The square roots and quotients of a group's geometry are a small kernel each: they are what is
    # launched beyond the formula by hand, which has no norms. That nothing is added but what is
    # finite takes a few instructions, and no kernel.
    # Traffic: a is read for its square, a and b for their product, b for its square; both again for
    # the direction, which is written. All sums are one message of three numbers for each leaf.
    "dtnh global": Bound("global", 0.55, 7.5, 7.1, 0.02, 1, 12, 0),
    "dtnh layer": Bound("layer", 0.7, 14.5, 7.1, 0.02, 1, 12, 0),
    "dtnh leaf": Bound("leaf", 0.25, 20.5, 7.1, 0.02, 1, 12, 0),
    # Its diagnostics keep the changes of all leaves, and send their squares too.
    "dtnh element": Bound("global", 3.4, 42, 13.2, 1.1, 1, 16, 0),
    # Without them no leaf is looked at twice.
    "dtnh element, diagnostics=False": Bound("sum", 0.1, 16, 3.02, 0, 0, 0, 0),
    # The average is an output, not temporary.
    "dtnh layer, reference=ema": Bound("layer", 2.8, 25, 13.1, 0.1, 1, 12, 0),
    # The regularizer's gradient is at least not kept for all leaves.
    "dtnh layer of L2-SP": Bound("layer", 1.2, 17.5, 10.1, 0.55, 1, 12, 0),
    "pcgrad layer": Bound("layer", 2.6, 32, 7.1, 0.02, 1, 12, 0),
    "decoupled layer": Bound("layer", 0.7, 18, 7.1, 0.02, 1, 12, 0),
    # Two momenta more, which are outputs: each reads a gradient and a momentum, and writes one.
    "momenta": Bound("layer", 5.6, 99, 13.1, 0.02, 1, 12, 0),
}


def tree_of(n_leaves, sharding=None):
    return {
        f"layer{i:02}": {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            for name, shape in SHAPES.items()
        }
        for i in range(n_leaves // 2)
    }


def whole_size(make, n_leaves=N_LEAVES):
    """The size of a program on one device."""
    tree = tree_of(n_leaves)
    program = compile_program(*make(tree))
    n_bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(tree))
    return Size(
        launches=program.hlo.launches() / n_leaves,
        instructions=program.hlo.size() / n_leaves,
        traffic=program.compiled.cost_analysis()["bytes accessed"] / n_bytes,
        temporary=program.memory(n_bytes)["temporary"],
        messages=0,
        message_bytes=0,
        conditionals=program.hlo.count("conditional"),
    )


@functools.cache
def baseline_size(name):
    return whole_size(BASELINES[name])


def measured(make, n_leaves=N_LEAVES):
    """The size of a program, and its messages where it is cut over 8 devices."""
    cut = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    usual, _ = compile_program(*make(tree_of(n_leaves, cut))).hlo.collectives()
    return whole_size(make, n_leaves)._replace(
        messages=sum(usual.counts.values()), message_bytes=usual.n_bytes / n_leaves
    )


def beyond(size, baseline):
    """A size whose launches and instructions are those beyond a baseline's."""
    return size._replace(
        launches=size.launches - baseline.launches,
        instructions=size.instructions - baseline.instructions,
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_no_larger_than_its_bound(name):
    baseline, *bounds = BOUNDS[name]
    found = beyond(measured(PROGRAMS[name]), baseline_size(baseline))
    grown = {
        quantity: f"{now:.4g} > {bound}"
        for quantity, now, bound in zip(Size._fields, found, bounds, strict=True)
        if now > bound
    }
    assert not grown


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_the_traffic_of_its_formula(name):
    # One that is worse than its formula would hide what a program has too much.
    assert baseline_size(name).traffic < (3.02 if name == "sum" else 7.1)


@pytest.mark.parametrize("name", ["dtnh global", "dtnh layer"])
def test_twice_the_leaves_make_twice_the_program_and_as_many_messages(name):
    few, many = (measured(PROGRAMS[name], n_leaves) for n_leaves in (N_LEAVES // 2, N_LEAVES))
    assert many.instructions < 1.1 * few.instructions
    assert many.launches < 1.1 * few.launches
    assert many.messages == few.messages


if __name__ == "__main__":  # what the bounds are made from
    for of_program, make in PROGRAMS.items():
        print(of_program, beyond(measured(make), baseline_size(BOUNDS[of_program].baseline)))
