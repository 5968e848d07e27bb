"""The experiment's cells, grids, file of results and runner, on images made here."""

# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import gzip
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import jax
import needs
import numpy as np
import pytest

needs.examples()

from tiny_finetune import make_images

import dtnh_jax
from examples.common.data import CorruptImageError
from examples.common.objective import REGULARIZERS
from examples.never_hurt import __main__ as command
from examples.never_hurt import (
    batches,
    grids,
    images,
    report,
    runner,
    sources,
    store,
    tables,
    train,
    version,
)
from examples.never_hurt.cell import NONE, Cell, Result
from examples.never_hurt.grids import FITTING, GRIDS, KINDS, PER_CLASS, UNFITTING, Grid, Part
from examples.never_hurt.procedures import PROCEDURES
from examples.never_hurt.rules import RULES
from examples.never_hurt.sources import Pretraining

CELL = Cell(
    source="random_weights",
    target="colours",
    regularizer="distillation",
    rule="bounded_dtnh",
    strength=1.0,
    seed=0,
    learning_rate=0.05,
    images_per_class=6,
    test=True,
    image_size=8,
    steps=4,
    batch_size=8,
)
GRID = Grid(
    [
        Part(
            sources=("random_weights",),
            targets=("colours",),
            regularizers=("l2_sp",),
            rules=("bounded_dtnh",),
            strengths=(1.0,),
            seeds=(0,),
        )
    ],
    learning_rates=(0.05,),
    tuning_seeds=(0,),
    image_size=8,
    steps=4,
    batch_size=8,
    pretraining_steps=1,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    make_images(directory / "colours")
    return directory


@pytest.fixture
def tiny_grid(monkeypatch):
    monkeypatch.setitem(PER_CLASS, "colours", 6)
    monkeypatch.setitem(GRIDS, "tiny", GRID)


@pytest.fixture
def standard(standard_promotion):
    """Users' programs run like this."""
    with jax.numpy_rank_promotion("allow"):
        yield


def result(cell=CELL, **values):
    known = {"validation": 0.5, "test": 0.25, "train_accuracy": 1.0, "train_loss": 0.1}
    return Result(cell, **(known | values))


def prepared(cell, data):
    source = sources.obtain(
        Pretraining(cell.source, cell.architecture, cell.image_size, steps=1),
        data,
        data / "kept",
        None,
    )
    read = images.read(data, cell.target, cell.image_size, cell.images_per_class, cell.seed)
    return train.Prepared(cell, source, read)


# Cells


def test_a_key_is_of_the_whole_config():
    changed = {
        "str": lambda value: value + "x",
        "int": lambda value: value + 1,
        "float": lambda value: value / 2,
        "bool": lambda value: not value,
    }
    cell = replace(CELL, held_out=1, trial=0.5)
    keys = {CELL.key, cell.key}
    for field in fields(Cell):
        value = getattr(cell, field.name)
        keys.add(replace(cell, **{field.name: changed[type(value).__name__](value)}).key)
    assert len(keys) == 2 + len(fields(Cell))
    assert replace(CELL, strength=1, learning_rate=0.05).key == CELL.key
    # Results of other machines and days are found again by this.
    assert CELL.key == "b41e5a736fa9ef2d"


@pytest.mark.parametrize(
    ("field", "value"),
    [("strength", -1.0), ("strength", math.nan), ("steps", 3), ("learning_rate", math.inf)],
)
def test_bad_cells(field, value):
    with pytest.raises(ValueError, match=f"{field} must be finite and at least"):
        replace(CELL, **{field: value})


# Grids


def test_the_small_grid_is_as_large_as_it_must_be():
    part = GRIDS["small"].parts[0]
    assert {KINDS[source] for source in part.sources} >= {FITTING, UNFITTING}
    assert len(part.sources) >= 3
    assert len(part.targets) >= 3
    assert {"l2_sp", "distillation"} <= set(part.regularizers)
    assert len(part.rules) >= 5
    assert len(part.strengths) >= 4
    assert len(part.seeds) >= 3


@pytest.mark.parametrize("name", GRIDS)
def test_grids_name_what_there_is(name):
    for part in GRIDS[name].parts:
        assert set(part.rules) <= set(RULES)
        assert set(part.regularizers) <= set(REGULARIZERS)
        assert set(part.sources) <= set(KINDS)
        assert set(part.targets) <= set(GRIDS[name].images_per_class)
        assert part.procedure in PROCEDURES


def test_cells_of_a_grid():
    grid = replace(
        GRID,
        parts=[
            Part(
                ("tinyimagenet", "medmnist"), ("dtd10",), ("l2_sp",), ("gate",), (1.0, 2.0), (0, 1)
            )
        ],
        learning_rates=(0.01, 0.1),
        tuning_seeds=(0, 1),
    )
    tuning = grid.tuning()
    assert len(tuning) == 2 * 2 * 2
    assert not any(cell.test for cell in tuning)
    with pytest.raises(ValueError, match="cannot be chosen"):
        grid.cells({})
    results = {
        cell.key: result(
            cell,
            # The second is better from one of the sources alone, on the mean of both seeds.
            validation=(0.5 + 0.1 * cell.seed)
            if cell.learning_rate == 0.01
            else (0.9 - 0.5 * cell.seed if cell.source == "medmnist" else 0.3),
        )
        for cell in tuning
    }
    assert grid.chosen_rates(results) == {
        ("tinyimagenet", "dtd10"): [0.01],
        ("medmnist", "dtd10"): [0.1],
    }
    cells = grid.cells(results)
    assert len(cells) == len(set(cells)) == 2 * 2 * (grids.PLAIN_RUNS + 2)
    assert all(cell.test for cell in cells)
    rates = {(cell.source, cell.learning_rate) for cell in cells}
    assert rates == {("tinyimagenet", 0.01), ("medmnist", 0.1)}
    assert sum(cell.regularizer == NONE for cell in cells) == 2 * 2 * grids.PLAIN_RUNS


def test_a_grid_that_tunes_each_setting_runs_every_learning_rate():
    grid = replace(GRID, tuned="each", learning_rates=(0.01, 0.1), images_per_class={"colours": 6})
    assert grid.tuning() == []
    cells = grid.cells({})
    assert len(cells) == 2 * (grids.PLAIN_RUNS + 1)
    assert {cell.learning_rate for cell in cells} == {0.01, 0.1}


def test_a_grid_may_hold_images_out_and_have_a_procedure():
    part = replace(GRID.parts[0], held_out=2, returned_at=0.5, procedure="lp_ft")
    cells = replace(GRID, parts=[part], tuned="each", images_per_class={"colours": 6}).cells({})
    assert {(cell.rule, cell.held_out, cell.returned_at, cell.procedure) for cell in cells} == {
        (NONE, 0, 1.0, "plain"),
        ("bounded_dtnh", 2, 0.5, "lp_ft"),
    }
    assert {cell.images_per_class for cell in cells} == {6}


def test_smoke_is_small():
    smoke = GRIDS["small"].smoke()
    results = {cell.key: result(cell) for cell in smoke.tuning()}
    assert len(results) == 1
    assert len(smoke.cells(results)) == grids.PLAIN_RUNS + 4
    assert smoke.steps == 4


# The file of results


def test_results_come_back(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    first = result(conflict={"conv1": [0.0, 1.0, 0.5, 0.5]}, removed=[0.1] * 4, train_loss=None)
    other = result(replace(CELL, seed=1), test=None)
    for each in (first, other, result(test=0.9)):
        store.append(path, each)
    assert store.read(path) == {CELL.key: first, other.cell.key: other}
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert store.read(packed) == store.read(path)
    assert store.read(tmp_path / "none.jsonl") == {}


def test_what_is_not_finite_is_no_json():
    assert [train._finite(x, 2) for x in (0.123, math.nan, math.inf)] == [0.12, None, None]
    with pytest.raises(ValueError, match="not JSON compliant"):
        result(removed=[math.nan]).to_json()


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path):
    path = tmp_path / "r.jsonl"
    store.append(path, result())
    with path.open("a") as file:
        file.write(result(replace(CELL, seed=1)).to_json()[:50])
    store.append(path, result(replace(CELL, seed=2)))
    with pytest.warns(UserWarning, match=r"r.jsonl:2 is incomplete"):
        found = store.read(path)
    assert [each.cell.seed for each in found.values()] == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "0" * 16}, "now has the key"),
        ({"cell": asdict(CELL) | {"colour": 1}}, "unknown settings"),
        ({"accuracy": 1.0}, "accuracy"),
    ],
)
def test_lines_that_are_no_results(tmp_path, change, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(json.loads(result().to_json()) | change) + "\n")
    with pytest.raises(ValueError, match=message):
        store.read(path)


