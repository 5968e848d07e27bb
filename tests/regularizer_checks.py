"""What every regularizer is held against: float64, finite differences, eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import relative_error, wide
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads


def numerical_gradient(oracle, tree, step=1e-5):
    """Central differences of an oracle in NumPy's float64, number by number."""
    leaves, treedef = jax.tree.flatten(wide(tree))
    grads = []
    for index, leaf in enumerate(leaves):
        grad = np.zeros_like(leaf)
        for place in np.ndindex(leaf.shape):
            values = []
            for sign in (1, -1):
                moved = leaf.copy()
                moved[place] += sign * step
                values.append(
                    oracle(treedef.unflatten([*leaves[:index], moved, *leaves[index + 1 :]]))
                )
            grad[place] = (values[0] - values[1]) / (2 * step)
        grads.append(grad)
    return treedef.unflatten(grads)


def assert_agrees(fun, oracle, x, gradient=None, nonzero=True):
    """Value and gradient are those of the oracle to 1e-6, and the gradient is there at all."""
    value, grads = jax.jit(jax.value_and_grad(fun))(x)
    np.testing.assert_allclose(value, oracle(wide(x)), rtol=1e-6)
    wanted = numerical_gradient(oracle, x) if gradient is None else gradient
    assert relative_error(grads, wanted) <= 1e-6
    if nonzero:
        assert all(np.any(np.asarray(grad) != 0) for grad in jax.tree.leaves(grads))
    return value, grads


def assert_zero_there(fun, x, atol=0.0):
    """Value and gradient are zero, not NaN."""
    value, grads = jax.jit(jax.value_and_grad(fun))(x)
    np.testing.assert_allclose(value, 0, atol=atol)
    for grad in jax.tree.leaves(grads):
        np.testing.assert_allclose(np.asarray(grad, np.float32), 0, atol=atol)


def assert_smooth(fun, x):
    """The derivative of the derivative is one."""
    check_grads(jax.jit(fun), (jax.tree.map(jnp.asarray, x),), order=2, modes=("rev",), rtol=0.02)


def on_eight_devices(tree):
    """The tree, each leaf with its first axis over eight devices."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), tree)


def assert_same_on_eight_devices(fun, *args):
    """Value and gradient by the first argument do not depend on where the arguments lie."""
    value_and_grad = jax.jit(jax.value_and_grad(fun))
    alone_value, alone = value_and_grad(*args)
    placed = on_eight_devices(args)
    value, grads = value_and_grad(*placed)
    np.testing.assert_allclose(value, alone_value, rtol=1e-6)
    assert relative_error(grads, alone) <= 1e-6
    for grad, x in zip(jax.tree.leaves(grads), jax.tree.leaves(placed[0]), strict=True):
        assert len(grad.sharding.device_set) == len(x.sharding.device_set) == 8


def assert_half_is_close(fun, x):
    """bfloat16 in: a float32 value near that of the numbers widened, a bfloat16 gradient."""
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), x)
    value_and_grad = jax.jit(jax.value_and_grad(fun))
    value, grads = value_and_grad(half)
    wanted, wanted_grads = value_and_grad(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert all(grad.dtype == jnp.bfloat16 for grad in jax.tree.leaves(grads))
    assert relative_error(grads, wanted_grads) <= 5e-3
