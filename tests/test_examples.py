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
from examples.digits import data, figure, models, report, train
from examples.digits.__main__ import main
from examples.digits.config import Config
from examples.digits.results import METHODS, SOURCES, FineTuning, Results
from examples.digits.rules import RULES

TINY = Config(
    seeds=2, steps=6, source_steps=200, memorize_steps=60, evaluations=2, widths=(4, 4, 8)
)
SETTINGS = [("scratch", "plain"), *((source, method) for source in SOURCES for method in METHODS)]


@pytest.fixture(scope="module")
def results():
    return train.run(TINY)


@pytest.fixture(scope="module")
def directory(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "new" / "digits"
    report.report(results, dataclasses.replace(TINY, out=out))
    return out


def made_up(**accuracy_of):
    """Results with the final accuracies of methods, and 50 and 70 % for all others."""
    return Results(
        [
            FineTuning(seed, source, method, False, np.array([0.1, 0.2, final]), False)
            for source, method in SETTINGS
            for seed, final in enumerate(accuracy_of.get(method, (0.5, 0.7)))
        ],
        {source: [(1.0, 0.9), (1.0, 0.8)] for source in SOURCES},
        1.0,
    )


def test_digits_runs_every_method_from_every_source(results):
    assert len(results.fine_tunings) == 2 * len(SETTINGS)
    for setting in SETTINGS:
        runs = results.of(*setting)
        assert [run.seed for run in runs] == [0, 1]
        assert results.accuracies(*setting).shape == (2, 3)
        if setting[1] != "trial_runs":
            assert all(run.regularized == (setting[1] != "plain") for run in runs)


def test_digits_pairs_its_runs(results):
    for source in SOURCES:
        for seed in range(2):
            at_start = {results.of(source, method)[seed].accuracy[0] for method in METHODS}
            assert len(at_start) == 1
        for trial, plain in zip(
            results.of(source, "trial_runs"), results.of(source, "plain"), strict=True
        ):
            if not trial.regularized:
                np.testing.assert_array_equal(trial.accuracy, plain.accuracy)


def test_digits_ends_all_seeds_when_one_fails(monkeypatch):
    def run_seed(seed, cfg, advance):
        if seed == 0:
            raise FloatingPointError("seed 0")
        while True:
            advance()

    monkeypatch.setattr(train, "run_seed", run_seed)
    with pytest.raises(FloatingPointError, match="seed 0"):
        train.run(TINY)


def test_digits_sources_are_what_they_are_called(results):
    fitting, unfitting = (np.mean(results.source_accuracy[source], axis=0) for source in SOURCES)
    assert fitting[1] > 0.6, "on images of the target"
    assert unfitting[1] < 0.4
    assert fitting[0] > unfitting[0]


@pytest.mark.parametrize("better", [True, False])
def test_digits_trains_on_all_images_as_the_trials_say(better, monkeypatch):
    trained, losses = [], iter([1.0, 2.0, 4.0, 2.0 if better else 3.5])
    splits = data.load(TINY, 0)

    def training(start, split, rule, reg_weight, steps, cfg):
        trained.append((len(split.labels), rule, reg_weight, steps))
        yield from [start.network] * steps

    monkeypatch.setattr(train, "training", training)
    monkeypatch.setattr(train.calibration, "calibrated_loss", lambda *_: next(losses))
    network = models.init(TINY.widths, 0)
    start = train.Start("fitting", network, network.params, 0, lambda: None)
    cfg = dataclasses.replace(TINY, folds=2, reg_weight=0.7)
    run = train.fine_tune(start, "trial_runs", splits, cfg)
    # Over both folds the loss without the regularizer is 5, and with it 4 or 5.5.
    assert trained[:-1] == [(20, "bounded", weight, 2) for weight in (0.0, 0.7)] * 2
    assert trained[-1] == (30, *(("bounded", 0.7) if better else ("weighted_sum", 0.0)), 6)
    assert run.regularized == better


def test_digits_sources_do_not_depend_on_the_settings_of_fine_tunings():
    task = data.load(TINY, 0).source
    other = dataclasses.replace(TINY, learning_rate=0.5, reg_weight=3.0, steps=9)
    one, two = (train.pretrain("unfitting", task, 0, cfg, lambda: None) for cfg in (TINY, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_digits_holds_out_one_image_of_every_class():
    target = data.load(TINY, 0).target
    folds = [data.hold_out(target, fold) for fold in range(TINY.images_per_class)]
    for rest, held_out in folds:
        assert sorted(held_out.labels) == list(range(10))
        assert not images(rest) & images(held_out)
        assert images(rest) | images(held_out) == images(target)
    assert set.union(*(images(held_out) for _, held_out in folds)) == images(target)


def test_digits_writes_its_files(directory):
    assert sorted(path.name for path in directory.iterdir()) == [
        "figure.png",
        "results.json",
        "table.md",
    ]
    assert (directory / "figure.png").read_bytes().startswith(b"\x89PNG")
    lines = (directory / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:12]]
    assert [(row[0], row[1]) for row in rows] == SETTINGS[1:]
    assert not lines[12]

    def reject(constant):
        raise AssertionError(f"{constant} in results.json")

    written = json.loads((directory / "results.json").read_text(), parse_constant=reject)
    assert written["config"]["steps"] == 6
    assert set(written["versions"]) >= {"python", "jax", "dtnh_jax", "flax"}
    assert len(written["fine_tunings"]) == 2 * len(SETTINGS)


def test_digits_table_fits_a_terminal():
    console = Console(width=80, file=io.StringIO())
    with console.capture() as printed:
        wide = made_up(dtnh=(0.0, 1.0), trial_runs=(0.0, 1.0))
        console.print(report.as_rich(report.table_rows(wide, TINY)))
    lines = printed.get().splitlines()
    assert len(lines) == 1 + 10
    assert not any("…" in line for line in lines)


def test_digits_says_what_was_measured():
    measured = made_up(weighted_sum=(0.6, 0.9), trial_runs=(0.4, 0.5))
    rows = {row[1]: row for row in report.table_rows(measured, TINY)[:5]}
    assert rows["plain"][2:] == ["60.0 ± 14.1", "", "1", ""]
    assert rows["weighted_sum"][3] == "+15.0 ± 7.1 ▲"
    assert rows["dtnh"][3] == "+0.0 ± 0.0"
    assert rows["trial_runs"][3:] == ["−15.0 ± 7.1 ▼", "1.7", "0 of 2"]
    sentences = " ".join(report.summary(measured, TINY))
    assert "on test images" in sentences
    assert "2 seeds" in sentences
    assert "the weighted sum is +15.0 ± 7.1 points" in sentences
    assert "diverged" not in sentences
    assert figure.in_points(-0.04) == "+0.0"
    assert "weighted_sum +15.0 points, trial_runs −15.0" in figure.title(measured, "fitting")


def test_digits_owns_up_to_divergence(results):
    *runs, last = results.fine_tunings
    broken = dataclasses.replace(last, diverged=True)
    sentences = report.summary(dataclasses.replace(results, fine_tunings=[*runs, broken]), TINY)
    assert any("1 of 22 fine-tunings diverged" in sentence for sentence in sentences)


def pairs(n):
    rng = np.random.default_rng(0)

    def tree():
        return {"conv": jnp.array(rng.normal(size=(3, 4))), "head": jnp.array(rng.normal(size=2))}

    return [dtnh_jax.GradientPair(tree(), tree() | {"head": None}) for _ in range(n)]


def updates_of(rule, pairs, reg_weight=0.5):
    tx = RULES[rule](0.01, reg_weight)
    params = jax.tree.map(jnp.zeros_like, pairs[0].loss_grads)
    state, steps = tx.init(params), []
    for pair in pairs:
        updates, state = tx.update(pair, state, params)
        steps.append(updates)
        structure, before = jax.tree.structure(state), jax.tree.structure(tx.init(params))
        assert structure == before, "a step that is compiled once"
    return steps


@pytest.mark.parametrize("rule", RULES)
def test_digits_rules_are_sgd_where_the_regularizer_does_not_act(rule):
    sgd = optax.sgd(0.01, momentum=0.9)
    state, acted = sgd.init(pairs(1)[0].loss_grads), []
    for pair, with_0, regularized in zip(
        pairs(5), updates_of(rule, pairs(5), 0.0), updates_of(rule, pairs(5)), strict=True
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
    sums = updates_of("weighted_sum", [agreeing] * 200)
    steps = updates_of(rule, [agreeing] * 200)
    np.testing.assert_allclose(steps[-1]["conv"], sums[-1]["conv"], rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_digits_rules_treat_a_conflict_as_described(rule):
    a = {"conv": jnp.ones((3, 4)), "head": jnp.ones(2)}
    opposed = dtnh_jax.GradientPair(a, jax.tree.map(jnp.negative, a))
    [update] = updates_of(rule, [opposed])
    kept = rule in ("weighted_sum", "bounded")
    np.testing.assert_allclose(update["conv"], -0.01 * (0.5 if kept else 1), rtol=1e-5)


def images(split):
    # Back to pixels: each seed standardises by numbers of its own.
    flat = split.images.reshape(len(split.images), -1)
    low, high = flat.min(), flat.max()
    return {tuple(np.rint(16 * (row - low) / (high - low)).astype(int)) for row in flat}


def test_digits_tests_on_images_that_no_seed_trains_on():
    splits = [data.load(TINY, seed) for seed in range(3)]
    validation = data.load(dataclasses.replace(TINY, evaluate_on="validation"), 0)
    test = images(splits[0].held_out)
    assert len(test) == 10 * data.TEST_PER_CLASS
    for each in splits:
        assert images(each.held_out) == test
        assert not (images(each.target) | images(each.source)) & test
        assert not images(each.target) & images(each.source)
        assert np.bincount(each.target.labels).tolist() == [TINY.images_per_class] * 10
    assert images(splits[0].target) != images(splits[1].target)
    used = test | images(validation.target) | images(validation.source)
    assert not images(validation.held_out) & used


def test_digits_batches_take_every_image_once_an_epoch():
    batches = draw_batches(10, 4, 5, np.random.default_rng(0))
    assert batches.shape == (5, 4)
    for epoch in batches.reshape(2, 10):
        assert sorted(epoch) == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seeds", "1"], "seeds must be at least 2"),
        (["--steps", "2"], "steps must be at least 3"),
        (["--folds", "0"], "folds must be at least 1"),
        (["--folds", "9"], "folds must be at most images_per_class"),
        (["--images-per-class", "1"], "images_per_class must be at least 2"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--reg-weight", "nan"], "reg_weight must be positive"),
        (["--evaluations", "1000"], "evaluations must be at most steps"),
        (["--widths", "0", "1", "1"], "widths must be at least 1"),
        (["--evaluate-on", "train"], "evaluate-on"),
    ],
)
def test_digits_refuses_bad_values(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Config, args=arguments)
    assert complaint in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_digits_refuses_more_images_than_there_are():
    with pytest.raises(ValueError, match="are left for the target"):
        main(dataclasses.replace(TINY, images_per_class=80))