def test_results_of_older_versions_are_read(tmp_path):
    path = tmp_path / "r.jsonl"
    old = json.loads(result().to_json())
    assert old.pop("version") is None
    for name in ("held_out_accuracy", "held_out_loss", "chosen", "shifted", "source_accuracy"):
        assert old.pop(name) is None
    assert old.pop("length_ratio") == []
    assert old["cell"].pop("procedure") == "plain"
    path.write_text(json.dumps(old) + "\n")
    assert store.read(path) == {CELL.key: result()}


def test_a_version_is_of_the_sources(tmp_path):
    assert re.fullmatch(rf"{re.escape(dtnh_jax.__version__)}\+[0-9a-f]{{8}}", version.version())
    (tmp_path / "a.py").write_text("x = 1")
    first = version.digest([tmp_path])
    assert version.digest([tmp_path]) == first
    (tmp_path / "notes.md").write_text("not a source")
    assert version.digest([tmp_path]) == first
    (tmp_path / "a.py").write_text("x = 2")
    second = version.digest([tmp_path])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, version.digest([tmp_path])}) == 3


# Batches


def test_every_image_comes_once_before_any_comes_again():
    plan = batches.draw(10, 16, 4, 5, (3, 0))
    which = plan.which.ravel()
    assert sorted(which[:10]) == sorted(which[10:]) == list(range(10))
    again = batches.draw(10, 16, 4, 5, (3, 0))
    np.testing.assert_array_equal(plan.which, again.which)
    assert not np.array_equal(plan.which, batches.draw(10, 16, 4, 5, (3, 1)).which)


