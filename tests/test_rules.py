"""The rivals, references and actions: published values, identities, oracles, and their promises."""

import functools
import math
import re

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
    rule,
    wide,
)

import dtnh_jax

A, B = np.float32([-4, 1, 1]), np.float32([6, 1, 1])
RIVALS = [
    "agem",
    "bloop",
    "cagrad",
    "config",
    "dynamic_barrier",
    "gradient_cosine",
    "imtl_g",
    "mgda",
    "pcgrad",
    "upgrad",
]
SCOPES = ["global", "layer", "leaf", "element"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("pcgrad", [0.5848, 3.8012, 3.8012]),
        ("mgda", [0, 1, 1]),
        ("upgrad", [0.2929, 1.9004, 1.9004]),
        ("imtl_g", [0.0767, 1, 1]),
        ("cagrad", [0.1835, 1.2041, 1.2041]),
        ("config", [0.1588, 2.0706, 2.0706]),
    ],
)
def test_published_values(name, wanted):
    got, _ = direction_of(rule(name, 1.0), A, B)
    # The published UPGrad regularises its Gramian by 1e-4.
    np.testing.assert_allclose(got, wanted, atol=6e-4 if name == "upgrad" else 1e-4)


# Each rule again as its row of the literature says it, on flat float64 vectors a and λ b.


def unit(x):
    return x / np.linalg.norm(x)


def orthogonal_part(x, y):
    return y - (x @ y) / (x @ x) * x


def config_by_hand(a, b):
    v = unit(unit(orthogonal_part(a, b)) + unit(orthogonal_part(b, a)))
    return (a @ v + b @ v) * v


def mgda_by_hand(a, b):
    t = np.clip((b @ b - a @ b) / ((a - b) @ (a - b)), 0, 1)
    return t * a + (1 - t) * b


def cagrad_by_hand(a, b, c=0.5):
    mean = (a + b) / 2
    radius = c * np.linalg.norm(mean)

    def worst(t):
        g = t * a + (1 - t) * b
        return g @ mean + radius * np.linalg.norm(g)

    low, high = 0.0, 1.0
    for _ in range(200):
        third = (high - low) / 3
        if worst(low + third) < worst(high - third):
            high -= third
        else:
            low += third
    g = (low + high) / 2 * a + (1 - (low + high) / 2) * b
    return mean + radius * unit(g)


def pcgrad_by_hand(a, b):
    if a @ b >= 0:
        return a + b
    return orthogonal_part(b, a) + orthogonal_part(a, b)


def agem_by_hand(a, b):
    g = a + b
    return g - min(0.0, g @ a) / (a @ a) * a


def dynamic_barrier_by_hand(a, b):
    # With λ b for b, the barrier 1/λ is 1.
    return a + b - min(a @ b / (a @ a), 1.0) * a


BY_HAND = {
    "agem": agem_by_hand,
    "bloop": lambda a, b: a + orthogonal_part(a, b),
    "cagrad": cagrad_by_hand,
    "config": config_by_hand,
    "dynamic_barrier": dynamic_barrier_by_hand,
    "gradient_cosine": lambda a, b: a + max(0.0, unit(a) @ unit(b)) * b,
    "imtl_g": lambda a, b: (
        (np.linalg.norm(b) * a + np.linalg.norm(a) * b) / (np.linalg.norm(a) + np.linalg.norm(b))
    ),
    "mgda": mgda_by_hand,
    "pcgrad": pcgrad_by_hand,
    "upgrad": lambda a, b: pcgrad_by_hand(a, b) / 2,
}


def rotated(seed, cosine, size):
    """Two flat vectors with this cosine and this ratio of lengths."""
    rng = np.random.default_rng(seed)
    a = unit(rng.standard_normal(40))
    other = unit(orthogonal_part(a, rng.standard_normal(40)))
    return a, size * (cosine * a + math.sqrt(1 - cosine**2) * other)


