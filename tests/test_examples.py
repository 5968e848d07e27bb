# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

for _package in ("flax", "matplotlib", "rich", "sklearn"):
    pytest.importorskip(_package)
tyro = pytest.importorskip("tyro")

from rich.console import Console

import dtnh_jax
from examples.common.epochs import draw_batches
from examples.digits import data, models, report, train
from examples.digits.__main__ import main
from examples.digits.config import Config
from examples.digits.results import PLAIN, SOURCES, Method
from examples.digits.rules import MOMENTUM, RULES

TINY = Config(
    seeds=2,
    source_images_per_class=20,
    steps=6,
    source_steps=60,
    evaluations=2,
    l2_sp_weights=(0.1,),
    distillation_weights=(1.0,),
    variants=("momentum_first",),
    widths=(4, 4, 8),
)
pytestmark = pytest.mark.usefixtures("standard_promotion")  # for optax.ema

RAN = ("weighted_sum", "dtnh", "momentum_first")
METHODS = [
    PLAIN,
    *(Method("l2_sp", rule, 0.1) for rule in RAN),
    *(Method("distillation", rule, 1.0) for rule in RAN),
]
SETTINGS = [("scratch", PLAIN), *((source, method) for source in SOURCES for method in METHODS)]
LAYERS = [
    "stem_conv",
    "stem_norm",
    *(f"block1/{layer}" for layer in ("conv1", "norm1", "conv2", "norm2")),
    *(f"block2/{layer}" for layer in ("conv1", "norm1", "conv2", "norm2", "shortcut")),
    *(f"block3/{layer}" for layer in ("conv1", "norm1", "conv2", "norm2", "shortcut")),
]


@pytest.fixture(scope="module")
def results():
    return train.run(TINY)


@pytest.fixture(scope="module")
def directory(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "new" / "digits"
    report.report(results, dataclasses.replace(TINY, out=out))
    return out


def test_digits_runs_every_method_from_every_source(results):
    assert results.settings() == SETTINGS
    for setting in SETTINGS:
        runs = results.of(*setting)
        assert [run.seed for run in runs] == [0, 1]
        for run in runs:
            assert run.accuracy.shape == (3,)
            assert sorted(run.groups) == sorted(LAYERS), "the new head is in no group"
            assert run.cosine.shape == run.conflict.shape == (6, len(LAYERS))
            assert np.all(np.abs(run.cosine) <= 1)
            np.testing.assert_array_equal(run.conflict, run.cosine < 0)
            assert run.removed.shape == (6,)
            assert np.all((run.removed >= 0) & (run.removed <= 1))
            if run.method.rule == "weighted_sum":
                np.testing.assert_array_equal(run.removed, 0)
            else:
                assert run.removed.max() > 0


def test_digits_pairs_its_runs(results):
    for source in SOURCES:
        for seed in range(2):
            runs = [results.of(source, method)[seed] for method in METHODS]
            for run in runs:
                assert run.accuracy[0] == runs[0].accuracy[0]
            # The first step's gradients are those of the same weights and the same batch.
            for first, *others in (runs[1:4], runs[4:7]):
                for other in others:
                    np.testing.assert_allclose(first.cosine[0], other.cosine[0], rtol=0, atol=1e-5)
    for one, other in zip(results.of(*SETTINGS[1]), results.of(*SETTINGS[8]), strict=True):
        assert one.source != other.source
        assert np.any(one.cosine[-1] != other.cosine[-1])


def test_digits_starts_from_the_source_and_acts_on_the_backbone_alone(results):
    # At the start the weights are the source's: L2-SP has no gradient yet, distillation has one.
    for source in SOURCES:
        for l2_sp in results.of(source, METHODS[2]):
            assert not l2_sp.cosine[0].any()
            assert l2_sp.cosine[1].all()
        for distillation in results.of(source, METHODS[5]):
            assert distillation.cosine[0].all()


def test_digits_sources_are_what_they_are_called(results):
    fitting, unfitting = (np.mean(results.source_accuracy[source], axis=0) for source in SOURCES)
    assert fitting[1] > 0.6, "held-out source images"
    assert unfitting[1] < 0.4
    assert fitting[0] > unfitting[0]


def test_digits_writes_its_files(directory):
    assert sorted(path.name for path in directory.iterdir()) == [
        "figure.png",
        "results.json",
        "table.md",
    ]
    assert (directory / "figure.png").read_bytes().startswith(b"\x89PNG")
    lines = (directory / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:17]]
    assert [row[0] for row in rows] == [source for source, _ in SETTINGS]
    assert [row[3] for row in rows] == ["" if m == PLAIN else m.rule for _, m in SETTINGS]

    def reject(constant):
        raise AssertionError(f"{constant} in results.json")

    written = json.loads((directory / "results.json").read_text(), parse_constant=reject)
    assert written["config"]["steps"] == 6
    assert set(written["versions"]) >= {"python", "jax", "dtnh_jax", "flax"}
    assert len(written["fine_tunings"]) == 2 * len(SETTINGS)
    assert set(written["fine_tunings"][-1]["conflict_rate_of_group"]) == set(LAYERS)


