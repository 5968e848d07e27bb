"""Regularizers: value and gradient against NumPy in float64, also where they degenerate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree, relative_error, wide
from jax.test_util import check_grads

from dtnh_jax import regularizers

PARAMS, START = random_tree(0), {**random_tree(100), "dense": None}


def l2_sp_by_hand(params, start, alpha, beta):
    value, grads = 0.0, {}
    for key in params:
        weights, treedef = jax.tree.flatten(wide(params[key]))
        new = start[key] is None
        starts = [0 * w for w in weights] if new else jax.tree.leaves(wide(start[key]))
        factor = beta if new else alpha
        value += (
            factor
            / 2
            * sum(np.sum(np.abs(w - s) ** 2) for w, s in zip(weights, starts, strict=True))
        )
        grads[key] = treedef.unflatten(
            [factor * (w - s) for w, s in zip(weights, starts, strict=True)]
        )
    return value, grads


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.1, 0.01), (0.0, 2.0), (3.0, 3.0)])
def test_l2_sp_agrees_with_numpy(alpha, beta):
    value, grads = jax.jit(
        jax.value_and_grad(lambda p: regularizers.l2_sp(p, START, alpha=alpha, beta=beta))
    )(PARAMS)
    wanted, wanted_grads = l2_sp_by_hand(PARAMS, START, alpha, beta)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert relative_error(grads, wanted_grads) <= 1e-6


def test_l2_sp_at_the_starting_point():
    value, grads = jax.value_and_grad(regularizers.l2_sp)(PARAMS, PARAMS)
    assert float(value) == 0
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))
    check_grads(lambda w: regularizers.l2_sp(w, w * 0 + 1), (jnp.ones(3),), order=2)


def test_l2_sp_gradient_is_not_lost():
    grads = jax.grad(lambda p: regularizers.l2_sp(p, START, beta=1.0))(PARAMS)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


def test_l2_sp_complex_and_half():
    w, w0 = random_tree(0, np.complex64), random_tree(1, np.complex64)
    wanted = sum(
        np.sum(np.abs(x - y) ** 2) / 2
        for x, y in zip(jax.tree.leaves(wide(w)), jax.tree.leaves(wide(w0)), strict=True)
    )
    np.testing.assert_allclose(regularizers.l2_sp(w, w0), wanted, rtol=1e-6)
    half = random_tree(0, jnp.bfloat16)
    value = regularizers.l2_sp(half, random_tree(1, jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert jax.grad(regularizers.l2_sp)(half, half)["dense"]["bias"].dtype == jnp.bfloat16
    # 2**16 differences of 1: a float16 sum would overflow.
    ones = jnp.ones(2**17, jnp.float16)
    assert float(regularizers.l2_sp(ones, 0 * ones)) == 2**16


def test_l2_sp_vmap():
    stacked = jnp.asarray(random_tree(0, shapes=(3, 5)))
    values = jax.vmap(regularizers.l2_sp, in_axes=(0, None))(stacked, jnp.zeros(5))
    np.testing.assert_allclose(values, 0.5 * np.sum(np.square(stacked), axis=1), rtol=1e-6)


def test_l2_sp_bad_trees():
    with pytest.raises(ValueError, match=r"pretrained must have the structure of params"):
        regularizers.l2_sp(PARAMS, {"block": START["block"]})
    with pytest.raises(ValueError, match=r"has 'old', which params lacks"):
        regularizers.l2_sp(PARAMS, {**START, "old": jnp.ones(2)})
    bad = {**START, "dense": {"kernel": np.ones((5, 4), np.float32), "bias": None}}
    with pytest.raises(ValueError, match=r"\(5, 4\) for \(4, 5\) at 'dense/kernel'.*put None"):
        regularizers.l2_sp(PARAMS, bad)


def distillation_by_hand(s, t, temperature, t_squared):
    """Value and gradient by the student's logits, mean over all leading axes."""

    def log_softmax(x):
        x = np.asarray(x, np.float64) / temperature
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    ls, lt = log_softmax(s), log_softmax(t)
    n = np.prod(s.shape[:-1])
    factor = temperature**2 if t_squared else 1.0
    value = factor * np.sum(np.exp(lt) * (lt - ls)) / n
    return value, factor * (np.exp(ls) - np.exp(lt)) / (temperature * n)


@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(8, 5), (5,), (2, 3, 4)])
def test_distillation_agrees_with_numpy(shape, temperature, t_squared):
    s, t = random_tree(0, shapes=shape, scale=3), random_tree(1, shapes=shape, scale=3)
    value, grad = jax.value_and_grad(regularizers.distillation)(
        s, t, temperature, t_squared=t_squared
    )
    wanted, wanted_grad = distillation_by_hand(s, t, temperature, t_squared)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert relative_error(grad, wanted_grad) <= 1e-6
    assert np.any(grad != 0)


def test_distillation_of_equals_is_zero():
    s = random_tree(0, shapes=(8, 5))
    value, grad = jax.value_and_grad(regularizers.distillation)(s, s, 2.0)
    assert float(value) == 0
    np.testing.assert_allclose(grad, 0, atol=1e-8)


@pytest.mark.parametrize("ruled_out", [-1e4, -np.inf])
def test_distillation_of_a_certain_teacher(ruled_out):
    t = np.full((2, 3), ruled_out, np.float32)
    t[:, 0] = 1e4
    s = np.float32([[0, 1, 2], [-1e4, 1e4, 0]])
    value, grad = jax.value_and_grad(regularizers.distillation)(s, t, 1.0)
    log_p = [-np.log(1 + np.e + np.e**2), -2e4]
    np.testing.assert_allclose(value, -np.mean(log_p), rtol=1e-6)
    assert np.isfinite(grad).all()


def test_distillation_t_squared_keeps_the_gradient():
    """At a high temperature the gradient with T² tends to that of half the squared difference."""
    s, t = random_tree(0, shapes=(4, 5)), random_tree(1, shapes=(4, 5))
    grad = jax.grad(regularizers.distillation)(s, t, 1e3)
    centred = (s - t) - (s - t).mean(-1, keepdims=True)
    np.testing.assert_allclose(grad, centred / (4 * 5), rtol=1e-2, atol=1e-4)


def test_distillation_smooth_jit_vmap_half():
    s, t = random_tree(0, shapes=(4, 5)), random_tree(1, shapes=(4, 5))
    check_grads(
        lambda s: regularizers.distillation(s, t, 2.0), (jnp.asarray(s),), order=2, rtol=0.02
    )
    jitted = jax.jit(regularizers.distillation)(s, t, jnp.float32(2.0))
    np.testing.assert_allclose(jitted, regularizers.distillation(s, t, 2.0), rtol=1e-6)
    each = jax.vmap(regularizers.distillation, in_axes=(0, 0, None))(s, t, 2.0)
    np.testing.assert_allclose(each.mean(), jitted, rtol=1e-6)
    half = regularizers.distillation(s.astype(jnp.bfloat16), t.astype(jnp.bfloat16), 2.0)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, jitted, rtol=2e-2)


def test_distillation_bad_input():
    s = jnp.ones((4, 5))
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive; got"):
            regularizers.distillation(s, s, temperature)
    with pytest.raises(ValueError, match=r"same shape.*\(4, 5\) and \(4, 6\)"):
        regularizers.distillation(s, jnp.ones((4, 6)))
    with pytest.raises(ValueError, match=r"\(\.\.\., classes\)"):
        regularizers.distillation(jnp.ones(()), jnp.ones(()))