@pytest.mark.parametrize("size", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("cosine", [-0.95, -0.4, 0.0, 0.4, 0.95])
@pytest.mark.parametrize("name", RIVALS)
def test_agrees_with_the_oracle(name, cosine, size):
    a, b = rotated(0, cosine, size)
    a, b = a.astype(np.float32), b.astype(np.float32)
    got, _ = direction_of(rule(name, 0.7), a, b)
    wanted = BY_HAND[name](np.float64(a), 0.7 * np.float64(b))
    assert np.linalg.norm(np.float64(got) - wanted) <= 3e-5 * np.linalg.norm(wanted) + 1e-6


@pytest.mark.parametrize("name", RIVALS)
def test_groups_are_vectors_of_their_own(name):
    a, b = random_tree(0), random_tree(100)
    got, state = direction_of(rule(name, 0.7, scope="layer"), a, b)
    for part in (lambda t: t["block"]["conv"], lambda t: t["dense"], lambda t: t["block"]["norm"]):
        leaves = [
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(wide(part(t)))])
            for t in (a, b, got)
        ]
        np.testing.assert_allclose(
            leaves[2], BY_HAND[name](leaves[0], 0.7 * leaves[1]), rtol=2e-3, atol=2e-5
        )
    assert len(dtnh_jax.conflict_stats(state).groups) == 4


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_dtnh_both_ways(seed):
    """P(a,b) + P(b,a) - (a+b) = PCGrad(a,b), P the one-sided projection."""
    a, b = random_tree(seed), random_tree(seed + 100)
    one_way, _ = direction_of(rule("dtnh", 1.0), a, b)
    other_way, _ = direction_of(rule("dtnh", 1.0), b, a)
    identity = jax.tree.map(
        lambda x, y, u, v: x + y - (u + v), *map(wide, (one_way, other_way, a, b))
    )
    got, _ = direction_of(rule("pcgrad", 1.0), a, b)
    assert relative_error(got, identity) <= 1e-6


DEGENERATE = {
    "zero loss": (0.0, 1.0, 0.3),
    "zero reg": (1.0, 0.0, 0.3),
    "zero both": (0.0, 0.0, 0.3),
    "parallel": (1.0, 2.0, 1.0),
    "opposite": (1.0, 2.0, -1.0),
    "equal": (1.0, 1.0, 1.0),
    "tiny": (1e-30, 1e-30, -0.5),
    "huge": (1e15, 1e15, -0.5),
    "tiny loss": (1e-30, 1.0, -0.5),
    "tiny reg": (1.0, 1e-30, -0.5),
    "far apart": (1e-12, 1e15, -0.5),
    "small": (1e-12, 1e-12, -0.5),
    "small loss": (1e-12, 1.0, -0.5),
    "small reg": (1.0, 1e-12, -0.5),
}


@pytest.mark.parametrize("scope", ["global", "element"])
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", RIVALS)
def test_degenerate_inputs_are_finite(name, case, scope):
    if (name, scope) == ("bloop", "element"):
        pytest.skip("This choice is an error.")
    a_size, b_size, cosine = DEGENERATE[case]
    a, b = rotated(1, cosine, 1.0)
    got, state = direction_of(
        rule(name, 1.0, scope=scope), np.float32(a_size * a), np.float32(b_size * b)
    )
    assert np.isfinite(got).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.measurement))


@pytest.mark.parametrize("case", [key for key in DEGENERATE if not re.search("zero|tiny", key)])
@pytest.mark.parametrize("name", ["pcgrad", "upgrad", "mgda", "config", "agem", "imtl_g"])
def test_non_conflicting(name, case):
    """Opposes neither objective: agem the loss alone; imtl_g not at all, when lengths differ."""
    a_size, b_size, cosine = DEGENERATE[case]
    a, b = rotated(1, cosine, 1.0)
    a, b = np.float64(np.float32(a_size * a)), np.float64(np.float32(b_size * b))
    got, _ = direction_of(rule(name, 1.0), np.float32(a), np.float32(b))
    got = np.float64(got)
    against = {"agem": [a], "imtl_g": []}.get(name, [a, b])
    for g in against:
        rounding = 2e-6 * np.linalg.norm(g) * (np.linalg.norm(a) + np.linalg.norm(b))
        assert got @ g >= -rounding
    if name == "imtl_g":
        assert got @ unit(a) == pytest.approx(
            got @ unit(b), abs=1e-5 * np.linalg.norm(a + b) + 1e-37
        )


@pytest.mark.parametrize("seed", range(3))
def test_mgda_and_imtl_g_are_convex_combinations(seed):
    a, b = rotated(seed, [-0.6, 0.1, 0.8][seed], 3.0)
    for name in ("mgda", "imtl_g"):
        got, _ = direction_of(rule(name, 1.0), np.float32(a), np.float32(b))
        (t, s), *_ = np.linalg.lstsq(np.stack([a, b], 1), np.float64(got), rcond=None)
        assert t + s == pytest.approx(1, abs=1e-5)
        assert -1e-6 <= t <= 1 + 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", RIVALS)
