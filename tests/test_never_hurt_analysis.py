"""The experiment's numbers, on results made up so that the answers are known."""

# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import itertools
import pathlib
import re
from dataclasses import replace

import needs
import numpy as np
import pytest
from scipy import stats

needs.examples()

from examples.never_hurt import __main__ as command
from examples.never_hurt import analysis, figures, report, store, tables
from examples.never_hurt.analysis import Estimate, Pair, Setting, Study
from examples.never_hurt.cell import NONE, Cell, Result
from examples.never_hurt.grids import GRIDS, Grid, Part

SOURCES, TARGETS = ("tinyimagenet", "medmnist"), ("cifar10", "scene15", "dtd10")
STRENGTHS, SEEDS = (0.1, 1.0, 100.0), (0, 1, 2)
EFFECTS = {
    # In points: what a rule does at each strength.
    "weighted_sum": {0.1: 1.0, 1.0: 4.0, 100.0: -20.0},
    "bounded_dtnh": {0.1: 1.0, 1.0: 3.0, 100.0: 3.0},
    "gate": {0.1: 0.0, 1.0: 0.0, 100.0: 0.0},
}
LAYERS = ("bn1", "conv1", "layer1/0/conv1")
GRID = Grid([Part(SOURCES, TARGETS, ("l2_sp",), tuple(EFFECTS), STRENGTHS, SEEDS)])


def make(noise, grid=GRID, seed=0):
    """Results of all cells of a grid: the effect of the rule and so much noise, in points."""
    rng = np.random.default_rng(seed)
    made = {}

    def add(cell, accuracy):
        made[cell.key] = Result(
            cell=cell,
            validation=accuracy / 100,
            test=(accuracy + noise * rng.standard_normal()) / 100 if cell.test else None,
            train_accuracy=1.0,
            train_loss=0.0,
            conflict={}
            if cell.regularizer == NONE
            else {name: [0.1 * i, 0.2, 0.3, 0.4] for i, name in enumerate(LAYERS)},
            removed=[0.5] * 4,
        )

    for cell in grid.tuning():
        add(cell, 50 + 100 * cell.learning_rate)
    for cell in grid.cells(made):
        base = 50 + 3 * cell.seed + 10 * (cell.source == "tinyimagenet")
        add(cell, base + EFFECTS.get(cell.rule, {}).get(cell.strength, 0.0))
    return made


def study(noise=0.0, grid=GRID, seed=0):
    made = make(noise, grid, seed)
    return Study(made[cell.key] for cell in grid.cells(made))


def test_differences_are_taken_in_pairs():
    found = study()
    for setting in found.accuracy:
        wanted = EFFECTS[setting.rule][setting.strength]
        np.testing.assert_allclose(found.against_plain(setting), [wanted] * 3, atol=1e-9)
        of_sum = wanted - EFFECTS["weighted_sum"][setting.strength]
        np.testing.assert_allclose(found.against_sum(setting), [of_sum] * 3, atol=1e-9)
    assert found.rules == list(EFFECTS)
    assert found.strengths == list(STRENGTHS)


def test_scratch_is_plain_training_from_random_weights():
    part = replace(GRID.parts[0], sources=("tinyimagenet", "random_weights"))
    found = study(grid=replace(GRID, parts=[part]))
    for setting in found.accuracy:
        wanted = EFFECTS[setting.rule][setting.strength] + 10 * (setting.source == "tinyimagenet")
        np.testing.assert_allclose(found.against_scratch(setting), [wanted] * 3, atol=1e-9)
    rows = tables.verdicts(found, "scratch")
    assert [row[1] for row in rows[1:]] == ["9"] * 3  # those from random weights are left out
    assert rows[0][3] == "below scratch"


def test_plain_is_the_mean_of_its_runs():
    cell = Cell("a", "b", NONE, NONE, 0.0, 0, 0.1, None, test=True)
    results = [
        Result(cell, 0.1, 0.4, 1.0, 0.0),
        Result(replace(cell, order=1), 0.1, 0.6, 1.0, 0.0),
        Result(replace(cell, regularizer="l2_sp", rule="gate", strength=1.0), 0.1, 0.7, 1.0, 0.0),
    ]
    found = Study(results)
    [setting] = found.accuracy
    np.testing.assert_allclose(found.against_plain(setting), [20.0])
    with pytest.raises(ValueError, match="no plain run"):
        Study(results[2:])


