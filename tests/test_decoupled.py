"""decoupled and add_l2_sp: the optimizer sees the loss alone, and the regularizer cannot hurt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import inner, norm, oracle, random_tree, relative_error, wide

import dtnh_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

SCHEDULE = optax.exponential_decay(0.1, 1, 0.5)
OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": lambda rate: optax.adam(rate),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "lion": lambda rate: optax.lion(rate),
    "muon": lambda rate: optax.contrib.muon(rate),
}


def tree(seed):
    return jax.tree.map(jnp.asarray, random_tree(seed))


def difference(x, y):
    return jax.tree.map(lambda x, y: x - y, wide(x), wide(y))


@pytest.mark.parametrize("rate", [0.1, SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["global", "layer", "element"])
def test_regularizer_never_raises_the_loss_whatever_the_optimizer(name, scope, rate):
    optimizer = OPTIMIZERS[name](rate)
    tx = dtnh_jax.decoupled(optimizer, 3.0, learning_rate=rate, scope=scope)
    params = tree(50)
    state, alone_state = tx.init(params), optimizer.init(params)
    update, alone = jax.jit(tx.update), jax.jit(optimizer.update)
    for step in range(3):
        a, b = tree(step), tree(100 + step)
        updates, state = update((a, b), state, params)
        without, alone_state = alone(a, alone_state, params)
        part = difference(updates, without)
        gamma = float(rate(step)) if callable(rate) else rate
        change = difference(oracle(a, b, 3.0, scope), a)
        wanted = jax.tree.map(lambda x, gamma=gamma: -gamma * x, change)
        assert relative_error(part, wanted) <= 1e-4
        assert inner(part, a) <= 1e-5 * norm(part) * norm(a)


def test_regularizer_stays_out_of_the_momentum():
    params = {"w": jnp.zeros(2)}
    a, b = {"w": jnp.array([0.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}
    zero = {"w": jnp.zeros(2)}
    optimizer = optax.sgd(1.0, momentum=0.9)
    for tx, left_over in [
        (dtnh_jax.decoupled(optimizer, 1.0, learning_rate=1.0), 0.0),
        (optax.chain(dtnh_jax.dtnh(1.0), optimizer), -0.9),
    ]:
        _, state = tx.update((a, b), tx.init(params), params)
        updates, _ = tx.update((zero, zero), state, params)
        assert float(updates["w"][0]) == pytest.approx(left_over)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_against_the_optimizers_own_step(name):
    optimizer = OPTIMIZERS[name](0.1)
    tx = dtnh_jax.decoupled(optimizer, 3.0, learning_rate=0.1, reference="update")
    params = tree(50)
    state, alone_state = tx.init(params), optimizer.init(params)
    for step in range(2):
        a, b = tree(step), tree(100 + step)
        updates, state = tx.update((a, b), state, params)
        without, alone_state = optimizer.update(a, alone_state, params)
        part = difference(updates, without)
        assert inner(part, without) >= -1e-5 * norm(part) * norm(without)


def test_unreached_leaves_are_the_optimizers():
    optimizer = optax.adam(0.1)
    tx = dtnh_jax.decoupled(
        optimizer, 1.0, learning_rate=0.1, scope="element", reference=optax.ema(0.99)
    )
    params, a, b = tree(50), tree(0), {**tree(100), "dense": None}
    updates, state = tx.update((a, b), tx.init(params), params)
    without, _ = optimizer.update(a, optimizer.init(params), params)
    for x, y in zip(*map(jax.tree.leaves, (updates["dense"], without["dense"])), strict=True):
        np.testing.assert_array_equal(x, y)
    assert dtnh_jax.conflict_stats(state).per_group.cosine.shape == (6,)


def test_both_call_styles_scan_and_a_lone_tree():
    tx = dtnh_jax.decoupled(optax.sgd(0.1, momentum=0.9), 1.0, learning_rate=SCHEDULE)
    params, a, b = tree(50), tree(0), tree(100)
    by_pair, _ = tx.update((a, b), tx.init(params), params)
    by_name, _ = tx.update(a, tx.init(params), params, reg_grads=b)
    assert relative_error(by_pair, by_name) == 0
    state, _ = jax.lax.scan(
        lambda state, _: tx.update((a, b), state, params)[::-1], tx.init(params), None, length=3
    )
    assert int(state.rule.count) == 3
    with pytest.raises(TypeError, match="as a pair"):
        tx.update(a, tx.init(params), params)


# add_l2_sp


def test_add_l2_sp_without_conflict_is_decay_towards_the_start():
    params = {"w": jnp.array([2.0, -2.0])}
    start = {"w": jnp.array([1.0, -1.0])}
    grads = {"w": jnp.array([1.0, -1.0])}
    tx = dtnh_jax.add_l2_sp(start, 0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [1.5, -1.5])
    decay = optax.add_decayed_weights(0.5)
    from_zero = dtnh_jax.add_l2_sp({"w": jnp.zeros(2)}, 0.5)
    got, _ = from_zero.update(grads, from_zero.init(params), params)
    wanted, _ = decay.update(grads, decay.init(params), params)
    np.testing.assert_allclose(got["w"], wanted["w"])


@pytest.mark.parametrize("scope", ["global", "layer", "leaf", "element"])
def test_add_l2_sp_never_opposes_the_update(scope):
    params, start, grads = tree(0), {**tree(1), "dense": None}, tree(2)
    tx = optax.chain(
        optax.scale_by_adam(),
        dtnh_jax.add_l2_sp(start, 3.0, scope=scope),
        optax.scale_by_learning_rate(0.1),
    )
    adam = optax.adam(0.1)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    without, _ = adam.update(grads, adam.init(params), params)
    assert inner(updates, without) >= norm(without) ** 2 * (1 - 1e-5)
    np.testing.assert_allclose(updates["dense"]["bias"], without["dense"]["bias"], rtol=1e-6)
    assert bool(dtnh_jax.conflict_stats(state).total.conflict) in (True, False)


def test_add_l2_sp_takes_the_gradient_of_the_regularizer():
    params, start = tree(0), {**tree(1), "dense": None}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = dtnh_jax.add_l2_sp(start, 1.0)
    updates, _ = tx.update(zero, tx.init(params), params)
    wanted = jax.grad(dtnh_jax.regularizers.l2_sp)(params, start)
    assert relative_error(updates, wanted) <= 1e-6


def test_add_l2_sp_near_the_start_in_half_precision():
    """The difference is taken before it is rounded."""
    start = {"w": jnp.array([256.0, 1.0])}
    params = {"w": jnp.array([258.0, 1.0], jnp.bfloat16)}
    tx = dtnh_jax.add_l2_sp({"w": start["w"] + 0.5}, 1.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(updates["w"]), [1.5, -0.5])


def test_complex_leaves_are_pulled_back_to_where_they_came_from():
    w0, w = jnp.array([1.0 + 1.0j]), jnp.array([2.0 + 3.0j])
    tx = optax.chain(dtnh_jax.add_l2_sp(w0, 1.0), optax.sgd(1.0))
    updates, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
    np.testing.assert_allclose(w + updates, w0)
    with jax.numpy_dtype_promotion("strict"):
        tx = dtnh_jax.decoupled(optax.sgd(0.1), 2.0, learning_rate=0.5)
        updates, _ = tx.update((0 * w, w - w0), tx.init(w), w)
    np.testing.assert_allclose(w + updates, w0)


START = {**random_tree(1), "dense": None}
MASK = {**dict.fromkeys(START, True), "dense": False}


def steps_of(tx, params, n=3, **kwargs):
    """The updates of some steps, jitted, with all buffers of the state donated."""
    update = jax.jit(tx.update, donate_argnums=1)
    state, updates = jax.jit(tx.init)(params), []
    for step in range(n):
        by, state = update(tree(10 + step), state, params, **kwargs)
        params = optax.apply_updates(params, by)
        updates.append(by)
    return updates, state


@pytest.mark.parametrize("scope", ["global", "layer", "element"])
@pytest.mark.parametrize("way", ["init", "argument"])
def test_the_start_is_that_of_the_tree(way, scope):
    def made(start, **kwargs):
        pull = dtnh_jax.add_l2_sp(start, 2.0, scope=scope, **kwargs)
        return optax.chain(pull, optax.sgd(0.1, momentum=0.9))

    params = jax.tree.map(jnp.asarray, random_tree(1))
    wanted, _ = steps_of(made(START), params)
    tx = made(way, mask=MASK)
    got, _ = steps_of(tx, params, **({"source_params": START} if way == "argument" else {}))
    assert relative_error(got, wanted) <= 1e-6


def test_the_start_in_the_state_is_a_copy_that_stays():
    params = jax.tree.map(jnp.asarray, random_tree(1))
    tx = dtnh_jax.add_l2_sp("init", 1.0, mask=MASK)
    both = jax.jit(lambda params: (params, tx.init(params)))(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(tree(3), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        both = step(*both)
    assert relative_error(both[1].start["block"], random_tree(1)["block"]) == 0
    assert jax.tree.leaves(both[1].start["dense"]) == []
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert {x.dtype for x in jax.tree.leaves(tx.init(half).start)} == {jnp.dtype(jnp.bfloat16)}
    # The copy is one of the trees that are like params, for sharding rules and the like.
    tx = dtnh_jax.add_l2_sp("init", 1.0)
    seen = optax.tree.map_params(tx, lambda x: "like params", tx.init(params))
    assert set(jax.tree.leaves(seen.start)) == {"like params"}


@pytest.mark.parametrize("way", ["init", "argument"])
def test_the_start_is_no_constant_of_the_program(way):
    params = {"w": jnp.arange(64.0)}
    extra = {"source_params": params} if way == "argument" else {}
    for start, n in ((params, 1), (way, 0)):
        tx = dtnh_jax.add_l2_sp(start, 1.0)
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params, **extra)
        assert [const.shape for const in jaxpr.consts].count((64,)) == n


def test_where_the_start_comes_from_is_checked():
    with pytest.raises(ValueError, match=r"'init' for the params that init sees.*got 'start'"):
        dtnh_jax.add_l2_sp("start", 1.0)
    tx = dtnh_jax.add_l2_sp("argument", 1.0)
    params = tree(0)
    with pytest.raises(TypeError, match=r"source_params=pretrained"):
        tx.update(params, tx.init(params), params)


def test_add_l2_sp_errors():
    params = tree(0)
    tx = dtnh_jax.add_l2_sp({**tree(1), "dense": None}, 1.0)
    with pytest.raises(ValueError, match=r"add_l2_sp needs the params"):
        tx.update(params, tx.init(params))
    tx = dtnh_jax.add_l2_sp({"block": None}, 1.0)
    with pytest.raises(ValueError, match=r"pretrained must have the structure of params"):
        tx.update(params, tx.init(params), params)
    tx = dtnh_jax.add_l2_sp(jax.tree.map(lambda x: x[None], params), 1.0)
    with pytest.raises(
        ValueError, match=r"pretrained must have the shapes of params.*'block/conv/bias'"
    ):
        tx.update(params, tx.init(params), params)


def test_other_arguments_reach_the_optimizer():
    optimizer = optax.polyak_sgd(1.0)
    params = jnp.ones(2)
    tx = dtnh_jax.decoupled(optimizer, 0.0, learning_rate=0.1)
    got, _ = tx.update((params, params), tx.init(params), params, value=0.5)
    wanted, _ = optimizer.update(params, optimizer.init(params), params, value=0.5)
    np.testing.assert_allclose(got, wanted)


def test_what_the_optimizer_freezes_a_mask_freezes_too():
    params = {"back": jnp.ones(1), "front": jnp.ones(1)}
    kinds = {"back": "trained", "front": "frozen"}
    optimizer = optax.partition({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, kinds)
    mask = {"back": True, "front": False}
    tx = dtnh_jax.decoupled(optimizer, 1.0, learning_rate=0.1, mask=mask)
    updates, _ = tx.update((params, params), tx.init(params), params)
    np.testing.assert_allclose([updates["back"][0], updates["front"][0]], [-0.2, 0.0])