def test_scales_with_both_gradients(name, scale):
    """A loss scale on both terms is a loss scale on the direction."""
    a, b = rotated(0, -0.5, 2.0)
    plain, _ = direction_of(rule(name, 0.7), np.float32(a), np.float32(b))
    scaled, _ = direction_of(rule(name, 0.7), np.float32(scale * a), np.float32(scale * b))
    np.testing.assert_allclose(scaled, scale * np.float64(plain), rtol=1e-3, atol=1e-6 * scale)


@pytest.mark.parametrize("name", RIVALS)
def test_zero_weight_leaves_the_regularizer_out(name):
    a, b = rotated(0, -0.5, 2.0)
    got, _ = direction_of(rule(name, 0.0), np.float32(a), np.float32(b))
    along = np.float64(got) @ a * a
    np.testing.assert_allclose(got, along, atol=1e-6)


@pytest.mark.parametrize("name", ["dtnh", "weighted_sum", *RIVALS])
def test_all_rules_share_signature_and_state(name):
    a, b = random_tree(0), random_tree(100)
    tx = getattr(dtnh_jax, name)(
        0.5, scope="layer", mask={"block": True, "dense": False, "temperature": True}
    )
    direction, state = direction_of(tx, a, b)
    np.testing.assert_array_equal(direction["dense"]["kernel"], a["dense"]["kernel"])
    assert isinstance(state, dtnh_jax.PairState)
    assert dtnh_jax.conflict_stats(state).groups == (".", "block/conv", "block/norm")
    assert jax.tree.structure(state.measurement) == jax.tree.structure(
        dtnh_jax.dtnh(0.1).init(a).measurement
    )


# Actions


@pytest.mark.parametrize("scope", ["global", "layer", "leaf"])
def test_gate_drops_the_groups_in_conflict(scope):
    a, b = random_tree(0), random_tree(100)
    got, state = direction_of(rule("dtnh", 0.5, scope=scope, on_conflict="gate"), a, b)
    stats = dtnh_jax.conflict_stats(state)
    np.testing.assert_allclose(stats.per_group.removed, stats.per_group.conflict.astype(float))
    summed, _ = direction_of(rule("weighted_sum", 0.5), a, b)
    if scope == "leaf":
        for x, d, s, conflict in zip(
            *map(jax.tree.leaves, (a, got, summed)), stats.per_group.conflict, strict=True
        ):
            np.testing.assert_array_equal(d, x if conflict else s)


def test_element_project_and_gate_are_one():
    a, b = random_tree(0), random_tree(100)
    project, _ = direction_of(rule("dtnh", 0.5, scope="element"), a, b)
    gate, _ = direction_of(rule("dtnh", 0.5, scope="element", on_conflict="gate"), a, b)
    assert_trees_equal(project, gate)


def test_cosine_action_is_gradient_cosine():
    a, b = random_tree(3), random_tree(4)
    one, _ = direction_of(rule("dtnh", 0.5, scope="leaf", on_conflict="cosine"), a, b)
    other, _ = direction_of(rule("gradient_cosine", 0.5, scope="leaf"), a, b)
    assert_trees_equal(one, other)
    gate, _ = direction_of(rule("dtnh", 0.5, scope="leaf", on_conflict="gate"), a, b)
    unweighted, _ = direction_of(rule("gradient_cosine", 0.5, scope="leaf", weighted=False), a, b)
    assert_trees_equal(gate, unweighted)


@pytest.mark.parametrize("action", ["project", "gate", "cosine"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("seed", range(3))
def test_every_action_never_hurts(action, scope, seed):
    a, b = random_tree(seed), random_tree(seed + 100)
    got, _ = direction_of(rule("dtnh", 5.0, scope=scope, on_conflict=action), a, b)
    assert inner(got, a) >= norm(a) ** 2 * (1 - 1e-5)


def test_wrong_actions():
    with pytest.raises(ValueError, match="'cosine', 'keep'; got 'drop'"):
        dtnh_jax.dtnh(0.1, on_conflict="drop")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dtnh_jax.dtnh(0.1, on_conflict="keep"), "without max_ratio is the weighted sum"),
        (
            lambda: dtnh_jax.dtnh(0.1, on_conflict="orthogonal", scope="element"),
            "on_conflict='orthogonal' with scope='element' would remove the whole regularizer",
        ),
        (lambda: dtnh_jax.bloop(0.1, scope="element"), "bloop with scope='element' would remove"),
    ],
)
def test_choices_without_a_meaning_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# References


