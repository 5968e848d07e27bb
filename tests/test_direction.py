"""The direction of dtnh: its values, and what it promises on every kind of input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_trees_equal,
    direction_of,
    inner,
    norm,
    oracle,
    oracle_groups,
    random_tree,
    relative_error,
    rule,
    wide,
)

import dtnh_jax

SCOPES = ["global", "layer", "leaf", "element"]
ON_CONFLICT = ["project", "orthogonal"]
# Of two numbers, no part of one is orthogonal to the other: that combination is an error.
every_choice = pytest.mark.parametrize(
    ("scope", "on_conflict"),
    [
        (scope, on_conflict)
        for scope in SCOPES
        for on_conflict in ON_CONFLICT
        if (scope, on_conflict) != ("element", "orthogonal")
    ],
)
A, B = [-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("reg_weight", "wanted"),
    [
        (1.0, [-2.8888888888888888, 3.2222222222222222, 3.2222222222222222]),
        (0.1, [-3.8888888888888888, 1.2222222222222222, 1.2222222222222222]),
    ],
)
@pytest.mark.parametrize("on_conflict", ON_CONFLICT)
def test_published_values(reg_weight, wanted, on_conflict):
    tx = rule("dtnh", reg_weight, on_conflict=on_conflict)
    got, _ = direction_of(tx, np.float32(A), np.float32(B))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("on_conflict", ON_CONFLICT)
def test_published_values_in_float64(on_conflict):
    got, _ = direction_of(rule("dtnh", 0.1, on_conflict=on_conflict), np.float64(A), np.float64(B))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, [-35 / 9, 11 / 9, 11 / 9], rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@every_choice
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float32, 1e-5), (np.complex64, 1e-5), (jnp.bfloat16, 2e-2), (np.float16, 2e-3)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_agrees_with_the_oracle(dtype, tolerance, scope, on_conflict, seed):
    a, b = random_tree(seed, dtype), random_tree(seed + 100, dtype)
    got, _ = direction_of(rule("dtnh", 0.7, scope=scope, on_conflict=on_conflict), a, b)
    assert relative_error(got, oracle(a, b, 0.7, scope, on_conflict)) <= tolerance
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))


@pytest.mark.usefixtures("x64")
@every_choice
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_agrees_with_the_oracle_in_float64(dtype, scope, on_conflict):
    a, b = random_tree(0, dtype), random_tree(100, dtype)
    got, _ = direction_of(rule("dtnh", 0.7, scope=scope, on_conflict=on_conflict), a, b)
    assert relative_error(got, oracle(a, b, 0.7, scope, on_conflict)) <= 1e-12


def opposite(a, b):
    return a, jax.tree.map(lambda x: -3 * x, a)


def parallel(a, b):
    return a, jax.tree.map(lambda x: 3 * x, a)


def zero_loss(a, b):
    return jax.tree.map(np.zeros_like, a), b


def zero_reg(a, b):
    return a, jax.tree.map(np.zeros_like, b)


def scaled(loss_scale, reg_scale):
    def pair(a, b):
        return (
            jax.tree.map(lambda x: (x * np.float32(loss_scale)).astype(x.dtype), a),
            jax.tree.map(lambda x: (x * np.float32(reg_scale)).astype(x.dtype), b),
        )

    return pair


def leaf_by_leaf(a, b):
    """Leaves from 1e-12 to 1e15, large against small."""
    leaves, treedef = jax.tree.flatten(a)
    scales = np.logspace(-12, 15, len(leaves)).astype(np.float32)
    return (
        treedef.unflatten([x * s for x, s in zip(leaves, scales, strict=True)]),
        treedef.unflatten([x * s for x, s in zip(jax.tree.leaves(b), scales[::-1], strict=True)]),
    )


INPUTS = {
    "generic": lambda a, b: (a, b),
    "opposite": opposite,
    "parallel": parallel,
    "zero loss": zero_loss,
    "zero reg": zero_reg,
    "zero both": lambda a, b: zero_loss(*zero_reg(a, b)),
    "leaf by leaf": leaf_by_leaf,
    **{
        f"a {x:g} b {y:g}": scaled(x, y)
        for x in (1e-12, 1e-6, 1.0, 1e6, 1e15)
        for y in (1e-12, 1e-6, 1.0, 1e6, 1e15)
    },
}


@pytest.mark.parametrize("seed", range(2))
@every_choice
@pytest.mark.parametrize("name", INPUTS)
def test_never_hurts(name, scope, on_conflict, seed):
    a, b = INPUTS[name](random_tree(seed), random_tree(seed + 100))
    got, _ = direction_of(rule("dtnh", 1.0, scope=scope, on_conflict=on_conflict), a, b)
    d, a, b = (jax.tree.leaves(wide(tree)) for tree in (got, a, b))
    assert all(np.isfinite(x).all() for x in d)
    groups = oracle_groups(a, "leaf" if scope == "element" else scope)
    if scope == "layer":
        groups = oracle_groups(got, "layer")
    for group in [*groups, range(len(d))]:
        d_, a_, b_ = ([tree[i] for i in group] for tree in (d, a, b))
        rounding = 1e-6 * norm(a_) * (norm(a_) + norm(b_))
        assert inner(d_, a_) >= norm(a_) ** 2 - rounding


@every_choice
@pytest.mark.parametrize("name", INPUTS)
def test_no_conflict_is_silently_kept(name, scope, on_conflict):
    """What is left of b has no component against a, relative to its own size."""
    a, b = INPUTS[name](random_tree(0), random_tree(100))
    got, _ = direction_of(rule("dtnh", 1.0, scope=scope, on_conflict=on_conflict), a, b)
    wanted = oracle(a, b, 1.0, scope, on_conflict)
    a, b = wide(a), wide(b)
    if scope == "element":
        units = [[i] for i in range(len(jax.tree.leaves(a)))]
    else:
        units = oracle_groups(a, scope)
    for group in units:
        d_, w_, a_, b_ = ([jax.tree.leaves(tree)[i] for i in group] for tree in (got, wanted, a, b))
        if norm(b_) > norm(a_):
            error = norm([x - y for x, y in zip(wide(d_), w_, strict=True)])
            assert error <= 1e-5 * norm(b_)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("seed", range(5))
def test_without_conflict_it_is_the_weighted_sum_to_the_bit(scope, seed):
    a = random_tree(seed)
    b = jax.tree.map(lambda x, y: np.abs(y) * np.sign(x), a, random_tree(seed + 100))
    got, _ = direction_of(rule("dtnh", 0.3, scope=scope), a, b)
    wanted, _ = direction_of(rule("weighted_sum", 0.3), a, b)
    assert_trees_equal(got, wanted)
    by_hand = jax.tree.map(lambda x, y: x + np.float32(0.3) * y, a, b)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


@every_choice
def test_projection_is_idempotent(scope, on_conflict):
    """The part of b that is kept has nothing more to remove."""
    a, b = random_tree(0), random_tree(100)
    tx = rule("dtnh", 1.0, scope=scope, on_conflict=on_conflict)
    once, _ = direction_of(tx, a, b)
    kept = jax.tree.map(lambda d, x: np.asarray(d) - x, once, a)
    twice, _ = direction_of(tx, a, kept)
    assert relative_error(twice, once) <= 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
@pytest.mark.parametrize("scope", SCOPES)
def test_kept_part_is_invariant_to_the_scale_of_a(scope, scale):
    a, b = random_tree(0), random_tree(100)
    tx = rule("dtnh", 1.0, scope=scope)

    scaled_a = jax.tree.map(lambda x: x * np.float32(scale), a)
    d, state = direction_of(tx, scaled_a, b)
    plain_d, plain_state = direction_of(tx, a, b)
    kept = jax.tree.map(lambda x, y: x - y, wide(d), wide(scaled_a))
    plain_kept = jax.tree.map(lambda x, y: x - y, wide(plain_d), wide(a))
    assert norm(jax.tree.map(lambda x, y: x - y, kept, plain_kept)) <= 1e-6 * norm(
        d if scale > 1 else plain_kept
    )
    np.testing.assert_allclose(
        dtnh_jax.conflict_stats(state).per_group.cosine,
        dtnh_jax.conflict_stats(plain_state).per_group.cosine,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_homogeneous_in_b(scope):
    """Twice the regularizer is twice its weight, as both come after the projection."""
    a, b = random_tree(0), random_tree(100)
    doubled, _ = direction_of(rule("dtnh", 0.5, scope=scope), a, jax.tree.map(lambda x: 2 * x, b))
    weighted, _ = direction_of(rule("dtnh", 1.0, scope=scope), a, b)
    assert relative_error(doubled, weighted) <= 1e-7


def test_zero_loss_gradient_follows_the_regularizer():
    a, b = zero_loss(random_tree(0), random_tree(100))
    got, _ = direction_of(rule("dtnh", 0.5), a, b)
    assert_trees_equal(got, jax.tree.map(lambda y: jnp.asarray(np.float32(0.5) * y), b))


def test_real_elements_in_conflict_are_dropped_exactly():
    a, b = random_tree(0), random_tree(100)
    got, _ = direction_of(rule("dtnh", 1e6, scope="element"), a, b)
    for d, x, y in zip(*map(jax.tree.leaves, (got, a, b)), strict=True):
        against = np.asarray(x * y < 0)
        np.testing.assert_array_equal(np.asarray(d)[against], np.asarray(x)[against])


def test_new_head_leaves_the_backbone_protected():
    """METHOD's toy: with the head in the group the backbone would get 0.1, the head 3.3."""
    a = {"backbone": np.float32([1, 0]), "head": np.float32([3, 0])}
    b = {"backbone": np.float32([-1, 1]), "head": np.float32([0, 0])}
    inside, _ = direction_of(rule("dtnh", 1.0), a, b)
    np.testing.assert_allclose(inside["backbone"], [0.1, 1.0], rtol=1e-6)
    np.testing.assert_allclose(inside["head"], [3.3, 0.0], rtol=1e-6)
    for reg_grads, kwargs in [
        ({**b, "head": None}, {}),
        (b, {"mask": {"backbone": True, "head": False}}),
        (b, {"mask": lambda tree: {"backbone": True, "head": False}}),
    ]:
        outside, _ = direction_of(dtnh_jax.dtnh(1.0, **kwargs), a, reg_grads)
        np.testing.assert_allclose(outside["backbone"], [1.0, 1.0], rtol=1e-6)
        np.testing.assert_array_equal(outside["head"], a["head"])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_unreached_leaves_pass_bit_for_bit(scope, dtype):
    a, b = random_tree(0, dtype), random_tree(100, dtype)
    a["dense"]["bias"][0] = np.nan
    reg_grads = {**b, "dense": None}
    got, state = direction_of(rule("dtnh", 2.0, scope=scope), a, reg_grads)
    for x, y in zip(jax.tree.leaves(got["dense"]), jax.tree.leaves(a["dense"]), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    rest = {key: value for key, value in a.items() if key != "dense"}
    assert all(np.isfinite(wide(x)).all() for x in jax.tree.leaves({**got, "dense": None}))
    alone, _ = direction_of(rule("dtnh", 2.0, scope=scope), rest, {key: b[key] for key in rest})
    assert_trees_equal({key: got[key] for key in rest}, alone)
    assert np.isfinite(dtnh_jax.conflict_stats(state).total.cosine)


def test_layers_that_agree_in_total_are_still_looked_at_one_by_one():
    a = {"one": {"w": np.float32([1, 0])}, "two": {"w": np.float32([1, 0])}}
    b = {"one": {"w": np.float32([2, 0])}, "two": {"w": np.float32([-1, 1])}}
    in_total, _ = direction_of(rule("dtnh", 1.0), a, b)
    by_layer, _ = direction_of(dtnh_jax.dtnh(1.0, scope="layer"), a, b)
    np.testing.assert_array_equal(in_total["two"]["w"], [0, 1])
    np.testing.assert_array_equal(by_layer["two"]["w"], [1, 1])


def test_scope_by_function_and_by_labels_agree():
    a, b = random_tree(0), random_tree(100)
    labels = {"block": "body", "dense": "top", "temperature": "body"}
    seen = []

    def by_path(path):
        seen.append(path)
        return labels[path.split("/")[0]]

    by_function, state = direction_of(dtnh_jax.dtnh(1.0, scope=by_path), a, b)
    by_labels, _ = direction_of(dtnh_jax.dtnh(1.0, scope=labels), a, b)
    assert_trees_equal(by_function, by_labels)
    assert "block/conv/kernel" in seen
    assert dtnh_jax.conflict_stats(state).groups == ("body", "top")
    for name in ("body", "top"):
        keys = [key for key, label in labels.items() if label == name]
        wanted = oracle({k: a[k] for k in keys}, {k: b[k] for k in keys}, 1.0, "global")
        assert relative_error({k: by_labels[k] for k in keys}, wanted) <= 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_odd_trees(scope):
    tx = rule("dtnh", 1.0, scope=scope)
    for empty in ({}, (), [], {"a": None}):
        got, _ = tx.update(dtnh_jax.GradientPair(empty, empty), tx.init(empty))
        assert got == empty
    scalar, _ = direction_of(tx, np.float32(2), np.float32(-3))
    assert scalar.shape == ()
    np.testing.assert_allclose(scalar, 2, rtol=1e-6)
    a = {"none": np.zeros((0, 3), np.float32), "some": np.float32([1, 0])}
    b = {"none": np.zeros((0, 3), np.float32), "some": np.float32([-1, 1])}
    got, _ = direction_of(tx, a, b)
    assert got["none"].shape == (0, 3)
    np.testing.assert_array_equal(got["some"], [1, 1])


def test_everything_masked_is_the_loss_gradient():
    a, b = random_tree(0), random_tree(100)
    for kwargs in ({"mask": False}, {"mask": jax.tree.map(lambda _: False, a)}):
        got, _ = direction_of(dtnh_jax.dtnh(1.0, **kwargs), a, b)
        assert_trees_equal(got, jax.tree.map(jnp.asarray, a))
    got, _ = direction_of(rule("dtnh", 1.0), a, None)
    assert_trees_equal(got, jax.tree.map(jnp.asarray, a))


def test_mixed_dtypes_keep_theirs():
    a = {"low": random_tree(0, jnp.bfloat16, (64,)), "high": random_tree(1, np.float32, (64,))}
    b = {"low": random_tree(2, np.float32, (64,)), "high": random_tree(3, np.float16, (64,))}
    got, _ = direction_of(rule("dtnh", 1.0), a, b)
    assert got["low"].dtype == jnp.bfloat16
    assert got["high"].dtype == jnp.float32
    assert relative_error(got, oracle(a, b, 1.0, "global")) <= 5e-3


def test_half_precision_accumulates_in_float32():
    ones = np.ones(70_000, np.float16)
    got, state = direction_of(rule("dtnh", 1.0), ones, -ones)
    np.testing.assert_array_equal(got, ones)
    np.testing.assert_allclose(dtnh_jax.conflict_stats(state).total.cosine, -1, rtol=1e-6)


def test_non_finite_gradients_are_not_hidden():
    a = {"w": np.float32([np.inf, 1]), "v": np.float32([1, 1])}
    b = {"w": np.float32([-1, 1]), "v": np.float32([-1, 1])}
    got, _ = direction_of(rule("dtnh", 1.0), a, b)
    assert not np.isfinite(got["w"]).all()
    by_leaf, _ = direction_of(dtnh_jax.dtnh(1.0, scope="leaf"), a, b)
    assert np.isfinite(by_leaf["v"]).all()


@pytest.mark.parametrize("exponent", [-13, -10, -5, 0, 5, 10, 15, 17])
def test_angles_are_exact_where_squares_are(exponent):
    a, b = (jax.tree.map(lambda x: x * np.float32(10.0**exponent), random_tree(i)) for i in (0, 9))
    got, state = direction_of(rule("dtnh", 1.0), a, b)
    assert relative_error(got, oracle(a, b, 1.0, "global")) <= 1e-6
    cosine = inner(a, b) / (norm(a) * norm(b))
    np.testing.assert_allclose(dtnh_jax.conflict_stats(state).total.cosine, cosine, rtol=1e-5)


@pytest.mark.parametrize("exponent", range(-30, -14))
def test_a_loss_gradient_too_small_to_be_squared_counts_as_zero(exponent):
    """Just above, some squares underflow: too small a sum would make too large a projection."""
    a, b = random_tree(0), random_tree(9)
    a = jax.tree.map(lambda x: x * np.float32(10.0**exponent), a)
    for scope in ("global", "leaf"):
        got, _ = direction_of(rule("dtnh", 1.0, scope=scope), a, b)
        exact, summed = oracle(a, b, 1.0, scope), jax.tree.map(np.add, wide(a), wide(b))
        for d, *either in zip(*map(jax.tree.leaves, (got, exact, summed)), strict=True):
            errors = [norm([wide(d) - wanted]) for wanted in either]
            assert min(errors) <= 1e-6 * norm([either[1]])


def test_large_weights_of_large_quotients_stay_finite():
    a, b = np.float32([1e-14, 0]), np.float32([-1e18, 1e18])
    got, _ = direction_of(rule("dtnh", 1e3), a, b)
    np.testing.assert_allclose(got[1], 1e21, rtol=1e-6)
    assert np.isfinite(got).all()
