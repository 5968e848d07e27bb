"""The recipes of docs/frameworks.md take the same step, whatever made their trees."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_equal, random_tree, relative_error

import dtnh_jax

nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")
orbax_checkpoint = pytest.importorskip("orbax.checkpoint")

PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"


@pytest.fixture(autouse=True)
def promotion_of_users(standard_promotion):
    with jax.numpy_rank_promotion("allow"):
        yield


def sections():
    """The blocks of code under each heading of the page."""
    heading, blocks = "", {}
    for part in re.finditer(r"^#+ ([^\n]+)$|^```python\n(.+?)^```$", PAGE.read_text(), re.M | re.S):
        heading = part[1] or heading
        if part[2]:
            blocks.setdefault(heading, []).append(part[2])
    return blocks


@functools.cache
def page(*headings, **changes):
    """What sections define, after those that all of them may rely on.

    ``changes`` take the place of what the page's first block defines.
    """
    shared = ("Frameworks", "Plain pytrees", "A new head")
    namespace = {} if headings == shared else {**page(*shared, **changes)}
    for heading in headings:
        for block in sections()[heading]:
            exec(compile(block, f"{PAGE.name}: {heading}", "exec"), namespace)
        if heading == "Frameworks":
            namespace.update(changes)
    return namespace


class Trained(NamedTuple):
    """What a recipe's steps made, in the form of plain pytrees."""

    params: Any
    mean: Any
    opt_state: Any
    losses: list[float]


def keys(steps):
    return jax.random.split(jax.random.key(5), steps)


def plain(code, weights, source, steps):
    params, stats, opt_state = weights, code["averages"], code["tx"].init(weights)
    losses = []
    for key in keys(steps):
        params, stats, opt_state, loss = code["step"](
            params, stats, opt_state, source, code["x"], code["labels"], key
        )
        losses.append(loss)
    return Trained(params, stats["mean"], opt_state, losses)


def nnx_model(code, weights):
    model = code["Network"](nnx.Rngs(params=0, dropout=1))
    nnx.update(model, weights)
    return model


def nnx_optimizer(code, weights, source, steps):
    model = nnx_model(code, weights)
    optimizer = nnx.Optimizer(model, code["tx"], wrt=nnx.Param)
    losses = [
        code["nnx_step"](model, optimizer, source, code["x"], code["labels"]) for _ in range(steps)
    ]
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return Trained(params, model.norm.mean[...], optimizer.opt_state, losses)


def nnx_functional(code, weights, source, steps):
    _, params, rest = nnx.split(nnx_model(code, weights), nnx.Param, ...)
    opt_state, losses = code["tx"].init(params), []
    for _ in range(steps):
        params, rest, opt_state, loss = code["functional_step"](
            params, rest, opt_state, source, code["x"], code["labels"]
        )
        losses.append(loss)
    rest = nnx.to_pure_dict(rest)
    return Trained(nnx.to_pure_dict(params), rest["norm"]["mean"], opt_state, losses)


def linen(code, weights, source, steps):
    losses = []
    state = code["State"].create(
        apply_fn=code["model"].apply,
        params=weights,
        tx=code["tx"],
        batch_stats={"norm": code["averages"]},
    )
    for _ in range(steps):
        state, loss = code["linen_step"](
            state, source, code["x"], code["labels"], jax.random.key(1)
        )
        losses.append(loss)
    return Trained(state.params, state.batch_stats["norm"]["mean"], state.opt_state, losses)


def eqx_leaves(model):
    return [
        leaf
        for part in (model.backbone, model.norm, model.head)
        for leaf in (part.weight, part.bias)
    ]


def eqx_params(params, tree):
    """A plain tree in the form of the model's params: Equinox's kernels are transposed."""
    leaves = [
        leaf.T
        for part, kernel in (("backbone", "kernel"), ("norm", "scale"), ("head", "kernel"))
        for leaf in (tree[part][kernel], tree[part]["bias"])
    ]
    return eqx.tree_at(eqx_leaves, params, leaves)


def plain_params(params):
    def part(layer, kernel):
        return {kernel: layer.weight.T, "bias": layer.bias}

    return {
        "backbone": part(params.backbone, "kernel"),
        "norm": part(params.norm, "scale"),
        "head": part(params.head, "kernel"),
    }


