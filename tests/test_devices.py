"""Many devices are one: the same numbers however arrays and programs lie over them."""

import functools
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training
from helpers import random_tree, relative_error
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tiny_training import OPTIMIZERS, REPLICATED, SHARDED, loss, placed, reg, trained

import dtnh_jax

if hasattr(jax, "shard_map"):
    shard_map = jax.shard_map
else:
    from jax.experimental.shard_map import shard_map

pytestmark = pytest.mark.usefixtures("standard_promotion")  # for optax's averages

average = functools.partial(jax.lax.pmean, axis_name="data")


def first_devices(n):
    return Mesh(np.array(jax.devices()[:n]), ("data",))


@functools.cache
def trained_alone(name):
    params, state = trained(OPTIMIZERS[name], first_devices(1), REPLICATED)
    assert dtnh_jax.conflict_stats(state).total.removed > 0.01  # or every rule is the sum
    return params, state


def moved(params):
    return jax.tree.map(lambda w, w0: np.asarray(w) - w0, params, tiny_training.initial_params())


def assert_is_one_device(name, params, state):
    wanted, wanted_state = trained_alone(name)
    assert relative_error(moved(params), moved(wanted)) <= 1e-6
    got, wanted = (dtnh_jax.conflict_stats(each).per_group for each in (state, wanted_state))
    np.testing.assert_allclose(got.cosine, wanted.cosine, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.removed, wanted.removed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("specs", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_jit_over_sharded_arrays(specs, name):
    assert_is_one_device(name, *trained(OPTIMIZERS[name], first_devices(8), specs))


@pytest.mark.skipif(
    not (hasattr(jax, "set_mesh") and hasattr(jax.sharding, "reshard")),
    reason="this JAX has no jax.set_mesh and jax.sharding.reshard",
)
@pytest.mark.parametrize("name", ["layer", "average", "decoupled", "accumulated"])
def test_jit_with_sharding_in_types(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))

    @dtnh_jax.value_and_gradient_pair
    def objective(params, pretrained, x, y):
        return loss(jax.sharding.reshard(params, P()), x, y), reg(params, pretrained)

    with jax.set_mesh(mesh):
        params, state = trained(OPTIMIZERS[name], mesh, SHARDED, objective)
        assert jax.tree.map(lambda x: jax.typeof(x).sharding.spec, params) == SHARDED
    assert_is_one_device(name, params, state)


@pytest.mark.parametrize("name", ["layer", "element", "average", "decoupled", "accumulated"])
def test_shard_map_with_the_mean_in_the_objective(name):
    """Its check of what varies, on by default, lets JAX differentiate through the mean."""
    mesh = first_devices(8)

    @dtnh_jax.value_and_gradient_pair
    def objective(params, pretrained, x, y):
        return average(loss(params, x, y)), reg(params, pretrained)

    def compiled(step):
        in_specs = (P(), P(), P(), P("data"), P("data"))
        return jax.jit(shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=P()))

    params, state = trained(OPTIMIZERS[name], mesh, REPLICATED, objective, compiled)
    assert_is_one_device(name, params, state)


@pytest.mark.parametrize("name", ["layer", "accumulated"])
def test_pmap_with_the_mean_of_the_pair(name):
    def objective(*args):
        values, pair = tiny_training.objective(*args)
        return values, average(pair)

    def compiled(step):
        mapped = jax.pmap(step, "data", in_axes=(None, None, None, 0, 0), out_axes=None)
        return lambda *args: mapped(*args[:3], *(x.reshape(8, 2, 8) for x in args[3:]))

    params, state = trained(OPTIMIZERS[name], first_devices(8), REPLICATED, objective, compiled)
    assert_is_one_device(name, params, state)


def pairs_of_devices():
    return [jax.tree.map(jnp.asarray, random_tree(i, shapes={"w": (8, 6)})) for i in (0, 100)]


