# ruff: noqa: E402 (the modules under test want the packages that are asked for first)
"""The fine-tuning example, its parts: every regularizer with every rule, and what steps do."""

import dataclasses
import functools
import pathlib
import re
from typing import get_args

import jax
import jax.numpy as jnp
import needs
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

needs.examples()

import tiny_finetune
from helpers import relative_error

import dtnh_jax
from benchmarks import combination
from examples.common import data, objective, resnet
from examples.finetune import devices, freeze, optimizer
from examples.finetune.__main__ import main, parse
from examples.finetune.batches import TrainingBatches, load
from examples.finetune.config import (
    HELD_OUT,
    Config,
    DeviceConfig,
    OutputConfig,
    RegularizerName,
    RuleName,
    TrainingConfig,
    TransferConfig,
    preset,
)
from examples.finetune.train import gradients, make_program, regularized, setup

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax's own code promotes

REGULARIZERS, RULES = get_args(RegularizerName), get_args(RuleName)


@pytest.fixture(scope="module", autouse=True)
def compiled_fast():
    """Hundreds of programs that run once each."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_finetune.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tasks(directory):
    """A task by its options, made once; and its first batch."""

    @functools.cache
    def make(*options):
        config = parse(tiny_finetune.arguments(directory, directory / "out", *options))
        dataset = load(config)
        task = setup(config, dataset)
        with TrainingBatches(task.config, dataset, task.mesh) as batches:
            return task, next(batches.train)

    return make


@pytest.fixture(scope="module")
def pairs(tasks):
    """Loss, regularizer and both gradients of a first batch, some way from where it started."""

    @functools.cache
    def of(regularizer):
        task, batch = tasks("--regularizer", regularizer, "--estimation-images", "12")
        away = jax.tree.map(lambda x: 1.1 * x, task.initial.params)
        network, source, batch = jax.device_put(
            (task.initial._replace(params=away), task.source, batch), jax.devices()[0]
        )
        ((loss, reg), _), pair = jax.jit(functools.partial(gradients, task))(
            network, source, batch, jax.random.key(0)
        )
        return task, away, loss, reg, pair, regularized(task)

    return of


def test_the_matrix_is_that_of_the_library():
    public = set(dtnh_jax.regularizers.__all__)
    helpers = {name for name in public if name.endswith(("_gradient", "_relationship", "_weights"))}
    helpers |= {"Match", "MatchReport", "fisher_diagonal", "match_pretrained"}
    helpers |= {"kl_to_reference", "sampled_kl", "l2_sp_lora"}  # of language models
    assert set(REGULARIZERS) == (public - helpers) | {"none", "delta_attention"}
    assert set(objective.REGULARIZERS) == set(REGULARIZERS)
    ours = {"bounded_dtnh", "bounded_sum", "dtnh", "decoupled", "weighted_sum"}
    assert set(RULES) == set(combination.RIVALS) | ours


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_regularizers_reach_the_network(pairs, regularizer):
    _, _, loss, reg, pair, reached = pairs(regularizer)
    assert np.isfinite(loss)
    assert np.isfinite(reg)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(pair))
    if regularizer == "none":
        assert not any(jax.tree.leaves(reached))
        return
    assert reg > 0
    assert optax.tree.norm(pair.reg_grads) > 0
    # Those that look at what comes out train the new head as well.
    with_head = ("l2", "adversarial", "virtual_adversarial")
    assert set(jax.tree.leaves(reached["head"])) == {regularizer in with_head}
    assert reached["conv1"]["kernel"], "the first layer is as far from the output as can be"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_every_regularizer(pairs, rule):
    @functools.cache
    def compiled(where, leaves):
        """The optimizer of one rule, for all regularizers that reach the same parameters."""
        task, *_ = pairs("l2_sp")
        transfer = dataclasses.replace(task.config.transfer, rule=rule, reg_weight=0.1)
        mask = jax.tree.unflatten(where, leaves)
        tx = optimizer.make_optimizer(transfer, task.config.training, mask=mask)
        return tx, jax.jit(tx.update)

    for regularizer in REGULARIZERS:
        _, params, _, _, pair, reached = pairs(regularizer)
        leaves, where = jax.tree.flatten(reached)
        tx, update = compiled(where, tuple(leaves))
        updates, state = update(pair, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
        assert optax.tree.norm(updates) > 0
        groups = dtnh_jax.conflict_stats(state).groups
        assert bool(groups) == (regularizer != "none")


def one_step(tasks, *options):
    """The weights after one step of the optimizer, and the state."""
    task, batch = tasks(*options)
    program = make_program(task)
    state, micro = program.init(), task.config.training.accumulate
    for _ in range(micro):
        state, _ = program.train(state, task.source, batch)
    return task, jax.device_get(state)


def test_frozen_parameters_stay(tasks):
    task, state = one_step(
        tasks, "--freeze", "conv1", "layer1/*", "*/bias", "--weight-decay", "0.1"
    )
    first, last = task.initial.params, state.network.params
    for (keys, before), after in zip(
        jax.tree.leaves_with_path(first), jax.tree.leaves(last), strict=True
    ):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        stays = path.startswith(("conv1/", "layer1/")) or path.endswith("/bias")
        assert np.array_equal(before, after) == stays, path


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(("layer9",), "'layer9' matches no parameter"), (("*",), "leaves no parameter to train")],
)
def test_wrong_freezing_is_an_error(tasks, patterns, message):
    task, _ = tasks()
    with pytest.raises(ValueError, match=message):
        freeze.trained(task.initial.params, patterns)


def test_frozen_batch_norm_keeps_its_averages(tasks):
    for option, same in (("--frozen-batch-norm", True), ("--no-frozen-batch-norm", False)):
        task, state = one_step(tasks, option)
        pairs = zip(
            jax.tree.leaves(task.initial.batch_stats),
            jax.tree.leaves(state.network.batch_stats),
            strict=True,
        )
        assert all(np.array_equal(*pair) == same for pair in pairs)


@pytest.mark.parametrize("rule", ["bounded_dtnh", "dtnh", "decoupled"])
def test_micro_batches_are_one_step(tasks, rule):
    # Without batch norm's statistics, two micro-batches of the same images are those images.
    common = ("--rule", rule, "--frozen-batch-norm", "--freeze", "conv1")
    _, one = one_step(tasks, *common)
    task, two = one_step(tasks, *common, "--accumulate", "2", "--batch-size", "16")
    assert int(two.seen) == 2
    assert int(optax.tree.get(two.opt_state, "mini_step")) == 0
    first = task.initial.params
    moved = [jax.tree.map(np.subtract, state.network.params, first) for state in (one, two)]
    assert optax.tree.norm(moved[0]) > 0
    assert relative_error(*moved) <= 1e-5


def names(images):
    return {images[index]["name"] for index in range(len(images))}


@pytest.mark.parametrize(("share", "per_class"), [("0.01", 1), ("0.25", 2), ("0.3", 3)])
def test_held_out_images_are_not_trained_on(directory, share, per_class):
    arguments = tiny_finetune.arguments(directory, directory / "out")
    everything = load(parse(arguments))
    parts = load(parse([*arguments, "--held-out", share]))
    assert everything.held_out is None
    assert np.bincount(parts.held_out.labels).tolist() == [per_class] * 3
    assert names(parts.train).isdisjoint(names(parts.held_out))
    assert names(parts.train) | names(parts.held_out) == names(everything.train)
    assert names(parts.validation) == names(everything.validation)


def test_a_class_keeps_an_image_to_train_on(directory):
    arguments = tiny_finetune.arguments(directory, directory / "out", "--images-per-class", "1")
    with pytest.raises(ValueError, match=r"Class blue has 1 images; .* Lower held_out"):
        load(parse([*arguments, "--held-out", "0.1"]))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_bounded_rule_with_held_out_images_is_the_preset_with_other_choices(
    name, standard_promotion
):
    training = TrainingConfig(
        optimizer=name, learning_rate=0.1, schedule="constant", weight_decay=0.0
    )
    ours = optimizer.make_optimizer(
        TransferConfig(rule="bounded_dtnh", reg_weight=0.5, held_out=0.1), training
    )
    preset_of = {
        "sgd": dtnh_jax.dtnh_sgd,
        "adamw": functools.partial(dtnh_jax.dtnh_adamw, weight_decay=0.0),
    }
    theirs = preset_of[name](0.1, 0.5, **HELD_OUT)
    params = {"conv": {"kernel": jnp.ones((2, 2))}, "norm": {"bias": jnp.ones(2)}}
    states = [tx.init(params) for tx in (ours, theirs)]
    for step in range(4):
        pair, grads = (
            [optax.tree.random_like(jax.random.key(10 * step + i), params) for i in each]
            for each in ((0, 1), (2,))
        )
        held_out_grads = dtnh_jax.HeldOutGrads(*grads, is_new=step % 2 == 0)
        made = [
            tx.update(tuple(pair), state, params, held_out_grads=held_out_grads)
            for tx, state in zip((ours, theirs), states, strict=True)
        ]
        states = [state for _, state in made]
        assert relative_error(made[0][0], made[1][0]) <= 1e-6
    assert set(dtnh_jax.conflict_stats(states[0]).groups) == {"global"}


@pytest.mark.parametrize("rule", ["bounded_dtnh", "dtnh", "decoupled"])
def test_a_conflict_with_held_out_images_decides(tasks, rule):
    """Against them the regularizer is left out, along them it acts; the batch does not matter."""
    options = ("--rule", rule, "--held-out", "0.2", "--scope", "global", "--regularizer", "l2")
    more = () if rule == "bounded_dtnh" else ("--on-conflict", "gate")
    task, _ = tasks(*options, *more)
    transfer = dataclasses.replace(task.config.transfer, reg_weight=1.0)
    tx = optimizer.make_optimizer(transfer, task.config.training)
    params = {"w": jnp.zeros(2)}
    loss, reg = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 1.0])}
    for sign in (1.0, -1.0):
        grads = {"w": jnp.array([0.0, sign])}
        pair = dtnh_jax.GradientPair(loss, reg)
        updates, _ = tx.update(pair, tx.init(params), params, held_out_grads=grads)
        assert (float(updates["w"][1]) < 0) == (sign > 0)


def test_the_held_out_gradient_is_that_of_its_images(tasks):
    options = ("--held-out", "0.2", "--freeze", "conv1")
    task, batch = tasks(*options, "--frozen-batch-norm")
    halves, _ = tasks(*options, "--frozen-batch-norm", "--accumulate", "2", "--batch-size", "16")
    one = make_program(task).held_out(task.initial, batch, None)
    # The training batch, seen as held out: its gradient is the loss gradient of a step.
    _, pair = jax.jit(functools.partial(gradients, task))(
        task.initial, task.source, batch, jax.random.key(0)
    )
    assert jax.tree.structure(one) == jax.tree.structure(pair.loss_grads)
    assert relative_error(one, pair.loss_grads) <= 1e-5
    program = make_program(halves)
    sums = program.held_out(halves.initial, batch, program.held_out(halves.initial, batch, None))
    assert relative_error(sums, one) <= 1e-5


def test_held_out_images_leave_batch_norm_alone(tasks):
    task, batch = tasks("--held-out", "0.2")
    program = make_program(task)
    grads = program.held_out(task.initial, batch, None)
    one, other = (
        program.train(program.init(), task.source, batch, given)[0] for given in (grads, None)
    )
    jax.tree.map(np.testing.assert_array_equal, one.network.batch_stats, other.network.batch_stats)
    age = [int(optax.tree.get(state.opt_state, "age")) for state in (one, other)]
    assert age == [0, -1], "only one of them has had a gradient"


def test_the_average_follows_the_weights(tasks):
    task, state = one_step(tasks, "--average-decay", "0.9")
    decay = 2 / 11
    wanted = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, task.initial, state.network
    )
    assert relative_error(state.average, wanted) <= 1e-6
    assert state.evaluated is state.average


def test_the_head_has_a_learning_rate_of_its_own(tasks):
    moved = []
    for options in ((), ("--head-learning-rate", "10")):
        task, state = one_step(tasks, *options)
        moved.append(jax.tree.map(np.subtract, state.network.params, task.initial.params))
    slow, fast = moved
    assert relative_error(fast.pop("head"), jax.tree.map(lambda x: 10 * x, slow.pop("head"))) < 1e-4
    assert relative_error(fast, slow) < 1e-4


def test_the_weighted_sum_is_clipped_as_a_whole():
    """Loss and regularizer keep their shares of the direction."""
    transfer = TransferConfig(rule="weighted_sum", reg_weight=1.0)
    training = TrainingConfig(clip_norm=1.0, learning_rate=1.0, momentum=0.0, schedule="constant")
    tx = optimizer.make_optimizer(transfer, training)
    params = {"w": jnp.zeros(2)}
    pair = dtnh_jax.GradientPair({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([0.0, 4.0])})
    updates, _ = tx.update(pair, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


def test_the_gradients_of_the_bounded_rule_are_clipped_one_by_one():
    """Before momentum, by their own norms."""
    training = TrainingConfig(clip_norm=1.0, learning_rate=1.0, momentum=0.0, schedule="constant")
    tx = optimizer.make_optimizer(TransferConfig(reg_weight=0.5), training)
    params = {"w": jnp.zeros(2)}
    pair = dtnh_jax.GradientPair({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([0.0, 4.0])})
    updates, _ = tx.update(pair, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-1.0, -0.5], rtol=1e-6)


# With a weight of 0, the others give no direction.
@pytest.mark.parametrize("rule", sorted({*RULES} - {"mgda", "imtl_g"}))
def test_clipping_does_not_shorten_adams_step(rule):
    """Gradients are clipped before Adam, whose step does not depend on their length."""
    training = TrainingConfig(
        optimizer="adamw", learning_rate=1e-3, clip_norm=1e-3, schedule="constant"
    )
    tx = optimizer.make_optimizer(TransferConfig(rule=rule, reg_weight=0.0), training)
    params = {"w": jnp.zeros(100)}
    grads = {"w": jnp.linspace(1.0, 2.0, 100)}
    updates, _ = tx.update(dtnh_jax.GradientPair(grads, grads), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-2)


@functools.cache
def regression():
    """Data of a linear regression, and weights that are larger than those that made the data."""
    inputs, noise = np.random.default_rng(0).normal(size=(2, 64, 16)).astype(np.float32)
    weights = np.linspace(-1, 1, 16, dtype=np.float32)
    targets = inputs @ weights + 0.1 * noise[:, 0]
    return jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(2 * weights)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("rule", RULES)
def test_every_optimizer_lowers_the_loss_with_and_without_clipping(rule, name, clip_norm):
    inputs, targets, kernel = regression()
    training = TrainingConfig(
        optimizer=name,
        clip_norm=clip_norm,
        learning_rate={"sgd": 0.02, "adamw": 0.2}[name],
        momentum=0.5,
        schedule="constant",
    )
    transfer = TransferConfig(regularizer="l2", rule=rule, reg_weight=0.01)
    tx = optimizer.make_optimizer(transfer, training)

    @dtnh_jax.value_and_gradient_pair
    def objective_of(params):
        loss = jnp.mean((inputs @ params["kernel"] - targets) ** 2)
        return loss, dtnh_jax.regularizers.l2(params)

    @jax.jit
    def step(params, state):
        (loss, _), pair = objective_of(params)
        updates, state = tx.update(pair, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = {"kernel": kernel}
    state, losses = tx.init(params), []
    for _ in range(100):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    # Some rules step as far as the weaker of the two gradients lets them.
    is_slow = rule in ("mgda", "imtl_g", "config")
    assert losses[-1] < (0.9 if is_slow else 0.1) * losses[0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_without_a_regularizer_every_rule_is_the_optimizer(
    name, nesterov, clip_norm, standard_promotion
):
    """Clipping, weight decay, momentum and the head's rate come in the order of plain training."""
    training = TrainingConfig(
        optimizer=name,
        nesterov=nesterov,
        clip_norm=clip_norm,
        weight_decay=0.1,
        head_learning_rate=3.0,
        steps=5,
    )
    params = {"kernel": jnp.ones((2, 2)), "head": {"kernel": jnp.ones((2, 3))}}
    moved = []
    for rule in ("weighted_sum", "bounded_dtnh"):
        tx = optimizer.make_optimizer(TransferConfig(rule=rule, reg_weight=0.0), training)
        state, of_rule = tx.init(params), []
        for step in range(3):
            grads = optax.tree.random_like(jax.random.key(step), params)
            updates, state = tx.update(dtnh_jax.GradientPair(grads, grads), state, params)
            of_rule.append(updates)
        moved.append(of_rule)
    for one, other in zip(*moved, strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize(("rule", "default"), [("bounded_dtnh", 1.0), ("bounded_sum", 2.0)])
def test_the_longest_regularizer(rule, default):
    params = {"kernel": jnp.zeros((1, 2))}
    pair = dtnh_jax.GradientPair({"kernel": jnp.array([[0.0, 1.0]])}, {"kernel": jnp.ones((1, 2))})
    training = TrainingConfig(learning_rate=1.0, schedule="constant")
    for max_ratio, length in ((None, default), (0.5, 0.5), (0.0, 0.0)):
        transfer = TransferConfig(rule=rule, reg_weight=1e3, max_ratio=max_ratio)
        tx = optimizer.make_optimizer(transfer, training)
        updates, _ = tx.update(pair, tx.init(params), params)
        added = np.asarray(-updates["kernel"] - pair.loss_grads["kernel"])
        assert np.linalg.norm(added) == pytest.approx(length, rel=1e-5)


def test_learning_rates():
    rates = {
        schedule: optimizer.learning_rate(
            TrainingConfig(
                steps=100,
                warmup_steps=10,
                learning_rate=2.0,
                schedule=schedule,
                decay_at=(0.5, 0.75),
            )
        )
        for schedule in ("cosine", "step", "constant")
    }
    for rate in rates.values():
        assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 1, 2])
    assert float(rates["cosine"](55)) == pytest.approx(1)
    assert float(rates["cosine"](100)) == pytest.approx(0)
    assert [float(rates["step"](step)) for step in (49, 51, 74, 76)] == pytest.approx(
        [2, 0.2, 0.2, 0.02]
    )
    assert float(rates["constant"](99)) == 2