def test_intervals_pool_the_spread_of_a_rule_and_a_target():
    setting = Setting("a", "b", "l2_sp", "gate", 1.0)
    values = {
        setting: np.array([1.0, 3.0, 2.0]),
        setting._replace(strength=2.0): np.array([0.0, 4.0, 2.0]),
        setting._replace(target="c"): np.array([0.0, 0.0, 0.0]),
        setting._replace(rule="dtnh"): np.array([5.0, 6.0, 7.0]),
    }
    found = analysis.estimates(list(values), values.__getitem__)
    deviation = np.sqrt((2.0 + 8.0) / 4)
    reach = stats.t.ppf(0.975, 4) * deviation / np.sqrt(3)
    assert found[setting] == pytest.approx((2.0, reach))
    assert found[setting._replace(strength=2.0)] == pytest.approx((2.0, reach))
    assert found[setting._replace(target="c")] == (0.0, 0.0)
    single = analysis.estimates([setting], lambda _: np.array([1.0]))[setting]
    assert single.half_width == np.inf
    assert not single.is_above
    assert Estimate(-1.0, 0.5).is_below
    assert not Estimate(-0.5, 1.0).is_below


def test_intervals_hold_as_often_as_they_say():
    misses, n = 0, 0
    for seed in range(40):
        found = study(noise=1.0, seed=seed)
        settings = found.settings(rule="gate")
        for each in analysis.estimates(settings, found.against_plain).values():
            misses += abs(each.mean) > each.half_width
            n += 1
    assert 0.03 < misses / n < 0.07


def test_bootstrap_intervals_hold_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        of_pairs = rng.normal(0, 1, size=(15, 1)) + rng.normal(0, 1, size=(15, 3))
        low, high = analysis.bootstrap_mean([[values] for values in of_pairs], seed=trial)[1:]
        hits += low <= 0 <= high
    assert 85 <= hits <= 100


def test_bootstrap_of_what_is_the_same_everywhere():
    group = [np.array([2.0, 2.0]), np.array([4.0, 4.0])]
    assert analysis.bootstrap_mean([group, group]) == pytest.approx((3.0, 3.0, 3.0))
    # Two settings of one pair count twice as much as one of another.
    mean = analysis.bootstrap_mean([group, [np.array([0.0, 0.0])]]).mean
    assert mean == pytest.approx(2.0)


def test_verdicts():
    found = study(noise=0.3)
    hurts = analysis.verdict(found.settings(rule="weighted_sum"), found.against_plain)
    assert hurts.n_settings == 18
    assert hurts.n_below == hurts.n_below_at_once == 6
    assert hurts.worst.strength == 100.0
    assert hurts.worst_estimate.mean == pytest.approx(-20, abs=1)
    assert hurts.by_chance == pytest.approx(0.45)
    helps = analysis.verdict(found.settings(rule="bounded_dtnh"), found.against_plain)
    assert helps.n_below == 0
    assert helps.n_above >= 12
    assert helps.mean == pytest.approx(7 / 3, abs=0.3)


def test_all_at_once_is_stricter():
    counts = np.zeros(2)
    for seed in range(30):
        found = study(noise=1.0, seed=seed)
        verdict = analysis.verdict(found.settings(rule="gate"), found.against_plain)
        counts += verdict.n_below, verdict.n_below_at_once
    assert counts[0] > 4 * counts[1]


def test_win_tie_loss():
    found = study(noise=0.2)
    at = {
        strength: analysis.win_tie_loss(
            found.settings(rule="bounded_dtnh", strength=strength), found
        )
        for strength in STRENGTHS
    }
    assert at[1.0] == (0, 0, 6)
    assert at[100.0] == (6, 0, 0)
    assert sum(at[0.1]) == 6


def test_the_best_strength_is_chosen_on_validation_images():
    found = study()
    setting = Setting("medmnist", "dtd10", "l2_sp", "weighted_sum", 0.1)
    found.validation[setting] = dict.fromkeys(SEEDS, 99.0)
    gains = analysis.best_gains(found, "weighted_sum")
    assert len(gains) == 6
    assert gains[Pair("medmnist", "dtd10"), "l2_sp"].strength == 0.1
    np.testing.assert_allclose(gains[Pair("medmnist", "dtd10"), "l2_sp"].at_best, 1.0)
    assert gains[Pair("medmnist", "cifar10"), "l2_sp"].strength == 1.0