@pytest.mark.usefixtures("standard")
@pytest.mark.parametrize("returned_at", [1.0, 0.5])
@pytest.mark.parametrize("every", [1, 4])
def test_held_out_images_are_not_trained_on_until_they_are_returned(every, returned_at):
    labels = np.repeat(np.arange(3), 6)
    cell = replace(
        CELL, steps=40, held_out=2, held_out_every=every, returned_at=returned_at, batch_size=8
    )
    train_plan, held_out = batches.schedule(cell, labels)
    apart = round(40 * returned_at)
    kept = set(held_out.which.ravel())
    assert len(kept) == 6
    assert np.bincount(labels[list(kept)]).tolist() == [2, 2, 2]
    assert kept | set(train_plan.which[:apart].ravel()) == set(range(18))
    assert not kept & set(train_plan.which[:apart].ravel())
    if returned_at < 1:
        assert set(train_plan.which[apart:].ravel()) == set(range(18))
    assert [cell.is_due(i) for i in range(40)] == [i % every == 0 and i < apart for i in range(40)]
    other = batches.schedule(replace(cell, seed=1), labels)
    assert set(other.held_out.which.ravel()) != kept


def test_without_held_out_images_the_batches_are_as_before():
    found = batches.schedule(CELL, np.zeros(10, int))
    wanted = batches.draw(10, CELL.image_size, CELL.batch_size, CELL.steps, (CELL.seed, CELL.order))
    jax.tree.map(np.testing.assert_array_equal, found.train, wanted)
    assert found.held_out is None
    assert not any(CELL.is_due(i) for i in range(CELL.steps))


