"""A tiny fine-tuning on any devices; as a script, one of two processes that do it together."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import is_shape, random_tree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dtnh_jax
from dtnh_jax import regularizers

SHAPES = {
    "one": {"kernel": (8, 16), "bias": (16,)},
    "two": {"kernel": (16, 8)},
    "head": {"scale": (8,)},
}
REPLICATED = jax.tree.map(lambda _: P(), SHAPES, is_leaf=is_shape)
# Fully sharded data parallel: the devices that share the batch share the parameters too.
SHARDED = {
    "one": {"kernel": P(None, "data"), "bias": P("data")},
    "two": {"kernel": P("data", None)},
    "head": {"scale": P(None)},
}


def in_chain(rule):
    return optax.chain(rule, optax.sgd(0.1, momentum=0.9))


def pulled(pretrained):
    """L2-SP beside the optimizer, which is given the loss gradient alone."""
    of_loss = optax.stateless(lambda pair, params: pair[0])
    mask = {"one": True, "two": True, "head": False}
    pull = dtnh_jax.add_l2_sp(pretrained, 0.5, scope="layer", mask=mask)
    return optax.chain(of_loss, pull, optax.sgd(0.1, momentum=0.9))


OPTIMIZERS = {
    "global": in_chain(dtnh_jax.dtnh(0.5)),
    "layer": in_chain(dtnh_jax.dtnh(0.5, scope="layer")),
    "element": in_chain(dtnh_jax.dtnh(0.5, scope="element")),
    "average": in_chain(dtnh_jax.dtnh(0.5, scope="leaf", reference=optax.ema(0.9))),
    "pcgrad": in_chain(dtnh_jax.pcgrad(0.5, scope="layer")),
    "decoupled": dtnh_jax.decoupled(optax.adam(0.01), 0.5, learning_rate=0.1, scope="layer"),
    "pull to init": pulled("init"),
    "pull to argument": pulled("argument"),
    "accumulated": dtnh_jax.accumulate_pairs(in_chain(dtnh_jax.dtnh(0.5, scope="layer")), 2),
}


def initial_params():
    return random_tree(0, shapes=SHAPES, scale=0.3)


def batches():
    """Inputs and targets of six steps."""
    x = random_tree(1, shapes=(6, 16, 8))
    return x, x @ random_tree(2, shapes=(8, 8))


def loss(params, x, y):
    """The mean squared error of a small network."""
    hidden = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"][None])
    outputs = hidden @ params["two"]["kernel"] * params["head"]["scale"][None]
    return jnp.mean((outputs - y) ** 2)


def reg(params, pretrained):
    """L2-SP on all but the head."""
    return regularizers.l2_sp(params, {**pretrained, "head": None})


@dtnh_jax.value_and_gradient_pair
def objective(params, pretrained, x, y):
    return loss(params, x, y), reg(params, pretrained)


def placed(tree, mesh, specs):
    """NumPy arrays as arrays on the devices of ``mesh``, of which each process has its own."""

    def place(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    return jax.tree.map(place, tree, specs)


def trained(tx, mesh, specs, objective=objective, compiled=jax.jit):
    """Params and optimizer state after six steps from the pre-trained params."""

    @compiled
    def step(params, opt_state, pretrained, x, y):
        _, pair = objective(params, pretrained, x, y)
        updates, opt_state = tx.update(pair, opt_state, params, source_params=pretrained)
        return optax.apply_updates(params, updates), opt_state

    params = pretrained = placed(initial_params(), mesh, specs)
    opt_state = jax.jit(tx.init)(params)
    for batch in zip(*batches(), strict=True):
        batch = placed(batch, mesh, (P("data"), P("data")))
        params, opt_state = step(params, opt_state, pretrained, *batch)
    return params, opt_state


def as_numpy(tree, mesh):
    """The whole of each array, whichever processes hold the parts of it."""
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.tree.map(np.asarray, gathered)


def one_of_two_processes(address, process, path, names):
    """Trains together with the other process, and writes the params that each optimizer made."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, process, initialization_timeout=20)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert (len(mesh.local_devices), mesh.size) == (2, 4)
    params = {name: trained(OPTIMIZERS[name], mesh, SHARDED)[0] for name in names}
    leaves = jax.tree.leaves(as_numpy(params, mesh))
    np.savez(path, **{str(index): leaf for index, leaf in enumerate(leaves)})
    jax.distributed.shutdown()


if __name__ == "__main__":
    address, process, path, *names = sys.argv[1:]
    one_of_two_processes(address, int(process), path, names)
