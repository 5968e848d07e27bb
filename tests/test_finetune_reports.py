# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import csv
import dataclasses
import io
import itertools
import json
import math
import struct

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

needs.examples()
image_module = pytest.importorskip("PIL.Image")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

import dtnh_jax
from examples.common import pretrained, resnet, text
from examples.common.data import DataConfig
from examples.common.resnet import ResNetConfig
from examples.finetune import display, evaluate, figure, logs, metrics, predict, report
from examples.finetune.config import Config, ModelConfig, TrainingConfig, TransferConfig
from examples.finetune.logs import Logs, Record
from examples.finetune.meter import Throughput
from examples.finetune.report import Outcome

LAYERS = ("conv1", "bn1", "layer1/0/conv1", "layer1/0/bn1", "layer2/0/conv1", "head")


def of_groups(**cosines):
    return {
        name: {"cosine": cosine, "conflict": float(cosine < 0), "removed": max(-cosine, 0.0)}
        for name, cosine in cosines.items()
    }


def a_run(steps=6, groups=LAYERS[:-1], every=2):
    """Records as a run writes them, every second one after a look at validation images."""
    rng = np.random.default_rng(0)
    for step in range(every, steps + 1, every):
        cosines = dict(zip(groups, rng.uniform(-0.5, 0.5, len(groups)), strict=True))
        measured = of_groups(**cosines)
        yield Record(
            step,
            "train",
            loss=float(1 / step),
            reg=0.125 * step,
            accuracy=0.5,
            learning_rate=0.01,
            **(
                {"cosine": 0.25, "conflict": 0.4, "removed": 0.1, "groups": measured}
                if groups
                else {}
            ),
        )
        if step % (2 * every) == 0:
            yield Record(step, "validation", loss=1.5, accuracy=0.25 + step / 100, top5=0.75)


def written(out, records, resume_step=None, **kwargs):
    with Logs(out, resume_step=resume_step, tensorboard=False, **kwargs) as to:
        for record in records:
            to.write(record)
    return out


