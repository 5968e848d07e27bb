"""What users would take instead: rules that project or learn λ, and procedures."""

# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import needs
import numpy as np
import optax
import pytest

needs.examples()

from test_never_hurt import CELL, prepared
from tiny_finetune import make_images

import dtnh_jax
from examples.common import resnet
from examples.never_hurt import batches, procedures, rules, sources, train
from examples.never_hurt.cell import NONE
from examples.never_hurt.images import Images
from examples.never_hurt.procedures import PROCEDURES, Candidate, Procedure

pytestmark = pytest.mark.usefixtures("standard_promotion")
PLAIN = replace(CELL, regularizer=NONE, rule=NONE, strength=0.0)
SHAPES = {"conv": (3, 3, 2, 4), "bias": (4,), "head": (4, 2)}
RATE, STEPS = 0.1, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    make_images(directory / "colours")
    return directory


@pytest.fixture(autouse=True)
def standard_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def drawn(rng, scale=1.0):
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def as_jax(tree):
    return jax.tree.map(jnp.float32, tree)


def follow(rule, reg_weight, gradients, held_out=None):
    """The deviations from the source after each step of a rule on L2-SP, and the last state.

    The weights of the source are 1, so that a tiny deviation is lost in float32, as in a network.
    """
    mask = {"conv": True, "bias": True, "head": False}
    optimizer = rules.RULES[rule](rules.Setting(reg_weight, lambda _: RATE, mask))
    source = as_jax({name: np.ones(shape) for name, shape in SHAPES.items()})
    params = source
    state = optimizer.init(params)
    path = []
    for i, grads in enumerate(gradients):
        deviations = jax.tree.map(jnp.subtract, params, source)
        pair = dtnh_jax.GradientPair(as_jax(grads), deviations | {"head": None})
        extra = {} if held_out is None else {"held_out_grads": held_out[i]}
        updates, state = optimizer.update(pair, state, params, **extra)
        params = optax.apply_updates(params, updates)
        path.append(jax.tree.map(jnp.subtract, params, source))
    return path, state


def check(path, wanted):
    for found, expected in zip(path, wanted, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=2e-6)


def followed(gradients, project):
    """The same in float64: SGD with momentum, and after each step ``project``."""
    w = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    momenta = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for grads in gradients:
        new = {}
        for name, grad in grads.items():
            momenta[name] = 0.9 * momenta[name] + grad
            new[name] = w[name] - RATE * momenta[name]
            if name != "head":
                new[name] = project(name, w[name], grad, new[name])
        w = new
        yield w


# Rules


@pytest.mark.parametrize("reg_weight", [0.0, 0.3, 1.0, 50.0])
def test_spd_is_that_of_its_authors(reg_weight):
    rng = np.random.default_rng(0)
    gradients = [drawn(rng) for _ in range(STEPS)]
    projected = []

    def project(name, before, grad, after):
        if np.sum(grad * before) > 0:
            ratio = (np.linalg.norm(after) - np.linalg.norm(before)) / np.linalg.norm(after)
            share = min(1.0, reg_weight * np.clip(ratio, 0, 1))
            projected.append(share)
            after = after - share * after
        return after

    wanted = list(followed(gradients, project))
    check(follow("spd", reg_weight, gradients)[0], wanted)
    assert any(projected) == (reg_weight > 0)
    assert len(projected) < 2 * STEPS  # not in every step


def test_ftp_is_that_of_its_authors():
    rng = np.random.default_rng(1)
    gradients = [drawn(rng, 0.1) for _ in range(STEPS)]
    gradients[1:3] = [gradients[0], gradients[0]]  # the radius grows before it shrinks
    memory = {}

    def norm(x):
        return np.sum(np.abs(x), axis=tuple(range(x.ndim - 1)) if x.ndim > 1 else None) + 1e-8

    def project(name, before, grad, after):
        t, gamma, m, v, c_prev = memory.get(name, (1, 1e-8, 0.0, 0.0, None))
        if t > 1:
            slope = np.sum(grad * c_prev / norm(c_prev))
            m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            gamma = np.clip(gamma - 0.01 * step, 1e-8, norm(after).max())
        memory[name] = t + 1, gamma, m, v, after
        return np.clip(gamma / norm(after), 0, 1) * after

    wanted = list(followed(gradients, project))
    path, _ = follow("ftp", 1.0, gradients)
    check(path, wanted)
    assert 0.001 < np.abs(path[2]["conv"]).sum() < 0.9 * 0.1 * np.abs(gradients[0]["conv"]).sum()


