"""The held-out reference: its promise, its state, and every way in which its gradient is passed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_equal,
    inner,
    norm,
    oracle,
    oracle_groups,
    random_tree,
    relative_error,
    wide,
)

import dtnh_jax

SCOPES = ["global", "layer", "leaf", "element"]


def tree(seed, dtype=np.float32):
    return jax.tree.map(jnp.asarray, random_tree(seed, dtype))


def step(tx, a, b, v, state=None):
    state = tx.init(a) if state is None else state
    return tx.update((a, b), state, a, held_out_grads=v)


def minus(x, y):
    return jax.tree.map(lambda x, y: x - y, wide(x), wide(y))


def part(leaves, group):
    return [jax.tree.leaves(leaves)[i] for i in group]


# The promise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("on_conflict", ["project", "gate", "cosine"])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_added_does_not_raise_the_held_out_loss(scope, on_conflict, seed):
    """To first order, in each group: ⟨v, d - a⟩ ≥ 0, whatever the batch's gradient is."""
    a, b, v = tree(seed), tree(seed + 100), tree(seed + 200)
    tx = dtnh_jax.dtnh(5.0, scope=scope, on_conflict=on_conflict, reference="held_out")
    added = minus(step(tx, a, b, v)[0], a)
    for group in oracle_groups(a, "leaf" if scope == "element" else scope):
        x, y = part(added, group), part(wide(v), group)
        assert inner(x, y) >= -1e-5 * norm(x) * norm(y)


@pytest.mark.parametrize("scope", SCOPES)
def test_it_is_the_rule_with_another_reference(scope):
    a, b, v = tree(0), tree(100), tree(200)
    got, _ = step(dtnh_jax.dtnh(0.7, scope=scope, reference="held_out"), a, b, v)
    wanted = jax.tree.map(lambda x, d, r: x + d - r, wide(a), oracle(v, b, 0.7, scope), wide(v))
    assert relative_error(got, wanted) <= 1e-5


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", [dtnh_jax.dtnh_sgd, dtnh_jax.dtnh_adamw])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_preset_adds_nothing_that_raises_the_held_out_loss(make, scope):
    choices = {"scope": scope, "reference": "held_out", "bound_by": "running_max"}
    if make is dtnh_jax.dtnh_adamw:
        choices["weight_decay"] = 0.0
    tx, plain = make(0.1, 1e3, **choices), make(0.1, 0.0, **choices)
    params = tree(50)
    state, plain_state = tx.init(params), plain.init(params)
    for i in range(3):
        a, b, v = tree(i), tree(100 + i), tree(200 + i)
        updates, state = tx.update((a, b), state, params, held_out_grads=v)
        without, plain_state = plain.update((a, b), plain_state, params, held_out_grads=v)
        added = minus(updates, without)
        for group in oracle_groups(a, scope):
            x, y = part(added, group), part(wide(v), group)
            assert inner(x, y) <= 1e-5 * norm(x) * norm(y)  # an update goes down


# The bound


@pytest.mark.parametrize("scope", ["global", "layer", "leaf"])
def test_the_bound_is_relative_to_the_loss_gradient(scope):
    a, b = tree(0), tree(100)
    v = jax.tree.map(lambda x: 1e3 * x, b)  # agrees with b, and is long
    tx = dtnh_jax.dtnh(1e4, scope=scope, on_conflict="gate", reference="held_out", max_ratio=0.5)
    added = minus(step(tx, a, b, v)[0], a)
    for group in oracle_groups(a, scope):
        assert norm(part(added, group)) == pytest.approx(0.5 * norm(part(wide(a), group)), rel=1e-4)


def test_the_running_maximum_does_not_fade():
    b = {"w": jnp.array([0.0, 1.0])}
    tx = dtnh_jax.dtnh(1e4, max_ratio=1.0, on_conflict="gate", bound_by="running_max")
    state = tx.init(b)
    for length, bound in [(2.0, 2.0), (8.0, 8.0), (0.5, 8.0), (0.0, 8.0), (9.0, 9.0)]:
        direction, state = tx.update(({"w": jnp.array([length, 0.0])}, b), state)
        np.testing.assert_allclose(direction["w"], [length, bound], rtol=1e-6)
    current = dtnh_jax.dtnh(1e4, max_ratio=1.0, on_conflict="gate")
    assert current.init(b).largest is None


