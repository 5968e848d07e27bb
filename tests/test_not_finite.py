"""What is not finite, or out of the range of a square: no rule lets it in, and bounds hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dtnh_jax

A = {"one": {"w": jnp.array([3.0, 4.0])}, "two": {"w": jnp.array([1.0, 0.0])}}
B = {"one": {"w": jnp.array([1.0, 0.0])}, "two": {"w": jnp.array([2.0, 1.0])}}
BAD = {"nan": np.nan, "inf": np.inf, "square": 1e25}
RULES = [
    "agem",
    "bloop",
    "cagrad",
    "config",
    "dtnh",
    "dynamic_barrier",
    "gradient_cosine",
    "imtl_g",
    "mgda",
    "pcgrad",
    "upgrad",
]


def with_bad(tree, value):
    return tree | {"one": {"w": jnp.array([value, 1.0])}}


def step(tx, a, b, **extra):
    return tx.update((a, b), tx.init(a), a, **extra)


def added(tx, a, b, **extra):
    direction, _ = step(tx, a, b, **extra)
    return float(jnp.linalg.norm(np.float64(direction) - np.float64(a)))


@pytest.mark.usefixtures("standard_promotion")  # for the average of bloop
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", RULES)
def test_a_group_that_cannot_be_compared_is_left_out_and_the_others_are_not(name, bad):
    tx = getattr(dtnh_jax, name)(0.5, scope="layer")
    direction, state = step(tx, A, with_bad(B, BAD[bad]))
    wanted, _ = step(tx, A, B)
    np.testing.assert_array_equal(direction["one"]["w"], A["one"]["w"])
    np.testing.assert_array_equal(direction["two"]["w"], wanted["two"]["w"])
    stats = dtnh_jax.conflict_stats(state)
    assert stats.not_finite.tolist() == [1, 0]
    assert stats.reached.tolist() == [False, True]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(stats))


@pytest.mark.parametrize("choice", ["project", "gate", "cosine", "orthogonal", "keep"])
@pytest.mark.parametrize("bad", BAD)
def test_every_choice_leaves_it_out(choice, bad):
    tx = dtnh_jax.dtnh(0.5, scope="layer", on_conflict=choice, max_ratio=1.0)
    for zero in (1.0, 0.0):
        a = A | {"one": {"w": zero * A["one"]["w"]}}
        direction, _ = step(tx, a, with_bad(B, BAD[bad]))
        np.testing.assert_array_equal(direction["one"]["w"], a["one"]["w"])


def test_a_loss_gradient_whose_square_overflows_is_followed_alone():
    a, b = jnp.array([1e20, 0.0]), jnp.array([-1e18, 1.0])
    for tx in (dtnh_jax.dtnh(150.0), dtnh_jax.dtnh(150.0, max_ratio=1.0)):
        np.testing.assert_array_equal(step(tx, a, b)[0], a)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_elements_are_left_out_one_by_one(bad):
    a, b = jnp.array([1.0, 1.0, -1.0]), jnp.array([BAD[bad], 2.0, 2.0])
    direction, state = step(dtnh_jax.dtnh(0.5, scope="element"), a, b)
    np.testing.assert_array_equal(direction, [1.0, 2.0, -1.0])
    assert dtnh_jax.conflict_stats(state).not_finite.tolist() == [1]


def test_the_sum_is_the_sum_but_with_a_weight_of_zero():
    a, b = jnp.array([1.0, 1.0]), jnp.array([np.nan, 2.0])
    for diagnostics in (True, False):
        tx = dtnh_jax.weighted_sum(0.5, diagnostics=diagnostics)
        np.testing.assert_array_equal(step(tx, a, b)[0], [np.nan, 2.0])
        nothing = dtnh_jax.weighted_sum(0.0, diagnostics=diagnostics)
        np.testing.assert_array_equal(step(nothing, a, b)[0], a)


def test_a_weight_of_zero_in_a_sum_of_several():
    tx = dtnh_jax.agem((0.0, 0.5))
    a, b = jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0])
    got, _ = step(tx, a, (jnp.array([np.nan, np.inf]), b))
    np.testing.assert_allclose(got, a + 0.5 * b)


def test_the_preset_forgets_what_was_not_finite():
    tx = dtnh_jax.dtnh_sgd(1.0, 1.0)
    a, b = jnp.array([1.0, 1.0]), jnp.array([0.5, 0.25])
    state = tx.init(a)
    for reg_grads, not_finite in ((jnp.array([np.nan, 0.25]), 1), (b, 1), (b, 1)):
        updates, state = tx.update((a, reg_grads), state, a)
        assert np.isfinite(updates).all()
        assert dtnh_jax.conflict_stats(state).not_finite.tolist() == [not_finite]
    # The momentum of the first number started anew, that of the second did not.
    np.testing.assert_allclose(state[0].reg.trace, [1.9 * 0.5, 2.71 * 0.25], rtol=1e-6)


def test_what_starts_at_infinity_stays_there():
    """Only what has become infinite starts anew."""
    best = optax.GradientTransformation(
        lambda params: jnp.full([], jnp.inf), lambda updates, state, params=None: (updates, state)
    )
    tx = dtnh_jax.transform_pair(reg=best)
    _, state = step(tx, jnp.ones(2), jnp.ones(2))
    assert np.isinf(state.reg)


def test_an_average_of_held_out_gradients_forgets_what_was_not_finite():
    tx = dtnh_jax.dtnh(0.5, on_conflict="gate", reference=dtnh_jax.held_out(0.9))
    a, b = jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0])
    state = tx.init(a)
    first, state = tx.update((a, b), state, a, held_out_grads=jnp.array([np.nan, 1.0]))
    np.testing.assert_array_equal(first, a)
    second, state = tx.update((a, b), state, a, held_out_grads=jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(second, a + 0.5 * b)
    np.testing.assert_allclose(state.reference.average, [1.0, 1.9])


# The bound


@pytest.mark.parametrize("choice", ["project", "gate", "keep"])
@pytest.mark.parametrize("scope", ["global", "element"])
def test_the_bound_holds_for_all_finite_gradients_and_weights(choice, scope):
    """|d - a| <= |a|, or nothing is added."""
    sizes = [0.0, 1e-30, 1e-17, 1e-14, 1e-12, 1.0, 1e12, 1e19, 2e19, 1e25, 3e38]
    a_unit, b_unit = np.float32([0.6, 0.8]), np.float32([1.0, -0.5])
    tx = optax.inject_hyperparams(
        dtnh_jax.dtnh, static_args=("on_conflict", "max_ratio", "scope", "diagnostics")
    )(1.0, on_conflict=choice, max_ratio=1.0, scope=scope, diagnostics=False)
    state = tx.init(jnp.zeros(2))

    def added_to(a_size, b_size, reg_weight):
        hyperparams = state.hyperparams | {"reg_weight": reg_weight}
        a = jnp.asarray(a_unit) * a_size
        pair = (a, jnp.asarray(b_unit) * b_size)
        direction, _ = tx.update(pair, state._replace(hyperparams=hyperparams))
        return a, direction

    grid = np.float32(np.meshgrid(sizes, sizes, [1e-4, 1.0, 1e8, 1e30, np.inf])).reshape(3, -1)
    a, direction = jax.jit(jax.vmap(added_to))(*jnp.asarray(grid))
    a, direction = np.float64(a), np.float64(direction)
    # Where d and a are large, their difference is not known better than they are rounded.
    assert np.all(np.isfinite(direction) | (np.abs(a) > 1e38))
    length = np.linalg.norm(direction - a, axis=1)[np.abs(a).max(1) < 1e38]
    limit = np.linalg.norm(a, axis=1)[np.abs(a).max(1) < 1e38]
    assert np.all(length <= limit * (1 + 1e-5))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8, 1e12])
def test_the_bounded_projection_of_opposite_gradients_does_not_hurt(scale):
    """Of two numbers that cancel only their rounding is left, which the bound holds too."""
    a = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    b = np.linspace(-5, -0.1, 200, dtype=np.float32)[:, None] * a
    tx = dtnh_jax.dtnh(scale, max_ratio=1.0)
    state = tx.init(a)
    directions = jax.jit(jax.vmap(lambda b: tx.update((jnp.asarray(a), b), state)[0]))(b)
    d, a = np.float64(directions), np.float64(a)
    assert np.all(d @ a >= (1 - 1e-3) * (a @ a))
    assert np.all(np.linalg.norm(d - a, axis=1) <= (1 + 1e-5) * np.linalg.norm(a))


@pytest.mark.parametrize("scope", ["global", "element"])
@pytest.mark.parametrize("n_regularizers", [1, 2, 5])
def test_several_regularizers_share_the_bound(n_regularizers, scope):
    a = jnp.array([3.0, 4.0])
    tx = dtnh_jax.dtnh((1e3,) * n_regularizers, on_conflict="gate", max_ratio=1.0, scope=scope)
    assert added(tx, a, (a,) * n_regularizers) == pytest.approx(5.0, rel=1e-5)
    # What is short enough together is left as it is.
    tx = dtnh_jax.dtnh((0.1,) * n_regularizers, on_conflict="gate", max_ratio=1.0, scope=scope)
    assert added(tx, a, (a,) * n_regularizers) == pytest.approx(0.5 * n_regularizers, rel=1e-5)


def test_a_large_regularizer_does_not_take_all_of_the_bound():
    a, b = jnp.array([3.0, 4.0]), (jnp.array([5.0, 0.0]), jnp.array([0.0, 5.0]))
    tx = dtnh_jax.dtnh((1e12, 1.0), on_conflict="gate", max_ratio=1.0)
    np.testing.assert_allclose(step(tx, a, b)[0] - a, [2.5, 2.5], rtol=1e-5)


def test_one_of_several_that_is_not_finite_leaves_the_bound_to_the_other():
    a, b = jnp.array([3.0, 4.0]), (jnp.array([np.nan, 0.0]), jnp.array([0.0, 5.0]))
    tx = dtnh_jax.dtnh((1.0, 1e6), on_conflict="gate", max_ratio=1.0)
    direction, state = step(tx, a, b)
    np.testing.assert_allclose(direction, [3.0, 9.0], rtol=1e-5)
    assert dtnh_jax.conflict_stats(state).not_finite.tolist() == [1, 0]


def test_the_largest_norm_so_far_is_finite():
    tx = dtnh_jax.dtnh(1e6, on_conflict="keep", max_ratio=1.0, bound_by="running_max")
    a, b = jnp.array([3.0, 4.0]), jnp.array([0.0, 5.0])
    _, state = step(tx, a, b)
    for bad in (jnp.array([np.nan, 1.0]), jnp.array([1e25, 1.0])):
        _, state = tx.update((bad, b), state)
        assert state.largest.tolist() == [5.0]
    direction, _ = tx.update((0.5 * a, b), state)
    np.testing.assert_allclose(direction - 0.5 * a, [0.0, 5.0], rtol=1e-5)


def test_a_bound_by_another_gradient_than_the_compared_one():
    tx = dtnh_jax.dtnh(1e10, on_conflict="gate", max_ratio=1.0, reference="held_out")
    b = jnp.array([0.0, 1e18])
    for a in (jnp.array([1e25, 1.0]), jnp.array([0.0, 0.0])):
        np.testing.assert_array_equal(step(tx, a, b, held_out_grads=b)[0], a)


@pytest.mark.parametrize("value", [float("inf"), np.float32(np.inf), (0.1, float("inf"))])
def test_an_infinite_weight_is_an_error(value):
    with pytest.raises(ValueError, match=r"a number >= 0 and finite.*got"):
        dtnh_jax.dtnh(value)


# Half precision


@pytest.mark.usefixtures("standard_promotion")  # for Adam
@pytest.mark.parametrize("each", [optax.trace(0.9), optax.scale_by_adam(), optax.ema(0.9)])
def test_a_scan_keeps_its_dtypes_when_the_regularizer_is_wider(each):
    params, wide = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)
    tx = optax.chain(dtnh_jax.transform_pair(loss=each, reg=each), dtnh_jax.dtnh(0.1))
    state, _ = jax.lax.scan(
        lambda state, _: (tx.update((params, wide), state, params)[1], None),
        tx.init(params),
        None,
        3,
    )
    found = {x.dtype for x in jax.tree.leaves(state[0]) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert found == {jnp.dtype(jnp.float32)}


def test_momenta_of_float16_do_not_overflow():
    g = jnp.full(2, 9000.0, jnp.float16)
    tx = dtnh_jax.dtnh_sgd(1e-3, 0.01)
    state = tx.init(g)
    for _ in range(12):
        updates, state = tx.update((g, 0 * g), state, g)
    np.testing.assert_allclose(updates, -9 * (1 - 0.9**12) * 10, rtol=1e-3)


def test_sums_of_float16_do_not_overflow():
    g = jnp.full(2, 4e4, jnp.float16)
    tx = dtnh_jax.accumulate_pairs(optax.chain(dtnh_jax.dtnh(0.0), optax.sgd(1.0)), 2)
    _, state = tx.update((g, g), tx.init(g), g)
    updates, _ = tx.update((g, g), state, g)
    assert updates.dtype == jnp.float16
    np.testing.assert_allclose(updates, -g)