def equinox(code, weights, source, steps):
    model, state = eqx.nn.make_with_state(code["Model"])(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params = eqx_params(params, weights)
    source = eqx_params(params, {**source, "head": weights["head"]})
    source = eqx.tree_at(lambda params: params.head, source, replace=None)
    opt_state, losses = code["tx"].init(params), []
    for key in keys(steps):
        params, state, opt_state, loss = code["eqx_step"](
            params, static, state, opt_state, source, code["x"], code["labels"], key
        )
        losses.append(loss)
    mean, _ = state.get(model.norm.batch_state_index)
    return Trained(plain_params(params), mean, opt_state, losses)


RECIPES = {
    plain: [],
    nnx_optimizer: ["Flax NNX"],
    nnx_functional: ["Flax NNX"],
    linen: ["Flax Linen"],
    equinox: ["Equinox"],
}
FRAMEWORKS = [recipe for recipe in RECIPES if recipe is not plain]


def by_part(path):
    """The norm is a group, and the head shares one with the backbone."""
    return "norm" if path.startswith("norm") else "rest"


TX = optax.chain(dtnh_jax.dtnh(0.5, scope=by_part), optax.sgd(0.1, momentum=0.9))


def without_dropout(*headings):
    return page(*headings, rate=0.0, tx=TX)


@functools.cache
def start():
    """Weights, and a source in the direction that the loss rises in: the pull is in conflict."""
    code = without_dropout()
    weights, source = code["weights"], code["source"]
    _, pair = jax.jit(code["objective"])(
        weights, code["averages"], source, code["x"], code["labels"], keys(1)[0]
    )
    noise = random_tree(0, shapes=jax.tree.map(jnp.shape, weights), scale=0.03)
    source = jax.tree.map(lambda w, g, n: w + 10 * g + n, weights, pair.loss_grads, noise)
    return weights, {**source, "head": None}


def trained(recipe, steps=3):
    return recipe(without_dropout(*RECIPES[recipe]), *start(), steps)


def moved(params):
    weights, _ = start()
    return {name: jax.tree.map(jnp.subtract, params[name], weights[name]) for name in params}


@pytest.mark.parametrize("recipe", FRAMEWORKS)
def test_the_same_numbers_as_plain_pytrees(recipe):
    got, wanted = trained(recipe), trained(plain)
    assert relative_error(moved(got.params), moved(wanted.params)) <= 1e-6
    np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.losses, wanted.losses, rtol=1e-5)
    got, wanted = (dtnh_jax.conflict_stats(each.opt_state) for each in (got, wanted))
    assert got.groups == wanted.groups == ("norm", "rest")
    assert float(wanted.total.removed) > 0.01
    np.testing.assert_allclose(got.per_group.cosine, wanted.per_group.cosine, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.per_group.removed, wanted.per_group.removed, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_statistics_move_once_a_step(recipe):
    weights, _ = start()
    x = without_dropout()["x"]
    seen = x @ weights["backbone"]["kernel"] + weights["backbone"]["bias"]
    np.testing.assert_allclose(trained(recipe, 1).mean, 0.1 * seen.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_regularizer_does_not_touch_the_head(recipe):
    weights, source = start()
    near = {**weights, "head": None}
    code = without_dropout(*RECIPES[recipe])
    pulled, free = (recipe(code, weights, towards, 1) for towards in (source, near))
    assert dtnh_jax.conflict_stats(pulled.opt_state).per_group.conflict.all()
    assert_trees_equal(pulled.params["head"], free.params["head"])
    assert relative_error(pulled.params["backbone"], free.params["backbone"]) > 1e-3


def the_loss_twice(logits, labels, params, pretrained):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, loss


STILL = optax.chain(dtnh_jax.dtnh(0.5, scope="layer"), optax.sgd(0.0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_dropout_mask_a_step_for_both_gradients(recipe):
    """With the loss for a regularizer both gradients are one, under one mask and no other."""
    code = page(*RECIPES[recipe], rate=0.5, terms=the_loss_twice, tx=STILL)
    result = recipe(code, *start(), 2)
    cosine = dtnh_jax.conflict_stats(result.opt_state).per_group.cosine
    np.testing.assert_allclose(cosine, np.ones(3), rtol=1e-6)
    first, second = result.losses
    assert abs(first - second) > 1e-3  # another mask in the next step


def nnx_frozen(code, weights, source, steps):
    model = nnx_model(code, weights)
    optimizer = nnx.Optimizer(model, code["tx"], wrt=code["trainable"])
    for _ in range(steps):
        code["nnx_step"](model, optimizer, source, code["x"], code["labels"])
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer.opt_state


def linen_frozen(code, weights, source, steps):
    model, frozen = code["model"], {"backbone": weights["backbone"]}

    def apply(variables, *args, **kwargs):
        params = {**frozen, **variables["params"]}
        return model.apply({**variables, "params": params}, *args, **kwargs)

    state = code["State"].create(
        apply_fn=apply,
        params={name: weights[name] for name in ("norm", "head")},
        tx=code["tx"],
        batch_stats={"norm": code["averages"]},
    )
    for _ in range(steps):
        state, _ = code["linen_step"](state, source, code["x"], code["labels"], jax.random.key(1))
    return {**frozen, **state.params}, state.opt_state


def equinox_frozen(code, weights, source, steps):
    model, state = eqx.nn.make_with_state(code["Model"])(jax.random.key(0))
    model = eqx_params(model, weights)
    params, static = eqx.partition(model, code["trainable"])
    source = eqx_params(model, {**weights, "norm": source["norm"]})
    source = eqx.tree_at(lambda tree: tree.head, eqx.filter(source, code["trainable"]), None)
    opt_state = code["tx"].init(params)
    for key in keys(steps):
        params, state, opt_state, _ = code["eqx_step"](
            params, static, state, opt_state, source, code["x"], code["labels"], key
        )
    return plain_params(eqx.combine(params, static)), opt_state


@pytest.mark.parametrize(
    ("recipe", "heading"),
    [(nnx_frozen, "Flax NNX"), (linen_frozen, "Flax Linen"), (equinox_frozen, "Equinox")],
)
def test_frozen_parts_stay_and_leave_no_state(recipe, heading):
    weights, source = start()
    source = {"norm": source["norm"], "head": None}
    params, opt_state = recipe(without_dropout(heading), weights, source, 3)
    assert_trees_equal(params["backbone"], weights["backbone"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(opt_state)]
    assert (4, 8) not in shapes
    assert (8, 4) not in shapes

    code = without_dropout("Frozen layers")
    frozen, trained = (
        {"backbone": weights["backbone"]},
        {"norm": weights["norm"], "head": weights["head"]},
    )
    stats, opt_state = code["averages"], TX.init(trained)
    for key in keys(3):
        trained, stats, opt_state = code["step_of_trained"](
            trained, frozen, stats, opt_state, source, code["x"], code["labels"], key
        )
    params = {name: params[name] for name in trained}
    assert relative_error(moved(params), moved(trained)) <= 1e-6


def arguments(code, cast=lambda tree: tree):
    """What an objective in plain pytrees takes."""
    weights, source = start()
    x, labels = code["x"], code["labels"]
    return cast(weights), code["averages"], cast(source), cast(x), labels, keys(1)[0]


def plain_step(code, objective, tx, cast=lambda tree: tree):
    """Params and optimizer state after a step."""
    params, stats, *others = arguments(code, cast)
    params, _, opt_state, _ = code["make_step"](objective, tx)(
        params, stats, tx.init(params), *others
    )
    return params, opt_state


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def test_bfloat16_params():
    code = without_dropout("Mixed precision")
    params, opt_state = plain_step(code, code["objective"], code["tx_half"], code["half"])
    assert dtypes(params) == {"bfloat16"}
    momentum = opt_state[1:]
    assert dtypes((momentum, dtnh_jax.conflict_stats(opt_state).per_group.cosine)) == {"float32"}
    wanted, _ = plain_step(code, code["objective"], code["tx_half"])
    assert relative_error(params, wanted) <= 0.01


def test_bfloat16_compute_leaves_the_regularizer_its_digits():
    code = without_dropout("Mixed precision")
    _, pair = jax.jit(code["half_objective"])(*arguments(code))
    _, wanted = jax.jit(code["objective"])(*arguments(code))
    assert dtypes(pair) == {"float32"}
    assert relative_error(pair.reg_grads, wanted.reg_grads) <= 1e-6
    assert 1e-4 <= relative_error(pair.loss_grads, wanted.loss_grads) <= 0.05


def test_loss_scaling_changes_nothing():
    code = without_dropout("Mixed precision")
    params, _ = plain_step(code, code["scaled_objective"], code["tx_scaled"])
    tx = optax.chain(dtnh_jax.dtnh(0.01, scope="layer"), optax.sgd(0.1, momentum=0.9))
    wanted, _ = plain_step(code, code["objective"], tx)
    assert relative_error(moved(params), moved(wanted)) <= 1e-6


def test_the_teacher_runs_on_its_averages_and_stays():
    code = page("Flax NNX", "Distillation from a frozen teacher", tx=TX)
    weights, source = start()
    student, teacher = (
        nnx_model(code, weights),
        nnx_model(code, {**source, "head": weights["head"]}),
    )
    averages = {"mean": jnp.full(8, 0.1), "var": jnp.full(8, 0.7)}
    nnx.update(teacher, {"norm": averages})
    teacher.eval()
    before = jax.tree.map(jnp.copy, nnx.state(teacher, (nnx.Param, nnx.BatchStat)))
    same = nnx_model(code, weights)

    hidden = code["dense"](source["backbone"], code["x"]) - averages["mean"]
    hidden = hidden / jnp.sqrt(averages["var"] + 1e-5) * source["norm"]["scale"]
    logits = code["dense"](weights["head"], jax.nn.relu(hidden + source["norm"]["bias"]))

    @nnx.jit
    def stepped(same):
        _, pair = code["distilled"](same, logits, code["x"], code["labels"])
        params = nnx.state(same, nnx.Param)
        updates, _ = TX.update(pair, TX.init(params), params)
        return optax.apply_updates(params, updates)

    wanted = nnx.to_pure_dict(stepped(same))

    optimizer = nnx.Optimizer(student, TX, wrt=nnx.Param)
    code["distilling_step"](student, teacher, optimizer, code["x"], code["labels"])
    got = nnx.to_pure_dict(nnx.state(student, nnx.Param))
    assert relative_error(moved(got), moved(wanted)) <= 1e-6
    assert_trees_equal(nnx.state(teacher, (nnx.Param, nnx.BatchStat)), before)
    seen = code["dense"](weights["backbone"], code["x"])
    np.testing.assert_allclose(student.norm.mean[...], 0.1 * seen.mean(0), rtol=1e-5, atol=1e-7)


def test_many_devices_are_one():
    code = without_dropout("Many devices")
    weights, source = start()
    everywhere = jax.sharding.NamedSharding(code["mesh"], code["everywhere"])
    state = jax.device_put((weights, code["averages"], TX.init(weights)), everywhere)
    params, stats, _, _ = code["step"](*state, source, *code["batch"], keys(1)[0])
    wanted = trained(plain, 1)
    assert relative_error(moved(params), moved(wanted.params)) <= 1e-6
    np.testing.assert_allclose(stats["mean"], wanted.mean, rtol=1e-5, atol=1e-7)


def test_shard_map_gives_the_mean_of_the_pairs():
    code = without_dropout("Many devices")
    *trees, x, labels, key = arguments(code)
    (_, stats), pair = jax.jit(code["mapped"])(*trees, x, labels, key)
    n = code["mesh"].size
    each = jax.vmap(code["objective"], in_axes=(None, None, None, 0, 0, None))
    each = jax.jit(each)(*trees, x.reshape(n, -1, 4), labels.reshape(n, -1), key)
    (_, wanted_stats), wanted = jax.tree.map(lambda leaf: leaf.mean(0), each)
    assert relative_error(pair, wanted) <= 1e-6
    assert relative_error(stats, wanted_stats) <= 1e-6


AVERAGE = optax.chain(
    dtnh_jax.dtnh(0.5, scope="layer", reference=optax.ema(0.9)), optax.sgd(0.1, momentum=0.9)
)


def test_plain_state_through_a_checkpoint(tmp_path):
    code = page(rate=0.0, tx=AVERAGE)
    weights, source = start()
    result = plain(code, weights, source, 2)
    with orbax_checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", result.opt_state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(AVERAGE.init, weights))
    assert_trees_equal(restored, result.opt_state)
    assert dtnh_jax.conflict_stats(restored).groups == ("backbone", "head", "norm")


def test_nnx_optimizer_through_a_checkpoint(tmp_path):
    """Training goes on as it would have, dropout included."""
    code = page("Flax NNX", tx=AVERAGE)
    weights, source = start()

    def fresh():
        model = nnx_model(code, weights)
        return model, nnx.Optimizer(model, AVERAGE, wrt=nnx.Param)

    def step(both):
        code["nnx_step"](*both, source, code["x"], code["labels"])

    saved, restored = fresh(), fresh()
    step(saved)
    with orbax_checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", nnx.state(saved))
        saver.wait_until_finished()
        nnx.update(restored, saver.restore(tmp_path / "state", nnx.state(restored)))
    step(saved)
    step(restored)
    not_keys = nnx.Not(nnx.RngKey)
    assert_trees_equal(nnx.state(restored, not_keys), nnx.state(saved, not_keys))