def test_views_are_crops_of_the_padded_image():
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    plan = batches.draw(3, 8, 6, 1, (0, 0))
    plan = jax.tree.map(lambda x: x[0], plan)
    views = np.asarray(batches.views(jax.numpy.asarray(pixels), plan))
    for view, which, flip, (top, left) in zip(views, *plan, strict=True):
        padded = np.pad(pixels[which], ((1, 1), (1, 1), (0, 0)))
        wanted = padded[top : top + 8, left : left + 8]
        wanted = wanted[:, ::-1] if flip else wanted
        wanted = (wanted / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(view, wanted, atol=1e-6)
    assert {*plan.flip} == {True, False}


# Cells that are run


@pytest.mark.usefixtures("standard")
def test_cells_that_run_at_once_are_those_that_run_one_by_one(data):
    cells = [replace(CELL, strength=strength) for strength in (0.0, 100.0)]
    ready = [prepared(cell, data) for cell in cells]
    one_by_one = [train.run([each])[0] for each in ready]
    at_once = train.run(ready)
    for one, other in zip(one_by_one, at_once, strict=True):
        assert one.cell == other.cell
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
        assert one.test == pytest.approx(other.test, abs=0.1)
        assert one.conflict.keys() == other.conflict.keys()
    again = train.run(ready[:1])[0]
    assert replace(again, seconds=0.0) == replace(one_by_one[0], seconds=0.0)
    assert again.version == version.version()
    assert one_by_one[1].test is not None
    assert set(one_by_one[1].conflict) > {"conv1", "layer1/0/bn1", "layer3/0/conv2"}
    assert all(len(quarters) == 4 for quarters in one_by_one[1].conflict.values())
    with pytest.raises(ValueError, match="must share"):
        train.run([ready[0], prepared(replace(CELL, rule="gate"), data)])


@pytest.mark.usefixtures("standard")
def test_cells_with_held_out_images_run(data):
    cell = replace(CELL, regularizer="l2_sp", rule="held_out_global", held_out=2, held_out_every=2)
    [found] = train.run([prepared(cell, data)])
    assert found.cell == cell
    assert list(found.conflict) == ["global"]
    assert math.isfinite(found.train_loss)


@pytest.mark.usefixtures("standard")
@pytest.mark.parametrize(
    ("losses", "helps"),
    [
        ((2.0, 1.0), True),
        ((1.0, 2.0), False),
        ((1.0, 1.0), False),
        ((1.0, math.nan), False),
        ((math.nan, 1.0), True),
        ((math.nan, math.nan), False),
    ],
)
def test_trial_runs_decide_whether_there_is_a_regularizer(data, monkeypatch, losses, helps):
    cell = replace(CELL, regularizer="l2_sp", rule="trial_runs", strength=1000.0)
    for_trials = replace(cell, held_out=2, trial=0.5)
    found_losses = iter(losses)
    monkeypatch.setattr(train, "_loss_of_views", lambda *_: next(found_losses))
    [found] = train.run([prepared(for_trials, data)])
    assert found.trial_losses == [loss if math.isfinite(loss) else None for loss in losses]
    without = replace(cell, strength=0.0)
    [wanted] = train.run([prepared(cell if helps else without, data)])
    assert (found.train_loss, found.validation) == (wanted.train_loss, wanted.validation)
    assert wanted.trial_losses is None


@pytest.mark.usefixtures("standard")
def test_trial_runs_are_judged_by_images_that_they_do_not_train_on(data):
    cell = replace(CELL, regularizer="l2_sp", rule="trial_runs", held_out=2, trial=0.5)
    ready = prepared(cell, data)
    labels = ready.splits.train.labels
    schedule, views = batches.trial_schedule(cell, labels)
    assert len(schedule.train.which) == cell.steps // 2
    assert not set(views.which.ravel()) & set(schedule.train.which.ravel())
    assert [*np.bincount(labels[np.unique(views.which)])] == [2] * ready.splits.n_classes
    everything = batches.schedule(cell, labels).train.which
    assert set(views.which.ravel()) < set(everything.ravel()) == set(range(len(labels)))
    [found] = train.run([ready])
    assert all(map(math.isfinite, found.trial_losses))


@pytest.mark.parametrize("change", [{"trial": 1.1, "held_out": 1}, {"trial": 0.5}])
def test_trial_runs_need_a_share_and_held_out_images(change):
    with pytest.raises(ValueError, match=r"trial must be|set held_out"):
        replace(CELL, **change)


@pytest.mark.usefixtures("tiny_grid", "standard")
def test_a_run_goes_on_where_it_was(data, tmp_path, capsys):
    arguments = ["run", "--grid", "tiny", "--data", str(data), "--results", str(tmp_path)]
    assert command.main([*arguments, "--dry-run"]) == 0
    assert "1 cells, 1 of them to run" in capsys.readouterr().out
    assert command.main(arguments) == 0
    path = tmp_path / "tiny.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + grids.PLAIN_RUNS + 1
    # Lose two, and a half of another: only those are run again, and come out the same.
    path.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:40])
    capsys.readouterr()
    with pytest.warns(UserWarning, match="is incomplete"):
        assert command.main(arguments) == 0
    assert f"{grids.PLAIN_RUNS + 1} cells, 3 of them to run" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="is incomplete"):
        found = store.read(path)
    wanted = {each.cell.key: each for each in map(Result.from_json, lines)}
    assert found.keys() == wanted.keys()
    for key, each in found.items():
        assert replace(each, seconds=0.0) == replace(wanted[key], seconds=0.0)


