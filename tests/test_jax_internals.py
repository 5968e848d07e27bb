"""What is used of JAX without a public name: tested on 0.6.0 and on 0.12, the ends of our range."""

import jax
import jax.numpy as jnp
import optax
import pytest

from dtnh_jax import _jax_internals


def test_the_leaves_that_a_function_depends_on():
    def fun(tree):
        used, _, inside = tree
        return jnp.sum(used) + jax.jit(lambda x: 2 * x[0])(inside)

    assert _jax_internals.depends_on(fun, (jnp.ones(2), jnp.ones(3), jnp.ones(4))) == [
        True,
        False,
        True,
    ]


def test_which_function_traces_an_array():
    names = []

    def step(x):
        names.append(_jax_internals.traced_by(x))
        return x

    jax.jit(step)(1.0)
    assert names[0].startswith("step at ")
    assert __file__ in names[0]
    assert _jax_internals.traced_by(jnp.ones(2)) == ""
    assert _jax_internals.traced_by(1.0) == ""


@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps_traces_the_gradients_in_a_function_of_this_name():
    names = []

    def update(updates, state, params=None):
        names.extend(map(_jax_internals.traced_by, jax.tree.leaves(updates)))
        return updates, state

    tx = optax.MultiSteps(optax.GradientTransformation(optax.identity().init, update), 2)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    assert any(name.startswith("_do_update at ") for name in names)
    assert any(name.partition(":")[0].endswith("_accumulation.py") for name in names)
