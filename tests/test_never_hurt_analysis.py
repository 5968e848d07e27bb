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

import pandas as pd

from examples.never_hurt import __main__ as command
from examples.never_hurt import analysis, figures, labels, report, store, tables
from examples.never_hurt.analysis import SETTING, TASK, select, values
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
    return analysis.compare(analysis.frame(made[cell.key] for cell in grid.cells(made)))


def effects(cells):
    """What the rule of each cell does at its strength."""
    return np.array([EFFECTS[rule][x] for rule, x in zip(cells.rule, cells.strength, strict=True)])


def differences(values):
    """A frame of cells from the differences of each setting, seed by seed."""
    return pd.DataFrame(
        [
            {**dict(zip(SETTING, setting, strict=True)), "seed": seed, "difference": value}
            for setting, of_seeds in values.items()
            for seed, value in enumerate(of_seeds)
        ]
    )


def test_a_study_is_one_row_a_cell():
    made = make(0.5)
    cells = GRID.cells(made)
    found = analysis.frame(made[cell.key] for cell in cells)
    assert len(found) == len(cells)
    for row, cell in zip(found.itertuples(), cells, strict=True):
        assert (row.source, row.rule, row.strength, row.seed, row.order) == (
            cell.source, cell.rule, cell.strength, cell.seed, cell.order
        )  # fmt: skip
        assert row.accuracy == pytest.approx(100 * made[cell.key].test)
        assert row.validation == pytest.approx(100 * made[cell.key].validation)
    assert set(found["kind"]) == {"fitting", "unfitting"}
    tuning = analysis.frame(made[cell.key] for cell in GRID.tuning())
    np.testing.assert_array_equal(tuning["accuracy"], tuning["validation"])


def test_differences_are_taken_in_pairs():
    found = study()
    assert len(found) == len(list(itertools.product(SOURCES, TARGETS, EFFECTS, STRENGTHS, SEEDS)))
    np.testing.assert_allclose(found["against_plain"], effects(found), atol=1e-9)
    of_sum = effects(found) - effects(found.assign(rule="weighted_sum"))
    np.testing.assert_allclose(found["against_sum"], of_sum, atol=1e-9)
    assert found["against_scratch"].isna().all()
    assert values(found, "rule") == list(EFFECTS)
    assert values(found.iloc[::-1], "strength") == list(STRENGTHS)


def test_another_metric_is_compared_likewise():
    cells = study()
    made = make(0.0)
    frame = analysis.frame(made[cell.key] for cell in GRID.cells(made))
    doubled = frame.assign(doubled=2 * frame["accuracy"])
    found = analysis.compare(doubled, "doubled")
    np.testing.assert_allclose(found["against_plain"], 2 * cells["against_plain"], atol=1e-9)


def test_scratch_is_plain_training_from_random_weights():
    part = replace(GRID.parts[0], sources=("tinyimagenet", "random_weights"))
    found = study(grid=replace(GRID, parts=[part]))
    wanted = effects(found) + 10 * (found["source"] == "tinyimagenet")
    np.testing.assert_allclose(found["against_scratch"], wanted, atol=1e-9)
    rows = tables.verdicts(found, "scratch")
    assert [row[1] for row in rows[1:]] == ["9"] * 3  # those from random weights are left out
    assert rows[0][3] == "below scratch"


def test_plain_is_the_mean_of_its_runs():
    cell = PLAIN
    results = [
        Result(cell, 0.1, 0.4, 1.0, 0.0),
        Result(replace(cell, order=1), 0.1, 0.6, 1.0, 0.0),
        Result(replace(cell, regularizer="l2_sp", rule="gate", strength=1.0), 0.1, 0.7, 1.0, 0.0),
    ]
    found = analysis.compare(analysis.frame(results))
    np.testing.assert_allclose(found["against_plain"], [20.0])
    with pytest.raises(ValueError, match="no plain run"):
        analysis.compare(analysis.frame(results[2:]))