def test_kept_gain():
    kept = analysis.kept_gain(study(), "bounded_dtnh")
    assert kept == pytest.approx((0.75, 0.75, 0.75))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A folder with the results of two grids, and a page."""
    for name in GRIDS:
        monkeypatch.setitem(GRIDS, name, GRID)
    for name in ("small", "real"):
        for result in make(0.5).values():
            store.append(tmp_path / f"{name}.jsonl", result)
    return tmp_path


def test_report(finished):
    page = finished / "docs" / "page.md"
    (page.parent / "assets").mkdir(parents=True)
    page.write_text(
        "# Results\n\n<!-- table verdicts -->\nold\n<!-- end -->\n\nText, and again\n\n"
        "<!-- table real-regularizers -->\n<!-- end -->\n"
    )
    out = finished / "out"
    arguments = ["report", str(finished), "--out", str(out), "--page", str(page)]
    assert command.main(arguments) == 0
    first = page.read_text()
    assert "old" not in first
    assert "Text, and again" in first
    assert "bounded DTNH" in first
    assert {path.name for path in (page.parent / "assets").iterdir()} == {
        "never-hurt-strength.png",
        "never-hurt-settings.png",
        "never-hurt-conflict.png",
    }
    assert command.main(arguments) == 0
    assert page.read_text() == first
    latex = (out / "verdicts.tex").read_text()
    assert latex.startswith(r"\begin{tabular}")
    assert r"$\times$" in latex
    assert not re.search(r"(?<!\\)[%_]|[λ×−±→]", latex)
    markdown = (out / "verdicts.md").read_text()
    assert markdown.count("\n") == 2 + len(EFFECTS)


def test_report_wants_all_cells_and_known_tables(finished, capsys):
    path = finished / "real.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-3]) + "\n")
    assert command.main(["report", str(finished), "--out", str(finished / "out")]) == 1
    assert "lacks 3 of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="wants a table wrong"):
        report.renewed("<!-- table wrong -->\n<!-- end -->", {"right": []})


def test_every_table_has_rows_of_one_length():
    made = report.make_tables(dict.fromkeys(("small", "wide", "real", "variants"), study(0.5)))
    for name, rows in made.items():
        assert len({len(row) for row in rows}) == 1, name
        assert len(rows) > 1, name


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0"), (-0.04, "0.0"), (0.05, "+0.1"), (-12.34, "−12.3")]
)
def test_points(value, text):
    assert tables.points(value) == text


def test_conflict_is_drawn_from_the_image_to_the_logits():
    figure = figures.conflict(study(), "gate", 1.0, ["conv1", "bn1", "layer1/0/conv1", "head"])
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["conv1", "bn1", "layer1/0/conv1"]
    shown = axis.images[0].get_array()
    np.testing.assert_allclose(shown[:, 0], [0.1, 0.0, 0.2])


def test_lines_of_harm():
    figure = figures.harm_by_strength(study())
    panels = [axis for axis in figure.axes if axis.lines]
    assert len(panels) == 2  # one regularizer, fitting and unfitting
    of_rule = {line.get_label(): line for line in panels[0].lines}
    np.testing.assert_allclose(of_rule["weighted sum"].get_ydata(), [1, 4, -20], atol=1e-9)
    np.testing.assert_allclose(of_rule["bounded DTNH"].get_ydata(), [1, 3, 3], atol=1e-9)


def test_every_setting_is_a_point():
    figure = figures.every_setting(study())
    n_points = sum(len(each.get_offsets()) for each in figure.axes[0].collections)
    assert n_points == len(list(itertools.product(SOURCES, TARGETS, EFFECTS, STRENGTHS)))


ROOT = pathlib.Path(report.__file__).parents[2]


def test_the_page_is_what_the_results_say():
    """Its tables are made from the results that are kept, of whole grids."""
    results = ROOT / "examples" / "never_hurt" / "results"
    kept = {name.name.removesuffix(".jsonl.gz") for name in results.glob("*.jsonl.gz")}
    assert kept >= {"small", "variants"}
    studies = {name: report.study(results, name) for name in kept}
    page = (ROOT / "docs" / "results.md").read_text()
    assert report.renewed(page, report.make_tables(studies)) == page
