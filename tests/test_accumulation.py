"""accumulate_pairs: k micro-batches are one big batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_tree, relative_error

import dtnh_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")


def optimizer(name):
    rule = dtnh_jax.dtnh(0.5, scope="layer", reference=optax.ema(0.9))
    return {
        "sgd": optax.chain(rule, optax.sgd(0.1, momentum=0.9)),
        "adam": optax.chain(rule, optax.adam(0.1)),
        "decoupled": dtnh_jax.decoupled(optax.adam(0.1), 0.5, learning_rate=0.1),
    }[name]


def tree(seed):
    return jax.tree.map(jnp.asarray, random_tree(seed))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", ["sgd", "adam", "decoupled"])
def test_micro_batches_are_one_big_batch(name, k):
    inner = optimizer(name)
    tx = dtnh_jax.accumulate_pairs(inner, k)
    params = tree(50)
    state, big_state = tx.init(params), inner.init(params)
    update = jax.jit(tx.update)
    for step in range(3):
        micro = [
            (tree(10 * step + i), {**tree(500 + 10 * step + i), "dense": None}) for i in range(k)
        ]
        for i, pair in enumerate(micro):
            updates, state = update(pair, state, params)
            if i < k - 1:
                assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(updates))
        mean = jax.tree.map(lambda *xs: jnp.mean(jnp.stack(xs), 0), *micro)
        wanted, big_state = inner.update(mean, big_state, params)
        assert relative_error(updates, wanted) <= 1e-5
    assert optax.tree.get(state, "mini_step") == 0
    for x, y in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(big_state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_scan_keeps_state_and_reg_grads_style():
    tx = dtnh_jax.accumulate_pairs(optimizer("adam"), 2)
    params, a, b = tree(50), tree(0), tree(100)
    state, updates = jax.lax.scan(
        lambda state, scale: tx.update(
            jax.tree.map(lambda x: scale * x, a), state, params, reg_grads=b
        )[::-1],
        tx.init(params),
        jnp.array([1.0, 2.0, 3.0, 4.0]),
    )
    moved = [bool(jnp.any(x != 0)) for x in updates["dense"]["kernel"]]
    assert moved == [False, True, False, True]
    assert int(state.optimizer[1][0].count) == 2
    assert dtnh_jax.conflict_stats(state).groups


def test_sums_have_the_dtype_asked_for():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0))
    tx = dtnh_jax.accumulate_pairs(optimizer("sgd"), 2, accumulator_dtype=jnp.float32)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.sums)} == {jnp.dtype(jnp.float32)}
    updates, after = tx.update((params, params), state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_projecting_each_micro_batch_is_another_method():
    """Why the pairs are averaged, and not the directions."""
    params = jnp.zeros(2)
    pairs = [
        (jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0])),
        (jnp.array([0.0, 1.0]), jnp.array([0.0, -1.0])),
    ]
    rule = dtnh_jax.dtnh(1.0)
    tx = dtnh_jax.accumulate_pairs(optax.chain(rule, optax.sgd(1.0)), 2)
    state = tx.init(params)
    for pair in pairs:
        updates, state = tx.update(pair, state, params)
    np.testing.assert_allclose(updates, [-0.5, -0.5])
    apart = [rule.update(pair, rule.init(params))[0] for pair in pairs]
    np.testing.assert_allclose(sum(apart) / 2, [0.5, 0.5])


def test_containers_of_gradients_may_be_others_than_those_of_params():
    freeze = pytest.importorskip("flax.core").freeze
    tx = dtnh_jax.accumulate_pairs(optimizer("sgd"), 2)
    params, grads = tree(50), freeze(tree(0))
    state = tx.init(params)
    first, state = tx.update((grads, grads), state, params)
    second, _ = tx.update((grads, grads), state, params)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert (
        relative_error(
            dict(second), optimizer("sgd").update((tree(0),) * 2, optimizer("sgd").init(params))[0]
        )
        < 1e-6
    )


SIZES = (5, 1, 2)


@pytest.mark.parametrize("compiled", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_unequal_micro_batches_are_the_big_batch(compiled):
    """Exactly: all sums of these whole numbers, and the mean over eight tokens, are exact."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-4, 5, (sum(SIZES), 3)).astype(np.float32))
    params = {"w": jnp.array([1.0, -2.0, 3.0])}

    @dtnh_jax.value_and_gradient_pair
    def objective(params, x):
        return jnp.mean((x @ params["w"]) ** 2), jnp.mean(x @ params["w"])

    inner = optax.chain(dtnh_jax.weighted_sum(0.5), optax.sgd(1.0))
    tx = dtnh_jax.accumulate_pairs(inner, len(SIZES))
    update, state = compiled(tx.update), tx.init(params)
    for _ in range(2):  # what was summed is forgotten after a step
        for size, part in zip(SIZES, jnp.split(x, np.cumsum(SIZES)[:-1]), strict=True):
            _, pair = objective(params, part)
            # The sums of a micro-batch over its size are rounded, so that they are made exact.
            pair = jax.tree.map(lambda g, size=size: jnp.round(size * g) / size, pair)
            updates, state = update(pair, state, params, micro_batch_weight=size)
        wanted, _ = inner.update(objective(params, x)[1], inner.init(params), params)
        np.testing.assert_array_equal(updates["w"], wanted["w"])
    plain, plain_state = tx, tx.init(params)
    for part in jnp.split(x, np.cumsum(SIZES)[:-1]):
        updates, plain_state = plain.update(objective(params, part)[1], plain_state, params)
    assert relative_error(updates, wanted) > 0.01  # the mean of the means is another