def test_the_running_maximum_is_of_each_group():
    a = {"one": {"w": jnp.array([3.0])}, "two": {"w": jnp.array([5.0])}}
    b = {"one": {"w": jnp.array([1.0])}, "two": {"w": jnp.array([1.0])}}
    tx = dtnh_jax.dtnh(1e4, scope="layer", max_ratio=1.0, bound_by="running_max")
    _, state = tx.update((a, b), tx.init(a))
    direction, state = tx.update((jax.tree.map(lambda x: x / 10, a), b), state)
    np.testing.assert_allclose(direction["one"]["w"], 3.3, rtol=1e-6)
    np.testing.assert_allclose(direction["two"]["w"], 5.5, rtol=1e-6)
    np.testing.assert_allclose(state.largest, [3.0, 5.0])


# The average


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_it_is_compared_with_the_decayed_sum(decay):
    reference = dtnh_jax.held_out(decay)
    tx = dtnh_jax.dtnh(0.7, scope="layer", reference=reference)
    state = tx.init(tree(0))
    average = jax.tree.map(lambda x: 0 * x, wide(tree(0)))
    for i in range(4):
        a, b, v = tree(i), tree(100 + i), tree(200 + i)
        got, state = step(tx, a, b, v, state)
        average = jax.tree.map(lambda m, x: decay * m + x, average, wide(v))
        wanted = jax.tree.map(
            lambda x, d, r: x + d - r, wide(a), oracle(average, b, 0.7, "layer"), average
        )
        assert relative_error(got, wanted) <= 1e-5


def test_the_average_of_half_precision_is_in_float32():
    a, b, v = (tree(i, jnp.bfloat16) for i in (0, 100, 200))
    tx = dtnh_jax.dtnh(0.7, reference=dtnh_jax.held_out(0.99))
    state = tx.init(a)
    assert {x.dtype for x in jax.tree.leaves(state.reference.average)} == {jnp.dtype(jnp.float32)}
    direction, after = step(tx, a, b, v, state)
    assert {x.dtype for x in jax.tree.leaves(direction)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(after) == jax.tree.structure(state)


# Not every step


@pytest.fixture(params=[jnp.asarray, bool], ids=["traced", "static"])
def some(request):
    """Held-out gradients whose newness is an array, or known when the step is traced."""
    return lambda v, is_new: dtnh_jax.HeldOutGrads(v, request.param(is_new))


def test_the_regularizer_is_left_out_until_the_first_gradient(some):
    a, b, v = tree(0), tree(100), tree(200)
    tx = dtnh_jax.dtnh(0.5, on_conflict="gate", reference="held_out")
    zeros = jax.tree.map(jnp.zeros_like, v)
    direction, state = step(tx, a, b, some(zeros, False))
    assert_trees_equal(direction, a)
    assert int(state.reference.age) == -1
    direction, state = step(tx, a, b, some(b, True), state)
    assert (
        relative_error(direction, jax.tree.map(lambda x, y: x + 0.5 * y, wide(a), wide(b))) < 1e-6
    )
    assert int(state.reference.age) == 0


def test_between_two_gradients_the_average_stays(some):
    a, b, v = tree(0), tree(100), tree(200)
    tx = dtnh_jax.dtnh(0.5, scope="layer", reference=dtnh_jax.held_out(0.9))
    first, state = step(tx, a, b, some(v, True))
    again, after = step(tx, a, b, some(tree(300), False), state)
    assert_trees_equal(again, first)
    assert_trees_equal(after.reference.average, state.reference.average)
    assert int(after.reference.age) == 1


@pytest.mark.parametrize("max_age", [0, 2])
def test_a_gradient_that_is_too_old_leaves_the_regularizer_out(some, max_age):
    a, b = tree(0), tree(100)
    tx = dtnh_jax.dtnh(0.5, reference=dtnh_jax.held_out(0.9, max_age=max_age))
    _, state = step(tx, a, b, some(b, True))
    for age in range(1, 5):
        direction, state = step(tx, a, b, some(b, False), state)
        assert int(state.reference.age) == age
        if age > max_age:
            assert_trees_equal(direction, a)
        else:
            assert relative_error(direction, a) > 0.1
    direction, state = step(tx, a, b, some(b, True), state)
    assert relative_error(direction, a) > 0.1


def test_every_k_steps_in_a_jitted_loop():
    a, b = tree(0), tree(100)
    calls = []

    def grad(seed, params):
        jax.debug.callback(lambda: calls.append(None))
        return jax.tree.map(lambda x, p: x + 0 * p * seed, b, params)

    held_out_grads = dtnh_jax.every_k_steps(3, grad)
    tx = dtnh_jax.dtnh(0.5, on_conflict="gate", reference=dtnh_jax.held_out(0.9))

    def body(state, i):
        v = held_out_grads(i, jnp.float32(0.0), a)
        direction, state = tx.update((a, b), state, a, held_out_grads=v)
        return state, (direction, state.reference.age)

    _, (directions, ages) = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(7)))(tx.init(a))
    jax.effects_barrier()
    assert ages.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(calls) == 3
    wanted = jax.tree.map(lambda x, y: x + 0.5 * y, wide(a), wide(b))
    for i in range(7):
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], directions), wanted) <= 1e-6