PLAIN = Cell("a", "b", NONE, NONE, 0.0, 0, 0.1, None, test=True)


def compared(*changes):
    """Cells of one task with plain runs of two seeds, from changes of cell and result."""
    results = [
        Result(replace(PLAIN, seed=seed), validation=0.5, test=0.5, train_accuracy=1, train_loss=0)
        for seed in (0, 1)
    ]
    for cell, result in changes:
        cell = replace(PLAIN, **({"regularizer": "l2_sp", "rule": "gate"} | cell))
        results.append(replace(results[0], cell=cell, **result))
    return analysis.compare(analysis.frame(results))


def test_procedures_and_held_out_images_are_methods_of_their_own():
    nothing = {"regularizer": NONE, "rule": NONE}
    found = compared(
        ({"strength": 1.0}, {"test": 0.6}),
        ({"strength": 1.0, "held_out": 2}, {"test": 0.7}),
        ({"strength": 1.0, "procedure": "lp_ft"}, {"test": 0.8}),
        (nothing | {"procedure": "wise_ft", "held_out": 2}, {"test": 0.9}),
        (nothing | {"held_out": 2}, {"test": 0.4}),
        ({"rule": "held_out_global", "strength": 1.0, "held_out": 2}, {"test": 0.5}),
    )
    assert dict(zip(found["rule"], found["against_plain"].round(6), strict=True)) == {
        "gate": 10.0,
        "gate, 2 held out": 20.0,
        "gate, lp_ft": 30.0,
        "wise_ft": 40.0,
        "none, 2 held out": -10.0,
        "held_out_global": 0.0,
    }
    assert labels.label("gate, lp_ft, 2 held out") == "gate (layer), LP-FT, 2 held out"


def test_a_strength_is_chosen_anew_for_each_seed():
    found = compared(
        ({"strength": 1.0}, {"validation": 0.6, "test": 0.7}),
        ({"strength": 10.0}, {"validation": 0.55, "test": 0.9}),
        ({"strength": 1.0, "seed": 1}, {"validation": 0.5, "test": 0.1}),
        ({"strength": 10.0, "seed": 1}, {"validation": 0.4, "test": 0.9}),
    )
    chosen = analysis.with_chosen_strength(found, "validation")
    rows = chosen[["seed", "strength", "accuracy", "against_plain"]].sort_values("seed")
    # For the second seed nothing is better than plain fine-tuning.
    np.testing.assert_allclose(rows, [[0, 1, 70, 20], [1, 0, 50, 0]])
    assert analysis.with_chosen_strength(found, "held_out").empty


def test_a_strength_is_chosen_on_held_out_images():
    def run(strength, accuracy, loss, test):
        cell = {"strength": strength, "held_out": 1}
        return cell, {"held_out_accuracy": accuracy, "held_out_loss": loss, "test": test}

    found = compared(
        run(0.0, 0.8, 0.5, 0.1), run(1.0, 0.9, 0.4, 0.2), run(10.0, 0.9, 0.3, 0.3),
        run(100.0, 0.9, None, 0.4), ({"strength": 1000.0}, {"validation": 0.9, "test": 0.9}),
    )  # fmt: skip
    chosen = analysis.with_chosen_strength(found, "held_out")
    assert chosen[["rule", "strength", "accuracy"]].to_numpy().tolist() == [
        ["gate, 1 held out", 10.0, 30.0]
    ]
    [head, *rows] = tables.chosen_strength(found)
    assert head[2:] == [
        *("λ × 0", "λ × 1", "λ × 10", "λ × 100", "λ × 1000"),
        *("λ chosen on validation images", "worst pair", "λ chosen on held-out images"),
        "worst pair",
    ]
    of_rule = {row[1]: row for row in rows}
    assert of_rule["gate (layer), 1 held out"][-2] == "−20.0"
    assert of_rule["gate (layer)"][-4] == "+40.0"
    assert of_rule["gate (layer)"][-2:] == ["", ""]