def test_auto_lambda_moves_along_the_held_out_gradient():
    rng = np.random.default_rng(2)
    gradients = [drawn(rng) for _ in range(STEPS)]
    held_out = [drawn(rng) for _ in range(STEPS)]
    multiple, m, v, momenta = 1.0, 0.0, 0.0, dict.fromkeys(SHAPES, 0.0)
    w = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    wanted, multiples = [], []
    for t, (grads, of_held_out) in enumerate(zip(gradients, held_out, strict=True), start=1):
        slope = -sum(np.sum(of_held_out[name] * w[name]) for name in ("conv", "bias"))
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        multiple = max(multiple - 0.05 * step, 0.0)
        multiples.append(multiple)
        for name, grad in grads.items():
            pull = 0.5 * multiple * w[name] if name != "head" else 0.0
            momenta[name] = 0.9 * momenta[name] + grad + pull
        w = {name: w[name] - RATE * momenta[name] for name in w}
        wanted.append(w)
    given = [dtnh_jax.HeldOutGrads(as_jax(each)) for each in held_out]
    path, state = follow("auto_lambda", 0.5, gradients, given)
    check(path, wanted)
    assert float(state.multiple) == pytest.approx(multiples[-1], rel=1e-4)
    assert abs(multiples[-1] - 1) > 0.01


@pytest.mark.parametrize("is_new", [True, jnp.array(True), False])
def test_auto_lambda_is_clipped_and_waits(is_new):
    gradients = [{name: np.ones(shape) for name, shape in SHAPES.items()}] * 40
    # Moving away from the source lowers the held-out loss.
    given = [dtnh_jax.HeldOutGrads(as_jax(gradients[0]), is_new)] * 40
    _, state = follow("auto_lambda", 0.01, gradients, given)
    assert float(state.multiple) == (0.0 if bool(is_new) else 1.0)
    with pytest.raises(TypeError, match="Auto-λ needs held_out_grads"):
        follow("auto_lambda", 0.01, gradients)


@pytest.mark.parametrize(("rule", "held_out"), [("spd", 0), ("ftp", 0), ("auto_lambda", 2)])
def test_cells_with_these_rules_run(data, rule, held_out):
    cell = replace(CELL, regularizer="l2_sp", rule=rule, held_out=held_out)
    [found] = train.run([prepared(cell, data)])
    assert math.isfinite(found.train_loss)
    assert {"conv1", "layer1/0/bn1"} < set(found.conflict)
    if held_out == 0:
        with pytest.raises(ValueError, match=f"{rule} is defined for the regularizer l2_sp"):
            train.run([prepared(replace(cell, regularizer="distillation"), data)])


# Procedures


def networks(monkeypatch):
    """The networks that results are computed from, in the order of the results."""
    seen = []
    compute = train._result

    def result(program, each, network, *others):
        seen.append(network)
        return compute(program, each, network, *others)

    monkeypatch.setattr(train, "_result", result)
    return seen


def test_the_best_candidate():
    def candidate(number, accuracy, loss):
        return Candidate(number, None, accuracy, loss)

    several = [candidate(1, 0.5, 0.1), candidate(2, 0.7, math.nan), candidate(3, 0.7, 0.4)]
    assert procedures.best([*several, candidate(4, 0.7, 0.5)]).number == 3
    assert procedures.best(several[:2]).number == 2


def test_interpolations():
    def network(value, head):
        return resnet.Network({"conv": value, "head": {"bias": head}}, {"mean": 10 * value})

    source, tuned = network(1.0, np.zeros(3)), network(3.0, np.full(2, 7.0))
    found = dict(procedures.interpolations(PROCEDURES["wise_ft"], source, tuned))
    assert list(found) == pytest.approx(np.arange(1, 11) / 10)
    assert found[0.5].params["conv"] == 2.0
    assert found[0.5].batch_stats["mean"] == 20.0
    for each in found.values():
        np.testing.assert_allclose(each.params["head"]["bias"], [7.0, 7.0])
    jax.tree.map(np.testing.assert_allclose, found[1.0], tuned)