@pytest.mark.usefixtures("tiny_grid", "standard")
def test_smoke_runs_to_its_end(data, tmp_path):
    arguments = ["run", "--grid", "tiny", "--smoke", "--data", str(data)]
    assert command.main([*arguments, "--results", str(tmp_path)]) == 0
    found = store.read(tmp_path / "tiny-smoke.jsonl")
    assert len(found) == 1 + grids.PLAIN_RUNS + 1
    assert not (tmp_path / "tiny.jsonl").exists()


@pytest.mark.usefixtures("tiny_grid", "standard")
def test_a_cell_runs_again_by_its_key(data, tmp_path, capsys):
    results = ["--data", str(data), "--results", str(tmp_path)]
    assert command.main(["run", "--grid", "tiny", *results]) == 0
    file = tmp_path / "tiny.jsonl"
    [cell] = [each.cell for each in store.read(file).values() if each.cell.rule == "bounded_dtnh"]
    places = ["--data", str(data), "--sources", str(tmp_path / "sources")]
    capsys.readouterr()
    assert command.main(["again", str(file), cell.key[:8], *places]) == 0
    old, new = capsys.readouterr().out.splitlines()
    assert cell.key in old
    assert old.removeprefix("old") == new.removeprefix("new")
    for key, count in ((cell.key[:-1] + "x", 0), ("", 1 + grids.PLAIN_RUNS + 1)):
        assert command.main(["again", str(file), key, *places]) == 1
        assert f"{count} cells of" in capsys.readouterr().err
    other = file.rename(tmp_path / "other.jsonl")
    assert command.main(["again", str(other), cell.key, *places]) == 1
    assert "not named after a grid" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_grid", "standard")
def test_drawn_cells_are_repeated_and_compared(data, tmp_path, capsys, monkeypatch):
    results = ["--data", str(data), "--results", str(tmp_path)]
    assert command.main(["run", "--grid", "tiny", *results]) == 0
    kept = store.read(tmp_path / "tiny.jsonl")
    places = ["--data", str(data), "--sources", str(tmp_path / "sources")]
    repeat = ["repeat", str(tmp_path), *places, "--sample", "2"]
    assert command.main(repeat) == 0
    assert f"tiny: 2 of {len(kept)} cells" in capsys.readouterr().out
    again = store.read(tmp_path / report.REPEATED)
    assert len(again) == 2
    [_, row] = tables.repeated({"tiny": kept, "other": {}}, again)
    assert row == ["`tiny`", "2", "2", "0.0", "0.0"]
    # Nothing is run twice.
    monkeypatch.setattr(train, "run", lambda prepared: pytest.fail("ran again"))
    assert command.main(repeat) == 0
    key, first = next(iter(again.items()))
    again[key] = replace(first, validation=first.validation + 0.02, test=None)
    kept[key] = replace(kept[key], validation=first.validation, test=None)
    [_, row] = tables.repeated({"tiny": kept}, again)
    assert row == ["`tiny`", "2", "1", "2.0", "+1.0"]


SCRIPT = """
import sys
from pathlib import Path
from test_never_hurt import GRID, PER_CLASS
from examples.never_hurt import runner
PER_CLASS["colours"] = 6
data, results = map(Path, sys.argv[1:3])
if __name__ == "__main__":
    places = runner.Places(data, None, results, data / "kept")
    runner.run_missing(GRID.tuning(), places, workers=2, lanes=1, pretraining_steps=1)
"""


def test_processes_of_their_own(data, tmp_path):
    script, results = tmp_path / "script.py", tmp_path / "r.jsonl"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), str(data), str(results)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(store.read(results)) == 1


class Deadly:
    """Kills the worker process that receives it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_worker_that_fails_is_reported(tmp_path):
    """Any exception, also one that cannot be sent between processes."""
    places = runner.Places(tmp_path, None, tmp_path / "r.jsonl", tmp_path / "kept")
    advanced = []
    good = Pretraining("random_weights", "cifar_resnet8", 8, steps=1)
    bad = Pretraining("missing", "cifar_resnet8", 8, steps=1)
    with pytest.raises(runner.WorkerError, match="failed: ValueError: There is no folder missing"):
        runner._run_jobs([good, bad], places, 2, 1, advanced.append)
    assert (places.sources / good.file_name).exists()

    def corrupt(*arguments):
        raise CorruptImageError("a.jpg", "it is empty")
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_do", corrupt)
        with pytest.raises(runner.WorkerError, match=r"a\.jpg cannot be read") as caught:
            runner._finish(bad, places, 1)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_a_worker_that_dies_is_reported(tmp_path):
    places = runner.Places(tmp_path, None, tmp_path / "r.jsonl", tmp_path / "kept")
    with pytest.raises(runner.WorkerError, match=r"worker process died.*start again to continue"):
        runner._run_jobs([Deadly()], places, 2, 1, lambda n=1: None)


ORPHANS = """
import os, time
from examples.never_hurt import runner