# Every way to pass it


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("style", ["pair", "tuple", "reg_grads"])
@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1, momentum=0.9), optax.adam(0.1), optax.adamw(0.1), optax.lion(0.1)],
    ids=["sgd", "adam", "adamw", "lion"],
)
def test_through_a_chain_in_every_style(optimizer, style):
    a, b, v = tree(0), tree(100), tree(200)
    rule = dtnh_jax.dtnh(0.5, scope="layer", reference="held_out")
    direction, _ = step(rule, a, b, v)
    wanted, _ = optimizer.update(direction, optimizer.init(a), a)
    tx = optax.chain(dtnh_jax.transform_pair(), rule, optimizer)
    if style == "reg_grads":
        got, _ = tx.update(a, tx.init(a), a, reg_grads=b, held_out_grads=v)
    else:
        pair = (a, b) if style == "tuple" else dtnh_jax.GradientPair(a, b)
        got, _ = tx.update(pair, tx.init(a), a, held_out_grads=v)
    assert relative_error(got, wanted) <= 1e-5


def test_the_last_micro_batch_brings_the_held_out_gradient():
    a, b, v = tree(0), tree(100), tree(200)
    rule = dtnh_jax.dtnh(0.5, scope="layer", reference="held_out")
    tx = dtnh_jax.accumulate_pairs(rule, every_k=2)
    state = tx.init(a)
    _, state = tx.update((a, b), state, a, held_out_grads=tree(300))
    got, _ = tx.update((a, b), state, a, held_out_grads=v)
    wanted, _ = step(rule, a, b, v)
    assert relative_error(got, wanted) <= 1e-6


def test_decoupled_and_add_l2_sp_take_it_too():
    a, b, v = tree(0), tree(100), tree(200)
    sgd = optax.sgd(0.1, momentum=0.9)
    tx = dtnh_jax.decoupled(sgd, 0.5, learning_rate=0.1, scope="layer", reference="held_out")
    got, _ = step(tx, a, b, v)
    direction, _ = step(dtnh_jax.dtnh(0.5, scope="layer", reference="held_out"), a, b, v)
    assert relative_error(got, jax.tree.map(lambda x: -0.1 * x, direction)) <= 1e-5
    pull = dtnh_jax.add_l2_sp(tree(400), 0.5, scope="layer", reference="held_out")
    params = jax.tree.map(lambda w0, x: w0 + x, tree(400), b)
    got, _ = pull.update(a, pull.init(params), params, held_out_grads=v)
    assert relative_error(got, direction) <= 1e-5