def test_weight_decay_is_that_of_kernels():
    training = TrainingConfig(weight_decay=0.5, learning_rate=1.0, momentum=0.0, steps=1)
    for name, expected in (("sgd", -0.5), ("adamw", -0.5)):
        tx = optimizer.make_optimizer(
            TransferConfig(rule="weighted_sum"), dataclasses.replace(training, optimizer=name)
        )
        params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(dtnh_jax.GradientPair(zeros, zeros), tx.init(params), params)
        assert float(updates["kernel"][0, 0]) == pytest.approx(expected)
        assert float(updates["bias"][0]) == 0


def test_teacher_of_unfinished_training_is_the_source(tasks):
    """At the start nothing was moved, so feature maps in inference mode agree."""
    task, batch = tasks("--regularizer", "feature_distillation", "--frozen-batch-norm")
    (values, _), pair = jax.jit(functools.partial(gradients, task))(
        task.initial, task.source, batch, jax.random.key(0)
    )
    assert float(values[1]) == 0
    assert optax.tree.norm(pair.reg_grads) == 0


def test_meshes():
    config = DeviceConfig
    assert dict(devices.make_mesh(config(), 8).shape) == {"data": 8, "fsdp": 1}
    assert dict(devices.make_mesh(config(mesh="fsdp"), 8).shape) == {"data": 1, "fsdp": 8}
    mesh = devices.make_mesh(config(mesh="4x2"), 8)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    shapes = {"large": jnp.zeros((3, 64, 128)), "small": jnp.zeros(8), "odd": jnp.zeros((4099, 3))}
    specs = jax.tree.map(lambda each: each.spec, devices.state_sharding(shapes, mesh))
    assert specs == {"large": P(None, None, "fsdp"), "small": P(), "odd": P()}
    with pytest.raises(ValueError, match="for 9 devices; there are 8"):
        devices.make_mesh(config(mesh="3x3"), 9)
    with pytest.raises(ValueError, match="8 devices cannot share 12 images"):
        devices.make_mesh(config(), 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"batch_size": 10, "accumulate": 3}, "multiple of accumulate"),
        ({"steps": 5, "warmup_steps": 5}, "warmup_steps must be"),
        ({"decay_at": (1.0,)}, "decay_at"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"reg_weight": -1.0}, "reg_weight must not be negative"),
        (
            {"rule": "bloop", "on_conflict": "gate"},
            "on_conflict is an option of the rules dtnh and",
        ),
        ({"reference_decay": 1.0}, "reference_decay"),
        ({"rule": "pcgrad", "max_ratio": 1.0}, "max_ratio is an option of the rules dtnh and bou"),
        ({"max_ratio": -1.0}, "max_ratio must not be negative"),
        (
            {"rule": "pcgrad", "held_out": 0.1},
            r"held_out is an option of .*, not of pcgrad\. Omit it, or choose one of these with",
        ),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1"),
        ({"held_out_every": 4}, r"there are none\. Give their share too, such as --held-out 0\.1"),
        ({"held_out": 0.1, "held_out_every": 0}, "held_out_every must be at least 1"),
        ({"rule": "dtnh", "held_out": 0.1, "regularizer": "none"}, "the regularizer is none"),
        (
            {"held_out": 0.1, "rule": "dtnh", "reference_decay": 0.9},
            "reference_decay .* Give only one",
        ),
        (
            {"rule": "bounded_dtnh", "held_out": 0.1, "scope": "element"},
            "Choose another --scope than element",
        ),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"mesh": "two"}, "mesh must be"),
        ({"prefetch": 0}, "prefetch must be"),
        ({"coordinator": "localhost:1"}, "all three"),
        ({"keep_last": 0}, "keep_last"),
    ],
)
def test_wrong_settings_are_errors(options, message):
    parts = {
        "training": TrainingConfig,
        "transfer": TransferConfig,
        "devices": DeviceConfig,
        "output": OutputConfig,
    }
    chosen = {
        part: {name: value for name, value in options.items() if hasattr(kind(), name)}
        for part, kind in parts.items()
    }
    with pytest.raises(ValueError, match=message):
        Config(
            data.DataConfig(dataset="x"),
            **{part: parts[part](**settings) for part, settings in chosen.items()},
        )