def run(tx, pairs):
    """The directions of several steps."""
    state = tx.init(pairs[0][0])
    directions = []
    for pair in pairs:
        direction, state = tx.update(jax.tree.map(jnp.asarray, pair), state)
        directions.append(direction)
    return directions, state


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_held_against_an_average(scope, decay):
    pairs = [(random_tree(i), random_tree(100 + i)) for i in range(4)]
    tx = dtnh_jax.dtnh(0.7, scope=scope, reference=optax.ema(decay))
    directions, _ = run(tx, pairs)
    average = jax.tree.map(lambda x: 0 * x, wide(pairs[0][0]))
    for step, ((a, b), direction) in enumerate(zip(pairs, directions, strict=True), 1):
        average = jax.tree.map(lambda m, x: decay * m + (1 - decay) * x, average, wide(a))
        unbiased = jax.tree.map(lambda m, step=step: m / (1 - decay**step), average)
        change = jax.tree.map(lambda x, y: x - y, oracle(unbiased, b, 0.7, scope), unbiased)
        wanted = jax.tree.map(lambda x, y: x + y, wide(a), change)
        assert relative_error(direction, wanted) <= 1e-5
        # The promise: what the regularizer adds does not oppose the average.
        added = jax.tree.map(lambda d, x: d - x, wide(direction), wide(a))
        assert inner(added, unbiased) >= -1e-5 * norm(unbiased) * norm(b)


@pytest.mark.usefixtures("standard_promotion")
def test_bloop_is_orthogonal_to_its_average():
    pairs = [(random_tree(i), random_tree(100 + i)) for i in range(4)]
    by_name, _ = run(dtnh_jax.bloop(0.7, decay=0.9), pairs)
    by_choice, _ = run(
        dtnh_jax.dtnh(0.7, on_conflict="orthogonal", reference=optax.ema(0.9)), pairs
    )
    for x, y in zip(by_name, by_choice, strict=True):
        assert relative_error(x, y) <= 1e-5
    assert relative_error(by_name[0], oracle(*pairs[0], 0.7, "global", "orthogonal")) <= 1e-5
    for bad in (1, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            dtnh_jax.bloop(0.1, decay=bad)


@pytest.mark.parametrize(
    "reference",
    [optax.trace(0.9), optax.scale_by_adam(), optax.identity()],
    ids=["trace", "adam", "identity"],
)
def test_other_references(reference):
    pairs = [(random_tree(i), random_tree(100 + i)) for i in range(3)]
    with jax.numpy_dtype_promotion("standard"):
        directions, _ = run(dtnh_jax.dtnh(1.0, scope="layer", reference=reference), pairs)
        state = reference.init(pairs[0][0])
        for (a, b), direction in zip(pairs, directions, strict=True):
            r, state = reference.update(jax.tree.map(jnp.asarray, a), state)
            wanted = jax.tree.map(
                lambda x, y, z: x + y - z, wide(a), oracle(r, b, 1.0, "layer"), wide(r)
            )
            assert relative_error(direction, wanted) <= 1e-5


def test_reference_keeps_no_state_for_what_is_not_reached():
    a = random_tree(0)
    mask = {"block": True, "dense": False, "temperature": True}
    tx = dtnh_jax.dtnh(1.0, mask=mask, reference=optax.ema(0.9, accumulator_dtype=jnp.bfloat16))
    average = tx.init(a).reference.ema
    assert not jax.tree.leaves(average["dense"])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(average))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scope", SCOPES)
def test_reference_state_scans(scope):
    tx = dtnh_jax.dtnh(0.5, scope=scope, reference=optax.ema(0.9))
    a, b = (jax.tree.map(jnp.asarray, random_tree(i)) for i in (0, 100))
    state, directions = jax.lax.scan(
        lambda state, scale: tx.update((jax.tree.map(lambda x: scale * x, a), b), state)[::-1],
        tx.init(a),
        jnp.array([1.0, -1.0, 2.0]),
    )
    assert int(state.count) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(directions))


def test_no_reference():
    with pytest.raises(TypeError, match=r"'batch'.*optax.ema\(0.99\).*got 'ema'"):
        dtnh_jax.dtnh(0.1, reference="ema")


# Several regularizers


def several(i):
    return random_tree(100 + i), {**random_tree(200 + i), "dense": None}