def test_other_metrics_are_compared_with_plain_fine_tuning():
    measured = [
        ({"strength": 1.0}, {"shifted": 0.6, "source_accuracy": 0.2, "length_ratio": [0.1] * 4}),
        ({"strength": 2.0}, {"shifted": 0.1, "length_ratio": [0.3, 0.2, None, 5e-4]}),
        ({"strength": 2.0, "seed": 1}, {"length_ratio": [0.5, 0.2, 1.0, 5e-4]}),
    ]
    plain = [({"regularizer": NONE, "rule": NONE, "order": 1, "seed": 0},
              {"shifted": 0.4, "source_accuracy": 0.3})]  # fmt: skip
    found = compared(*plain, *measured)
    np.testing.assert_allclose(found["shifted_against_plain"], [20, -30, np.nan])
    np.testing.assert_allclose(found["source_accuracy_against_plain"], [-10, np.nan, np.nan])
    made = report.make_tables({"real": found})
    assert made["real-shifted"][1][2:4] == ["+20.0", "−30.0"]
    assert made["real-source-accuracy"][0][2:] == ["λ × 1", "worst setting"]
    assert made["real-length-ratios"] == [
        ["regularizer", "rule", "λ × 1", "λ × 2"],
        ["L2-SP", "gate (layer)", "0.1, 0.1, 0.1, 0.1", "0.4, 0.2, 1, 0.0005"],
    ]
    old = report.make_tables({"real": compared(({"strength": 1.0}, {}))})
    assert not {"real-shifted", "real-source-accuracy", "real-length-ratios"} & old.keys()


def test_intervals_pool_the_spread_of_a_rule_and_a_target():
    setting = ("a", "b", "l2_sp", "gate", 1.0)
    stronger = ("a", "b", "l2_sp", "gate", 2.0)
    other_target = ("a", "c", "l2_sp", "gate", 1.0)
    other_rule = ("a", "b", "l2_sp", "dtnh", 1.0)
    cells = differences(
        {
            setting: [1.0, 3.0, 2.0],
            stronger: [0.0, 4.0, 2.0],
            other_target: [0.0, 0.0, 0.0],
            other_rule: [5.0, 6.0, 7.0],
        }
    )
    found = analysis.estimates(cells, "difference")
    assert list(found.index) == [setting, stronger, other_target, other_rule]
    deviation = np.sqrt((2.0 + 8.0) / 4)
    reach = stats.t.ppf(0.975, 4) * deviation / np.sqrt(3)
    bounds = found[["mean", "half_width"]]
    assert tuple(bounds.loc[setting]) == pytest.approx((2.0, reach))
    assert tuple(bounds.loc[stronger]) == pytest.approx((2.0, reach))
    assert tuple(bounds.loc[other_target]) == (0.0, 0.0)
    p_value = stats.ttest_1samp([0.0, 0.0, 1.0, 2.0], 0, alternative="less").pvalue
    alone = analysis.estimates(differences({setting: [0.0, 0.0, 1.0, 2.0]}), "difference")
    assert alone["p_value"].item() == pytest.approx(p_value)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_single_seed_tells_nothing(value):
    cells = differences({("a", "b", "l2_sp", "gate", 1.0): [value]})
    found = analysis.estimates(cells, "difference")
    assert found["half_width"].item() == np.inf
    assert not found[["below", "above"]].any(axis=None)
    assert analysis.verdicts(found)["at_once"].item() == 0


def test_what_is_below_and_above():
    settings = {("a", target, "l2_sp", "gate", 1.0): target for target in "bcd"}
    spread = np.array([-0.1, 0.0, 0.1])
    of_target = {"b": -1 + spread, "c": 1 + spread, "d": 0.1 + 10 * spread}
    cells = differences({setting: of_target[target] for setting, target in settings.items()})
    found = analysis.estimates(cells, "difference")
    assert found["below"].tolist() == [True, False, False]
    assert found["above"].tolist() == [False, True, False]