def test_digits_table_fits_a_terminal(results):
    console = Console(width=80, file=io.StringIO())
    with console.capture() as printed:
        console.print(report.as_rich(report.table_rows(results)))
    lines = printed.get().splitlines()
    assert len(lines) == 1 + 3 + 2 * 2 + len(SETTINGS), "headers: of sources, of regularizers"
    assert not any("…" in line for line in lines)


def test_digits_says_what_was_measured(results):
    sentences = " ".join(report.summary(results, TINY))
    assert "on test images of the target" in sentences
    assert "2 seeds" in sentences
    for rule in RAN:
        assert f"{rule} against plain fine-tuning, 4 settings: " in sentences
    assert sentences.count("Against weighted_sum, 4 settings: ") == 2
    assert "diverged" not in sentences


def test_digits_owns_up_to_divergence(results):
    *runs, last = results.fine_tunings
    broken = dataclasses.replace(last, cosine=np.full_like(last.cosine, np.nan))
    sentences = report.summary(dataclasses.replace(results, fine_tunings=[*runs, broken]), TINY)
    assert any("1 of 30 fine-tunings diverged" in sentence for sentence in sentences)


def test_digits_difference_is_paired_and_says_what_it_shows():
    base = np.array([50.0, 90.0])
    assert str(report.difference(base + np.array([1.0, 2.0]), base)) == "+1.5 ± 0.7"
    assert report.difference(base + np.array([1.0, 2.0]), base).verdict == "helps"
    assert report.difference(base - np.array([1.0, 2.0]), base).verdict == "hurts"
    assert report.difference(base + np.array([-1.0, 2.0]), base).verdict == "within the spread"
    assert report.difference(base, base).verdict == "within the spread"


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_digits_layers_come_in_network_order(scope):
    names = {
        "global": ["global"],
        "leaf": ["stem_conv/kernel", "stem_norm/bias", "block1/conv1/kernel"],
    }[scope]
    assert models.in_network_order(sorted(names), TINY.widths) == names
    assert models.in_network_order(sorted(LAYERS), TINY.widths) == LAYERS


def pairs(n):
    rng = np.random.default_rng(0)

    def tree():
        return {"conv": jnp.array(rng.normal(size=(3, 4))), "head": jnp.array(rng.normal(size=2))}

    return [dtnh_jax.GradientPair(tree(), tree() | {"head": None}) for _ in range(n)]


def updates_of(rule, pairs, reg_weight=0.5):
    tx = RULES[rule](reg_weight, TINY)
    params = jax.tree.map(jnp.zeros_like, pairs[0].loss_grads)
    state, steps = tx.init(params), []
    for pair in pairs:
        updates, state = tx.update(pair, state, params)
        steps.append(updates)
        structure, before = jax.tree.structure(state), jax.tree.structure(tx.init(params))
        assert structure == before, "a step that is compiled once"
    return steps, state


@pytest.mark.parametrize("rule", RULES)
def test_digits_rules_are_sgd_where_the_regularizer_does_not_act(rule):
    sgd = optax.sgd(TINY.learning_rate, momentum=MOMENTUM)
    state, acted = sgd.init(pairs(1)[0].loss_grads), []
    for pair, with_0, regularized in zip(
        pairs(5), updates_of(rule, pairs(5), 0.0)[0], updates_of(rule, pairs(5))[0], strict=True
    ):
        expected, state = sgd.update(pair.loss_grads, state)
        for name in expected:
            np.testing.assert_allclose(with_0[name], expected[name], rtol=1e-5)
        np.testing.assert_allclose(regularized["head"], expected["head"], rtol=1e-5)
        acted.append(np.any(regularized["conv"] != expected["conv"]))
    assert any(acted)