def test_early_stopping_keeps_the_best_step(data, monkeypatch):
    monkeypatch.setitem(PROCEDURES, "early_stopping", Procedure(every=2))
    scores = iter([0.2, 0.9, 0.4, 0.9])  # after 2, 4, 6 and 7 steps
    losses = iter([0.0, 0.2, 0.0, 0.3])
    candidate = train._candidate

    def scored(program, each, number, network):
        found = candidate(program, each, number, network)
        return found._replace(accuracy=next(scores), loss=next(losses))

    monkeypatch.setattr(train, "_candidate", scored)
    seen = networks(monkeypatch)
    cell = replace(PLAIN, held_out=2, procedure="early_stopping", steps=7)
    [found] = train.run([prepared(cell, data)])
    assert found.chosen == 4
    assert list(scores) == []
    # Stopping after two steps is another network than stopping after four.
    monkeypatch.setattr(train, "_candidate", lambda *a: candidate(*a)._replace(accuracy=-a[2]))
    [other] = train.run([prepared(cell, data)])
    assert other.chosen == 2
    assert not np.allclose(seen[0].params["head"]["bias"], seen[1].params["head"]["bias"])


def test_held_out_images_are_evaluated_as_they_are(data, monkeypatch):
    seen = networks(monkeypatch)
    ready = prepared(replace(PLAIN, held_out=2), data)
    [found] = train.run([ready])
    images, labels = ready.splits.train
    which = batches.held_out_images(ready.cell, labels)
    assert len(which) == 6
    output = resnet.apply(
        resnet.ResNetConfig(PLAIN.architecture, 3),
        seen[0],
        batches.standardise(images[which]),
        train=False,
    )
    logits = np.asarray(output.logits)
    right = np.argmax(logits, axis=-1) == labels[which]
    assert found.held_out_accuracy == pytest.approx(np.mean(right), abs=1e-4)
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(6), labels[which]]
    assert found.held_out_loss == pytest.approx(float(np.mean(losses)), abs=1e-3)
    [without] = train.run([prepared(PLAIN, data)])
    assert (without.held_out_accuracy, without.held_out_loss, without.chosen) == (None,) * 3


def test_scores_are_over_all_chunks():
    config = resnet.ResNetConfig("cifar_resnet8", 3, width=4)
    network = resnet.init(config, 0)
    rng = np.random.default_rng(0)
    some = Images(rng.integers(256, size=(7, 8, 8, 3), dtype=np.uint8), np.arange(7) % 3)
    at_once, in_parts = (sources.score(config, network, some, chunk) for chunk in (256, 3))
    assert at_once == pytest.approx(in_parts, rel=1e-5)
    assert sources.accuracy(config, network, some) == at_once.accuracy


def test_lp_ft_trains_the_head_first(data, monkeypatch):
    seen = networks(monkeypatch)
    cell = replace(PLAIN, procedure="lp_ft")
    train.run([prepared(cell, data)])
    monkeypatch.setitem(PROCEDURES, "lp_ft", Procedure(head_only=1.0))
    for regularized in (cell, replace(CELL, regularizer="l2_sp", procedure="lp_ft")):
        ready = prepared(regularized, data)
        train.run([ready])
        source = ready.source.network
        jax.tree.map(np.testing.assert_array_equal, seen[-1].batch_stats, source.batch_stats)
        for name in source.params.keys() - {"head"}:
            jax.tree.map(np.testing.assert_array_equal, seen[-1].params[name], source.params[name])
        head = resnet.init_head(resnet.ResNetConfig(cell.architecture, 3), cell.seed)
        assert not np.allclose(seen[-1].params["head"]["bias"], head["bias"])
    # The first run trained everything in its second half.
    assert not np.allclose(seen[0].params["conv1"]["kernel"], source.params["conv1"]["kernel"])


def test_wise_ft_interpolates_what_plain_fine_tuning_yields(data, monkeypatch):
    seen = networks(monkeypatch)
    ready = prepared(PLAIN, data)
    train.run([ready])
    [half] = train.run([ready._replace(cell=replace(PLAIN, procedure="wise_ft_half"))])
    assert half.chosen == 0.5
    tuned, between = (each.params["conv1"]["kernel"] for each in seen)
    source = ready.source.network.params["conv1"]["kernel"]
    np.testing.assert_allclose(between, (source + tuned) / 2, atol=1e-6)
    held_out = replace(PLAIN, procedure="wise_ft", held_out=2)
    [chosen] = train.run([prepared(held_out, data)])
    assert chosen.chosen in PROCEDURES["wise_ft"].shares


@pytest.mark.parametrize(
    ("procedure", "message"),
    [("wise", "There is no procedure wise: there are plain,"), ("wise_ft", "set held_out above 0")],
)
def test_bad_procedures(data, procedure, message):
    with pytest.raises(ValueError, match=message):
        train.run([prepared(replace(PLAIN, procedure=procedure), data)])
