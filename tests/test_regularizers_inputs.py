"""Regularizers of the inputs' neighbourhood: the same ascent in NumPy's float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree, relative_error, wide
from regularizer_checks import assert_same_on_eight_devices, numerical_gradient

from dtnh_jax import regularizers

KEY = jax.random.key(7)
X = random_tree(0, shapes=(8, 3))
PARAMS = random_tree(1, shapes={"in": (3, 5), "out": (5, 4)}, scale=0.8)


def logits(params, x, xp=jnp):
    return xp.tanh(x @ params["in"]) @ params["out"]


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(log_p, log_q):
    return np.sum(np.exp(log_p) * (log_p - log_q), -1)


def jacobian(params, x):
    """Of the logits by the inputs, for each example."""
    slope = 1 - np.tanh(x @ params["in"]) ** 2
    return np.einsum("ih,nh,hc->nci", params["in"], slope, params["out"])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def change_by_hand(params, x, epsilon, step_size, steps, norm, bounds, dtype=np.float32):
    def projected(change):
        if norm == "inf":
            change = np.clip(change, -epsilon, epsilon)
        else:
            sizes = np.linalg.norm(change, axis=1, keepdims=True)
            change = change * np.minimum(1, epsilon / sizes)
        return change if bounds is None else np.clip(x + change, *bounds) - x

    p = np.exp(log_softmax(logits(params, x, np)))
    change = projected(1e-3 * wide(jax.random.normal(KEY, x.shape, dtype)))
    for _ in range(steps):
        q = np.exp(log_softmax(logits(params, x + change, np)))
        grad = np.einsum("nc,nci->ni", q - p, jacobian(params, x + change))
        change = projected(change + step_size * (np.sign(grad) if norm == "inf" else unit(grad)))
    return change


CASES = [
    {"norm": "inf", "bounds": None, "step_size": 0.2, "steps": 6, "epsilon": 0.7},
    {"norm": "2", "bounds": None, "step_size": 0.2, "steps": 6, "epsilon": 0.9},
    {"norm": "inf", "bounds": (-1.0, 1.0), "step_size": 0.3, "steps": 3, "epsilon": 0.7},
    {"norm": "2", "bounds": (-1.0, 1.0), "step_size": 0.3, "steps": 1, "epsilon": 0.9},
]


@pytest.mark.parametrize(
    ("case", "reduction"), list(zip(CASES, ["mean", "sum", "sum", "mean"], strict=True))
)
def test_adversarial_agrees_with_numpy(case, reduction, request):
    x = np.clip(X, *case["bounds"]) if case["bounds"] else X
    params, dtype = PARAMS, np.float32
    if case["norm"] == "2":
        # So near the input the ascent's first direction has four digits in float32.
        request.getfixturevalue("x64")
        x, params, dtype = wide(x), wide(params), np.float64
    change = change_by_hand(wide(PARAMS), wide(x), **case, dtype=dtype)

    def by_hand(params):
        log_p, log_q = (log_softmax(logits(params, wide(x) + c, np)) for c in (0, change))
        return getattr(np, reduction)(kl(log_p, log_q))

    def fun(params):
        return regularizers.adversarial(
            lambda x: logits(params, x), x, KEY, reduction=reduction, **case
        )

    value, grads = jax.jit(jax.value_and_grad(fun))(params)
    np.testing.assert_allclose(value, by_hand(wide(PARAMS)), rtol=1e-6)
    assert relative_error(grads, numerical_gradient(by_hand, PARAMS)) <= 2e-6
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


def test_adversarial_change_is_in_the_ball_and_hurts():
    seen = []

    def spy(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return logits(PARAMS, x)

    for case in CASES:
        seen.clear()
        x = np.clip(X, *case["bounds"]) if case["bounds"] else X
        value = regularizers.adversarial(spy, x, KEY, **case)
        jax.effects_barrier()
        assert len(seen) >= case["steps"] + 2
        for moved in seen:
            size = np.linalg.norm(moved - x, np.inf if case["norm"] == "inf" else 2, axis=1)
            assert np.all(size <= case["epsilon"] * (1 + 1e-5))
            if case["bounds"]:
                assert moved.min() >= case["bounds"][0]
                assert moved.max() <= case["bounds"][1]
        plain = {**case, "steps": 1, "step_size": 1e-3}
        assert value > 10 * regularizers.adversarial(spy, x, KEY, **plain)


def direction_by_hand(params, x, steps):
    p = np.exp(log_softmax(logits(params, x, np)))
    j = jacobian(params, x)
    fisher = np.einsum("nci,ncd,ndk->nik", j, np.stack([np.diag(r) - np.outer(r, r) for r in p]), j)
    direction = unit(wide(jax.random.normal(KEY, x.shape)))
    for _ in range(steps):
        direction = unit(np.einsum("nik,nk->ni", fisher, direction))
    return direction, fisher


@pytest.mark.parametrize(("steps", "reduction"), [(1, "mean"), (3, "sum")])
def test_virtual_adversarial_agrees_with_numpy(steps, reduction):
    direction, _ = direction_by_hand(wide(PARAMS), wide(X), steps)
    clean = log_softmax(logits(wide(PARAMS), wide(X), np))

    def by_hand(params):
        moved = log_softmax(logits(params, wide(X) + 0.8 * direction, np))
        return getattr(np, reduction)(kl(clean, moved))

    def fun(params):
        return regularizers.virtual_adversarial(
            lambda x: logits(params, x), X, KEY, epsilon=0.8, steps=steps, reduction=reduction
        )

    value, grads = jax.jit(jax.value_and_grad(fun))(PARAMS)
    np.testing.assert_allclose(value, by_hand(wide(PARAMS)), rtol=1e-6)
    assert relative_error(grads, numerical_gradient(by_hand, PARAMS)) <= 2e-6
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


def test_virtual_adversarial_finds_the_first_eigenvector():
    """For a small change the divergence is half the largest eigenvalue times its square."""
    _, fisher = direction_by_hand(wide(PARAMS), wide(X), 1)
    got = regularizers.virtual_adversarial(
        lambda x: logits(PARAMS, x), X, KEY, epsilon=0.05, steps=60
    )
    wanted = np.mean(np.linalg.eigvalsh(fisher)[:, -1]) * 0.05**2 / 2
    np.testing.assert_allclose(got, wanted, rtol=0.05)


ADVERSARIAL = functools.partial(regularizers.adversarial, epsilon=0.7, step_size=0.2, steps=3)
VIRTUAL = functools.partial(regularizers.virtual_adversarial, epsilon=0.8, steps=2)
both = pytest.mark.parametrize("fun", [ADVERSARIAL, VIRTUAL], ids=["adversarial", "virtual"])


@both
def test_no_search_is_differentiated(fun):
    """Derivatives of any order, by the parameters and the inputs, without those of the search."""

    def of(params, x):
        return fun(lambda x: logits(params, x), x, KEY)

    text = str(jax.make_jaxpr(jax.grad(of))(PARAMS, X))
    forward = str(jax.make_jaxpr(of)(PARAMS, X))
    loops = [sum(t.count(f" {loop}[") for loop in ("while", "scan")) for t in (text, forward)]
    assert loops[0] == loops[1] == 1
    second = jax.jvp(jax.grad(of), (PARAMS, X), (PARAMS, X))[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(second))
    assert np.any(np.asarray(jax.grad(of, argnums=1)(PARAMS, X)) != 0)


@both
def test_outputs_that_do_not_turn_or_are_certain(fun):
    flat = jax.tree.map(np.zeros_like, PARAMS)
    value, grads = jax.value_and_grad(lambda p: fun(lambda x: logits(p, x), X, KEY))(flat)
    assert float(value) == 0
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))

    def certain(w):
        return fun(lambda x: jnp.stack([w * jnp.sign(x[:, 0]), -w * x[:, 0]], 1), X, KEY)

    value, grad = jax.value_and_grad(certain)(jnp.float32(1e4))
    assert np.isfinite(value)
    assert np.isfinite(grad)


@both
def test_jit_vmap_half_sharded(fun):
    def of(x, key=KEY, params=PARAMS):
        return fun(lambda x: logits(params, x), x, key)

    value = of(X)
    np.testing.assert_allclose(jax.jit(of)(X), value, rtol=1e-5)
    keys = jax.random.split(KEY, 3)
    many = jax.vmap(of, in_axes=(None, 0))(X, keys)
    np.testing.assert_allclose(many, [of(X, key) for key in keys], rtol=1e-5)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (X, PARAMS))
    got, grads = jax.value_and_grad(lambda p: of(half[0], params=p))(half[1])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, value, rtol=0.3)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    assert_same_on_eight_devices(of, X)


@both
def test_bad_input(fun):
    def with_logits(x, **options):
        return fun(lambda x: logits(PARAMS, x), x, KEY, **options)

    with pytest.raises(ValueError, match=r"epsilon must be positive; got 0"):
        with_logits(X, epsilon=0)
    with pytest.raises(ValueError, match=r"steps must be an integer >= 1; got 0"):
        with_logits(X, steps=0)
    with pytest.raises(ValueError, match=r"reduction must be 'mean' or 'sum'"):
        with_logits(X, reduction="none")
    with pytest.raises(ValueError, match=r"floating-point inputs.*got int32 of shape \(8, 3\)"):
        with_logits(np.ones((8, 3), np.int32))
    with pytest.raises(ValueError, match=r"logits of shape \(8, classes\).*got \(8,\)"):
        fun(lambda x: x[:, 0], X, KEY)


def test_adversarial_bad_input():
    for options, wanted in (
        ({"norm": "1"}, r"norm must be 'inf' or '2'; got '1'"),
        ({"step_size": -1.0}, r"step_size must be positive; got -1.0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            ADVERSARIAL(lambda x: logits(PARAMS, x), X, KEY, **options)


@both
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_coarse_inputs_do_not_stop_the_search(fun, size):
    """Noise of 0.001 is nothing to a bfloat16 of one."""
    w = np.float32([[1, -1], [-2, 2], [4, -4]]) / (4 * size)
    options = {"epsilon": 0.5 * size}
    if fun is ADVERSARIAL:
        options |= {"step_size": 0.2 * size, "steps": 9}
    values = []
    for dtype in (jnp.bfloat16, jnp.float32):
        x, weights = (jnp.asarray(a, dtype) for a in (np.full((8, 3), size), w))
        values.append(fun(lambda z, x=x, w=weights: (z - x) @ w, x, KEY, **options))
    assert values[1] > 0.05
    np.testing.assert_allclose(*values, rtol=0.1)
