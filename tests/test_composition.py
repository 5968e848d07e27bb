"""Every row of the composition tables: the right numbers, or an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import JOINT, LINKS, LOSS_ONLY, WORKS, WRAPPERS, Refused, as_markdown

import dtnh_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"w": jnp.array([1.0, 1.0, 1.0]), "v": jnp.array([2.0, 2.0])}
# The first is in conflict, the second is not; the second micro-batch differs from the first.
LOSS_GRADS = {"w": jnp.array([-4.0, 1.0, 1.0]), "v": jnp.array([1.0, 2.0])}
REG_GRADS = {"w": jnp.array([6.0, 1.0, 1.0]), "v": jnp.array([-1.0, 1.0])}
PAIRS = [(LOSS_GRADS, REG_GRADS), jax.tree.map(lambda x: 3 * x, (REG_GRADS, LOSS_GRADS))]


def available(link, *args):
    """The row, skipped where this Optax is too old to have what it names."""
    try:
        link.make(*args)
    except (AttributeError, ImportError) as error:
        return pytest.param(link, id=link.name, marks=pytest.mark.skip(reason=str(error)))
    return pytest.param(link, id=link.name)


every_link = pytest.mark.parametrize("link", [available(link) for link in LINKS])


def rule():
    return dtnh_jax.dtnh(1.0, scope="leaf")


def direction(loss_grads, reg_grads):
    tx = rule()
    return tx.update((loss_grads, reg_grads), tx.init(PARAMS))[0]


def run(tx, inputs, params, style="one"):
    """The updates of a step for each input."""
    tx = optax.with_extra_args_support(tx)
    state, all_updates = tx.init(params), []
    for each in inputs:
        if style == "reg_grads":
            updates, state = tx.update(each[0], state, params, reg_grads=each[1])
        else:
            updates, state = tx.update(each, state, params)
        all_updates.append(updates)
    return all_updates


def assert_close(got, wanted):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def check(outcome, tx, style, wanted, params=PARAMS):
    if isinstance(outcome, Refused):
        with pytest.raises((TypeError, ValueError), match=outcome.match):
            run(tx, PAIRS, params, style)
    else:
        assert_close(run(tx, PAIRS, params, style), wanted())


@pytest.mark.parametrize("style", ["pair", "reg_grads"])
@every_link
def test_after_the_rule(link, style):
    """As if the direction had been the gradient all along."""
    directions = [direction(*pair) for pair in PAIRS]
    wanted = run(optax.chain(link.make(), optax.sgd(1.0)), directions, PARAMS)
    tx = optax.chain(rule(), link.make(), optax.sgd(1.0))
    check(WORKS, tx, style, lambda: wanted)


@every_link
def test_before_the_rule_with_a_pair(link):
    def one_by_one():
        losses = run(link.make(), [pair[0] for pair in PAIRS], PARAMS)
        regs = run(link.make(), [pair[1] for pair in PAIRS], PARAMS)
        return [direction(*pair) for pair in zip(losses, regs, strict=True)]

    def jointly():
        return [direction(*pair) for pair in run(link.make(), PAIRS, PARAMS)]

    wanted = {WORKS: one_by_one, JOINT: jointly}.get(link.before_pair)
    check(link.before_pair, optax.chain(link.make(), rule()), "pair", wanted)
    if link.before_pair == JOINT:
        with pytest.raises(AssertionError):
            assert_close(jointly(), one_by_one())


@every_link
def test_before_the_rule_with_reg_grads(link):
    assert link.before_reg_grads in (WORKS, LOSS_ONLY)
    losses = run(link.make(), [pair[0] for pair in PAIRS], PARAMS)
    wanted = [direction(a, pair[1]) for a, pair in zip(losses, PAIRS, strict=True)]
    check(WORKS, optax.chain(link.make(), rule()), "reg_grads", lambda: wanted)
    if link.before_reg_grads == WORKS:
        assert_close(losses, [pair[0] for pair in PAIRS])


@pytest.mark.parametrize("style", ["pair", "reg_grads"])
@pytest.mark.parametrize("wrapper", [available(each, optax.identity()) for each in WRAPPERS])
def test_around_the_rule(wrapper, style):
    """As if the wrapper had wrapped the optimizer alone, and been given the direction."""
    params = optax.LookaheadParams(PARAMS, PARAMS) if wrapper.name == "lookahead" else PARAMS
    wanted = functools.partial(
        run, wrapper.make(optax.sgd(1.0)), [direction(*pair) for pair in PAIRS], params
    )
    tx = wrapper.make(optax.chain(rule(), optax.sgd(1.0)))
    check(getattr(wrapper, style), tx, style, wanted, params)


def test_multi_steps_says_what_to_use():
    tx = optax.MultiSteps(optax.chain(rule(), optax.sgd(1.0)), 2)
    with pytest.raises(TypeError, match=r"accumulate_pairs\(tx, every_k\).*averages both"):
        tx.update(LOSS_GRADS, tx.init(PARAMS), PARAMS, reg_grads=REG_GRADS)
    jitted = jax.jit(lambda state: tx.update(LOSS_GRADS, state, PARAMS, reg_grads=REG_GRADS))
    with pytest.raises(TypeError, match=r"accumulate_pairs"):
        jitted(tx.init(PARAMS))


def test_multi_steps_around_add_l2_sp_is_right():
    """The pull is made from params, which do not change between micro-batches."""
    inner = optax.chain(dtnh_jax.add_l2_sp(REG_GRADS, 1.0), optax.sgd(1.0))
    tx = optax.MultiSteps(inner, 2)
    state = tx.init(PARAMS)
    for pair in PAIRS:
        updates, state = tx.update(pair[0], state, PARAMS)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, PAIRS[0][0], PAIRS[1][0])
    wanted, _ = inner.update(mean, inner.init(PARAMS), PARAMS)
    assert_close(updates, wanted)


def test_a_rule_is_an_aggregator():
    """Of two gradients, after the means over the examples of each, in Optax's own frame."""
    aggregating = pytest.importorskip("optax.experimental").aggregating
    mean_and_rule = optax.chain(aggregating.average_per_element_updates(0), rule())
    tx = aggregating.process(
        optax.clip(5.0),  # of each example
        aggregating.Aggregator(mean_and_rule.init, mean_and_rule.update),
        optax.sgd(1.0),
    )
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *PAIRS)
    updates, state = jax.jit(tx.update)(stacked, tx.init(PARAMS), PARAMS)
    mean = jax.tree.map(lambda x: jnp.clip(x, -5, 5).mean(0), stacked)
    assert_close(updates, jax.tree.map(jnp.negative, direction(*mean)))
    assert dtnh_jax.conflict_stats(state).groups == ("v", "w")
    accumulated = dtnh_jax.accumulate_pairs(
        aggregating.process(optax.identity(), rule(), optax.sgd(1.0)), 2
    )
    state = accumulated.init(PARAMS)
    for pair in PAIRS:
        again, state = accumulated.update(pair, state, PARAMS)
    mean = jax.tree.map(lambda x: x.mean(0), stacked)
    assert_close(again, jax.tree.map(jnp.negative, direction(*mean)))


def test_tables_have_no_unknown_cell():
    rows = [line for line in as_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(LINKS) + len(WRAPPERS)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4
        assert all(cells[1:3])


def test_multi_steps_around_a_link_that_makes_its_pair_is_right():
    """Only reg_grads= from outside are those of one micro-batch; a pair made inside is not."""

    def make_pair(updates, state, params=None):
        return dtnh_jax.GradientPair(updates, params), state

    pull = optax.GradientTransformation(optax.identity().init, make_pair)
    inner = optax.chain(pull, rule(), optax.sgd(1.0))
    tx = optax.MultiSteps(inner, 2)
    state = tx.init(PARAMS)
    for pair in PAIRS:
        updates, state = tx.update(pair[0], state, PARAMS)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, PAIRS[0][0], PAIRS[1][0])
    wanted, _ = inner.update(mean, inner.init(PARAMS), PARAMS)
    assert_close(updates, wanted)
