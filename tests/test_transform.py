"""What optax and JAX may expect of a rule: the contract of a gradient transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_equal,
    direction_of,
    inner,
    jitted_update,
    norm,
    oracle,
    random_tree,
    relative_error,
    rule,
)

import dtnh_jax

RULES = ["dtnh", "weighted_sum"]
SCOPES = ["global", "layer", "leaf", "element"]


@pytest.fixture
def pair():
    return dtnh_jax.GradientPair(*(jax.tree.map(jnp.asarray, random_tree(i)) for i in (0, 100)))


def struct(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scope", SCOPES)
class TestContract:
    def test_jit_is_eager(self, name, scope, pair):
        tx = rule(name, 0.5, scope=scope)
        eager, eager_state = tx.update(pair, tx.init(pair.loss_grads))
        jitted, jitted_state = jitted_update(tx)(pair, tx.init(pair.loss_grads))
        assert relative_error(jitted, eager) <= 1e-6
        for x, y in zip(jax.tree.leaves(jitted_state), jax.tree.leaves(eager_state), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_state_keeps_its_structure_and_dtypes(self, name, scope, pair):
        tx = rule(name, 0.5, scope=scope)
        state = tx.init(pair.loss_grads)
        _, after = jitted_update(tx)(pair, state)
        assert struct(state) == struct(after)
        assert jax.tree.structure(state) == jax.tree.structure(after)
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair)
        _, after_half = jitted_update(tx)(half, state)
        assert struct(state) == struct(after_half)

    def test_second_call_does_not_compile(self, name, scope, pair):
        tx = getattr(dtnh_jax, name)(0.5, scope=scope)
        traces = []

        @jax.jit
        def update(pair, state):
            traces.append(None)
            return tx.update(pair, state)

        state = tx.init(pair.loss_grads)
        for _ in range(3):
            _, state = update(pair, state)
        assert len(traces) == 1
        assert int(state.count) == 3

    def test_vmap_is_a_loop(self, name, scope, pair):
        tx = rule(name, 0.5, scope=scope)
        batch = jax.tree.map(lambda x: jnp.stack([x, -x, 1e-25 * x]), pair)
        # Signs differ between the trees so that some of the batch conflict and some do not.
        batch = batch._replace(reg_grads=jax.tree.map(lambda x: x[::-1], batch.reg_grads))
        state = jax.vmap(tx.init)(batch.loss_grads)
        together, after = jax.jit(jax.vmap(tx.update))(batch, state)
        stats = dtnh_jax.conflict_stats(after)
        for i in range(3):
            alone, state = jitted_update(tx)(
                jax.tree.map(lambda x, i=i: x[i], batch), tx.init(pair.loss_grads)
            )
            assert relative_error(jax.tree.map(lambda x, i=i: x[i], together), alone) <= 1e-6
            one = dtnh_jax.conflict_stats(state)
            np.testing.assert_allclose(
                stats.per_group.cosine[i], one.per_group.cosine, rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(stats.total.cosine[i], one.total.cosine, rtol=1e-5)

    def test_scan_over_steps_is_a_loop(self, name, scope, pair):
        tx = optax.chain(rule(name, 0.5, scope=scope), optax.sgd(0.1, momentum=0.9))
        params = jax.tree.map(jnp.zeros_like, pair.loss_grads)

        def step(carry, scale):
            params, state = carry
            scaled = jax.tree.map(lambda x: scale.astype(x.dtype) * x, pair)
            updates, state = tx.update(scaled, state, params)
            return (optax.apply_updates(params, updates), state), None

        scales = jnp.array([1.0, -2.0, 0.5, 3.0])
        start = (params, tx.init(params))
        scanned, _ = jax.jit(lambda start: jax.lax.scan(step, start, scales))(start)
        looped = start
        for scale in scales:
            looped, _ = step(looped, scale)
        assert relative_error(scanned[0], looped[0]) <= 1e-6
        assert int(scanned[1][0].count) == 4

    def test_eval_shape(self, name, scope, pair):
        tx = rule(name, 0.5, scope=scope)
        abstract = jax.eval_shape(lambda tree: tree, pair)
        state = jax.eval_shape(tx.init, abstract.loss_grads)
        assert struct(state) == struct(tx.init(pair.loss_grads))
        updates, after = jax.eval_shape(tx.update, abstract, state)
        assert struct(updates) == struct(pair.loss_grads)
        assert struct(after) == struct(state)

    def test_donated_buffers(self, name, scope, pair):
        tx = rule(name, 0.5, scope=scope)
        wanted, _ = jitted_update(tx)(pair, tx.init(pair.loss_grads))
        donating = jax.jit(lambda a, b, state: tx.update((a, b), state), donate_argnums=(0, 2))
        mine = jax.tree.map(jnp.copy, pair.loss_grads)
        got, _ = donating(mine, pair.reg_grads, tx.init(pair.loss_grads))
        assert_trees_equal(got, wanted)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(mine))

    def test_both_call_styles_agree(self, name, scope, pair):
        tx = rule(name, 0.5, scope=scope)
        state = tx.init(pair.loss_grads)
        by_pair, _ = jitted_update(tx)(pair, state)
        by_tuple, _ = jitted_update(tx)(tuple(pair), state)
        by_name, _ = jitted_update(tx)(pair.loss_grads, state, reg_grads=pair.reg_grads)
        assert_trees_equal(by_pair, by_tuple)
        assert_trees_equal(by_pair, by_name)

    def test_params_and_other_extra_args_are_welcome(self, name, scope, pair):
        tx = rule(name, 0.5, scope=scope)
        state = tx.init(pair.loss_grads)
        wanted, _ = tx.update(pair, state)
        got, _ = tx.update(pair, state, pair.loss_grads, value=jnp.zeros(()))
        assert_trees_equal(got, wanted)


@pytest.mark.parametrize("name", RULES)
def test_the_rules_share_one_state(name, pair):
    state = getattr(dtnh_jax, name)(0.5, scope="layer").init(pair.loss_grads)
    wanted = dtnh_jax.dtnh(0.1, scope="layer").init(pair.loss_grads)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    assert isinstance(state, dtnh_jax.PairState)


def test_schedule_is_read_by_the_step(pair):
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    tx = dtnh_jax.dtnh(schedule)
    state = tx.init(pair.loss_grads)
    update = jax.jit(tx.update)
    for step in range(3):
        got, state = update(pair, state)
        wanted, _ = direction_of(dtnh_jax.dtnh(step / 10), *pair)
        assert relative_error(got, wanted) <= 1e-6


def test_inject_hyperparams(pair, standard_promotion):
    tx = optax.inject_hyperparams(dtnh_jax.dtnh)(
        reg_weight=0.5, scope="layer", on_conflict="orthogonal"
    )
    state = tx.init(pair.loss_grads)
    assert state.hyperparams["reg_weight"] == 0.5
    update = jax.jit(tx.update)
    got, state = update(pair, state, pair.loss_grads)
    assert relative_error(got, oracle(*pair, 0.5, "layer", "orthogonal")) <= 1e-5
    state.hyperparams["reg_weight"] = jnp.asarray(0.25)
    got, state = update(pair, state, pair.loss_grads)
    assert relative_error(got, oracle(*pair, 0.25, "layer", "orthogonal")) <= 1e-5
    scheduled = optax.inject_hyperparams(dtnh_jax.dtnh)(optax.constant_schedule(0.5))
    got, _ = scheduled.update(pair, scheduled.init(pair.loss_grads), pair.loss_grads)
    assert relative_error(got, oracle(*pair, 0.5, "global")) <= 1e-5


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.adam(0.1),
        optax.adamw(0.1, weight_decay=0.01),
        optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
        optax.lion(0.1),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "clip", "decay", "lion"],
)
def test_chains_into_any_optimizer(optimizer, pair, standard_promotion):
    """The optimizer after the rule sees the direction, and nothing else."""
    params = jax.tree.map(jnp.ones_like, pair.loss_grads)
    tx = optax.chain(dtnh_jax.dtnh(0.5, scope="layer"), optimizer)
    updates, _ = tx.update(pair, tx.init(params), params)
    direction, _ = direction_of(dtnh_jax.dtnh(0.5, scope="layer"), *pair)
    wanted, _ = optimizer.update(direction, optimizer.init(params), params)
    assert relative_error(updates, wanted) <= 1e-6


def test_masked_carries_the_separate_style(pair):
    params = pair.loss_grads
    mask = {"block": True, "dense": False, "temperature": True}
    tx = optax.masked(dtnh_jax.dtnh(1.0), mask)
    got, state = tx.update(pair.loss_grads, tx.init(params), params, reg_grads=pair.reg_grads)
    wanted, _ = direction_of(dtnh_jax.dtnh(1.0, mask=mask), *pair)
    assert relative_error(got, wanted) <= 1e-6
    assert dtnh_jax.conflict_stats(state).groups == ("global",)
    leaf_by_leaf = {
        **jax.tree.map(lambda _: True, params),
        "dense": {"kernel": False, "bias": False},
    }
    by_layer = optax.masked(dtnh_jax.dtnh(1.0, scope="layer"), leaf_by_leaf).init(params)
    assert dtnh_jax.conflict_stats(by_layer).groups == (".", "block/conv", "block/norm")


def test_optax_tree_map_params_passes_over_the_state(pair):
    tx = optax.chain(dtnh_jax.dtnh(0.5, scope="layer"), optax.sgd(0.1, momentum=0.9))
    state = tx.init(pair.loss_grads)
    doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert_trees_equal(doubled[0], state[0])
    assert float(jax.tree.leaves(doubled[1])[0].ravel()[0]) == 1


def test_pairs_pass_through_transforms_before_the_rule(pair):
    tx = optax.chain(optax.scale(2.0), dtnh_jax.dtnh(0.5))
    got, _ = tx.update(pair, tx.init(pair.loss_grads), pair.loss_grads)
    assert relative_error(got, oracle(*jax.tree.map(lambda x: 2 * x, pair), 0.5, "global")) <= 1e-5


def test_differentiable_through(pair):
    """Meta-learning: the direction has finite derivatives, also at degenerate inputs."""
    tx = dtnh_jax.dtnh(0.5, scope="layer", diagnostics=False)

    def first(a, b):
        direction, _ = tx.update((a, b), tx.init(a))
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(direction))

    zeros = jax.tree.map(jnp.zeros_like, pair.loss_grads)
    for a, b in [pair, (zeros, pair.reg_grads), (pair.loss_grads, zeros)]:
        grads = jax.jit(jax.grad(first, argnums=(0, 1)))(a, b)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))


def test_weighted_sum_without_diagnostics_takes_no_inner_product(pair):
    def compiled(diagnostics):
        tx = dtnh_jax.weighted_sum(0.5, diagnostics=diagnostics)
        state = tx.init(pair.loss_grads)
        return jax.jit(tx.update).lower(pair, state).compile().as_text()

    assert " reduce(" in compiled(True)
    assert " reduce(" not in compiled(False)


def test_nothing_waits_for_a_number(pair):
    """No branch on a value: the host would wait for it, and the leaves would have to be kept."""
    tx = dtnh_jax.dtnh(0.5)
    text = jax.jit(tx.update).lower(pair, tx.init(pair.loss_grads)).as_text()
    assert "stablehlo.case" not in text
    assert "stablehlo.while" not in text


@functools.cache
def flax_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.backbone = nnx.Linear(2, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

    return nnx, Model


def nnx_gradients(nnx, model):
    x = jnp.ones((4, 2))
    loss_grads = nnx.grad(lambda model: jnp.mean(model.head(model.backbone(x)) ** 2))(model)
    reg_grads = nnx.grad(
        lambda model: (
            -sum(
                jnp.sum(p[...] ** 2)
                for p in jax.tree.leaves(
                    nnx.state(model, nnx.Param), is_leaf=lambda p: isinstance(p, nnx.Variable)
                )
            )
        )
    )(model)
    return loss_grads, reg_grads


@pytest.mark.parametrize("style", ["tuple", "GradientPair", "reg_grads="])
def test_nnx_optimizer(style, standard_promotion):
    """nnx turns a tuple into a State with keys 0 and 1 on its way to optax."""
    nnx, model_class = flax_model()
    model = model_class(nnx.Rngs(0))
    tx = optax.chain(dtnh_jax.dtnh(0.5, scope="layer"), optax.sgd(0.1, momentum=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss_grads, reg_grads = nnx_gradients(nnx, model)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    pure = [nnx.to_pure_dict(nnx.as_pure(grads)) for grads in (loss_grads, reg_grads)]

    @nnx.jit
    def step(model, optimizer, loss_grads, reg_grads):
        if style == "tuple":
            optimizer.update(model, (loss_grads, reg_grads))
        elif style == "GradientPair":
            optimizer.update(model, dtnh_jax.GradientPair(loss_grads, reg_grads))
        else:
            optimizer.update(model, loss_grads, reg_grads=reg_grads)

    step(model, optimizer, loss_grads, reg_grads)
    wanted = jax.tree.map(lambda p, d: p - 0.1 * d, before, oracle(*pure, 0.5, "layer"))
    assert relative_error(nnx.to_pure_dict(nnx.state(model, nnx.Param)), wanted) <= 1e-6
    stats = dtnh_jax.conflict_stats(optimizer.opt_state)
    assert stats.groups == ("backbone", "head")
    a, b = pure
    cosine = inner(a["head"], b["head"]) / (norm(a["head"]) * norm(b["head"]))
    np.testing.assert_allclose(stats.per_group.cosine[1], cosine, rtol=1e-5)


def test_nnx_optimizer_with_one_tree_shows_the_right_call(standard_promotion):
    nnx, model_class = flax_model()
    model = model_class(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, dtnh_jax.dtnh(0.5), wrt=nnx.Param)
    loss_grads, _ = nnx_gradients(nnx, model)
    with pytest.raises(TypeError, match=r"reg_grads=reg_grads"):
        optimizer.update(model, loss_grads)


def test_nnx_list_with_keys_zero_and_one_is_no_pair(standard_promotion):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)])
    optimizer = nnx.Optimizer(model, dtnh_jax.dtnh(0.5), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model[1](model[0](jnp.ones((1, 2))))))(model)
    with pytest.raises(TypeError, match="needs the gradients of loss and regularizer as a pair"):
        optimizer.update(model, grads)


def test_linen_train_state_takes_the_pair(standard_promotion):
    train_state = pytest.importorskip("flax.training.train_state")
    params = {"w": jnp.ones(3)}
    tx = optax.chain(dtnh_jax.dtnh(1.0), optax.sgd(1.0))
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    pair = ({"w": jnp.array([-4.0, 1.0, 1.0])}, {"w": jnp.array([6.0, 1.0, 1.0])})
    state = state.apply_gradients(grads=pair)
    np.testing.assert_allclose(1 - state.params["w"], [-26 / 9, 29 / 9, 29 / 9], rtol=1e-6)


def test_linen_partitioned_boxes_are_no_level_of_the_model():
    linen = pytest.importorskip("flax.linen")

    def boxed(seed):
        return {
            "dense": {
                name: linen.Partitioned(jnp.asarray(random_tree(seed, shapes=(3,))), ())
                for name in ("kernel", "bias")
            }
        }

    tx = dtnh_jax.dtnh(1.0, scope="layer")
    a, b = boxed(0), boxed(1)
    got, state = tx.update((a, b), tx.init(a))
    assert jax.tree.structure(got) == jax.tree.structure(a)
    assert dtnh_jax.conflict_stats(state).groups == ("dense",)


def test_flax_serialization_round_trip(pair):
    serialization = pytest.importorskip("flax.serialization")
    tx = dtnh_jax.dtnh(0.5, scope="layer")
    state = tx.init(pair.loss_grads)
    _, after = tx.update(pair, state)
    restored = serialization.from_bytes(state, serialization.to_bytes(after))
    assert_trees_equal(jax.tree.map(jnp.asarray, restored), after)


@pytest.mark.usefixtures("x64")
def test_state_of_float32_params_stays_float32_under_float64_gradients():
    params = {"w": jnp.ones(3, jnp.float32)}
    tx = dtnh_jax.dtnh(0.5)
    state = tx.init(params)
    grads = {"w": jnp.ones(3, jnp.float64)}
    direction, after = tx.update((grads, grads), state)
    assert direction["w"].dtype == jnp.float64
    assert struct(after) == struct(state)


def test_the_count_stops_at_its_largest_number():
    tx = dtnh_jax.dtnh(0.5)
    a = jnp.ones(2)
    last = jnp.asarray(np.iinfo(np.int32).max, jnp.int32)
    _, state = tx.update((a, a), tx.init(a)._replace(count=last))
    assert state.count == last


@pytest.mark.usefixtures("standard_promotion")
def test_a_reference_sees_the_params_of_the_leaves_that_are_reached():
    """Were it given others, their trees would not match."""
    reference = optax.chain(optax.add_decayed_weights(0.5), optax.trace(0.0))
    tx = dtnh_jax.dtnh(1.0, reference=reference, mask={"v": True, "w": False})
    a = {"v": jnp.array([1.0, 0.0]), "w": jnp.ones(2)}
    b = {"v": jnp.array([0.0, -1.0]), "w": jnp.ones(2)}
    params = {"v": jnp.array([-2.0, 2.0]), "w": jnp.ones(2)}
    direction, _ = tx.update((a, b), tx.init(params), params)
    # r = a + params / 2 = (0, 1), which takes all of b.
    np.testing.assert_allclose(direction["v"], [1.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(direction["w"], a["w"])


def test_a_rule_on_one_part_takes_the_gradients_of_all():
    params = {"a": jnp.ones(2), "b": {"v": jnp.ones(2), "w": jnp.ones(2)}}
    tx = optax.partition(
        {"rule": dtnh_jax.dtnh(0.5), "other": optax.sgd(0.1)}, {"a": "rule", "b": "other"}
    )
    for reg_grads in (params, params | {"b": jnp.ones(2)}, params | {"b": None}):
        updates, _ = tx.update(params, tx.init(params), params, reg_grads=reg_grads)
        np.testing.assert_allclose(updates["a"], 1.5)
        np.testing.assert_allclose(updates["b"]["w"], -0.1)