def test_intervals_hold_as_often_as_they_say():
    misses, n = 0, 0
    for seed in range(40):
        cells = select(study(noise=1.0, seed=seed), rule="gate")
        found = analysis.estimates(cells, "against_plain")
        misses += (found["mean"].abs() > found["half_width"]).sum()
        n += len(found)
    assert 0.03 < misses / n < 0.07


def test_bootstrap_intervals_hold_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        of_pairs = rng.normal(0, 1, size=(15, 1)) + rng.normal(0, 1, size=(15, 3))
        cells = differences(
            {("a", str(pair), "l2_sp", "gate", 1.0): each for pair, each in enumerate(of_pairs)}
        )
        low, high = analysis.bootstrap_mean(cells, "difference", seed=trial)[1:]
        hits += low <= 0 <= high
    assert 85 <= hits <= 100


def test_bootstrap_of_what_is_the_same_everywhere():
    def settings(target, values):
        return {("a", target, "l2_sp", "gate", x): [value] * 2 for x, value in enumerate(values)}

    def bootstrap(values):
        return analysis.bootstrap_mean(differences(values), "difference")

    same = settings("b", [2.0, 4.0]) | settings("c", [2.0, 4.0])
    assert bootstrap(same) == pytest.approx((3.0, 3.0, 3.0))
    # Two settings of one pair count twice as much as one of another.
    mean = bootstrap(settings("b", [2.0, 4.0]) | settings("c", [0.0])).mean
    assert mean == pytest.approx(2.0)


def test_verdicts():
    estimates = analysis.estimates(study(noise=0.3), "against_plain")
    found = analysis.verdicts(estimates)
    assert list(found.index) == list(EFFECTS)
    hurts = found.loc["weighted_sum"]
    assert hurts["settings"] == 18
    assert hurts["below"] == hurts["at_once"] == 6
    assert dict(zip(SETTING, hurts["worst"], strict=True))["strength"] == 100.0
    assert estimates.loc[hurts["worst"], "mean"] == pytest.approx(-20, abs=1)
    helps = found.loc["bounded_dtnh"]
    assert helps["below"] == 0
    assert helps["above"] >= 12
    assert helps["mean"] == pytest.approx(7 / 3, abs=0.3)
    [head, *rows] = tables.verdicts(study(noise=0.3))
    assert head[3] == "below plain"
    assert rows[0][3] == f"6 ({18 * 0.025:.1f})"


def test_all_at_once_is_stricter():
    counts = np.zeros(2)
    for seed in range(30):
        cells = select(study(noise=1.0, seed=seed), rule="gate")
        found = analysis.verdicts(analysis.estimates(cells, "against_plain"))
        counts += found[["below", "at_once"]].to_numpy()[0]
    assert counts[0] > 4 * counts[1]


def test_holm():
    def count(*p_values):
        return analysis.n_below_at_once(pd.Series(p_values))

    assert count(0.9, 0.01, 0.001) == 2  # 0.001 ≤ 0.025 / 3 and 0.01 ≤ 0.025 / 2
    assert count(0.02, 0.01, 0.01) == 0  # none is within 0.025 / 3
    assert count(0.01, 0.008, 0.02) == 3
    assert count(1.0) == 0


def test_win_tie_loss():
    found = select(study(noise=0.2), rule="bounded_dtnh")
    at = {x: analysis.win_tie_loss(select(found, strength=x)) for x in STRENGTHS}
    assert at[1.0] == (0, 0, 6)
    assert at[100.0] == (6, 0, 0)
    assert sum(at[0.1]) == 6
    assert analysis.win_tie_loss(select(found, strength=5.0)) == (0, 0, 0)


