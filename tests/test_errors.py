"""Bad input: each error says what was wanted, what came, and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_tree

import dtnh_jax

A, B = random_tree(0), random_tree(100)


def update(updates, init_params=A, tx=None, **kwargs):
    tx = tx or dtnh_jax.dtnh(1.0)
    return tx.update(updates, tx.init(init_params), **kwargs)


@pytest.mark.parametrize("rule", [dtnh_jax.dtnh, dtnh_jax.weighted_sum])
@pytest.mark.parametrize("value", [-0.1, float("nan"), np.float32(-1), jnp.array([0.1, 0.2])])
def test_reg_weight_out_of_range(rule, value):
    with pytest.raises(ValueError, match=r"reg_weight must be a number >= 0.*got"):
        rule(value)


@pytest.mark.parametrize("value", ["0.1", None, True, {"w": 0.1}])
def test_reg_weight_of_a_wrong_type(value):
    with pytest.raises(TypeError, match=r"reg_weight must be a number >= 0 or an optax schedule"):
        dtnh_jax.dtnh(value)


def test_unknown_on_conflict():
    with pytest.raises(ValueError, match=r"'project', 'orthogonal'.*got 'Project'"):
        dtnh_jax.dtnh(0.1, on_conflict="Project")


def test_unknown_scope():
    with pytest.raises(ValueError, match=r"'global', 'layer', 'leaf', 'element'.*got 'layers'"):
        dtnh_jax.dtnh(0.1, scope="layers")
    for scope in (None, True, 1, 0.5):
        with pytest.raises(TypeError, match=rf"a tree of labels.*got {scope}"):
            dtnh_jax.dtnh(0.1, scope=scope)


@pytest.mark.parametrize("updates", [A, [A, B], (A,), (A, B, B), {"loss_grads": A}])
def test_no_pair(updates):
    with pytest.raises(
        TypeError,
        match=r"as a pair; got one tree.*GradientPair\(loss_grads, reg_grads\).*reg_grads=",
    ):
        update(updates)


def test_lone_tree_that_happens_to_be_a_tuple_of_two():
    params = (jnp.ones(2), jnp.ones(2))
    with pytest.raises(TypeError, match="as a pair"):
        update(params, params, params=params)
    tx = dtnh_jax.dtnh(0.1, scope="leaf")
    with pytest.raises(ValueError, match=r"groups of the params that init saw.*GradientPair"):
        update(params, params, tx)


def test_lone_dict_with_keys_zero_and_one():
    params = {0: jnp.ones(2), 1: jnp.ones(2)}
    with pytest.raises(TypeError, match="as a pair; got one tree"):
        update(params, params)


def test_pair_of_a_tuple_of_two_is_understood():
    params = (jnp.ones(2), jnp.ones(2))
    direction, _ = update((params, params), params, params=params)
    np.testing.assert_allclose(direction[0], 2.0)
    direction, _ = update(params, params, params=params, reg_grads=params)
    np.testing.assert_allclose(direction[0], 2.0)


def test_reg_grads_twice():
    with pytest.raises(TypeError, match="reg_grads came twice"):
        update((A, B), reg_grads=B)


def test_a_gradient_pair_wins_over_the_reg_grads_that_a_chain_hands_on():
    """After a link from pairs to pairs, the rule combines what that link made."""
    tx = optax.chain(dtnh_jax.transform_pair(reg=optax.scale(2.0)), dtnh_jax.dtnh(1.0))
    params = jax.tree.map(jnp.zeros_like, A)
    by_name, _ = tx.update(A, tx.init(params), params, reg_grads=B)
    by_pair, _ = tx.update((A, B), tx.init(params), params)
    wanted, _ = update((A, jax.tree.map(lambda x: 2 * x, B)))
    for got in (by_name, by_pair):
        for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("dense"), r"has nothing at 'dense/bias'.*put None there"),
        (lambda b: b.update(more=np.ones(1)), r"has 'more', which loss_grads lacks"),
        (lambda b: b.update(dense=np.ones(1)), r"has a leaf at 'dense', where loss_grads has a"),
        (lambda b: b["dense"].pop("bias"), r"has nothing at 'dense/bias'"),
    ],
    ids=["missing", "extra", "leaf for subtree", "missing leaf"],
)
def test_trees_that_do_not_match(change, message):
    b = random_tree(100)
    change(b)
    with pytest.raises(
        ValueError, match=r"reg_grads must have the structure of loss_grads, but " + message
    ):
        update((A, b))


def test_shapes_that_do_not_match():
    b = random_tree(100)
    b["dense"]["kernel"] = b["dense"]["kernel"].T
    with pytest.raises(ValueError, match=r"\(4, 5\) and \(5, 4\) at 'dense/kernel'.*put None"):
        update((A, b))


def test_shapes_that_would_broadcast_do_not_match_either():
    b = random_tree(100)
    b["dense"]["bias"] = np.float32(1)
    with pytest.raises(ValueError, match=r"\(5,\) and \(\) at 'dense/bias'"):
        update((A, b))


@pytest.mark.parametrize("role", ["loss_grads", "reg_grads"])
def test_integer_leaves(role):
    a, b = random_tree(0), random_tree(100)
    {"loss_grads": a, "reg_grads": b}[role]["dense"]["bias"] = np.arange(5)
    with pytest.raises(TypeError, match=role + r".*got int.* at 'dense/bias'.*put None"):
        update((a, b))


def test_integer_leaves_that_take_no_part_pass():
    a = {"w": np.float32([1, 2]), "steps": np.int32(3)}
    direction, _ = update((a, {"w": np.float32([1, 2]), "steps": None}), a)
    assert direction["steps"] == 3


def test_leaves_that_are_no_arrays():
    a, b = random_tree(0), random_tree(100)
    b["temperature"] = "warm"
    with pytest.raises(TypeError, match=r"reg_grads must hold arrays; got str at 'temperature'"):
        update((a, b))


def test_complex_regularizer_of_a_real_loss():
    b = random_tree(100, np.complex64)
    with pytest.raises(TypeError, match=r"complex at 'block/conv/bias'"):
        update((A, b))


@pytest.mark.parametrize(
    ("scope", "error", "message"),
    [
        ({"block": "one"}, ValueError, r"label tree of scope.*has nothing at 'dense/bias'"),
        ({**dict.fromkeys(A, "one"), "more": "two"}, ValueError, r"has 'more', which params lacks"),
        (dict.fromkeys(A, 1), TypeError, r"must hold strings; got 1 at 'block/conv/bias'.*mask="),
        (lambda path: None, TypeError, r"must return the name of the leaf's group.*got None"),
    ],
    ids=["missing", "extra", "numbers", "function"],
)
def test_labels_that_do_not_fit(scope, error, message):
    with pytest.raises(error, match=message):
        dtnh_jax.dtnh(0.1, scope=scope).init(A)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"block": True}, ValueError, r"mask must have.*has nothing at 'dense/bias'"),
        (dict.fromkeys(A, 1), TypeError, r"mask must hold True.*got 1 at 'block/conv/bias'"),
    ],
)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        dtnh_jax.dtnh(0.1, mask=mask).init(A)


def test_state_of_something_else():
    tx = dtnh_jax.dtnh(0.1)
    with pytest.raises(TypeError, match=r"the state that its init\(params\) made; got EmptyState"):
        tx.update((A, B), optax.EmptyState())
    layers = dtnh_jax.dtnh(0.1, scope="layer")
    with pytest.raises(ValueError, match=r"'dense' is in only one"):
        layers.update((A, B), layers.init({"block": A["block"], "temperature": np.ones(())}))


def test_errors_come_at_trace_time():
    tx = dtnh_jax.dtnh(0.1)
    b = random_tree(100)
    b["dense"]["bias"] = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="at 'dense/bias'"):
        jax.eval_shape(tx.update, (A, b), tx.init(A))


def test_conflict_stats_without_a_rule():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"holds the state of a dtnh_jax rule.*got tuple"):
        dtnh_jax.conflict_stats(optax.adam(0.1).init(params))
    silent = dtnh_jax.dtnh(0.1, diagnostics=False).init(params)
    with pytest.raises(ValueError, match="diagnostics=True"):
        dtnh_jax.conflict_stats(silent)


def test_a_mask_has_nothing_where_params_have_nothing():
    params = {**A, "dense": None}
    mask = jax.tree.map(lambda _: True, params)
    state = dtnh_jax.dtnh(0.1, scope="leaf", mask=mask).init(params)
    assert state.groups.keys() == dtnh_jax.dtnh(0.1, scope="leaf").init(params).groups.keys()


def test_no_regularizer_gradient_at_all_in_both_styles():
    """None says that it reaches nothing, which is another thing than to say nothing."""
    for kwargs in ({}, {"reg_grads": None}):
        direction, state = update((A, None) if not kwargs else A, **kwargs)
        for x, y in zip(*map(jax.tree.leaves, (direction, A)), strict=True):
            np.testing.assert_array_equal(x, y)
        assert not dtnh_jax.conflict_stats(state).reached.any()
    both, _ = update((A, B), reg_grads=None)
    wanted, _ = update((A, B))
    for x, y in zip(*map(jax.tree.leaves, (both, wanted)), strict=True):
        np.testing.assert_array_equal(x, y)
