"""What conflict_stats reads: against NumPy, in any nesting, inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import direction_of, inner, norm, oracle, random_tree, rule, wide

import dtnh_jax


def by_hand(a, b, d, reg_weight):
    """Cosine, conflict and removed share of one group."""
    kept = jax.tree.map(lambda x, y: (y - x) / reg_weight, wide(a), wide(d))
    removed = jax.tree.map(lambda x, y: x - y, wide(b), kept)
    return inner(a, b) / (norm(a) * norm(b)), inner(a, b) < 0, norm(removed) / norm(b)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("scope", "on_conflict"),
    [
        *((scope, "project") for scope in ["global", "layer", "leaf", "element"]),
        *((scope, "orthogonal") for scope in ["global", "layer", "leaf"]),
    ],
)
def test_agrees_with_numpy(scope, on_conflict, seed):
    a, b = random_tree(seed), random_tree(seed + 100)
    _, state = direction_of(rule("dtnh", 0.7, scope=scope, on_conflict=on_conflict), a, b)
    stats = dtnh_jax.conflict_stats(state)
    d = oracle(a, b, 0.7, scope, on_conflict)
    np.testing.assert_allclose(
        np.array(stats.total, float), by_hand(a, b, d, 0.7), rtol=1e-4, atol=1e-6
    )
    parts = {
        "global": {"global": lambda tree: tree},
        "layer": {
            ".": lambda tree: tree["temperature"],
            "block/conv": lambda tree: tree["block"]["conv"],
            "block/norm": lambda tree: tree["block"]["norm"],
            "dense": lambda tree: tree["dense"],
        },
    }.get(
        scope,
        {
            "block/conv/bias": lambda tree: tree["block"]["conv"]["bias"],
            "block/conv/kernel": lambda tree: tree["block"]["conv"]["kernel"],
            "block/norm/scale": lambda tree: tree["block"]["norm"]["scale"],
            "dense/bias": lambda tree: tree["dense"]["bias"],
            "dense/kernel": lambda tree: tree["dense"]["kernel"],
            "temperature": lambda tree: tree["temperature"],
        },
    )
    assert stats.groups == tuple(parts)
    for row, part in enumerate(parts.values()):
        got = [float(value[row]) for value in stats.per_group]
        np.testing.assert_allclose(
            got, by_hand(part(a), part(b), part(d), 0.7), rtol=1e-4, atol=1e-6
        )


def test_weighted_sum_removes_nothing():
    _, state = direction_of(
        rule("weighted_sum", 0.7, scope="leaf"), random_tree(0), random_tree(100)
    )
    stats = dtnh_jax.conflict_stats(state)
    assert bool(stats.per_group.conflict.any())
    np.testing.assert_array_equal(stats.per_group.removed, 0)
    assert float(stats.total.removed) == 0


@pytest.mark.parametrize(("x", "y"), [(1e-12, 1e15), (1e15, 1e-12), (1e-13, 1.0), (1.0, 1e-13)])
def test_holds_at_any_scale(x, y):
    a, b = np.float32(A) * np.float32(x), np.float32(B) * np.float32(y)
    _, state = direction_of(rule("dtnh", 1.0), a, b)
    stats = dtnh_jax.conflict_stats(state)
    for part in (stats.total, stats.per_group):
        np.testing.assert_allclose(part.cosine, -22 / np.sqrt(18 * 38), rtol=1e-5)
        np.testing.assert_allclose(part.removed, 22 / np.sqrt(18 * 38), rtol=1e-5)
        assert np.all(part.conflict)


A, B = [-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]


@pytest.mark.parametrize("reg_weight", [1e-6, 1e-3, 1e6])
def test_removed_share_does_not_depend_on_the_weight(reg_weight):
    _, state = direction_of(dtnh_jax.dtnh(reg_weight), np.float32(A), np.float32(B))
    np.testing.assert_allclose(
        dtnh_jax.conflict_stats(state).total.removed, 22 / np.sqrt(18 * 38), rtol=1e-5
    )


@pytest.mark.parametrize("zero", ["a", "b", "both", "weight"])
def test_degenerate_steps_read_zero_and_not_nan(zero):
    a = np.zeros(3, np.float32) if zero in ("a", "both") else np.float32(A)
    b = np.zeros(3, np.float32) if zero in ("b", "both") else np.float32(B)
    _, state = direction_of(dtnh_jax.dtnh(0.0 if zero == "weight" else 1.0), a, b)
    stats = dtnh_jax.conflict_stats(state)
    assert float(stats.total.removed) == 0
    assert bool(stats.total.conflict) is (zero == "weight")
    assert np.isfinite(stats.total.cosine)


def test_before_the_first_step_all_is_zero():
    stats = dtnh_jax.conflict_stats(dtnh_jax.dtnh(1.0, scope="leaf").init(random_tree(0)))
    assert not any(np.any(x) for x in jax.tree.leaves(stats))


def test_found_in_any_nesting():
    a, b = random_tree(0), random_tree(100)
    params = jax.tree.map(jnp.zeros_like, a)
    link = dtnh_jax.dtnh(0.5, scope="layer")
    wanted = dtnh_jax.conflict_stats(direction_of(link, a, b)[1])
    nestings = [
        optax.chain(link, optax.sgd(0.1)),
        optax.chain(optax.chain(optax.identity(), link), optax.sgd(0.1, momentum=0.9)),
        optax.named_chain(("rule", link), ("sgd", optax.sgd(0.1))),
        optax.inject_hyperparams(lambda rate: optax.chain(link, optax.sgd(rate)))(rate=0.1),
        optax.apply_if_finite(link, 3),
    ]
    with jax.numpy_dtype_promotion("standard"):
        for tx in nestings:
            _, state = tx.update(a, tx.init(params), params, reg_grads=b)
            got = dtnh_jax.conflict_stats(state)
            assert got.groups == wanted.groups
            np.testing.assert_allclose(got.per_group.cosine, wanted.per_group.cosine, rtol=1e-5)


def test_several_rules_are_reported_side_by_side():
    params = {"one": jnp.ones(2), "two": jnp.ones(2)}
    tx = optax.partition(
        {"first": dtnh_jax.dtnh(1.0), "second": dtnh_jax.weighted_sum(1.0)},
        {"one": "first", "two": "second"},
    )
    stats = dtnh_jax.conflict_stats(tx.init(params))
    assert stats.groups == ("global", "global#2")
    assert stats.per_group.cosine.shape == (2,)


def test_leaves_a_jitted_step():
    tx = optax.chain(dtnh_jax.dtnh(0.5, scope="layer"), optax.sgd(0.1))
    a, b = (jax.tree.map(jnp.asarray, random_tree(i)) for i in (0, 100))

    @jax.jit
    def step(pair, state):
        _, state = tx.update(pair, state)
        return state, dtnh_jax.conflict_stats(state)

    state, stats = step((a, b), tx.init(a))
    outside = dtnh_jax.conflict_stats(state)
    assert stats.groups == outside.groups
    np.testing.assert_allclose(stats.per_group.cosine, outside.per_group.cosine)


def test_unreached_group_reads_zero():
    a, b = random_tree(0), random_tree(100)
    _, state = direction_of(dtnh_jax.dtnh(0.5, scope="layer"), a, {**b, "dense": None})
    stats = dtnh_jax.conflict_stats(state)
    row = stats.groups.index("dense")
    assert [float(value[row]) for value in stats.per_group] == [0, 0, 0]


def test_a_mean_over_what_is_reached_counts_no_head():
    """The one layer that is regularized is in full conflict."""
    a = {"backbone": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    b = {"backbone": {"w": -jnp.ones(2)}, "head": None}
    tx = dtnh_jax.dtnh(0.5, scope="layer")
    stats = dtnh_jax.conflict_stats(tx.init(a))
    assert stats.reached.tolist() == [False, False]
    _, state = tx.update((a, b), tx.init(a))
    stats = dtnh_jax.conflict_stats(state)
    assert stats.groups == ("backbone", "head")
    assert stats.reached.tolist() == [True, False]
    assert float(jnp.mean(stats.per_group.conflict, where=stats.reached)) == 1


def test_not_finite_counts_steps_and_the_others_read_on():
    tx = dtnh_jax.dtnh(0.5, scope="leaf")
    a = {"v": jnp.ones(2), "w": jnp.ones(2)}
    state = tx.init(a)
    for bad in (jnp.nan, 1.0, jnp.inf):
        _, state = tx.update((a, {"v": jnp.ones(2), "w": jnp.array([bad, 1.0])}), state)
    stats = dtnh_jax.conflict_stats(state)
    assert stats.not_finite.tolist() == [0, 2]
    np.testing.assert_allclose(stats.total.cosine, 1 / np.sqrt(1), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_measurements_are_as_wide_as_params():
    a, b = np.float64([1.0, 0.0]), np.float64([1e-9, 1.0])
    _, state = direction_of(dtnh_jax.dtnh(0.5), a, b)
    cosine = dtnh_jax.conflict_stats(state).total.cosine
    assert cosine.dtype == np.float64
    np.testing.assert_allclose(cosine, 1e-9, rtol=1e-9)


def test_the_total_of_large_norms_is_finite():
    a = {"v": jnp.full(2, 1e15), "w": jnp.full(2, 1e18)}
    b = {"v": jnp.full(2, -1e18), "w": jnp.full(2, -1e15)}
    _, state = direction_of(dtnh_jax.dtnh(0.5, scope="leaf"), a, b)
    total = dtnh_jax.conflict_stats(state).total
    np.testing.assert_allclose(total.cosine, -2e-3, rtol=1e-3)
    np.testing.assert_allclose(total.removed, 1, rtol=1e-5)


def momenta(**kwargs):
    return dtnh_jax.dtnh_sgd(0.1, 0.5, **kwargs)


TWICE = {
    "sgd": lambda: optax.chain(momenta(), optax.sgd(0.1, momentum=0.9)),
    "adam": lambda: optax.chain(dtnh_jax.dtnh_adamw(0.1, 0.5), optax.adam(0.1)),
    "ema": lambda: optax.chain(optax.chain(momenta()), optax.chain(optax.ema(0.9))),
    "several": lambda: optax.chain(dtnh_jax.dtnh_sgd(0.1, (0.5, 0.5)), optax.trace(0.9)),
    "one chain": lambda: optax.chain(
        dtnh_jax.transform_pair(loss=optax.trace(0.9), reg=optax.trace(0.9)),
        dtnh_jax.dtnh(0.5),
        optax.sgd(0.1, momentum=0.9),
    ),
    "accumulated": lambda: dtnh_jax.accumulate_pairs(optax.chain(momenta(), optax.trace(0.9)), 2),
    "a part": lambda: optax.partition(
        {"all": optax.chain(momenta(), optax.lion(0.1))}, dict.fromkeys(random_tree(0), "all")
    ),
}
ONCE = {
    "preset": momenta,
    "adamw preset": lambda: dtnh_jax.dtnh_adamw(0.1, 0.5),
    "sgd without": lambda: optax.chain(momenta(), optax.sgd(-1.0)),
    "after the paper's rule": lambda: optax.chain(dtnh_jax.dtnh(0.5), optax.adam(0.1)),
    "clipped pair": lambda: optax.chain(
        dtnh_jax.transform_pair(loss=optax.clip(1.0), reg=optax.clip(1.0)),
        dtnh_jax.dtnh(0.5),
        optax.sgd(0.1, momentum=0.9),
    ),
    "a reference": lambda: optax.chain(
        dtnh_jax.dtnh(0.5, reference=optax.trace(0.9)), optax.sgd(0.1, momentum=0.9)
    ),
    "before": lambda: optax.chain(optax.scale_by_adam(), dtnh_jax.add_l2_sp(random_tree(0), 0.5)),
    "two parts": lambda: optax.partition(
        {"one": momenta(), "two": optax.adam(0.1)},
        {name: "one" if i else "two" for i, name in enumerate(random_tree(0))},
    ),
    "decoupled": lambda: dtnh_jax.decoupled(
        optax.adam(0.1), 0.5, learning_rate=0.1, reference="update"
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_momentum_twice_is_a_warning(name, standard_promotion):
    state = TWICE[name]().init(random_tree(0))
    with pytest.warns(UserWarning, match=r"momentum twice.*optax\.scale_by_learning_rate"):
        dtnh_jax.conflict_stats(state)
    with pytest.warns(UserWarning, match="momentum twice"):
        jax.jit(dtnh_jax.conflict_stats)(state)


@pytest.mark.parametrize("name", ONCE)
def test_momentum_once_is_none(name, standard_promotion):
    dtnh_jax.conflict_stats(ONCE[name]().init(random_tree(0)))