def test_the_best_strength_is_chosen_on_validation_images():
    found = select(study(), rule="weighted_sum")
    at = (found["source"] == "medmnist") & (found["target"] == "dtd10") & (found["strength"] == 0.1)
    found.loc[at, "validation"] = 99.0
    best = analysis.at_best_strength(found)
    assert len(best) == 6 * len(SEEDS)
    chosen = best.set_index(TASK)
    assert set(chosen.loc[("medmnist", "dtd10", "l2_sp"), "strength"]) == {0.1}
    np.testing.assert_allclose(chosen.loc[("medmnist", "dtd10", "l2_sp"), "against_plain"], 1.0)
    assert set(chosen.loc[("medmnist", "cifar10", "l2_sp"), "strength"]) == {1.0}


def test_kept_gain():
    kept = analysis.kept_gain(analysis.at_best_strength(study()), "bounded_dtnh")
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


def test_kept_at_the_best_strength_of_the_sum_and_at_tenfold():
    rates = {rule: {0.1: x[0.1], 1.0: x[1.0], 10.0: x[100.0]} for rule, x in EFFECTS.items()}
    assert rates["weighted_sum"][1.0] == 4.0  # the best strength is 1
    found = study()
    found["strength"] = found["strength"].replace(100.0, 10.0)
    found["images_per_class"] = found["images_per_class"].where(found["target"] == "cifar10")
    rules = ("weighted_sum", "bounded_dtnh", "unknown")
    head, *rows = tables.kept([found, found], rules)
    assert head[3:] == ["best λ", "weighted sum", "bounded DTNH", "unknown"]
    assert len(rows) == 2 * len(SOURCES) * len(TARGETS)
    assert all(row[3:] == ["× 1", "+4.0 (100%)", "+3.0 (75%)", ""] for row in rows)
    assert "all" in {row[1] for row in rows} != {"all"}
    _, *tenfold = tables.kept([found], rules, times=10.0)
    assert tenfold[0][4:] == ["−20.0 (−500%)", "+3.0 (75%)", ""]
    # A task without a gain to keep, and a multiple that was not run.
    found["against_plain"] /= 2
    assert tables.kept([found], rules) == [head]
    assert tables.kept([study()], rules, times=7.0) == [head]


def test_the_best_learning_rate_is_chosen_for_each_setting():
    grid = replace(
        GRID, tuned="each", learning_rates=(0.01, 0.1), images_per_class=dict.fromkeys(TARGETS, 5)
    )
    made = {}
    for cell in grid.cells({}):
        # Plain fine-tuning is better at the small rate, a rule at the large one.
        good = cell.learning_rate == (0.01 if cell.rule == NONE else 0.1)
        accuracy = 0.5 + 0.1 * good
        made[cell.key] = Result(cell, accuracy, accuracy, 1.0, 0.0, removed=[0.5] * 4)
    found = analysis.at_best_rate(analysis.frame(made.values()))
    rates = found.groupby("rule")["learning_rate"].agg(["min", "max"])
    assert (rates.loc[NONE] == 0.01).all()
    assert (rates.drop(index=NONE) == 0.1).all(axis=None)
    assert len(found) == len(made) / 2


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
    with pytest.raises(ValueError, match="names a table wrong"):
        report.renewed("<!-- table wrong -->\n<!-- end -->", {"right": []})


def test_every_table_has_rows_of_one_length():
    made = report.make_tables(
        dict.fromkeys(("small", "wide", "real", "variants", "gains", "harm"), study(0.5))
    )
    for name, rows in made.items():
        assert len({len(row) for row in rows}) == 1, name
        assert len(rows) > 1 or name == "gains-kept-tenfold", name  # not run


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0"), (-0.04, "0.0"), (0.05, "+0.1"), (-12.34, "−12.3")]
)
def test_points(value, text):
    assert labels.points(value) == text


def test_conflict_is_drawn_from_the_image_to_the_logits():
    cells = select(study(), rule="gate", strength=1.0)
    figure = figures.conflict(cells, ["conv1", "bn1", "layer1/0/conv1", "head"])
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
    made = report.make_tables(studies) | report.repeated(results)
    assert report.renewed(page, made) == page