def test_two_weights_and_none_at_all():
    tx = dtnh_jax.accumulate_pairs(dtnh_jax.weighted_sum(1.0), 2)
    params = jnp.zeros(1)
    state = tx.init(params)
    for a, b, weights in ((1.0, 16.0, (1, 3)), (5.0, 32.0, (3, jnp.array(1.0)))):
        updates, state = tx.update(
            (params + a, params + b), state, params, micro_batch_weight=weights
        )
    np.testing.assert_array_equal(updates, [4.0 + 20.0])
    for _ in range(2):
        updates, state = tx.update((params + jnp.nan,) * 2, state, params, micro_batch_weight=0)
    np.testing.assert_array_equal(updates, [0.0])
    for bad in ((1, 2, 3), "1", None, jnp.ones(2)):
        with pytest.raises(TypeError, match="micro_batch_weight must be a number"):
            tx.update((params, params), state, params, micro_batch_weight=bad)


def test_errors():
    inner = optimizer("sgd")
    with pytest.raises(ValueError, match=r"every_k must be at least 1.*got 0"):
        dtnh_jax.accumulate_pairs(inner, 0)
    for bad in (2.0, True, None):
        with pytest.raises(TypeError, match="every_k must be an integer"):
            dtnh_jax.accumulate_pairs(inner, bad)
    tx = dtnh_jax.accumulate_pairs(inner, 2)
    params = tree(0)
    with pytest.raises(TypeError, match="as a pair"):
        tx.update(params, tx.init(params), params)


def test_leaves_that_are_frozen_stay_out():
    tx = dtnh_jax.accumulate_pairs(optimizer("sgd"), 2)
    whole, frozen = tree(50), {**tree(50), "dense": None}
    state, whole_state = tx.init(frozen), tx.init(whole)
    for seed in (0, 1):
        a, b = tree(seed), {**tree(100 + seed), "dense": None}
        updates, state = tx.update(({**a, "dense": None}, b), state, frozen)
        wanted, whole_state = tx.update((a, b), whole_state, whole)
    assert updates["dense"] is None
    assert relative_error(updates, {**wanted, "dense": None}) <= 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_gradient_that_the_last_micro_batch_lacks_waits(scale):
    tx = dtnh_jax.accumulate_pairs(dtnh_jax.weighted_sum(1.0), 2)
    params = {"v": jnp.zeros(1), "w": jnp.zeros(1)}
    a, ones = params, jax.tree.map(lambda x: x + scale, params)
    state, found = tx.init(params), []
    for b in (ones, {**ones, "w": None}, None, ones, ones, ones):
        updates, state = tx.update((a, b), state, params)
        found.append({name: float(x[0]) for name, x in updates.items()})
    # In all, three steps with the five of v and the four of w that came.
    wanted = [{"v": 1.0, "w": 0.0}, {"v": 0.5, "w": 1.0}, {"v": 1.0, "w": 1.0}]
    assert found[1::2] == [{name: scale * x for name, x in each.items()} for each in wanted]
    assert not any(np.any(x) for x in jax.tree.leaves(state.sums))


def test_other_arguments_reach_the_optimizer():
    inner = optax.chain(dtnh_jax.dtnh(0.5), optax.polyak_sgd(1.0))
    tx = dtnh_jax.accumulate_pairs(inner, 1)
    pair, params = (jnp.ones(2), jnp.ones(2)), jnp.ones(2)
    got, _ = tx.update(pair, tx.init(params), params, value=1.0)
    wanted, _ = inner.update(pair, inner.init(params), params, value=1.0)
    np.testing.assert_allclose(got, wanted)


def test_sums_keep_their_dtype_in_a_scan():
    params, grads = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)
    for dtype in (None, jnp.bfloat16):
        tx = dtnh_jax.accumulate_pairs(dtnh_jax.dtnh(0.5), 2, accumulator_dtype=dtype)
        state, _ = jax.lax.scan(
            lambda state, _, tx=tx: (tx.update((grads, grads), state, params)[1], None),
            tx.init(params),
            None,
            2,
        )
        assert state.sums.reg_grads.dtype == (jnp.float32 if dtype is None else dtype)
