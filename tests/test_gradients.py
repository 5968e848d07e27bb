"""value_and_gradient_pair: the two gradients, one forward pass, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree, relative_error

import dtnh_jax


@jax.custom_vjp
def custom(x):
    return jnp.sin(x)


custom.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, grad: (grad * cos,))


def network(params, x):
    """A little of everything that a network may hold."""
    x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(params["one"], x)
    x = custom(x)
    x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["two"]), None), x, None, length=3)
    x = jax.lax.cond(x.sum() > 0, lambda x: 2 * x, lambda x: x, x)
    return jax.nn.relu(x) @ params["head"]


def terms(params, x):
    out = network(params, x)
    reg = 0.5 * (jnp.sum(params["one"] ** 2) + jnp.sum(jnp.square(params["two"] - 1)))
    return (jnp.mean(out**2), reg), {"out": out}


@pytest.fixture
def params():
    shapes = {"one": (4, 5), "two": (5, 5), "head": (5, 2)}
    return jax.tree.map(jnp.asarray, random_tree(0, shapes=shapes))


@pytest.fixture
def x():
    return jnp.asarray(random_tree(1, shapes=(7, 4)))


@pytest.mark.parametrize("jit", [False, True])
def test_agrees_with_two_separate_grads(params, x, jit):
    fun = dtnh_jax.value_and_gradient_pair(terms, has_aux=True)
    ((loss, reg), aux), pair = (jax.jit(fun) if jit else fun)(params, x)
    (wanted_loss, wanted_reg), wanted_aux = terms(params, x)
    np.testing.assert_allclose([loss, reg], [wanted_loss, wanted_reg], rtol=1e-6)
    np.testing.assert_allclose(aux["out"], wanted_aux["out"], rtol=1e-5)
    assert isinstance(pair, dtnh_jax.GradientPair)
    loss_grads = jax.grad(lambda params: terms(params, x)[0][0])(params)
    reg_grads = jax.grad(lambda params: terms(params, x)[0][1])(params)
    assert relative_error(pair.loss_grads, loss_grads) <= 1e-6
    assert pair.reg_grads["head"] is None
    assert relative_error({**pair.reg_grads, "head": reg_grads["head"]}, reg_grads) <= 1e-6


def test_forward_pass_runs_once(params, x):
    calls = []

    def counted(params, x):
        calls.append(None)
        return terms(params, x)

    dtnh_jax.value_and_gradient_pair(counted, has_aux=True)(params, x)
    assert len(calls) == 1


def flops(fun, *args):
    analysis = jax.jit(fun).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def test_a_regularizer_of_the_weights_costs_no_second_backward_pass():
    w = jnp.ones((64, 64))
    x = jnp.ones((512, 64))

    def fun(w, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w)), 0.5 * jnp.sum(jnp.square(w))

    both = flops(dtnh_jax.value_and_gradient_pair(fun), w, x)
    one = flops(jax.value_and_grad(lambda w, x: fun(w, x)[0]), w, x)
    assert both <= 1.01 * one + 4 * w.size


def test_argnums(params, x):
    def fun(scale, params, x):
        (loss, reg), _ = terms(params, x)
        return scale * loss, scale**2 * reg

    scale = jnp.asarray(2.0)
    _, by_one = dtnh_jax.value_and_gradient_pair(fun, argnums=1)(scale, params, x)
    assert (
        relative_error(by_one.loss_grads, jax.grad(lambda p: fun(scale, p, x)[0])(params)) <= 1e-6
    )
    _, by_two = dtnh_jax.value_and_gradient_pair(fun, argnums=(0, 1))(scale, params, x)
    wanted = jax.grad(lambda s, p: fun(s, p, x)[0], argnums=(0, 1))(scale, params)
    assert isinstance(by_two.loss_grads, tuple)
    assert relative_error(by_two.loss_grads, wanted) <= 1e-6
    assert by_two.reg_grads[1]["head"] is None


def test_decorator_keeps_the_name_and_takes_keywords(params, x):
    @functools.partial(dtnh_jax.value_and_gradient_pair, has_aux=True)
    def objective(params, *, batch):
        """Says what it is."""
        return terms(params, batch)

    assert objective.__name__ == "objective"
    assert objective.__doc__ == "Says what it is."
    ((loss, _), _), _ = objective(params, batch=x)
    assert jnp.isfinite(loss)


def test_vmap_over_examples(params, x):
    fun = dtnh_jax.value_and_gradient_pair(lambda p, x: terms(p, x[None])[0])
    (losses, _), pair = jax.jit(jax.vmap(fun, in_axes=(None, 0)))(params, x)
    assert losses.shape == (7,)
    assert pair.loss_grads["one"].shape == (7, 4, 5)
    one = jax.grad(lambda p: terms(p, x[2:3])[0][0])(params)
    assert relative_error(jax.tree.map(lambda g: g[2], pair.loss_grads), one) <= 1e-5


@pytest.mark.parametrize("inside", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_unreached_leaves_are_found_inside_other_transforms(params, x, inside):
    """A jit inside the decorator takes all params, and the regularizer still not the head."""
    fun = dtnh_jax.value_and_gradient_pair(inside(lambda params, x: terms(params, x)[0]))
    _, pair = jax.jit(fun)(params, x)
    assert pair.reg_grads["head"] is None
    assert pair.reg_grads["one"] is not None


def test_constant_terms():
    fun = dtnh_jax.value_and_gradient_pair(lambda w: (jnp.sum(w**2), 0.0))
    (_, reg), pair = fun(jnp.ones(3))
    assert float(reg) == 0
    assert pair.reg_grads is None
    np.testing.assert_array_equal(pair.loss_grads, 2.0)


def test_dtypes_and_none_leaves_are_kept():
    params = {"w": jnp.ones(3, jnp.bfloat16), "frozen": None}
    fun = dtnh_jax.value_and_gradient_pair(
        lambda p: (jnp.sum(p["w"] ** 2), jnp.sum(p["w"].astype(jnp.float32)))
    )
    _, pair = fun(params)
    assert pair.loss_grads["w"].dtype == pair.reg_grads["w"].dtype == jnp.bfloat16
    assert pair.loss_grads["frozen"] is None


@pytest.mark.parametrize(
    ("result", "has_aux", "message"),
    [
        (lambda w: w.sum(), False, r"returns \(loss, reg\).*got an array of shape \(\)"),
        (lambda w: ((w.sum(), w.sum()), {}), False, r"loss = tuple of 2.*set has_aux=True"),
        (lambda w: (w.sum(), w.sum()), True, r"returns \(\(loss, reg\), aux\)"),
        (lambda w: (w, w.sum()), False, r"loss = an array of shape \(3,\)"),
        (lambda w: (w.sum(), jnp.zeros((), int)), False, r"reg of dtype int32"),
        (lambda w: (w.sum(), 1j * w.sum()), False, r"reg of dtype complex64"),
        (lambda w: (w.sum(), None), False, r"reg = NoneType"),
        (lambda w: (w.sum(),) * 3, False, r"tuple of 3"),
    ],
)
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_wrong_results(result, has_aux, message):
    with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError, match=message):
        dtnh_jax.value_and_gradient_pair(result, has_aux=has_aux)(jnp.ones(3))


def test_params_by_keyword():
    with pytest.raises(TypeError, match="Pass params by position"):
        dtnh_jax.value_and_gradient_pair(lambda w: (w, w))(w=jnp.ones(()))


def test_the_last_argument_by_a_negative_number():
    def fun(x, w):
        return jnp.sum(x * w), jnp.sum(w**2)

    x, w = jnp.ones(2), jnp.array([2.0, 3.0])
    for argnums in (-1, (-1,)):
        _, pair = dtnh_jax.value_and_gradient_pair(fun, argnums=argnums)(x, w)
        np.testing.assert_allclose(jax.tree.leaves(pair.reg_grads)[0], 2 * w)
    with pytest.raises(TypeError, match="argument -3, but the function was called with 2"):
        dtnh_jax.value_and_gradient_pair(fun, argnums=-3)(x, w)


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_integers_have_no_gradient(argnums):
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    name = "n" if argnums == 0 else "0/n"

    def fun(params, other):
        return jnp.sum(params["w"] * other), jnp.sum(params["w"] ** 2)

    with pytest.raises(TypeError, match=f"got int32 at '{name}'.*another argument"):
        dtnh_jax.value_and_gradient_pair(fun, argnums=argnums)(params, jnp.ones(2))
