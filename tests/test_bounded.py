"""The bound on what the regularizer adds, and the presets that are built on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_close_leaves,
    assert_trees_equal,
    direction_of,
    inner,
    norm,
    oracle_groups,
    random_tree,
    relative_error,
    rule,
    wide,
)

import dtnh_jax

DECAY = 0.9
WEIGHTS = [0.0, 1e-3, 0.7, 1e4, 1e12]
SCOPES = ["global", "layer", "leaf"]
ACTIONS = ["project", "gate", "cosine", "keep"]


def preset(reg_weight, *, each=None, mask=None, **choices):
    """The chain of `dtnh_sgd` before its learning rate."""
    each = optax.trace(DECAY) if each is None else each
    choices = {"scope": "layer", "on_conflict": "gate", "max_ratio": 1.0} | choices
    several = len(reg_weight) if isinstance(reg_weight, tuple) else None
    return optax.chain(
        dtnh_jax.transform_pair(loss=each, reg=each, mask=mask, n_regularizers=several),
        dtnh_jax.dtnh(reg_weight, mask=mask, **choices),
    )


def trees(seed, n=4):
    """The gradients of a few steps, loss and regularizer."""
    return [(random_tree(seed + i), random_tree(seed + 100 + i, scale=3.0)) for i in range(n)]


def run(tx, pairs, params=None):
    """The directions of a few steps."""
    params = jax.tree.map(jnp.asarray, pairs[0][0]) if params is None else params
    state = tx.init(params)
    update = jax.jit(tx.update)
    directions = []
    for pair in pairs:
        direction, state = update(jax.tree.map(jnp.asarray, pair), state, params)
        directions.append(direction)
    return directions, state


def momenta(grads, decay=DECAY):
    """Momentum in float64, step by step."""
    momentum = jax.tree.map(np.zeros_like, wide(grads[0]))
    made = []
    for each in grads:
        momentum = jax.tree.map(lambda m, g: decay * m + g, momentum, wide(each))
        made.append(momentum)
    return made


def part(tree, group):
    leaves = jax.tree.leaves(tree)
    return [leaves[i] for i in group]


def minus(x, y):
    return jax.tree.map(lambda x, y: x - y, wide(x), wide(y))


def oracle(m_a, m_b, reg_weight, scope, action, max_ratio):
    """The direction, in float64, by the formula of the docstring."""
    leaves, treedef = jax.tree.flatten(m_a)
    others = jax.tree.leaves(m_b)
    directions = list(leaves)
    for group in oracle_groups(m_a, scope):
        a, b = [leaves[i] for i in group], [others[i] for i in group]
        product, length = inner(a, b), norm(b)
        if action == "gate":
            kept = [y * (product >= 0) for y in b]
        elif action == "cosine":
            kept = [y * max(0.0, product / (norm(a) * length)) for y in b]
        elif action == "project":
            c = min(0.0, product / norm(a) ** 2)
            kept = [y - c * x for x, y in zip(a, b, strict=True)]
        else:
            kept = b
        added = [reg_weight * y for y in kept]
        if max_ratio is not None and norm(added) > max_ratio * norm(a):
            added = [y * (max_ratio * norm(a) / norm(added)) for y in added]
        for i, x, y in zip(group, a, added, strict=True):
            directions[i] = x + y
    return treedef.unflatten(directions)


@functools.cache
def compiled(scope, action="gate"):
    """A step with weight and bound as arguments, which a sweep may compile once for all."""

    @jax.jit
    def step(pair, state, reg_weight, max_ratio):
        tx = preset(reg_weight, scope=scope, on_conflict=action, max_ratio=max_ratio)
        return tx.update(pair, state)

    return step


def run_compiled(pairs, reg_weight, scope, action="gate", max_ratio=1.0):
    state = preset(1.0, scope=scope).init(jax.tree.map(jnp.asarray, pairs[0][0]))
    directions = []
    for pair in pairs:
        direction, state = compiled(scope, action)(pair, state, reg_weight, max_ratio)
        directions.append(direction)
    return directions


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_agrees_with_the_oracle(scope, action):
    pairs = trees(3)
    for reg_weight, max_ratio in [(0.2, 1.0), (50.0, 1.0), (50.0, 0.5), (50.0, 0.0)]:
        directions = run_compiled(pairs, reg_weight, scope, action, max_ratio)
        of_loss, of_reg = (momenta(grads) for grads in zip(*pairs, strict=True))
        for direction, m_a, m_b in zip(directions, of_loss, of_reg, strict=True):
            wanted = oracle(m_a, m_b, reg_weight, scope, action, max_ratio)
            assert relative_error(direction, wanted) < 2e-6


def test_agrees_with_the_oracle_without_a_bound():
    pairs = trees(4)
    directions, _ = run(preset(50.0, max_ratio=None), pairs)
    of_loss, of_reg = (momenta(grads) for grads in zip(*pairs, strict=True))
    for direction, m_a, m_b in zip(directions, of_loss, of_reg, strict=True):
        assert relative_error(direction, oracle(m_a, m_b, 50.0, "layer", "gate", None)) < 2e-6


@pytest.mark.parametrize("reg_weight", WEIGHTS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("seed", range(3))
def test_never_opposes_the_momentum_and_never_outgrows_it(seed, scope, reg_weight):
    pairs = trees(seed, n=3)
    directions = run_compiled(pairs, reg_weight, scope)
    of_loss = momenta([a for a, _ in pairs])
    for direction, m_a in zip(directions, of_loss, strict=True):
        added = minus(direction, m_a)
        for group in oracle_groups(m_a, scope):
            length = norm(part(m_a, group))
            assert norm(part(added, group)) <= length * (1 + 1e-5)
            assert inner(part(direction, group), part(m_a, group)) >= length**2 * (1 - 1e-5)


def test_elements_keep_their_signs_and_at_most_double():
    pairs = trees(5)
    directions, _ = run(preset(1e6, scope="element"), pairs)
    ratios = [
        np.concatenate([np.ravel(x / y) for x, y in zip(*map(jax.tree.leaves, both), strict=True)])
        for both in zip(wide(directions), momenta([a for a, _ in pairs]), strict=True)
    ]
    for ratio in ratios:
        # Either dropped, or as long as what it is added to: the weight is far too large.
        assert np.all(np.isclose(ratio, 1, atol=1e-5) | np.isclose(ratio, 2, atol=1e-5))
        assert 0.2 < np.mean(ratio > 1.5) < 0.8


def test_without_a_bound_and_without_a_rule_it_is_sgd_of_the_sum():
    pairs = trees(7)
    trace = optax.trace(DECAY)
    tx = optax.chain(
        dtnh_jax.transform_pair(loss=trace, reg=trace), dtnh_jax.weighted_sum(0.3, scope="layer")
    )
    directions, _ = run(tx, pairs)
    both = [jax.tree.map(lambda a, b: a + 0.3 * b, *pair) for pair in pairs]
    for direction, wanted in zip(directions, momenta(both), strict=True):
        assert relative_error(direction, wanted) < 1e-6


def test_a_weight_of_zero_is_plain_training_to_the_bit():
    pairs = trees(9)
    directions, _ = run(preset(0.0), pairs)
    trace = optax.trace(DECAY)
    state, update = trace.init(pairs[0][0]), jax.jit(trace.update)
    for direction, (a, _) in zip(directions, pairs, strict=True):
        wanted, state = update(jax.tree.map(jnp.asarray, a), state)
        assert_trees_equal(direction, wanted)


@pytest.mark.parametrize("by", ["none", "mask"])
def test_unreached_leaves_are_plain_training_to_the_bit(by):
    pairs = trees(11)
    kept = {"block": True, "dense": False, "temperature": True}
    tx = preset(1e3, mask=kept if by == "mask" else None)
    if by == "none":
        pairs = [(a, b | {"dense": None}) for a, b in pairs]
    directions, state = run(tx, pairs)
    plain, _ = run(preset(0.0), trees(11))
    for direction, wanted in zip(directions, plain, strict=True):
        assert_trees_equal(direction["dense"], wanted["dense"])
    if by == "mask":
        n_reg = len(jax.tree.leaves(state[0].reg))
        assert n_reg == len(jax.tree.leaves(pairs[0][0])) - 2  # no momentum for what is masked


def test_call_styles_jit_scan_and_vmap_agree():
    pairs = jax.tree.map(jnp.asarray, trees(13, n=3))
    params = pairs[0][0]
    tx = preset(0.5)
    eager, state = [], tx.init(params)
    for a, b in pairs:
        direction, state = tx.update(a, state, params, reg_grads=b)
        eager.append(direction)
    jitted, _ = run(tx, pairs)

    def step(state, pair):
        direction, state = tx.update(pair, state)
        return state, direction

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
    _, scanned = jax.lax.scan(step, tx.init(params), stacked)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), pairs[0])
    states = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(params))
    mapped, _ = jax.vmap(lambda pair, state: tx.update(pair, state))(twice, states)
    for i, one in enumerate(jitted):
        for other in (eager[i], jax.tree.map(lambda x, i=i: x[i], scanned)):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), one, other
            )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        jitted[0],
        jax.tree.map(lambda x: x[1], mapped),
    )


def test_it_is_compiled_once():
    pairs = jax.tree.map(jnp.asarray, trees(15))
    tx = preset(0.5)
    traces = []

    @jax.jit
    def update(pair, state):
        traces.append(1)
        return tx.update(pair, state)

    state = tx.init(pairs[0][0])
    for pair in pairs:
        _, state = update(pair, state)
    assert len(traces) == 1


def test_several_regularizers_are_bounded_together():
    a = {"w": jnp.array([3.0, 4.0])}
    b = {"w": jnp.array([0.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}
    tx = preset((100.0, 0.5))
    direction, state = tx.update((a, b), tx.init(a))
    # 5 and 0.5 long, together more than 5.
    np.testing.assert_allclose(direction["w"], [3 + 0.5 / 1.1, 4 + 5 / 1.1], rtol=1e-6)
    assert len(state[0].reg) == 2
    assert dtnh_jax.conflict_stats(state).groups == ("0/.", "1/.")
    with pytest.raises(TypeError, match="2 weights"):
        tx.update((a, (b[0],)), tx.init(a))


def test_diagnostics_are_of_the_momenta():
    a = {"w": jnp.array([1.0, 0.0])}
    tx = preset(1.0)
    state = tx.init(a)
    _, state = tx.update((a, {"w": jnp.array([1.0, 0.0])}), state)
    assert not dtnh_jax.conflict_stats(state).total.conflict
    # The batch's are in conflict, the momenta of 0.9 and 1 and of 1.9 and 0.4 are not.
    _, state = tx.update((a, {"w": jnp.array([-0.5, 0.0])}), state)
    stats = dtnh_jax.conflict_stats(state).total
    assert not stats.conflict
    assert stats.cosine == pytest.approx(1)


@pytest.mark.usefixtures("standard_promotion")  # what Adam needs
def test_adam_for_both():
    pairs = trees(17)
    tx = optax.chain(preset(10.0, each=optax.scale_by_adam()), optax.scale_by_learning_rate(0.1))
    directions, _ = run(tx, pairs)
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.1))
    state = adam.init(jax.tree.map(jnp.asarray, pairs[0][0]))
    for direction, (a, _) in zip(directions, pairs, strict=True):
        plain, state = adam.update(jax.tree.map(jnp.asarray, a), state)
        for group in oracle_groups(plain, "layer"):
            length = norm(part(plain, group))
            assert norm(part(minus(direction, plain), group)) <= length * (1 + 1e-5)


def test_it_is_accumulated_for():
    a, b = jax.tree.map(jnp.asarray, trees(19, n=1)[0])
    tx = preset(0.5)
    whole, _ = tx.update((a, b), tx.init(a))
    accumulated = dtnh_jax.accumulate_pairs(tx, every_k=2)
    state = accumulated.init(a)
    double = jax.tree.map(lambda x: 2 * x, (a, b))
    zeros = jax.tree.map(jnp.zeros_like, (a, b))
    _, state = accumulated.update(double, state, a)
    got, _ = accumulated.update(zeros, state, a)
    assert_close_leaves(got, whole, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_has_momenta_in_float32(dtype):
    pairs = jax.tree.map(lambda x: jnp.asarray(x, dtype), trees(21))
    directions, state = run(preset(10.0), pairs)
    wanted, _ = run(preset(10.0), jax.tree.map(lambda x: x.astype(jnp.float32), pairs))
    found = {leaf.dtype for leaf in jax.tree.leaves((directions, state[0]))}
    assert found == {jnp.dtype(jnp.float32)}
    for one, other in zip(directions, wanted, strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("make", [dtnh_jax.dtnh_sgd, dtnh_jax.dtnh_adamw])
def test_bfloat16_params_are_trained_as_if_their_gradients_were_float32(make, standard_promotion):
    """Momenta of small gradients do not stall, and the params keep their dtype."""
    tx = make(0.1, 0.5)

    @jax.jit
    def step(params, state, wide_state):
        grads = jax.tree.map(lambda x: (x / 512).astype(x.dtype), params)
        updates, state = tx.update((grads, params), state, params)
        of_wide = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (grads, params)]
        wanted, wide_state = tx.update(tuple(of_wide), wide_state, of_wide[1])
        return optax.apply_updates(params, updates), state, wide_state, updates, wanted

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(0))
    states = [tx.init(params), tx.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))]
    for _ in range(20):
        params, *states, updates, wanted = step(params, *states)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    kinds = {x.dtype for x in jax.tree.leaves(states[0]) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(jnp.float32)}
    assert relative_error(updates, wanted) <= 0.01


def test_frozen_leaves_are_none():
    params = {"w": jnp.ones(2), "frozen": None}
    pair = ({"w": jnp.ones(2), "frozen": None}, {"w": jnp.ones(2), "frozen": None})
    tx = preset(0.5)
    direction, _ = tx.update(pair, tx.init(params), params)
    assert direction["frozen"] is None
    np.testing.assert_allclose(direction["w"], 1.5)


@pytest.mark.parametrize("scope", [*SCOPES, "element"])
@pytest.mark.parametrize("action", ACTIONS)
def test_the_bound_of_dtnh_shortens_and_turns_nothing(action, scope):
    a, b = trees(23, n=1)[0]
    if action == "keep":
        unbounded = rule("weighted_sum", 10.0, scope=scope)
    else:
        unbounded = rule("dtnh", 10.0, scope=scope, on_conflict=action)
    free, _ = direction_of(unbounded, a, b)
    bounded, _ = direction_of(
        rule("dtnh", 10.0, scope=scope, on_conflict=action, max_ratio=0.5), a, b
    )
    one, other = wide(minus(free, a)), wide(minus(bounded, a))
    leaves = [jax.tree.leaves(tree) for tree in (wide(a), one, other)]
    if scope == "element":
        vectors = zip(*(np.concatenate([np.ravel(x) for x in each]) for each in leaves))  # noqa: B905
        vectors = [([np.array(v)] for v in values) for values in vectors]
    else:
        vectors = [
            ([each[i] for i in group] for each in leaves) for group in oracle_groups(a, scope)
        ]
    for loss, long, short in vectors:
        limit = 0.5 * norm(loss)
        assert norm(short) == pytest.approx(min(norm(long), limit), rel=1e-4, abs=1e-6)
        assert inner(long, short) == pytest.approx(norm(long) * norm(short), rel=1e-4, abs=1e-6)


def test_what_is_short_enough_is_left_to_the_bit():
    a, b = trees(25, n=1)[0]
    free, _ = direction_of(rule("dtnh", 1e-3, scope="layer"), a, b)
    bounded, _ = direction_of(rule("dtnh", 1e-3, scope="layer", max_ratio=1.0), a, b)
    assert_trees_equal(bounded, free)


def test_nothing_is_added_where_there_is_nothing_to_compare_with():
    a, b = jnp.zeros(3), jnp.ones(3)
    direction, _ = direction_of(rule("dtnh", 1.0, max_ratio=1.0), a, b)
    np.testing.assert_array_equal(direction, 0)
    direction, _ = direction_of(rule("dtnh", 1.0, max_ratio=1.0), b, a)
    np.testing.assert_array_equal(direction, 1)


@pytest.mark.parametrize("exponent", [-10, 0, 15])
def test_large_and_small_gradients_are_bounded_alike(exponent):
    a, b = (jax.tree.map(lambda x: x * np.float32(10.0**exponent), t) for t in trees(27, n=1)[0])
    direction, _ = direction_of(rule("dtnh", 1e6, scope="layer", max_ratio=1.0), a, b)
    for group in oracle_groups(a, "layer"):
        length = norm(part(minus(direction, a), group))
        assert length == pytest.approx(norm(part(a, group)), rel=1e-4)


def test_the_removed_share_counts_what_the_bound_took():
    a, b = jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0])
    _, state = direction_of(rule("dtnh", 1.0, max_ratio=1.0), a, b)
    assert dtnh_jax.conflict_stats(state).total.removed == pytest.approx(0.75)


def test_add_l2_sp_with_a_bound():
    params = {"w": jnp.array([30.0, 40.0])}
    tx = dtnh_jax.add_l2_sp(
        {"w": jnp.zeros(2)}, 1e3, scope="layer", on_conflict="gate", max_ratio=1.0
    )
    update, _ = tx.update({"w": jnp.array([0.0, 2.0])}, tx.init(params), params)
    np.testing.assert_allclose(update["w"], [1.2, 3.6], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: preset(-1.0), ValueError, "reg_weight must be a number >= 0"),
        (lambda: preset(1.0, max_ratio=-1.0), ValueError, "max_ratio must be"),
        (lambda: dtnh_jax.dtnh(1.0, max_ratio=float("nan")), ValueError, "max_ratio must be"),
        (lambda: dtnh_jax.dtnh(1.0, max_ratio="1"), TypeError, "max_ratio must be None or"),
        (lambda: dtnh_jax.dtnh(1.0, max_ratio=True), TypeError, "max_ratio must be None or"),
        (lambda: preset(1.0, each=0.9), TypeError, "loss must be an optax transformation"),
        (lambda: dtnh_jax.transform_pair(reg=0.9), TypeError, "reg must be an optax"),
        (lambda: preset(1.0, on_conflict="drop"), ValueError, "'keep'; got 'drop'"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_lone_tree_shows_the_right_call():
    params = {"w": jnp.ones(2)}
    tx = preset(1.0)
    with pytest.raises(TypeError, match="pair"):
        tx.update(params, tx.init(params), params)


def test_a_leaf_that_is_not_reached_counts_in_no_bound():
    a = {"layer": {"kernel": jnp.array([100.0, 0.0]), "bias": jnp.array([3.0, 4.0])}}
    b = {"layer": {"kernel": None, "bias": jnp.array([0.0, 2.0])}}
    tx = preset(1e6)
    direction, _ = tx.update((a, b), tx.init(a), a)
    np.testing.assert_allclose(direction["layer"]["bias"], [3.0, 9.0], rtol=1e-6)
    np.testing.assert_array_equal(direction["layer"]["kernel"], a["layer"]["kernel"])