def sleep(numbers):
    runner._start_worker(numbers)
    print(*os.sched_getaffinity(0), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    context = runner.multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    numbers.put(1)
    context.Process(target=sleep, args=(numbers,)).start()
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Cores cannot be chosen here.")
def test_a_worker_ends_with_its_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert len(parent.stdout.readline().split()) == 1
        killed = time.monotonic()
        parent.kill()
        # The pipe ends when no process is left that writes to it.
        assert parent.stdout.read() == ""
    assert time.monotonic() - killed < 30


def test_shares_are_all_cells_once(tmp_path, monkeypatch):
    grid, path = GRIDS["real"], tmp_path / "real.jsonl"
    for cell in grid.tuning():
        store.append(path, result(cell))
    shares = []

    def take(cells, places, **settings):
        shares.append(cells)

    monkeypatch.setattr(runner, "run_missing", take)
    for index in range(3):
        run = ["run", "--grid", "real", "--data", str(tmp_path), "--results", str(tmp_path)]
        assert command.main([*run, "--share", str(index), "3"]) == 0
    assert shares[::2] == [grid.tuning()] * 3
    shares = shares[1::2]
    everything = grid.cells(store.read(path))
    assert shares[1] == everything[1::3]
    assert sorted(cell.key for share in shares for cell in share) == sorted(
        cell.key for cell in everything
    )
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Cores cannot be chosen here.")
def test_one_core_is_one_core_and_then_all_again():
    before = os.sched_getaffinity(0)
    taken = set()
    for number in range(2 * len(before)):
        with runner.one_core(number):
            inside = os.sched_getaffinity(0)
            assert len(inside) == 1
            taken |= inside
        assert os.sched_getaffinity(0) == before
    assert taken == before


def test_cells_of_one_program_stay_together():
    cells = [
        replace(CELL, source=source, regularizer=regularizer, seed=seed)
        for seed in (0, 1)
        for source in ("medmnist", "gtsrb")
        for regularizer in ("l2_sp", "distillation")
    ]
    cells += [replace(CELL, procedure="lp_ft")]
    jobs = runner._grouped(cells, lanes=3)
    # By the source where its head is looked at.
    assert sorted(sum(map(len, job)) for job in jobs) == [1, 2, 2, 4]
    assert all(len(chunk) <= 3 for job in jobs for chunk in job)
    assert {cell for job in jobs for chunk in job for cell in chunk} == set(cells)


# Sources


@pytest.mark.usefixtures("standard")
def test_sources_are_trained_once_and_kept(data, tmp_path):
    pretraining = Pretraining("random_labels_colours", "cifar_resnet8", 8, steps=2, batch_size=4)
    first = sources.obtain(pretraining, data, tmp_path, None)
    assert first.config.n_classes == 3
    assert 0 <= float(first.metadata["held_out_accuracy"]) <= 1
    sources.obtain.cache_clear()
    again = sources.obtain(pretraining, data / "nowhere", tmp_path, None)
    jax.tree.map(np.testing.assert_array_equal, first.network, again.network)
    other = replace(pretraining, seed=1)
    assert other.file_name != pretraining.file_name


def test_errors_say_what_to_do(data, tmp_path, capsys):
    run = ["run", "--data", str(data), "--results", str(tmp_path)]
    assert command.main([*run, "--grid", "huge"]) == 1
    assert "There is no grid huge" in capsys.readouterr().err
    assert command.main([*run, "--grid", "small"]) == 1
    assert "There is no folder" in capsys.readouterr().err
    for flags, message in (
        (["--workers", "0"], "workers must be at least 1"),
        (["--lanes", "0"], "lanes must be at least 1"),
        (["--share", "2", "2"], "got 2 2"),
    ):
        assert command.main([*run, *flags]) == 1
        assert message in capsys.readouterr().err
    assert command.main(["report", str(tmp_path)]) == 1
    assert "There are no results" in capsys.readouterr().err
    with pytest.raises(ValueError, match="by --weights"):
        sources.obtain(Pretraining("x.safetensors", "cifar_resnet20", 32), data, tmp_path, None)
