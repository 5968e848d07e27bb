"""Regularizers of the weights: value and gradient against NumPy in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, random_tree, relative_error, wide
from regularizer_checks import (
    assert_half_is_close,
    assert_same_on_eight_devices,
    assert_smooth,
    assert_zero_there,
    on_eight_devices,
)

import dtnh_jax
from dtnh_jax import regularizers

PARAMS, START = random_tree(0), {**random_tree(100), "dense": None}
FISHER = {**jax.tree.map(np.square, random_tree(200)), "dense": None}
NO_BIASES = {
    "block": {"conv": {"kernel": True, "bias": False}, "norm": False},
    "dense": {"kernel": True, "bias": False},
    "temperature": True,
}

WEIGHTS = [
    ("l2", (), {}),
    ("l2", (), {"mask": NO_BIASES}),
    ("l2_sp", (START,), {}),
    ("l2_sp", (START,), {"alpha": 0.1, "beta": 0.01}),
    ("l2_sp", (START,), {"alpha": 0.0, "beta": 2.0}),
    ("l2_sp", (START,), {"alpha": 3.0, "beta": 3.0, "mask": NO_BIASES}),
    ("l2_sp_fisher", (START, FISHER), {}),
    ("l2_sp_fisher", (START, FISHER), {"alpha": 0.5, "beta": 0.1, "epsilon": 0.3}),
    ("l2_sp_fisher", (START, FISHER), {"beta": 0.1, "mask": NO_BIASES}),
]
each = pytest.mark.parametrize(("name", "trees", "options"), WEIGHTS)


def none_is_leaf(node):
    return node is None


def by_hand(name, params, trees, alpha=1.0, beta=0.0, epsilon=0.0, mask=None):
    """Value and gradient, leaf by leaf; the gradient is None where nothing acts."""
    pretrained, fisher = (*trees, None, None)[:2]
    value, grads = 0.0, {}
    flat, treedef = jax.tree_util.tree_flatten_with_path(wide(params))

    def entry(tree, path):
        for key in path:
            if tree is None or isinstance(tree, bool):
                return tree
            tree = tree[key.key]
        return tree

    grads = []
    for path, w in flat:
        start = None if pretrained is None else entry(pretrained, path)
        new = start is None
        factor = 1.0 if name == "l2" else beta if new else alpha
        if factor == 0 or (mask is not None and not entry(mask, path)):
            grads.append(None)
            continue
        weight = np.float64(1.0)
        if name == "l2_sp_fisher" and not new:
            weight = wide(entry(fisher, path)) + epsilon
        difference = w if new else w - wide(start)
        value += factor / 2 * np.sum(weight * np.abs(difference) ** 2)
        grads.append(factor * weight * np.conj(difference))
    return value, treedef.unflatten(grads)


@each
def test_agrees_with_numpy(name, trees, options):
    fun = getattr(regularizers, name)
    value, grads = jax.jit(jax.value_and_grad(lambda p: fun(p, *trees, **options)))(PARAMS)
    wanted, wanted_grads = by_hand(name, PARAMS, trees, **options)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    compared = list(
        zip(
            jax.tree.leaves(grads), jax.tree.leaves(wanted_grads, is_leaf=none_is_leaf), strict=True
        )
    )
    for got, want in compared:
        if want is None:
            assert np.all(np.asarray(got) == 0)
        else:
            assert np.any(np.asarray(got) != 0)
            assert relative_error(got, want) <= 1e-6
    assert any(want is not None for _, want in compared)


@each
def test_closed_form_is_the_gradient_of_a_pair(name, trees, options):
    """None in the same places, the same numbers elsewhere."""
    fun, closed = getattr(regularizers, name), getattr(regularizers, f"{name}_gradient")
    objective = dtnh_jax.value_and_gradient_pair(
        lambda p: (jnp.sum(p["dense"]["bias"]), fun(p, *trees, **options))
    )
    _, pair = objective(jax.tree.map(jnp.asarray, PARAMS))
    got = jax.jit(lambda p: closed(p, *trees, **options))(PARAMS)
    assert jax.tree.structure(got) == jax.tree.structure(pair.reg_grads)
    assert relative_error(got, pair.reg_grads) <= 1e-6
    assert relative_error(got, by_hand(name, PARAMS, trees, **options)[1]) <= 1e-6


@pytest.mark.parametrize("dtype", [np.complex64, jnp.bfloat16, np.float16])
def test_closed_form_of_other_dtypes(dtype):
    params, start = random_tree(0, dtype), random_tree(1, dtype)
    fisher = jax.tree.map(lambda x: jnp.abs(jnp.asarray(x)).astype(jnp.float32), random_tree(2))
    for name, trees in (("l2", ()), ("l2_sp", (start,)), ("l2_sp_fisher", (start, fisher))):
        closed = getattr(regularizers, f"{name}_gradient")(params, *trees)
        grads = jax.grad(getattr(regularizers, name))(params, *trees)
        assert all(x.dtype == dtype for x in jax.tree.leaves(closed))
        assert relative_error(closed, grads) <= (1e-6 if dtype == np.complex64 else 1e-2)


def test_starting_point():
    for fun in (
        lambda w: regularizers.l2_sp(w, PARAMS),
        lambda w: regularizers.l2_sp_fisher(w, PARAMS, FISHER | {"dense": PARAMS["dense"]}),
    ):
        assert_zero_there(fun, PARAMS)
    closed = regularizers.l2_sp_gradient(PARAMS, PARAMS)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(closed))
    assert_zero_there(regularizers.l2, jax.tree.map(np.zeros_like, PARAMS))


def test_smooth_also_at_the_start():
    fisher = np.float32([0.5, 2.0, 0.0])
    for start in (np.ones(3, np.float32), np.zeros(3, np.float32)):
        assert_smooth(
            lambda w, s=start: regularizers.l2_sp_fisher(w, s, fisher), np.ones(3, np.float32)
        )
    hessian = jax.hessian(regularizers.l2_sp)(jnp.ones(3), jnp.ones(3))
    np.testing.assert_array_equal(hessian, np.eye(3))


def test_complex_half_and_overflow():
    w, w0 = random_tree(0, np.complex64), random_tree(1, np.complex64)
    np.testing.assert_allclose(regularizers.l2_sp(w, w0), by_hand("l2_sp", w, (w0,))[0], rtol=1e-6)
    assert_half_is_close(lambda p: regularizers.l2_sp(p, random_tree(1)), random_tree(0))
    # 2**16 differences of 1: a float16 sum would overflow.
    ones = jnp.ones(2**17, jnp.float16)
    assert float(regularizers.l2_sp(ones, 0 * ones)) == 2**16


def test_vmap_and_traced_weights():
    stacked = jnp.asarray(random_tree(0, shapes=(3, 5)))
    values = jax.vmap(regularizers.l2_sp, in_axes=(0, None))(stacked, jnp.zeros(5))
    np.testing.assert_allclose(values, 0.5 * np.sum(np.square(stacked), axis=1), rtol=1e-6)
    traced = jax.jit(lambda alpha: regularizers.l2_sp(stacked, stacked * 0, alpha=alpha))
    np.testing.assert_allclose(traced(2.0), 2 * np.sum(values), rtol=1e-6)


def test_sharded_is_one_device():
    params, start, fisher = (random_tree(i, shapes={"a": (8, 3), "b": (16,)}) for i in range(3))
    assert_same_on_eight_devices(regularizers.l2_sp, params, start)
    assert_same_on_eight_devices(regularizers.l2_sp_fisher, params, start, fisher)
    closed = jax.jit(regularizers.l2_sp_gradient)(*on_eight_devices((params, start)))
    assert len(closed["a"].sharding.device_set) == 8
    assert relative_error(closed, regularizers.l2_sp_gradient(params, start)) <= 1e-6


def test_mask_forms():
    """A function, and one boolean for a subtree."""
    tree = {"block": False, "dense": True, "temperature": False}
    wanted = regularizers.l2(PARAMS["dense"])
    np.testing.assert_array_equal(regularizers.l2(PARAMS, mask=tree), wanted)
    np.testing.assert_array_equal(regularizers.l2(PARAMS, mask=lambda p: tree), wanted)
    # What is left out need not fit.
    odd = {**random_tree(1), "block": None, "temperature": np.ones(7, np.float32)}
    got = regularizers.l2_sp(PARAMS, odd, mask=tree)
    np.testing.assert_array_equal(got, regularizers.l2_sp(PARAMS["dense"], odd["dense"]))


def test_bad_trees():
    for fun in (regularizers.l2_sp, regularizers.l2_sp_gradient):
        with pytest.raises(ValueError, match=r"pretrained must have the structure of params"):
            fun(PARAMS, {"block": START["block"]})
        with pytest.raises(ValueError, match=r"has 'old', which params lacks"):
            fun(PARAMS, {**START, "old": jnp.ones(2)})
        bad = {**START, "dense": {"kernel": np.ones((5, 4), np.float32), "bias": None}}
        with pytest.raises(ValueError, match=r"\(5, 4\) for \(4, 5\) at 'dense/kernel'.*put None"):
            fun(PARAMS, bad)
        with pytest.raises(TypeError, match=r"mask must hold True.*got 1.0 at 'block/conv/bias'"):
            fun(PARAMS, START, mask={"block": 1.0, "dense": True, "temperature": True})
    fisher = {**FISHER, "temperature": None}
    with pytest.raises(ValueError, match=r"fisher must have a leaf.*None at 'temperature'.*mask="):
        regularizers.l2_sp_fisher(PARAMS, START, fisher)
    with pytest.raises(ValueError, match=r"shapes of params; got \(2,\) for \(\) at 'temperature'"):
        regularizers.l2_sp_fisher(PARAMS, START, {**FISHER, "temperature": np.ones(2)})


SOURCE = random_tree(3, shapes={"kernel": (3, 4), "bias": (4,)})
INPUTS = random_tree(4, shapes=(16, 3))
LABELS = np.random.default_rng(5).integers(0, 4, 16)


def linear(params, x):
    return x @ params["kernel"] + params["bias"][None]


def fisher_by_hand(kind, inputs=INPUTS, labels=LABELS):
    params, inputs = wide(SOURCE), wide(inputs)
    total = {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}
    for x, label in zip(inputs, labels, strict=True):
        logits = x @ params["kernel"] + params["bias"]
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        for y in range(4):
            weight = p[y] if kind == "true" else float(y == label)
            grad = np.eye(4)[y] - p
            total["kernel"] += weight * np.outer(x, grad) ** 2 / len(inputs)
            total["bias"] += weight * grad**2 / len(inputs)
    return total


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize(("cuts", "chunk_size"), [([], 32), ([8], 3), ([5, 10], 1), ([7], 4)])
def test_fisher_agrees_with_numpy(kind, cuts, chunk_size):
    """However the examples are cut into batches and chunks."""
    batches = zip(np.split(INPUTS, cuts), np.split(LABELS, cuts), strict=True)
    got = regularizers.fisher_diagonal(linear, SOURCE, batches, kind=kind, chunk_size=chunk_size)
    assert relative_error(got, fisher_by_hand(kind)) <= 1e-6


def test_fisher_of_a_network_is_that_of_single_gradients():
    params = random_tree(6, shapes={"in": (3, 5), "out": (5, 4)})

    def logits_fn(params, x):
        return jnp.tanh(x["x"] @ params["in"]) @ params["out"]

    def log_p(params, x, y):
        return jax.nn.log_softmax(logits_fn(params, {"x": x[None]})[0])[y]

    squares = [
        jax.tree.map(lambda g: wide(g) ** 2, jax.grad(log_p)(params, x, y))
        for x, y in zip(INPUTS[:5], LABELS[:5], strict=True)
    ]
    wanted = jax.tree.map(lambda *xs: sum(xs) / 5, *squares)
    got = regularizers.fisher_diagonal(logits_fn, params, [({"x": INPUTS[:5]}, LABELS[:5])])
    assert relative_error(got, wanted) <= 1e-6


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_fisher_is_compiled_once_and_sharded(kind):
    traces = []

    def logits_fn(params, x):
        traces.append(None)
        return linear(params, x)

    regularizers.fisher_diagonal(logits_fn, SOURCE, [(INPUTS, LABELS)], kind=kind, chunk_size=8)
    once = len(traces)
    batches = on_eight_devices([(INPUTS, LABELS)] * 3)
    got = regularizers.fisher_diagonal(logits_fn, SOURCE, batches, kind=kind, chunk_size=8)
    assert len(traces) == 2 * once
    # Devices tell each other their sums, and no example.
    whole = jax.jit(
        lambda inputs, labels: regularizers.fisher_diagonal(
            linear, SOURCE, [(inputs, labels)], kind=kind, chunk_size=8
        )
    )
    text = whole.lower(*batches[0]).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    assert relative_error(got, fisher_by_hand(kind)) <= 1e-6


def test_fisher_of_half_and_complex_params():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (SOURCE, INPUTS))
    got = regularizers.fisher_diagonal(linear, half[0], [(half[1], LABELS)])
    assert got["kernel"].dtype == jnp.float32
    assert relative_error(got, fisher_by_hand("empirical")) <= 0.05
    # Real and imaginary part are two weights: the logits are those of the real part.
    as_complex = jax.tree.map(lambda x: x.astype(np.complex64), SOURCE)
    got = regularizers.fisher_diagonal(
        lambda p, x: jnp.real(linear(p, x.astype(jnp.complex64))), as_complex, [(INPUTS, LABELS)]
    )
    assert got["kernel"].dtype == jnp.float32
    assert relative_error(got, fisher_by_hand("empirical")) <= 1e-6


def test_fisher_bad_input():
    fisher = functools.partial(regularizers.fisher_diagonal, linear, SOURCE)
    with pytest.raises(ValueError, match=r"kind must be 'empirical' or 'true'; got 'exact'"):
        fisher([(INPUTS, LABELS)], kind="exact")
    with pytest.raises(ValueError, match=r"chunk_size must be an integer >= 1; got 0"):
        fisher([(INPUTS, LABELS)], chunk_size=0)
    with pytest.raises(ValueError, match=r"at least one example"):
        fisher([])
    with pytest.raises(ValueError, match=r"shape \(16,\); got .* of shape \(3,\).*kind='true'"):
        fisher([(INPUTS, LABELS[:3])])
    with pytest.raises(ValueError, match=r"one leading axis of examples"):
        fisher([((INPUTS, INPUTS[:3]), LABELS)])
    with pytest.raises(ValueError, match=r"logits of shape \(n, classes\).*got \(1,\) for one"):
        regularizers.fisher_diagonal(lambda p, x: linear(p, x)[:, 0], SOURCE, [(INPUTS, LABELS)])
    got = fisher([(INPUTS, np.where(LABELS == 0, 4, LABELS))])
    assert np.isnan(got["bias"]).any()
    assert_trees_equal(
        fisher([(INPUTS, None)], kind="true"), fisher([(INPUTS, LABELS)], kind="true")
    )


# Low-rank adapters


def adapters(scale=1.0):
    shapes = {
        "query": {"lora_a": (6, 2), "lora_b": (2, 5), "kernel": (6, 5)},
        "experts": {"lora_a": (3, 4, 2), "lora_b": (3, 2, 4), "bias": (4,)},
    }
    return random_tree(7, shapes=shapes, scale=scale)


def merged(params, scale):
    return {
        name: scale * jnp.matmul(of["lora_a"], of["lora_b"], precision="highest")
        for name, of in params.items()
    }


def test_l2_sp_of_adapters_is_exactly_that_of_the_merged_weights():
    """Value and gradient, also by the path through the merged weights."""
    params, scale = adapters(), 0.5
    start = random_tree(8, shapes=jax.tree.map(jnp.shape, merged(params, 1.0)))

    def of_merged(params):
        weights = jax.tree.map(jnp.add, start, merged(params, scale))
        return regularizers.l2_sp(weights, start)

    fun = functools.partial(regularizers.l2_sp_lora, scale=scale)
    value, grads = jax.jit(jax.value_and_grad(fun))(params)
    wanted, wanted_grads = jax.value_and_grad(of_merged)(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert relative_error(grads, wanted_grads) <= 1e-5
    assert not np.any(grads["query"]["kernel"])
    np.testing.assert_allclose(fun(params), value, rtol=1e-6)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert fun(half).dtype == jnp.float32


def test_l2_of_adapters_is_another_regularizer():
    """Where LoRA begins, and by what it prefers: the nuclear norm of the product."""
    one = adapters()["query"]
    start = {"lora_a": one["lora_a"], "lora_b": 0 * one["lora_b"]}
    assert not any(map(np.any, jax.tree.leaves(jax.grad(regularizers.l2_sp_lora)(start))))
    np.testing.assert_array_equal(jax.grad(regularizers.l2)(start)["lora_a"], one["lora_a"])
    u, sizes, v = np.linalg.svd(one["lora_a"] @ one["lora_b"], full_matrices=False)
    root = np.sqrt(sizes[:2])
    balanced = {"lora_a": u[:, :2] * root, "lora_b": root[:, None] * v[:2]}
    np.testing.assert_allclose(regularizers.l2(balanced), sizes.sum(), rtol=1e-5)
    factors = {"lora_a": one["lora_a"], "lora_b": one["lora_b"]}
    assert float(regularizers.l2(factors)) > sizes.sum() * 1.01
    for each in (balanced, factors):  # while this one depends on the product alone
        np.testing.assert_allclose(regularizers.l2_sp_lora(each), np.sum(sizes**2) / 2, rtol=1e-5)


def test_adapters_of_other_names_and_bad_ones():
    one = adapters()["query"]
    renamed = {"A": one["lora_a"], "B": one["lora_b"]}
    np.testing.assert_array_equal(
        regularizers.l2_sp_lora(renamed, names=("A", "B")), regularizers.l2_sp_lora(one)
    )
    with pytest.raises(ValueError, match=r"found no leaves named 'lora_a' and 'lora_b'"):
        regularizers.l2_sp_lora(renamed)
    for bad in ({"lora_b": None}, {"lora_b": one["lora_b"].T}, {"lora_a": one["lora_a"][0]}):
        with pytest.raises(ValueError, match=r"of shape \(\.\.\., in, rank\).*at 'query'"):
            regularizers.l2_sp_lora({"query": {**one, **bad}})