@pytest.mark.parametrize("scope", ["global", "element"])
@pytest.mark.parametrize("reference", ["batch", optax.ema(0.9)], ids=["batch", "ema"])
def test_a_model_on_each_device(scope, reference):
    """Inside shard_map, of gradients that vary over the devices, a rule is a loop over them."""
    tx = dtnh_jax.dtnh(0.5, scope=scope, reference=reference)
    pair = pairs_of_devices()

    def directions(loss_grads, reg_grads):
        return tx.update((loss_grads, reg_grads), tx.init(loss_grads))[0]

    mapped = shard_map(directions, mesh=first_devices(8), in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(mapped)(*pair)["w"]
    for i in range(8):
        alone = jax.jit(directions)(*jax.tree.map(lambda x, i=i: x[i], pair))["w"]
        np.testing.assert_allclose(got[i], alone, rtol=1e-5, atol=1e-6)


def by_shard_map(method):
    def of_one(pair):
        return method(jax.tree.map(lambda x: x[0], pair))

    mesh = first_devices(8)
    return jax.jit(shard_map(of_one, mesh=mesh, in_specs=P("data"), out_specs=P()))


def by_pmap(method):
    return jax.pmap(method, "data", out_axes=None)


@pytest.mark.parametrize("mapped", [by_shard_map, by_pmap])
def test_the_mean_of_projections_is_not_the_projection_of_the_mean(mapped):
    tx = dtnh_jax.dtnh(0.5)
    pair = tuple(pairs_of_devices())
    state = tx.init(jax.tree.map(lambda x: x[0], pair[0]))
    wanted, _ = tx.update(jax.tree.map(lambda x: x.mean(0), pair), state)
    right = mapped(lambda pair: tx.update(average(pair), state)[0])(pair)
    wrong = mapped(lambda pair: average(tx.update(pair, state)[0]))(pair)
    assert relative_error(right, wanted) <= 1e-6
    assert relative_error(wrong, wanted) >= 0.01


COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\("
)


def collectives(text):
    """Operation and type of each collective."""
    return [match.group(2, 1) for match in COLLECTIVE.finditer(text)]


N_SHARDED = 3
SCALARS = {
    **{name: [3 * N_SHARDED] for name in OPTIMIZERS},
    # The diagnostics alone ask for these: the inner products, and what was removed of each leaf.
    "element": [4 * N_SHARDED],
    "silent element": [],
    "silent sum": [],
}


@pytest.mark.parametrize("name", SCALARS)
def test_devices_exchange_scalars_alone_and_all_at_once(name):
    silent = {
        "silent element": dtnh_jax.dtnh(0.5, scope="element", diagnostics=False),
        "silent sum": dtnh_jax.weighted_sum(0.5, diagnostics=False),
    }
    tx = OPTIMIZERS.get(name) or silent[name]
    mesh = first_devices(8)
    a, b = (placed(random_tree(i, shapes=tiny_training.SHAPES), mesh, SHARDED) for i in (0, 100))
    update = functools.partial(tx.update, source_params=b)
    compiled = jax.jit(update).lower((a, b), tx.init(a), a).compile()
    found = collectives(compiled.as_text())
    assert {operation for operation, _ in found} <= {"all-reduce"}
    types = [re.findall(r"\w+\[[\d,]*\]", types) for _, types in found]
    assert {each for group in types for each in group} <= {"f32[]"}
    assert sum(map(len, types)) == sum(SCALARS[name])
    if jax.__version_info__ >= (0, 10):  # XLA combined none on CPU in JAX 0.6
        assert sorted(map(len, types)) == sorted(SCALARS[name])
    for x, sharding in zip(
        jax.tree.leaves(a), jax.tree.leaves(compiled.output_shardings[0]), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_two_processes(tmp_path):
    names = ["layer", "average", "pull to init", "pull to argument"]
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    address = f"localhost:{free_port()}"
    processes = []
    try:
        for i in range(2):
            command = [sys.executable, tiny_training.__file__, address, str(i)]
            command += [str(tmp_path / f"{i}.npz"), *names]
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        for process in processes:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output.decode()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    alone = {name: trained(OPTIMIZERS[name], first_devices(4), SHARDED)[0] for name in names}
    for i in range(2):
        leaves = np.load(tmp_path / f"{i}.npz").values()
        together = jax.tree.unflatten(jax.tree.structure(alone), leaves)
        for name in names:
            assert relative_error(moved(together[name]), moved(alone[name])) <= 1e-6
