"""The small links: transform_pair, combine_pair, weightings, and the optimizers made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_equal,
    direction_of,
    inner,
    norm,
    oracle,
    random_tree,
    relative_error,
    wide,
)

import dtnh_jax
from benchmarks import calls
from dtnh_jax import weightings
from dtnh_jax.weightings import Geometry, Weights

A, B = [-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]


def pairs(n=3):
    return [
        jax.tree.map(jnp.asarray, dtnh_jax.GradientPair(random_tree(i), random_tree(100 + i)))
        for i in range(n)
    ]


def run(tx, inputs, style="pair"):
    """What each of several updates returns."""
    params = inputs[0].loss_grads
    state, made = tx.init(params), []
    for a, b in inputs:
        if style == "pair":
            out, state = tx.update(dtnh_jax.GradientPair(a, b), state, params)
        else:
            out, state = tx.update(a, state, params, reg_grads=b)
        made.append(out)
    return made


# transform_pair


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("style", ["pair", "reg_grads"])
@pytest.mark.parametrize(
    "transformation",
    [
        optax.trace(0.9),
        optax.scale_by_adam(),
        optax.clip_by_global_norm(0.5),
        optax.add_decayed_weights(0.1),
    ],
    ids=["trace", "adam", "clip", "decay"],
)
def test_each_gradient_is_transformed_as_if_it_were_alone(transformation, style):
    made = run(dtnh_jax.transform_pair(transformation, transformation), pairs(), style)
    params = pairs()[0].loss_grads
    for which in range(2):
        state = transformation.init(params)
        for pair, out in zip(pairs(), made, strict=True):
            wanted, state = transformation.update(pair[which], state, params)
            assert_trees_equal(out[which], wanted)


def test_none_leaves_a_gradient_as_it_is():
    for pair, out in zip(pairs(), run(dtnh_jax.transform_pair(), pairs()), strict=True):
        assert isinstance(out, dtnh_jax.GradientPair)
        assert_trees_equal(out, pair)


def test_what_the_regularizer_does_not_reach_stays_absent():
    a, b = pairs()[0]
    tx = dtnh_jax.transform_pair(reg=optax.trace(0.9))
    out, state = tx.update((a, {**b, "dense": None}), tx.init(a))
    assert jax.tree.leaves(out.reg_grads["dense"]) == []
    # The state has a place for it: the regularizer may reach it in a later step.
    out, _ = tx.update((a, b), state)
    assert_trees_equal(out.reg_grads["dense"], b["dense"])
    assert_trees_equal(
        out.reg_grads["block"], jax.tree.map(lambda x: x + jnp.float32(0.9) * x, b["block"])
    )


def test_a_mask_takes_the_state_away_too():
    a, b = pairs()[0]
    mask = {"block": True, "dense": False, "temperature": True}
    tx = dtnh_jax.transform_pair(reg=optax.trace(0.9), mask=mask)
    state = tx.init(a)
    assert len(jax.tree.leaves(state.reg)) == len(jax.tree.leaves(a)) - 2
    out, _ = tx.update((a, b), state)
    assert jax.tree.leaves(out.reg_grads["dense"]) == []


def test_several_regularizers_are_transformed_one_by_one():
    a, b = pairs()[0]
    other = jax.tree.map(lambda x: -2 * x, b)
    tx = dtnh_jax.transform_pair(reg=optax.trace(0.5), n_regularizers=2)
    state = tx.init(a)
    _, state = tx.update((a, (b, other)), state)
    out, _ = tx.update((a, (b, other)), state)
    for got, grads in zip(out.reg_grads, (b, other), strict=True):
        assert_trees_equal(got, jax.tree.map(lambda x: x + jnp.float32(0.5) * x, grads))
    with pytest.raises(TypeError, match="tuple of as many trees"):
        tx.update((a, b), state)


def test_extra_arguments_reach_both_transformations():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    link = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = dtnh_jax.transform_pair(link, link)
    a, b = pairs()[0]
    tx.update((a, b), tx.init(a), a, value=3)
    assert seen == [{"value": 3}, {"value": 3}]


def test_transform_pair_scans_jits_and_vmaps():
    tx = dtnh_jax.transform_pair(optax.trace(0.9), optax.trace(0.9))
    looped = run(tx, pairs())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs())
    params = pairs()[0].loss_grads
    _, scanned = jax.lax.scan(
        lambda state, pair: tx.update(pair, state)[::-1], tx.init(params), stacked
    )
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), tx.init(params))
    mapped, _ = jax.jit(jax.vmap(tx.update))(stacked, states)
    for i, pair in enumerate(looped):
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], scanned), pair) <= 1e-6
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], mapped), pairs()[i]) == 0


# combine_pair


def test_a_rule_of_the_users_own():
    def keep_half(geometry, reg_weight):
        return Weights(-0.5 * reg_weight * jnp.minimum(geometry.along, 0.0), reg_weight)

    a = random_tree(0)
    b = jax.tree.map(lambda x, y: y - x, a, random_tree(100))  # in conflict
    for scope in ("global", "layer", "leaf", "element"):
        got, state = direction_of(dtnh_jax.combine_pair(keep_half, 0.7, scope=scope), a, b)
        half = jax.tree.map(
            lambda x, y: (x + y) / 2,
            oracle(a, b, 0.7, scope),
            jax.tree.map(lambda x, y: x + 0.7 * y, wide(a), wide(b)),
        )
        assert relative_error(got, half) <= 1e-6
        assert dtnh_jax.conflict_stats(state).total.removed > 0


@pytest.mark.parametrize("returned", [1.0, (1.0, 2.0, 3.0), None])
def test_a_weighting_that_returns_something_else(returned):
    tx = dtnh_jax.combine_pair(lambda geometry, reg_weight: returned, 0.1)
    with pytest.raises(TypeError, match=r"must return dtnh_jax.weightings.Weights\(ref, reg\)"):
        tx.update((jnp.ones(2), jnp.ones(2)), tx.init(jnp.ones(2)))


def test_several_is_each_or_sum():
    with pytest.raises(ValueError, match="several must be 'each' or 'sum'; got 'all'"):
        dtnh_jax.combine_pair(weightings.project, 0.1, several="all")
    a, b = pairs()[0]
    other = pairs()[1].reg_grads
    got, _ = direction_of(
        dtnh_jax.combine_pair(weightings.project, (0.3, 0.5), several="sum"), a, (b, other)
    )
    total = jax.tree.map(lambda x, y: 0.3 * x + 0.5 * y, wide(b), wide(other))
    assert relative_error(got, oracle(a, total, 1.0, "global")) <= 1e-6


# weightings


@pytest.mark.parametrize("name", [name for name in weightings.__all__ if name.islower()])
def test_a_weighting_is_the_same_for_one_group_and_for_many(name):
    if name == "bounded":
        pytest.skip("It is made of another one.")
    weighting = getattr(weightings, name)
    columns = np.float32([[1, 2, -1], [3, 1, 0.5], [0, 2, 0], [1, 0, 0], [2, 2, -2]])
    many = weighting(Geometry(*map(jnp.asarray, columns.T)), jnp.float32(0.5))
    for row, column in enumerate(columns):
        one = weighting(Geometry(*map(jnp.float32, column)), jnp.float32(0.5))
        for whole, single in zip(many, one, strict=True):
            whole = jnp.broadcast_to(whole, len(columns))
            np.testing.assert_allclose(whole[row], single, rtol=1e-6)
            assert np.isfinite(single)


# The optimizers


@pytest.mark.parametrize("style", ["pair", "reg_grads"])
def test_dtnh_sgd_is_the_chain_of_its_docstring_bit_for_bit(style):
    trace = optax.trace(0.9)
    chain = optax.chain(
        dtnh_jax.transform_pair(loss=trace, reg=trace),
        dtnh_jax.dtnh(50.0, on_conflict="gate", max_ratio=1.0, scope="layer"),
        optax.scale_by_learning_rate(0.1),
    )
    for x, y in zip(
        run(dtnh_jax.dtnh_sgd(0.1, 50.0), pairs(10), style), run(chain, pairs(10)), strict=True
    ):
        assert_trees_equal(x, y)


def test_dtnh_sgd_without_weight_is_sgd():
    sgd = optax.sgd(0.1, momentum=0.9, nesterov=True)
    params = pairs()[0].loss_grads
    state = sgd.init(params)
    for out, (a, _) in zip(
        run(dtnh_jax.dtnh_sgd(0.1, 0.0, nesterov=True), pairs()), pairs(), strict=True
    ):
        wanted, state = sgd.update(a, state, params)
        assert_trees_equal(out, wanted)


@pytest.mark.usefixtures("standard_promotion")
def test_dtnh_adamw_without_weight_is_adamw():
    adamw = optax.adamw(0.1, weight_decay=0.01)
    params = pairs()[0].loss_grads
    state = adamw.init(params)
    tx = dtnh_jax.dtnh_adamw(0.1, 0.0, weight_decay=0.01)
    for out, (a, _) in zip(run(tx, pairs()), pairs(), strict=True):
        wanted, state = adamw.update(a, state, params)
        assert relative_error(out, wanted) <= 1e-6


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", [dtnh_jax.dtnh_sgd, dtnh_jax.dtnh_adamw])
def test_the_regularizer_never_opposes_or_outweighs_the_loss_in_any_layer(make):
    decay = {} if make is dtnh_jax.dtnh_sgd else {"weight_decay": 0.0}
    with_it = run(make(0.1, 1e4, **decay), pairs())
    without = run(make(0.1, 0.0, **decay), pairs())
    for x, y in zip(with_it, without, strict=True):
        for part in (lambda t: t["block"]["conv"], lambda t: t["dense"]):
            plain = part(y)
            added = jax.tree.map(lambda u, v: u - v, wide(part(x)), wide(plain))
            assert inner(added, plain) >= -1e-5 * norm(plain) ** 2
            assert norm(added) <= (1 + 1e-5) * norm(plain)


# Old names


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            lambda: dtnh_jax.dtnh(0.5, mode="orthogonal"),
            lambda: dtnh_jax.dtnh(0.5, on_conflict="orthogonal"),
            "write on_conflict='orthogonal'",
        ),
        (
            lambda: dtnh_jax.dtnh(0.5, action="gate"),
            lambda: dtnh_jax.dtnh(0.5, on_conflict="gate"),
            "write on_conflict='gate'",
        ),
        (
            lambda: dtnh_jax.dtnh(0.5, mode="conflict", action="project"),
            lambda: dtnh_jax.dtnh(0.5),
            "write on_conflict='project'",
        ),
        (
            lambda: dtnh_jax.bloop(0.5, ema=0.25),
            lambda: dtnh_jax.bloop(0.5, decay=0.75),
            "write decay=0.75",
        ),
        (
            lambda: dtnh_jax.decoupled(optax.sgd(0.1), 0.5, learning_rate=0.1, action="gate"),
            lambda: dtnh_jax.decoupled(optax.sgd(0.1), 0.5, learning_rate=0.1, on_conflict="gate"),
            "write on_conflict='gate'",
        ),
        (
            lambda: optax.chain(dtnh_jax.bounded_dtnh(50.0), optax.scale_by_learning_rate(0.1)),
            lambda: dtnh_jax.dtnh_sgd(0.1, 50.0),
            r"write dtnh_sgd\(learning_rate, reg_weight\)",
        ),
        (
            lambda: dtnh_jax.bounded_dtnh(0.5, action="keep", max_ratio=None),
            lambda: optax.chain(
                dtnh_jax.transform_pair(optax.trace(0.9), optax.trace(0.9)),
                dtnh_jax.weighted_sum(0.5),
            ),
            "deprecated",
        ),
    ],
)
def test_old_names_warn_and_do_what_the_new_ones_do(old, new, message):
    with pytest.warns(DeprecationWarning, match=message) as caught:
        tx = old()
    assert caught[0].filename == __file__
    with jax.numpy_dtype_promotion("standard"):
        for x, y in zip(run(tx, pairs()), run(new(), pairs()), strict=True):
            assert_trees_equal(x, y)


def test_old_names_that_do_not_go_together():
    with pytest.raises(ValueError, match="mode='orthogonal' cannot be combined"):
        dtnh_jax.dtnh(0.1, mode="orthogonal", action="gate")
    with pytest.raises(ValueError, match="'conflict' or 'orthogonal'; got 'Conflict'"):
        dtnh_jax.dtnh(0.1, mode="Conflict")


@pytest.mark.parametrize(("name", "most"), [("dtnh layer", (400, 50)), ("dtnh_sgd", (664, 78))])
def test_an_update_is_few_calls_in_few_files(name, most):
    """Half of what they were, or fewer: `python -m benchmarks.calls` prints the counts."""
    found = calls.count(calls.RULES[name])
    assert found.calls <= most[0]
    assert found.changes_of_file <= most[1]


def test_both_transformations_see_the_params():
    decay = optax.add_decayed_weights(0.5)
    tx = dtnh_jax.transform_pair(loss=decay, reg=decay, mask={"v": True, "w": False})
    params = {"v": jnp.full(2, 4.0), "w": jnp.full(2, 6.0)}
    ones = jax.tree.map(jnp.ones_like, params)
    pair, _ = tx.update((ones, ones), tx.init(params), params)
    np.testing.assert_array_equal(pair.loss_grads["w"], 4.0)
    np.testing.assert_array_equal(pair.reg_grads["v"], 3.0)
    assert pair.reg_grads["w"] is None