def contents(out):
    return [(out / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")]


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# Logs


def test_what_is_read_is_what_was_written(tmp_path):
    records = list(a_run())
    found = logs.read(written(tmp_path / "new" / "run", records))
    assert [(each.step, each.split) for each in found] == [
        (2, "train"),
        (4, "train"),
        (4, "validation"),
        (6, "train"),
    ]
    for one, other in zip(found, records, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        if other.groups is None:
            assert one == other
        for group, measured in (other.groups or {}).items():
            assert one.groups[group] == pytest.approx(measured, rel=1e-5)


def test_lines_are_json_and_lack_what_was_not_measured(tmp_path):
    record = Record(3, "train", loss=math.nan, reg=math.inf, groups=of_groups(a=math.nan))
    (line,) = (written(tmp_path, [record]) / "metrics.jsonl").read_text().splitlines()
    assert strict_json(line) == {
        "step": 3,
        "split": "train",
        "loss": None,
        "reg": None,
        "groups": {"a": {"cosine": None, "conflict": 0.0, "removed": None}},
    }
    (found,) = logs.read(tmp_path)
    assert math.isnan(found.loss)
    assert math.isnan(found.groups["a"]["cosine"])
    assert found.accuracy is None


def test_numbers_of_numpy_and_jax_are_written_as_numbers(tmp_path):
    record = Record(
        np.int64(1234567), "train", loss=jnp.float32(0.1), accuracy=np.float32(0.7), reg=1
    )
    (line,) = (written(tmp_path, [record]) / "metrics.jsonl").read_text().splitlines()
    assert strict_json(line) == {
        "step": 1234567,
        "split": "train",
        "loss": 0.1,
        "accuracy": 0.7,
        "reg": 1,
    }


def test_the_table_has_one_width_and_the_numbers_of_the_lines(tmp_path):
    records = [*a_run(), Record(6, "test", loss=math.nan, accuracy=0.5)]
    with (written(tmp_path, records) / "metrics.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert {len(row) for row in [head, *rows]} == {len(logs.COLUMNS)}
    assert head == list(logs.COLUMNS)
    assert "groups" not in head
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        for name, cell in zip(head, row, strict=True):
            value = getattr(record, name)
            if name == "split":
                assert cell == value
            elif value is None:
                assert cell == ""
            else:
                assert float(cell) == pytest.approx(value, rel=1e-5, nan_ok=True)


def test_each_record_is_on_disk_when_write_returns(tmp_path):
    with Logs(tmp_path, resume_step=None, tensorboard=False) as to:
        for n, record in enumerate(a_run(), start=1):
            to.write(record)
            assert len(logs.read(tmp_path)) == n
            assert contents(tmp_path)[0].count(b"\n") == n
    assert contents(tmp_path)[1].count(b"\n") == n + 1


def test_the_table_is_written_if_the_run_fails(tmp_path):
    def fail():
        with Logs(tmp_path, resume_step=None, tensorboard=False) as to:
            to.write(Record(1, "train"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(tmp_path)[1].count(b"\n") == 2


def test_the_table_of_an_earlier_run_is_not_kept(tmp_path):
    written(tmp_path, a_run())
    with Logs(tmp_path, resume_step=None, tensorboard=False):
        assert contents(tmp_path)[1].count(b"\n") == 1


@pytest.mark.parametrize("resume_step", range(8))
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, resume_step):
    records = list(a_run())
    whole = contents(written(tmp_path / "whole", records))
    for killed_after in range(len(records) + 1):
        out = written(tmp_path / str(killed_after), records[:killed_after])
        # What has been written when the next is cut short in the middle of both files.
        for path, content in zip(
            (out / "metrics.jsonl", out / "metrics.csv"), contents(out), strict=True
        ):
            path.write_bytes(content + b'{"step": 8, "spl')
        again = [record for record in records if record.step > resume_step]
        written(out, again, resume_step=resume_step)
        kept = [r for r in records[:killed_after] if r.step <= resume_step]
        if len(kept) + len(again) == len(records):
            assert contents(out) == whole
        assert [each.step for each in logs.read(out)] == [each.step for each in [*kept, *again]]


def test_a_last_line_torn_at_any_byte_is_passed_over(tmp_path):
    records = list(a_run(groups=("größe",)))
    out = written(tmp_path, records)
    text = (out / "metrics.jsonl").read_bytes()
    *_, last = text.splitlines(keepends=True)
    for length in range(len(last) - 1):
        (out / "metrics.jsonl").write_bytes(text[: len(text) - len(last) + length])
        assert len(logs.read(out)) == len(records) - 1
    (out / "metrics.jsonl").write_bytes(text[:-1])
    assert len(logs.read(out)) == len(records)


@pytest.mark.parametrize("line", ["{", '{"step": 1}', '{"step": 1, "split": "x", "y": 1}', "3"])
def test_another_broken_line_is_an_error_with_its_number(tmp_path, line):
    first, *rest = contents(written(tmp_path, a_run()))[0].decode().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([first, line, *rest]))
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not a record .* Repair or"):
        logs.read(tmp_path)


def test_a_step_of_a_split_is_written_once(tmp_path):
    records = list(a_run())
    written(tmp_path, [*records, *records])
    before = contents(tmp_path)
    written(tmp_path, records, resume_step=6)
    assert contents(tmp_path) == before
    assert len(logs.read(tmp_path)) == len(records)


def test_a_new_run_begins_with_empty_files(tmp_path):
    written(tmp_path, a_run())
    written(tmp_path, [Record(1, "train")])
    assert logs.read(tmp_path) == [Record(1, "train")]


def test_no_file_is_no_record_and_a_disabled_log_makes_none(tmp_path):
    assert logs.read(tmp_path) == []
    assert list(written(tmp_path, a_run(), enabled=False).iterdir()) == []


def events(path):
    """TensorBoard's records: length, checksum, content, checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def event_files(out):
    return sorted((out / "tensorboard").iterdir())


def test_tensorboard_gets_the_scalars_and_hides_what_a_resumed_run_makes_again(tmp_path):
    groups = of_groups(conv1=-0.25, bn1=math.nan)
    record = Record(4, "train", loss=0.5, reg=math.inf, groups=groups)
    for n, resume_step in enumerate((None, 3), start=1):
        with Logs(tmp_path, resume_step=resume_step, tensorboard=True) as to:
            to.write(record)
            to.write(Record(4, "validation", accuracy=0.75))
        assert len(event_files(tmp_path)) == n
    read = [list(events(path)) for path in event_files(tmp_path)]
    for of_file in read:
        scalars = {
            (value.tag, event.step): value.simple_value
            for event in of_file
            for value in event.summary.value
        }
        assert scalars == {
            ("train/loss", 4): 0.5,
            ("cosine/conv1", 4): -0.25,
            ("validation/accuracy", 4): 0.75,
        }
    starts = [
        event.step
        for each in read
        for event in each
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [4]

    with Logs(tmp_path, resume_step=None, tensorboard=True):
        pass
    (only,) = event_files(tmp_path)
    assert not any(event.summary.value for event in events(only))


def test_the_fields_of_a_conflict_are_those_of_the_stats(tmp_path):
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    tx = dtnh_jax.dtnh(0.1, scope="leaf")
    pair = (
        {"a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 1.0])},
        {"a": jnp.array([-1.0, 0.0]), "b": jnp.array([0.0, 2.0])},
    )
    stats = dtnh_jax.conflict_stats(tx.update(pair, tx.init(params))[1])
    record = Record(1, "train", **logs.of_conflict(stats))
    assert record.conflict == 0.5
    assert record.cosine == pytest.approx((-1 + 2) / math.sqrt(2 * 5))
    assert record.removed == pytest.approx(1 / math.sqrt(5))
    assert record.groups == {
        "a": {"cosine": -1.0, "conflict": True, "removed": 1.0},
        "b": {"cosine": 1.0, "conflict": False, "removed": 0.0},
    }
    assert logs.read(written(tmp_path, [record]))[0].groups == record.groups


def test_groups_that_were_not_reached_do_not_count():
    """In one step, or in a part of the steps of a record."""
    tx = dtnh_jax.dtnh(0.1, scope="leaf")
    params = {name: jnp.zeros(2) for name in "abc"}
    one = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 1.0]), "c": jnp.array([1.0, 1.0])}
    other = {"a": -one["a"], "b": one["b"] * math.inf, "c": None}
    stats = dtnh_jax.conflict_stats(tx.update((one, other), tx.init(params))[1])
    found = logs.of_conflict(stats)
    assert found["conflict"] == 1
    assert found["groups"] == {"a": {"cosine": -1.0, "conflict": True, "removed": 1.0}}
    finite = dtnh_jax.conflict_stats(tx.update((one, other | {"b": one["b"]}), tx.init(params))[1])
    mean = jax.tree.map(lambda *steps: np.mean(steps, axis=0), stats, finite, finite)
    found = logs.of_conflict(mean)
    assert found["conflict"] == pytest.approx(3 / 5)
    assert found["groups"]["b"] == pytest.approx({"cosine": 1, "conflict": 0, "removed": 0})
    nothing = dtnh_jax.conflict_stats(tx.init(params))
    assert logs.of_conflict(nothing) == {}


# The live view


def shown(total, start=0, *, terminal, enabled=True):
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, highlight=False)
    with display.Display(total, 8, start=start, enabled=enabled, console=console) as view:
        for step in range(start + 1, total + 1):
            view.advance()
            if step % 10 == 0:
                view.show(Record(step, "train", loss=0.123, accuracy=0.456, conflict=0.789))
            if step == total:
                view.show(Record(step, "validation", loss=0.321, accuracy=0.654))
        view.message("Saved [bold]it[/bold].")
    return console.file.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then():
    *lines, last, message = shown(1000, terminal=False).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"step {step} of 1000" for step in range(50, 1001, 50)
    ]
    assert "loss 0.123, accuracy 45.6 %, conflict 78.9 %" in lines[-1]
    assert last == "step 1000: validation loss 0.321, accuracy 65.4 %"
    assert message == "Saved [bold]it[/bold]."


def test_a_short_or_resumed_run_has_its_lines_too():
    lines = shown(3, terminal=False).splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == [f"step {n} of 3" for n in (1, 2, 3)]
    resumed = shown(1000, start=920, terminal=False).splitlines()
    assert resumed[0].startswith("step 950 of 1000")


def test_on_a_terminal_there_is_a_bar_and_the_newest_numbers():
    text = shown(20, start=10, terminal=True)
    assert "20/20" in text
    assert "loss 0.123, accuracy 45.6 %, conflict 78.9 %" in text
    assert "validation loss 0.321, accuracy 65.4 %" in text
    assert "Saved [bold]it[/bold]." in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_disabled_view_shows_nothing(terminal):
    assert shown(20, terminal=terminal, enabled=False) == ""


# Figures


def test_the_heat_map_has_a_row_a_group_from_image_to_logits():
    records = list(a_run(groups=("layer2/0/conv1", "bn1", "conv1", "elsewhere")))
    drawn = figure.draw(records, LAYERS, title="a run", best_step=4)
    loss, reg, accuracy, heat_map = (axes for axes in all_axes(drawn) if axes.get_xlabel())
    assert [label.get_text() for label in heat_map.get_yticklabels()] == [
        "conv1",
        "bn1",
        "layer2/0/conv1",
        "elsewhere",
    ]
    (mesh,) = (each for each in heat_map.collections if each.get_array() is not None)
    values = np.asarray(mesh.get_array()).reshape(4, 3)
    train = [record for record in records if record.split == "train"]
    for row, group in enumerate(("conv1", "bn1", "layer2/0/conv1", "elsewhere")):
        np.testing.assert_allclose(values[row], [r.groups[group]["cosine"] for r in train])
    low, high = mesh.get_clim()
    assert low == -high
    assert np.quantile(np.abs(values), 0.9) <= high <= 1
    red, green, blue, _ = mesh.cmap(mesh.norm(low))
    assert red > max(green, blue), "conflict is red"
    assert mesh.cmap(mesh.norm(0))[:3] == pytest.approx((1, 1, 1), abs=0.04), "0 is white"
    assert heat_map.yaxis_inverted()

    raw, _, validation = loss.lines[:3]
    np.testing.assert_allclose(raw.get_xydata(), [(r.step, r.loss) for r in train])
    np.testing.assert_allclose(validation.get_xydata(), [(4, 1.5)])
    np.testing.assert_allclose(reg.lines[0].get_ydata(), [r.reg for r in train])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [50, 50, 50])
    assert [line.get_xdata()[0] for line in (loss.lines[-1], accuracy.lines[-1])] == [4, 4]


def all_axes(drawn):
    return [axes for part in drawn.subfigs for axes in part.axes]


def test_without_a_regularizer_there_is_no_heat_map():
    records = [dataclasses.replace(record, reg=0.0) for record in a_run(groups=())]
    drawn = figure.draw(records, LAYERS, title="plain")
    assert [axes.get_title() for axes in drawn.axes] == ["loss", "accuracy, %"]


def test_a_gradient_that_is_not_finite_is_a_hole_in_the_heat_map():
    first, *rest = a_run(groups=("conv1", "bn1"))
    groups = of_groups(conv1=math.nan, bn1=0.5)
    drawn = figure.draw([dataclasses.replace(first, groups=groups), *rest], LAYERS, title="")
    (mesh,) = (
        each
        for axes in all_axes(drawn)
        for each in axes.collections
        if each.get_array() is not None and each.get_array().size == 6
    )
    assert np.ma.getmaskarray(mesh.get_array()).reshape(2, 3).tolist() == [
        [True, False, False],
        [False, False, False],
    ]


def test_long_runs_are_shown_as_means_of_neighbouring_steps():
    steps, groups, cosine = figure.cosines(list(a_run(4000, groups=("conv1",), every=1)), LAYERS)
    assert (len(steps), groups, cosine.shape) == (4000, ["conv1"], (1, 4000))
    drawn = figure.Figure()
    figure.draw_cosines(drawn.add_subplot(), steps, groups, cosine)
    mesh = next(each for each in drawn.axes[0].collections if each.get_array() is not None)
    np.testing.assert_allclose(
        np.ravel(mesh.get_array()), cosine.reshape(-1, 10).mean(axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("blocks", [1, 3, 8, 40, 200])
def test_row_labels_can_be_read_however_deep_the_network(blocks):
    groups = ["conv1", *(f"layer1/{n}/conv{i}" for n in range(blocks) for i in (1, 2, 3))]
    rows, labels, borders = figure.row_labels(groups, room=60)
    assert len(labels) <= 60
    assert np.all(np.diff(rows) >= len(groups) / 60)
    if len(groups) <= 60:
        assert labels == groups
        np.testing.assert_allclose(rows, np.arange(len(groups)) + 0.5)
        assert borders == []
    for row, label in zip(rows, labels, strict=True):
        assert groups[int(row)].startswith(label)


def test_groups_of_any_scope_come_in_the_order_of_the_network():
    leaves = ["bn1/scale", "layer2/0/conv1/kernel", "conv1/kernel", "layer1/0/bn1/bias"]
    assert figure.in_network_order(leaves, LAYERS) == [
        "conv1/kernel",
        "bn1/scale",
        "layer1/0/bn1/bias",
        "layer2/0/conv1/kernel",
    ]
    assert figure.in_network_order(["layer2", "head", "layer1", "conv1"], LAYERS) == [
        "conv1",
        "layer1",
        "layer2",
        "head",
    ]
    assert figure.in_network_order(["global"], LAYERS) == ["global"]


@pytest.mark.parametrize("n_classes", [2, 12, 13, 40, 41, 300])
def test_confusion_is_drawn_as_shares_of_the_true_class(n_classes):
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 5, (n_classes, n_classes))
    matrix[0] = 0
    names = [f"${n} of a class with quite a long name" for n in range(n_classes)]
    drawn = figure.draw_confusion(matrix, names)
    drawn.savefig(io.BytesIO(), dpi=30)
    axes, _ = drawn.axes
    shares = axes.images[0].get_array()
    assert np.isnan(np.ma.filled(shares, np.nan)[0]).all(), "no images of the first class"
    np.testing.assert_allclose(shares[1:], 100 * matrix[1:] / matrix[1:].sum(1, keepdims=True))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == -(-n_classes // -(-n_classes // 40)) <= 40
    assert max(len(label) for label in labels) <= 20
    numbers = [text for text in axes.texts if text.get_text()]
    assert len(numbers) == (np.count_nonzero(matrix) if n_classes <= 12 else 0)


def test_the_most_confused_pairs_are_wrong_ones_and_the_most_frequent_first():
    matrix = np.array([[9, 3, 0], [5, 9, 0], [1, 3, 9]])
    assert figure.most_confused(matrix, 10) == [(1, 0, 5), (0, 1, 3), (2, 1, 3), (2, 0, 1)]
    assert figure.most_confused(matrix, 1) == [(1, 0, 5)]
    assert figure.most_confused(np.eye(3, dtype=int), 10) == []


# The report


def the_metrics(confusion, *, loss=0.5, accuracy=None, top5=1.0, balanced_accuracy=None):
    """Metrics with this confusion matrix."""
    images, right = confusion.sum(axis=1), np.diagonal(confusion)
    recalls = right / np.where(images, images, np.nan)
    return metrics.Metrics(
        n=int(images.sum()),
        loss=loss,
        calibrated_loss=0.9 * loss,
        accuracy=right.sum() / images.sum() if accuracy is None else accuracy,
        top5=top5,
        balanced_accuracy=np.nanmean(recalls) if balanced_accuracy is None else balanced_accuracy,
        images=images,
        recalls=recalls,
        confusion=confusion,
    )


def the_validation(loss=0.75):
    confusion = np.array([[4, 0, 0], [1, 1, 0], [1, 1, 0]], np.int32)
    return the_metrics(confusion, loss=loss, accuracy=0.625, balanced_accuracy=0.5)


def an_outcome(tmp_path, **changes):
    confusion = np.array([[3, 1, 0], [0, 4, 0], [2, 0, 0]], np.int32)
    config = Config(
        DataConfig(dataset=str(tmp_path / "pets")),
        model=ModelConfig(init="weights.safetensors"),
        transfer=TransferConfig(regularizer="l2_sp", rule="dtnh", reg_weight=0.25),
        training=TrainingConfig(steps=6, evaluate_every=2),
    )
    values = {
        "config": config,
        "architecture": "cifar_resnet8",
        "throughput": Throughput(seconds=3725.4, images_per_second=512.3, waiting=0.02),
        "best_step": 4,
        "validation": the_validation(),
        "test": the_metrics(confusion),
        "class_names": ("cat", "[dog]", "ant|bee"),
        "records": tuple(a_run()),
        "layer_order": LAYERS,
    }
    return Outcome(**values | changes)


def reported(outcome, out):
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    report.report(outcome, out, console)
    return console.file.getvalue()


def test_the_report_says_the_numbers_of_the_run(tmp_path):
    outcome = an_outcome(tmp_path)
    printed = reported(outcome, tmp_path / "new" / "out")
    assert all(len(line) <= 80 for line in printed.splitlines()), "it fits a terminal"
    words = " ".join(printed.split())
    for expected in (
        "data set pets, 3 classes",
        "network cifar_resnet8 from weights.safetensors",
        "regularizer l2_sp, λ = 0.25",
        "rule dtnh, scope layer",
        "chosen step 4 of 6",
        "time 1:02:05 at 512 images/s",
        "waiting 2.0 %",
        "images 8 10",
        "accuracy 62.5 % 70.0 %",
        f"balanced accuracy 50.0 % {100 * (3 / 4 + 1 + 0) / 3:.1f} %",
        "loss 0.750 0.500",
        "The hardest classes: ant|bee 0.0 %, cat 75.0 %.",
        "conflicted in 40.0 % of steps and groups",
        "The rule removed 10.0 %",
    ):
        assert expected in words
    assert "top-5" not in words, "with three classes it says nothing"
    assert "The last step was the best" not in words
    assert "waited" not in words


def test_the_report_writes_its_files(tmp_path):
    outcome = an_outcome(tmp_path, validation=the_validation(math.nan))
    printed = reported(outcome, tmp_path / "out")
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["confusion.png", "curves.png", "summary.json", "summary.md"]
    for name in files:
        assert name in printed

    found = strict_json(files["summary.json"].read_text())
    assert found["validation"] == {
        "n": 8,
        "loss": None,
        "calibrated_loss": None,
        "accuracy": 0.625,
        "top5": 1.0,
        "balanced_accuracy": 0.5,
    }
    assert found["test"]["accuracy"] == 0.7
    assert found["test"]["accuracy_of_class"] == {"cat": 0.75, "[dog]": 1.0, "ant|bee": 0.0}
    assert (found["seconds"], found["images_per_second"]) == (3725.4, 512.3)
    assert (found["waiting"], found["best_step"]) == (0.02, 4)
    assert (found["conflict"], found["removed"]) == (0.4, 0.1)
    train = [record for record in outcome.records if record.split == "train"]
    for group, rate in found["conflict_of_group"].items():
        assert rate == pytest.approx(
            np.mean([r.groups[group]["conflict"] for r in train]), rel=1e-5
        )
    assert list(found["conflict_of_group"]) == list(LAYERS[:-1])
    assert found["versions"]["jax"] == jax.__version__
    assert str(len(jax.devices())) in found["devices"]
    assert "l2_sp" in json.dumps(found["config"])

    text = files["summary.md"].read_text()
    assert "| rule | dtnh, scope layer |" in text
    assert "| accuracy | 62.5 % | 70.0 % |" in text
    assert "70.0 % of 10 images" in text
    for name in ("curves.png", "confusion.png"):
        with image_module.open(files[name]) as image:
            assert min(image.size) > 300


# What folders can be called, and what neither every terminal nor every font can show.
NAMES = (
    "花",
    "кот λ",
    "emoji🌸",
    "$1_to_$100_bills",
    r"$\frac$",
    "caf\udce9",
    "line\nbreak",
    "*bold* _it_ `x` <b> [link](x) | ~~no~~",
    "[bold]red[/bold] [/]",
    ":car:",
    "\x1b[31mred",
    "a" * 60,
)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_name_is_written_drawn_and_printed(tmp_path, encoding, monkeypatch):
    """On a terminal that knows few characters, and with warnings as errors."""
    confusion = np.ones((len(NAMES), len(NAMES)), np.int32)
    outcome = an_outcome(tmp_path, class_names=NAMES, test=the_metrics(confusion))
    config = dataclasses.replace(outcome.config, data=DataConfig(dataset="$1 花 $2 \udce9"))
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding))
    text.print_anything()
    report.report(dataclasses.replace(outcome, config=config), tmp_path / "out")
    evaluate.report(outcome.test, NAMES, tmp_path / "out", text.plain_console())
    for name in NAMES:
        prediction = predict.Prediction(tmp_path / name, [(name, 0.5)])
        print(predict.as_text(prediction), predict.as_json(prediction), flush=True)

    printed = raw.getvalue().decode(encoding)
    assert "\x1b" not in printed
    for name in NAMES:
        if name.isascii() and name.isprintable() and len(name) < 50:
            assert name in printed
    found = strict_json((tmp_path / "out" / "summary.json").read_text())
    assert tuple(found["test"]["accuracy_of_class"]) == NAMES
    found = strict_json((tmp_path / "out" / "evaluation.json").read_text())
    assert tuple(found["accuracy_of_class"]) == NAMES
    lines = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8").splitlines()
    assert all(line.count(" | ") in (1, 2) for line in lines if line.startswith("|"))
    for file in ("curves.png", "confusion.png"):
        with image_module.open(tmp_path / "out" / file) as image:
            image.load()


def test_what_fails_costs_only_what_comes_after(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        report.report(an_outcome(tmp_path), tmp_path / "out", Console(file=Full()))
    assert len(list((tmp_path / "out").iterdir())) == 4
    monkeypatch.setattr(report, "draw", None)
    with pytest.raises(TypeError):
        report.report(an_outcome(tmp_path), tmp_path / "other")
    assert len(list((tmp_path / "other").iterdir())) == 2


def test_labels_say_what_the_font_has_and_tell_classes_apart():
    assert figure.drawable("é λ $x$") == "é λ $x$"
    assert figure.drawable("花\n\udce9") == r"\u82b1\n\xe9"
    labels = {figure.shortened(f"a long beginning, then {end}") for end in ("one", "another")}
    assert len(labels) == 2
    assert max(map(len, labels)) <= 20
    alike = [f"a beginning, {middle} and an end of the same" for middle in ("one", "other")]
    assert figure.shortened(alike[0]) == figure.shortened(alike[1])
    labels = figure.short_names([*alike, "short"])
    assert len(set(labels)) == 3
    assert labels[2] == "short"


@pytest.mark.parametrize("width", [30, 80])
def test_a_narrow_terminal_tells_long_names_apart(width):
    names = [f"{'x' * 100}{end}" for end in ("one", "two")]
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(report.as_rich([["class", "images"], *([name, "3"] for name in names)]))
    printed = "".join(line.split("  ")[0].strip() for line in console.file.getvalue().splitlines())
    assert all(name in printed for name in names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a_b weighted_sum", "a_b weighted_sum"),
        ("_a_ *b*", r"\_a\_ \*b\*"),
        ("x|y <b> [1]", r"x\|y \<b\> \[1\]"),
        ("l\nb", r"l\\nb"),
    ],
)
def test_markdown_shows_names_as_they_are(name, expected):
    assert text.markdown(name) == expected


def test_the_report_tells_what_to_do_about_it(tmp_path):
    throughput = Throughput(seconds=1.0, images_per_second=8.0, waiting=0.34)
    printed = reported(an_outcome(tmp_path, best_step=6, throughput=throughput), tmp_path)
    assert "The last step was the best" in printed
    assert "waited for data for 34.0 % of the time" in " ".join(printed.split())


def test_without_a_regularizer_there_is_no_talk_of_conflict(tmp_path):
    outcome = an_outcome(tmp_path, records=tuple(a_run(groups=())))
    config = dataclasses.replace(outcome.config, transfer=TransferConfig(regularizer="none"))
    printed = reported(dataclasses.replace(outcome, config=config), tmp_path)
    assert "regularizer  none" in printed
    assert "conflict" not in printed
    assert "scope" not in printed
    assert strict_json((tmp_path / "summary.json").read_text())["conflict"] is None


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (10, 10), (812, 1000)])
def test_the_interval_is_wilsons(right, n):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert report.interval(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


# Evaluation and prediction

CLASSES = ("wasp", "ant", "bee")  # not in the order of the folders
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MODEL = ResNetConfig("cifar_resnet8", n_classes=3, width=4)


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)

    def random(leaf):
        if leaf.ndim > 1:
            return rng.normal(0, 1.5 / math.sqrt(leaf.size / leaf.shape[-1]), leaf.shape)
        return rng.uniform(0.5, 1.5, leaf.shape)

    shapes = jax.eval_shape(lambda: resnet.init(MODEL, 0))
    return jax.tree.map(lambda leaf: random(leaf).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def images():
    """Five images of each class and split, of noise and a colour."""
    rng = np.random.default_rng(0)
    return {
        (split, name, index): np.clip(
            rng.integers(0, 256, 3) + rng.integers(-60, 60, (8, 8, 3)), 0, 255
        ).astype(np.uint8)
        for split, name, index in itertools.product(("train", "test"), CLASSES, range(5))
    }


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("insects")
    for (split, name, index), image in images.items():
        path = root / split / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(image).save(path)
    return root


def exported(path, network, **changes):
    metadata = {"class_names": CLASSES, "image_size": 8, "resize": 8, "mean": MEAN, "std": STD}
    metadata = {name: json.dumps(value) for name, value in (metadata | changes).items() if value}
    pretrained.export(path, MODEL, network, metadata=metadata)
    return str(path)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("weights") / "model.safetensors", network)


def probabilities_of(network, images):
    standardised = (np.stack(images) / 255 - np.array(MEAN)) / np.array(STD)
    output = resnet.apply(MODEL, network, jnp.asarray(standardised, jnp.float32), train=False)
    logits = np.asarray(output.logits, np.float64)
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_evaluate_counts_by_class_names_whatever_their_order(
    weights, folder, network, images, batch_size, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ["--weights", weights, "--dataset", str(folder), "--out", str(out)]
    assert evaluate.main([*arguments, "--workers", "0", "--batch-size", str(batch_size)]) == 0

    of_test = {key: image for key, image in images.items() if key[0] == "test"}
    probabilities = probabilities_of(network, list(of_test.values()))
    predicted = [CLASSES[index] for index in probabilities.argmax(axis=-1)]
    true = [name for _, name, _ in of_test]
    assert len(set(predicted)) > 1
    found = strict_json((out / "evaluation.json").read_text())
    assert found["n"] == 15
    assert found["accuracy"] == pytest.approx(
        sklearn_metrics.accuracy_score(true, predicted), rel=1e-5
    )
    of_true = [p[CLASSES.index(name)] for p, name in zip(probabilities, true, strict=True)]
    assert found["loss"] == pytest.approx(-np.mean(np.log(of_true)), rel=1e-4)
    recalls = sklearn_metrics.recall_score(true, predicted, labels=CLASSES, average=None)
    expected = dict(zip(CLASSES, recalls, strict=True))
    assert found["accuracy_of_class"] == pytest.approx(expected, rel=1e-5)
    assert (out / "confusion.png").stat().st_size > 5000

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [line for line in lines if line and line[0] in CLASSES]
    assert sorted(line[0] for line in table) == sorted(CLASSES)
    accuracies = [float(line[2]) for line in table]
    assert accuracies == sorted(accuracies), "the worst classes come first"


def test_classes_of_other_names_are_an_error_that_lists_them():
    np.testing.assert_array_equal(evaluate.matched(("caf\u00e9", "b"), ("b", "cafe\u0301")), [1, 0])
    np.testing.assert_array_equal(evaluate.matched(("a", "b", "c"), ("c", "a", "b")), [1, 2, 0])
    with pytest.raises(ValueError, match="1 only in the data: d; 1 only in the weights: b"):
        evaluate.matched(("a", "d"), ("a", "b"))
    with pytest.raises(ValueError, match=r"are 1 only in the weights: b\. Rename"):
        evaluate.matched(("a",), ("a", "b"))


def test_a_table_of_many_classes_has_the_worst_and_says_what_is_left_out(capsys):
    confusion = np.diag(np.arange(30)).astype(np.int32)
    confusion[:, 0] += 1
    found = the_metrics(confusion)
    names = [f"class{n}" for n in range(30)]
    console = Console(file=io.StringIO(), width=80)
    evaluate.report(found, names, None, console)
    text = console.file.getvalue()
    assert "class1 " in text
    assert "class29" not in text
    assert "... and 10 classes" in text
    _, first, second, *_ = evaluate.class_rows(found, names)
    assert first == ["class1", "2", "50.0 %", "class0"]
    assert second == ["class2", "3", "66.7 %", "class0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": None, "std": None}, "lacks class_names, std"),
        ({"class_names": ("ant", "bee")}, "has 3 logits, but names 2 classes"),
        ({"class_names": 3}, "is not that of a fine-tuning: 'int' object"),
        ({"image_size": "8"}, "is not that of a fine-tuning"),
        ({"mean": "grey"}, 'mean in the header of the weights must be three numbers; got "grey"'),
        ({"std": (1, 2)}, "std in the header of the weights must be three numbers; got [1, 2]"),
    ],
)
def test_weights_that_do_not_say_enough_are_an_error(
    network, folder, tmp_path, capsys, changes, message
):
    weights = exported(tmp_path / "model.safetensors", network, **changes)
    assert evaluate.main(["--weights", weights, "--dataset", str(folder)]) == 1
    assert predict.main(["--weights", weights, str(folder)]) == 1
    assert capsys.readouterr().err.count(message) == 2


@pytest.mark.parametrize("name", ["confusion.png", "evaluation.json"])
def test_evaluate_writes_over_nothing_unless_told_to(weights, folder, tmp_path, capsys, name):
    """Neither over another evaluation nor over the figure of the run."""
    (tmp_path / name).write_text("of a run")
    arguments = ["--weights", weights, "--dataset", str(folder), "--out", str(tmp_path)]
    assert evaluate.main(arguments) == 1
    assert f"{tmp_path} has {name} of an earlier evaluation or run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of a run"
    assert evaluate.main([*arguments, "--overwrite", "--workers", "0"]) == 0
    assert (tmp_path / name).read_bytes() != b"of a run"


def test_evaluate_names_what_is_not_there(weights, tmp_path, capsys):
    assert evaluate.main(["--weights", weights, "--dataset", str(tmp_path / "no")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    arguments = ["--weights", str(tmp_path / "no.safetensors"), "--dataset", str(tmp_path)]
    assert evaluate.main(arguments) == 1
    assert "no.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [4, 64])
def test_predict_says_the_classes_of_each_file(
    weights, folder, network, images, batch_size, capsys
):
    place = folder / "test" / "bee"
    arguments = ["--weights", weights, "--batch-size", str(batch_size), "--json", "--top", "2"]
    assert predict.main([*arguments, str(place), str(folder / "test" / "ant" / "0.png")]) == 0
    found = [strict_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["file"] for each in found] == [
        *(str(place / f"{index}.png") for index in range(5)),
        str(folder / "test" / "ant" / "0.png"),
    ]
    shown = [images["test", "bee", index] for index in range(5)] + [images["test", "ant", 0]]
    for each, expected in zip(found, probabilities_of(network, shown), strict=True):
        best = np.argsort(-expected)[:2]
        assert [entry["class"] for entry in each["classes"]] == [CLASSES[i] for i in best]
        np.testing.assert_allclose(
            [entry["probability"] for entry in each["classes"]], expected[best], rtol=1e-4
        )


def test_predict_prints_a_line_for_a_person(weights, folder, network, images, capsys):
    file = folder / "test" / "wasp" / "3.png"
    assert predict.main(["--weights", weights, str(file)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (expected,) = probabilities_of(network, [images["test", "wasp", 3]])
    best = int(np.argmax(expected))
    assert line.startswith(f"{file}: {CLASSES[best]} {100 * expected[best]:.1f} %, ")
    assert line.count("%") == 3, "there are but three classes"


def test_predict_names_and_skips_what_it_cannot_read(weights, folder, tmp_path, capsys):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / "sub").mkdir()
    good = tmp_path / "sub" / "good.PNG"
    good.write_bytes((folder / "test" / "ant" / "0.png").read_bytes())
    missing = tmp_path / "missing.jpg"
    assert predict.main(["--weights", weights, str(tmp_path), str(missing)]) == 1
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert line.startswith(f"{good}: ")
    skipped = printed.err.splitlines()
    assert [line.split(":")[0] for line in skipped] == [
        f"Left out of {tmp_path}",
        f"Skipped {tmp_path / 'empty.jpg'}",
        f"Skipped {tmp_path / 'text.png'}",
        f"Skipped {missing}",
        "3 of 4 files were skipped.",
    ]


def test_predict_wants_images_and_finite_weights(weights, network, folder, tmp_path, capsys):
    assert predict.main(["--weights", weights, str(tmp_path)]) == 1
    assert f"no image in the folder {tmp_path}" in capsys.readouterr().err
    head = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), network.params["head"])
    broken = network._replace(params=network.params | {"head": head})
    weights = exported(tmp_path / "model.safetensors", broken)
    assert predict.main(["--weights", weights, str(folder / "test" / "ant" / "0.png")]) == 1
    assert "logits are not finite" in capsys.readouterr().err
    for wrong in (["--top", "0"], ["--batch-size", "0"]):
        with pytest.raises(SystemExit):
            predict.main(["--weights", weights, *wrong, str(tmp_path)])
    with pytest.raises(SystemExit):
        predict.main(["--weights", weights])