@pytest.mark.usefixtures("standard_promotion")
def test_through_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(dtnh_jax.dtnh(0.5, reference="held_out"), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.ones((1, 2))
    grads, reg_grads, v = (
        nnx.grad(lambda model, s=s: jnp.sum(model(x) ** 2 * s))(model) for s in (1.0, -0.5, 1.0)
    )
    before = model.kernel[...]
    optimizer.update(model, grads, reg_grads=reg_grads, held_out_grads=v)
    # The regularizer is against v, all of it: nothing is left.
    np.testing.assert_allclose(model.kernel[...], before - grads["kernel"][...], rtol=1e-5)


def test_unreached_leaves_need_no_held_out_gradient():
    a, b, v = tree(0), tree(100), tree(200)
    mask = {"block": True, "dense": False, "temperature": True}
    tx = dtnh_jax.dtnh(0.5, mask=mask, reference="held_out")
    state = tx.init(a)
    assert len(jax.tree.leaves(state.reference.average)) == len(jax.tree.leaves(a)) - 2
    got, _ = step(tx, a, b, {**v, "dense": None}, state)
    wanted, _ = step(tx, a, b, v, state)
    assert_trees_equal(got, wanted)
    assert_trees_equal(got["dense"], a["dense"])


def test_jit_donates_vmaps_and_compiles_once():
    a, b, v = tree(0), tree(100), tree(200)
    tx = dtnh_jax.dtnh_sgd(0.1, 0.5, scope="layer", reference="held_out", bound_by="running_max")
    wanted, _ = step(tx, a, b, v)
    traces = []

    def update(pair, state, v):
        traces.append(None)
        return tx.update(pair, state, held_out_grads=v)

    jitted = jax.jit(update, donate_argnums=1)
    got, state = jitted((a, b), tx.init(a), v)
    assert relative_error(got, wanted) <= 1e-6
    jitted((a, b), state, v)
    assert len(traces) == 1
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), ((a, b), tx.init(a), v))
    mapped, _ = jax.vmap(update)(*twice)
    assert relative_error(jax.tree.map(lambda x: x[1], mapped), wanted) <= 1e-6


def test_sharded_is_as_on_one_device():
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("wants eight devices")
    mesh = jax.make_mesh((8,), ("x",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    a, b, v = ({"w": jnp.asarray(random_tree(i, shapes=(16, 4)))} for i in (0, 100, 200))
    tx = dtnh_jax.dtnh_sgd(0.1, 0.5, reference=dtnh_jax.held_out(0.9), bound_by="running_max")
    wanted, _ = step(tx, a, b, v)
    spread = jax.device_put((a, b, v), cut)
    got, _ = jax.jit(lambda a, b, v: step(tx, a, b, v))(*spread)
    assert relative_error(got, wanted) <= 1e-6


# Errors


def test_a_gradient_that_never_comes():
    a, b = tree(0), tree(100)
    tx = dtnh_jax.dtnh(0.5, reference="held_out")
    with pytest.raises(TypeError, match=r"needs held_out_grads=.*every_k_steps"):
        tx.update((a, b), tx.init(a), a)


def test_a_gradient_of_another_form():
    a, b, v = tree(0), tree(100), tree(200)
    tx = dtnh_jax.dtnh(0.5, reference="held_out")
    with pytest.raises(ValueError, match=r"got nothing for .* at 'dense/bias'"):
        step(tx, a, b, {**v, "dense": None})
    wrong = {**v, "dense": {**v["dense"], "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"got shape \(3,\) for \(5,\) at 'dense/bias'"):
        step(tx, a, b, wrong)
    with pytest.raises(ValueError, match="held_out_grads must have the structure of loss_grads"):
        step(tx, a, b, {"block": v["block"]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dtnh_jax.held_out(1.0), r"decay must be in \[0, 1\)"),
        (lambda: dtnh_jax.held_out(0.9, max_age=-1), "max_age must be None or"),
        (lambda: dtnh_jax.every_k_steps(0, lambda: None), "k must be at least 1"),
        (lambda: dtnh_jax.dtnh(0.1, bound_by="max"), "'current' or 'running_max'; got 'max'"),
        (lambda: dtnh_jax.dtnh(0.1, bound_by="running_max"), "give max_ratio"),
        (
            lambda: dtnh_jax.dtnh(0.1, scope="element", max_ratio=1.0, bound_by="running_max"),
            "another scope than 'element'",
        ),
    ],
)
def test_choices_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