@pytest.mark.parametrize("rule", RULES)
def test_digits_rules_pull_equally_far(rule):
    ones = {"conv": jnp.ones((3, 4)), "head": jnp.ones(2)}
    agreeing = dtnh_jax.GradientPair(ones, ones)
    sums, _ = updates_of("weighted_sum", [agreeing] * 200)
    steps, _ = updates_of(rule, [agreeing] * 200)
    np.testing.assert_allclose(steps[-1]["conv"], sums[-1]["conv"], rtol=1e-4)


@pytest.mark.parametrize("rule", ["gate", "decoupled", "momentum_first", "bounded_dtnh"])
def test_digits_variants_take_out_a_lasting_conflict(rule):
    a = {"conv": jnp.ones((3, 4)), "head": jnp.ones(2)}
    opposed = dtnh_jax.GradientPair(a, jax.tree.map(jnp.negative, a))
    steps, state = updates_of(rule, [opposed] * 5)
    plain, _ = updates_of("weighted_sum", [opposed] * 5, 0.0)
    np.testing.assert_allclose(steps[-1]["conv"], plain[-1]["conv"], rtol=1e-5)
    assert dtnh_jax.conflict_stats(state).total.removed == 1


def test_digits_same_length_is_as_long_and_unchosen():
    a, b = pairs(1)[0]
    ([chosen], _), ([unchosen], _) = (
        updates_of(rule, [dtnh_jax.GradientPair(a, b)])
        for rule in ("momentum_first", "same_length")
    )
    chosen, unchosen = (
        np.ravel(each["conv"] + TINY.learning_rate * a["conv"]) for each in (chosen, unchosen)
    )
    np.testing.assert_allclose(np.linalg.norm(unchosen), np.linalg.norm(chosen), rtol=1e-4)
    b = np.ravel(b["conv"])
    np.testing.assert_allclose(
        -unchosen / np.linalg.norm(unchosen), b / np.linalg.norm(b), rtol=0, atol=1e-4
    )


def test_digits_tests_on_images_that_no_seed_trains_on():
    def keys(split):
        # Back to pixels: each seed standardises by numbers of its own.
        flat = split.images.reshape(len(split.images), -1)
        low, high = flat.min(), flat.max()
        return {tuple(np.rint(16 * (row - low) / (high - low)).astype(int)) for row in flat}

    splits = [data.load(TINY, seed) for seed in range(3)]
    validation = data.load(dataclasses.replace(TINY, evaluate_on="validation"), 0)
    test = keys(splits[0].target_held_out)
    assert len(test) == 5 * data.TEST_PER_CLASS
    for each in splits:
        assert keys(each.target_held_out) == test
        assert not keys(each.target_train) & test
        assert not keys(each.source_train) & keys(each.source_held_out)
        assert np.bincount(each.target_train.labels).tolist() == [TINY.images_per_class] * 5
    assert keys(splits[0].target_train) != keys(splits[1].target_train)
    assert not keys(validation.target_held_out) & (test | keys(validation.target_train))


def test_digits_batches_take_every_image_once_an_epoch():
    batches = draw_batches(10, 4, 5, np.random.default_rng(0))
    assert batches.shape == (5, 4)
    for epoch in batches.reshape(2, 10):
        assert sorted(epoch) == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seeds", "1"], "seeds must be at least 2"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--l2-sp-weights", "0.1", "-1"], "l2_sp_weights must be"),
        (["--evaluations", "1000"], "evaluations must be at most steps"),
        (["--widths", "0", "1", "1"], "widths must be at least 1"),
        (["--scope", "layers"], "scope"),
        (["--variants", "gated"], "variants"),
    ],
)
def test_digits_refuses_bad_values(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Config, args=arguments)
    assert complaint in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_digits_refuses_more_images_than_there_are():
    with pytest.raises(ValueError, match="would leave none to hold out"):
        main(dataclasses.replace(TINY, images_per_class=80))