def test_presets():
    assert preset("paper", "x").training.steps == 9000
    config = parse(["--preset", "paper", "--dataset", "x", "--steps", "90"])
    assert (config.training.steps, config.training.schedule) == (90, "step")
    assert config.training.batch_size == 64


def test_what_the_network_needs(directory, capsys):
    images = ["--dataset", str(directory / "images"), "--out", str(directory / "none")]
    images += ["--image-size", "32"]
    assert main(images) == 1
    assert "--init timm/resnet50.a1_in1k" in capsys.readouterr().err
    assert main([*images, "--architecture", "cifar_resnet8"]) == 1
    assert "l2_sp needs a pre-trained network" in capsys.readouterr().err
    weights = ["--init", str(directory / "source.safetensors")]
    assert main([*images, *weights, "--architecture", "resnet18"]) == 1
    assert "omit --architecture and --width" in capsys.readouterr().err
    assert main([*images, *weights, "--regularizer", "delta", "--features", "layer7"]) == 1
    assert "No feature maps: layer7. There are conv1" in capsys.readouterr().err


def test_the_sections_that_the_docs_include_are_in_the_code():
    root = pathlib.Path(__file__).parents[1]
    page = (root / "docs" / "finetuning.md").read_text()
    includes = re.findall(r'^--8<-- "(.+):(.+)"$', page, re.MULTILINE)
    assert len(includes) >= 5
    for file, section in includes:
        code = (root / file).read_text()
        for marker in ("start", "end"):
            assert code.count(f"# --8<-- [{marker}:{section}]\n") == 1, (file, section)


def test_a_regularizer_says_which_inputs_it_needs():
    output = resnet.Output(jnp.zeros((2, 3)), {"pooled": jnp.ones((2, 4))}, {})
    params = {"conv1": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones((4, 3))}}
    given = objective.RegularizerInputs(params, output)
    for name, regularizer in objective.REGULARIZERS.items():
        if regularizer.needs:
            with pytest.raises(ValueError, match=f"needs {', '.join(regularizer.needs)}; got None"):
                regularizer(given)
        else:
            assert regularizer(given).shape == (), name
    source = {"conv1": {"kernel": jnp.zeros(2)}, "head": {"kernel": jnp.ones((4, 5))}}
    assert objective.REGULARIZERS["l2_sp"](given._replace(source_params=source)) == 1