@pytest.mark.parametrize("scope", SCOPES)
def test_several_regularizers_are_held_one_by_one(scope):
    a, (b1, b2) = random_tree(0), several(0)
    got, state = direction_of(dtnh_jax.dtnh([0.5, 2.0], scope=scope), a, (b1, b2))
    first, _ = direction_of(dtnh_jax.dtnh(0.5, scope=scope), a, b1)
    second, second_state = direction_of(dtnh_jax.dtnh(2.0, scope=scope), a, b2)
    wanted = jax.tree.map(lambda x, y, z: x + y - z, *map(wide, (first, second, a)))
    assert relative_error(got, wanted) <= 1e-6
    stats = dtnh_jax.conflict_stats(state)
    n = len(stats.groups) // 2
    assert stats.groups[0].startswith("0/")
    assert stats.groups[n].startswith("1/")
    np.testing.assert_allclose(
        stats.per_group.cosine[n:],
        dtnh_jax.conflict_stats(second_state).per_group.cosine,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["weighted_sum", "pcgrad", "mgda", "agem"])
def test_several_regularizers_of_the_other_rules_are_their_sum(name):
    a, (b1, b2) = random_tree(0), several(0)
    b2["dense"] = random_tree(201)["dense"]
    got, _ = direction_of(getattr(dtnh_jax, name)([0.5, 2.0]), a, (b1, b2))
    total = jax.tree.map(lambda x, y: np.float32(0.5) * x + np.float32(2) * y, b1, b2)
    wanted, _ = direction_of(rule(name, 1.0), a, total)
    assert relative_error(got, wanted) <= 1e-5


def test_several_regularizers_from_one_objective():
    @functools.partial(dtnh_jax.value_and_gradient_pair, has_aux=True)
    def objective(params):
        loss = jnp.sum(jnp.sin(params["w"])) + jnp.sum(params["head"] ** 2)
        return (loss, (jnp.sum(params["w"] ** 2), jnp.sum(params["w"]))), "aux"

    params = {"w": jnp.arange(3.0), "head": jnp.ones(2)}
    ((_, (square, total)), aux), pair = objective(params)
    assert (float(square), float(total), aux) == (5.0, 3.0, "aux")
    first, second = pair.reg_grads
    np.testing.assert_allclose(first["w"], 2 * params["w"])
    np.testing.assert_allclose(second["w"], 1.0)
    assert first["head"] is None
    tx = dtnh_jax.dtnh((0.1, optax.constant_schedule(0.2)))
    direction, _ = tx.update(pair, tx.init(params), params)
    np.testing.assert_array_equal(direction["head"], 2.0)


def test_several_regularizers_errors():
    a, b = random_tree(0), random_tree(100)
    with pytest.raises(TypeError, match=r"2 weights.*tuple of as many trees.*got dict"):
        direction_of(dtnh_jax.dtnh([0.1, 0.2]), a, b)
    with pytest.raises(TypeError, match=r"got tuple of 3"):
        direction_of(dtnh_jax.dtnh([0.1, 0.2]), a, (b, b, b))
    with pytest.raises(ValueError, match="got none"):
        dtnh_jax.dtnh([])
    with pytest.raises(ValueError, match="reg_weight must be a number >= 0"):
        dtnh_jax.dtnh([0.1, -0.2])
    with pytest.raises(ValueError, match=r"c must be in \[0, 1\)"):
        dtnh_jax.cagrad(0.1, c=1.0)


@pytest.mark.parametrize(
    ("name", "choices", "a", "b", "wanted"),
    [
        ("dtnh", {"on_conflict": "gate"}, [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]),  # at exactly 0
        ("dtnh", {"on_conflict": "cosine"}, [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]),  # no cosine
        ("dtnh", {"on_conflict": "orthogonal", "max_ratio": 1.0}, [1.0, 0.0], [5.0, 0.5], [1, 0.5]),
        ("dynamic_barrier", {"scope": "element"}, [5.0], [3.0], [5.0]),
        ("agem", {"scope": "element"}, [5.0], [-3.0], [2.0]),
        ("mgda", {}, [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]),
    ],
)
def test_values_at_the_edges(name, choices, a, b, wanted):
    got, _ = direction_of(rule(name, 1.0, **choices), np.float32(a), np.float32(b))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pcgrad", "config"])
def test_a_weight_of_zero_divides_by_no_regularizer(name):
    """What multiplies b is 0, and not a quotient with the weight left out."""
    geometry = dtnh_jax.weightings.Geometry(*jnp.float32([1.0, 2.0, -1.0]))
    weights = getattr(dtnh_jax.weightings, name)(geometry, jnp.float32(0.0))
    assert weights.reg == 0
