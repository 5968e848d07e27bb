"""Sharded leaves, and what the compiled program says to other devices about them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree, relative_error
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dtnh_jax

SHAPES = {
    "one": {"kernel": (16, 8), "bias": (8,)},
    "two": {"kernel": (8, 16), "bias": (16,)},
    "scale": (),
}
SPECS = {
    "one": {"kernel": P("model", None), "bias": P("model")},
    "two": {"kernel": P(None, "model"), "bias": P()},
    "scale": P(),
}


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:8]), ("model",))


def placed(mesh, seed):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        random_tree(seed, shapes=SHAPES),
        SPECS,
    )


@pytest.mark.parametrize("scope", ["global", "layer", "leaf", "element"])
def test_eight_devices_are_one(mesh, scope):
    tx = dtnh_jax.dtnh(0.5, scope=scope)
    alone = [jax.tree.map(jnp.asarray, random_tree(i, shapes=SHAPES)) for i in (0, 100)]
    wanted, wanted_state = jax.jit(tx.update)(tuple(alone), tx.init(alone[0]))
    a, b = placed(mesh, 0), placed(mesh, 100)
    got, state = jax.jit(tx.update)((a, b), tx.init(a))
    assert relative_error(got, wanted) <= 1e-6
    jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail("moved"), got, a
    )
    np.testing.assert_allclose(
        dtnh_jax.conflict_stats(state).per_group.cosine,
        dtnh_jax.conflict_stats(wanted_state).per_group.cosine,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("scope", ["global", "layer", "leaf", "element"])
def test_no_leaf_is_gathered(mesh, scope):
    """Other devices hear of a leaf only its share of the inner products."""
    tx = dtnh_jax.dtnh(0.5, scope=scope, diagnostics=False)
    a, b = placed(mesh, 0), placed(mesh, 100)
    text = jax.jit(tx.update).lower((a, b), tx.init(a)).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    reduced = [
        line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line
    ]
    assert bool(reduced) is (scope != "element")
    shapes = [shape for line in reduced for shape in re.findall(r"f32\[([\d,]*)\]", line)]
    assert set(shapes) <= {""}


def test_inside_shard_map_after_the_mean(mesh):
    """Data parallel by hand: average both trees first, then project once."""
    tx = dtnh_jax.dtnh(0.5, scope="layer")
    a, b = (jnp.asarray(random_tree(i, shapes=(8, 6))) for i in (0, 100))
    state = tx.init({"w": a[0]})

    def update(a, b):
        pair = jax.lax.pmean(({"w": a[0]}, {"w": b[0]}), "model")
        return tx.update(pair, state)[0]["w"]

    shard_map = jax.shard_map if hasattr(jax, "shard_map") else _old_shard_map()
    mapped = shard_map(update, mesh=mesh, in_specs=(P("model"), P("model")), out_specs=P())
    wanted, _ = tx.update(({"w": a.mean(0)}, {"w": b.mean(0)}), state)
    np.testing.assert_allclose(jax.jit(mapped)(a, b), wanted["w"], rtol=1e-5, atol=1e-6)


def _old_shard_map():
    from jax.experimental.shard_map import shard_map

    return shard_map
