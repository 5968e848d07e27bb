# ruff: noqa: E402 (the modules under test want the packages that are asked for first)
"""The fine-tuning example, whole runs: what comes out, and what survives a kill."""

import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from unittest import mock

import jax
import needs
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

needs.examples()

import soak_finetune
import tiny_finetune
from helpers import relative_error
from sklearn.metrics import confusion_matrix
from tiny_finetune import assert_same, last_checkpoint, opened, timeless

from examples.common import data, pretrained, resnet
from examples.common.standardisation import IMAGENET
from examples.finetune import checkpoint as checkpoint_module
from examples.finetune import preemption, train
from examples.finetune.__main__ import main, parse
from examples.finetune.checkpoint import CheckpointError, Progress
from examples.finetune.directory import DirectoryError
from examples.finetune.divergence import DivergedError
from examples.finetune.logs import read

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax's own code promotes


CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """All runs here are one program, and compiling takes nearly all of their time."""
    cache = tmp_path_factory.mktemp("cache")
    before = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in zip(CACHE, (str(cache), 0.0, 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def usual_signals():
    """A program in the background of a shell ignores Ctrl-C, and nohup ignores SIGHUP."""
    usual = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL)
    before = [signal.signal(*pair) for pair in zip(preemption.SIGNALS, usual, strict=True)]
    yield
    for number, handler in zip(preemption.SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_finetune.make(tmp_path_factory.mktemp("tiny"))


def run(directory, out, *more):
    """A run in this process, without figures."""
    with mock.patch.object(train, "report"):
        return train.run(parse(tiny_finetune.arguments(directory, out, *more)))


@pytest.fixture(scope="module")
def finished(directory, tmp_path_factory):
    """The directory of a run that nothing went wrong in, and what it returned."""
    out = tmp_path_factory.mktemp("finished") / "new" / "out"
    return out, train.run(parse(tiny_finetune.arguments(directory, out)))


def in_process(directory, out, *more, where="nowhere", n_devices=8):
    """A run in a process of its own."""
    command = [sys.executable, tiny_finetune.__file__, where, str(out)]
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {name.upper(): str(getattr(jax.config, name)) for name in CACHE}
    return subprocess.Popen(
        command + tiny_finetune.arguments(directory, out, *more),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


TRIAL = ("--rule", "bounded_sum", "--trial", "0.5")


def test_trial_runs_decide_whether_there_is_a_regularizer(directory, tmp_path, monkeypatch):
    """Without it, the run is that of --regularizer none, bit for bit."""
    monkeypatch.setattr(train.Trial, "helps", property(lambda trial: False))
    outcome = run(directory, tmp_path / "tried", *TRIAL)
    assert outcome.config.transfer.regularizer == "l2_sp"
    none = ("--rule", "bounded_sum", "--regularizer", "none")
    run(directory, tmp_path / "none", *none)
    states = [last_checkpoint(directory, tmp_path / out, *none) for out in ("tried", "none")]
    assert_same(*states)


def test_trial_runs_are_judged_on_validation_images(directory, tmp_path, monkeypatch, capsys):
    outcome = run(directory, tmp_path, *TRIAL)
    trial = outcome.trial
    assert trial.steps == 3
    for folder, loss in (("without", trial.loss_without), ("with", trial.loss_with)):
        records = read(tmp_path / "trials" / folder)
        [last] = [each.loss for each in records if each.split == "validation"]
        assert 0.8 * last < loss <= 1.0001 * last  # calibrated; rounded in the logs
    assert trial.loss_with != trial.loss_without
    assert trial.helps == (trial.loss_with < trial.loss_without)
    assert f"{trial.loss_with:.3f} with the regularizer" in capsys.readouterr().out
    # On --resume nothing is trained again.
    monkeypatch.setattr(train, "train_step", mock.Mock(side_effect=AssertionError))
    assert run(directory, tmp_path, *TRIAL, "--resume").trial == trial


def test_a_run_writes_its_files_and_they_agree(finished):
    out, outcome = finished
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "checkpoints",
        "confusion.png",
        "curves.png",
        "metrics.csv",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
        "summary.md",
        "tensorboard",
    }
    validation = {record.step: record for record in read(out) if record.split == "validation"}
    assert list(validation) == [2, 4, 6]
    best = max(validation.values(), key=lambda record: (record.accuracy, -record.step))
    assert outcome.best_step == best.step
    assert outcome.validation.accuracy == pytest.approx(best.accuracy, rel=1e-5)
    assert outcome.validation.loss == pytest.approx(best.loss, rel=1e-5)
    training = [record for record in read(out) if record.split == "train"]
    assert [record.step for record in training] == [1, 2, 3, 4, 5, 6]
    for record in training:
        assert "head" not in record.groups, "no regularizer reaches the new head"
        assert set(record.groups) < set(outcome.layer_order)
    assert training[0].cosine == 0, "L2-SP has no gradient where training begins"
    assert training[-1].cosine != 0
    assert json.loads((out / "summary.json").read_text())


def test_the_weights_that_are_written_are_those_that_were_tested(finished):
    out, outcome = finished
    written = pretrained.load(str(out / "model.safetensors"))
    assert json.loads(written.metadata["class_names"]) == list(tiny_finetune.COLOURS)
    config = outcome.config
    [batch] = data.evaluation_batches(data.load(config.data).test, config.data, batch_size=12)
    images = (batch.images / 255 - np.array(IMAGENET["mean"])) / np.array(IMAGENET["std"])
    logits = resnet.apply(
        written.config, written.network, images.astype(np.float32), train=False
    ).logits
    predicted = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(
        confusion_matrix(batch.labels, predicted, labels=range(3)), outcome.test.confusion
    )


def test_the_task_is_learnt_without_a_regularizer_too(directory, tmp_path):
    schedule = ("--steps", "40", "--learning-rate", "0.1", "--evaluate-every", "20")
    outcome = run(directory, tmp_path, *schedule, "--regularizer", "none")
    assert outcome.test.accuracy >= 0.75
    assert outcome.records[-2].loss < 0.7 < outcome.records[0].loss
    assert all(record.groups is record.cosine is None for record in outcome.records)


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_killed_run_goes_on_bit_for_bit(directory, finished, tmp_path, where):
    killed = in_process(directory, tmp_path, where=where)
    output, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, output
    before = {record.step for record in read(tmp_path)}
    assert 2 in before
    outcome = run(directory, tmp_path, "--resume")
    out, uninterrupted = finished
    assert_same(last_checkpoint(directory, tmp_path), last_checkpoint(directory, out))
    assert outcome.best_step == uninterrupted.best_step
    np.testing.assert_array_equal(outcome.test.confusion, uninterrupted.test.confusion)
    ours, theirs = (pretrained.load(str(each / "model.safetensors")) for each in (tmp_path, out))
    assert ours.metadata == theirs.metadata
    jax.tree.map(np.testing.assert_array_equal, ours.network, theirs.network)
    assert timeless(tmp_path) == timeless(out)


def stopped(directory, out, monkeypatch, *more, before, by=signal.SIGTERM):
    """The exit code of a run that is sent a signal before a micro-batch."""
    make_program = train.make_program

    def with_signal(task):
        program, calls = make_program(task), itertools.count(1)

        def train_step(*arguments):
            if next(calls) == before:
                os.kill(os.getpid(), by)
            return program.train(*arguments)

        return program._replace(train=train_step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_program", with_signal)
        return main(tiny_finetune.arguments(directory, out, *more))


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_saves_and_goes_on(
    directory, finished, tmp_path, monkeypatch, capfd, by
):
    assert stopped(directory, tmp_path, monkeypatch, before=3, by=by) == 128 + by
    printed = capfd.readouterr().err
    assert "Stopped by a signal at step 3 of 6. The state is saved; continue with" in printed
    assert ("Press Ctrl-C again" in printed) == (by == signal.SIGINT)
    assert last_checkpoint(directory, tmp_path)[0].step == 3
    run(directory, tmp_path, "--resume")
    assert_same(last_checkpoint(directory, tmp_path), last_checkpoint(directory, finished[0]))
    assert timeless(tmp_path) == timeless(finished[0])


@pytest.mark.parametrize("at", [1, 5], ids=["step 2", "step 6, the last"])
def test_a_run_that_is_told_to_stop_leaves_its_evaluation(directory, tmp_path, monkeypatch, at):
    """It saves at once, and evaluates the step when it goes on."""
    more = ("--validation", "5")  # 15 images, of which 8 fit into a batch
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(directory, whole, *more)
    make_program, calls = train.make_program, itertools.count(1)

    def with_signal(task):
        program = make_program(task)

        def evaluate(*arguments):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return program.evaluate(*arguments)

        return program._replace(evaluate=evaluate)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_program", with_signal)
        assert main(tiny_finetune.arguments(directory, parts, *more)) == 143
    assert next(calls) == at + 1, "the second batch is not evaluated"
    progress, _ = last_checkpoint(directory, parts, *more)
    assert (progress.step, progress.evaluated) == (at + 1, False)
    assert {(at + 1, "validation")}.isdisjoint((each.step, each.split) for each in read(parts))
    run(directory, parts, *more, "--resume")
    assert_same(*(last_checkpoint(directory, out, *more) for out in (parts, whole)))
    assert timeless(parts) == timeless(whole)
    weights = [pretrained.load(str(out / "model.safetensors")).network for out in (parts, whole)]
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_a_second_ctrl_c_is_not_caught():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.stop_signal() as must_stop:
        assert must_stop(1) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert must_stop(1) == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        assert must_stop(2) == signal.SIGINT, "a second signal of another kind does not matter"
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_ctrl_c_before_training_is_one_line(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load", mock.Mock(side_effect=KeyboardInterrupt))
    assert main(tiny_finetune.arguments(directory, tmp_path)) == 130
    assert capsys.readouterr().err.startswith("Interrupted.")


def test_random_kills_change_nothing(tmp_path):
    happened = soak_finetune.soak(tmp_path, kills=3, seed=3)
    assert happened["kills"] == 3


def test_held_out_images_go_on_where_they_were(directory, tmp_path, monkeypatch, capsys):
    more = ("--held-out", "0.2", "--held-out-every", "2", "--accumulate", "2", "--mesh", "4x2")
    more += ("--batch-size", "16", "--dtype", "bfloat16", "--freeze", "conv1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(directory, whole, *more)
    printed = capsys.readouterr().out
    assert "6 of 30 training images are held out." in printed, printed
    assert stopped(directory, parts, monkeypatch, *more, before=6) == 143
    progress, _ = last_checkpoint(directory, parts, *more)
    assert (progress.step, progress.data) == (3, {"next_row": 48, "held_out": {"next_row": 32}})
    run(directory, parts, *more, "--resume")
    assert_same(*(last_checkpoint(directory, out, *more) for out in (parts, whole)))
    progress, state = last_checkpoint(directory, whole, *more)
    assert progress.data["held_out"] == {"next_row": 48}, "in steps 1, 3 and 5"
    assert int(optax.tree.get(state.opt_state, "age")) == 1
    assert read(whole)[0].groups.keys() == {"global"}


def two_processes(directory, out, *more):
    """A run in two processes of two devices each."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    together = ("--mesh", "2x2", "--coordinator", address, "--processes", "2", "--process")
    processes = [
        in_process(directory, out, *more, *together, str(i), n_devices=2) for i in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def test_two_processes_that_share_weights_are_one(directory, tmp_path):
    steps = ("--steps", "10", "--evaluate-every", "5", "--keep-last", "2")
    run(directory, tmp_path / "one", *steps)
    two_processes(directory, tmp_path / "two", *steps)
    for goes_on_in_one in (False, True):
        if goes_on_in_one:
            shutil.rmtree(tmp_path / "two" / "checkpoints" / "10")
            run(directory, tmp_path / "two", *steps, "--resume")
        one, two = (last_checkpoint(directory, tmp_path / each, *steps) for each in ("one", "two"))
        assert one[0].step == two[0].step == 10
        assert one[0].data == two[0].data
        assert relative_error(two[1].network, one[1].network) <= 1e-5
        ours, theirs = (
            [record.loss for record in read(tmp_path / each) if record.split == "train"]
            for each in ("one", "two")
        )
        assert theirs == pytest.approx(ours, rel=1e-4)


def copied(finished, tmp_path):
    """A copy of the finished run, to be broken."""
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    return out


def checkpoint(out, step):
    """The directory of a checkpoint."""
    return out / "checkpoints" / str(step)


def damage(out, step):
    """Overwrites what a checkpoint has of the arrays."""
    files = [path for path in (checkpoint(out, step) / "state").rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"\\0" * path.stat().st_size)


def test_a_broken_checkpoint_is_passed_over(directory, finished, tmp_path):
    out = copied(finished, tmp_path)
    steps = sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    assert steps == [2, 6], "the best one and the last one"
    damage(out, 6)
    with pytest.warns(UserWarning, match="of step 6 .* cannot be read, and that of step 2 is"):
        run(directory, out, "--resume")
    assert_same(last_checkpoint(directory, out), last_checkpoint(directory, finished[0]))


def test_no_whole_checkpoint_is_an_error(directory, finished, tmp_path, capsys):
    out = copied(finished, tmp_path)
    damage(out, 2)
    damage(out, 6)
    assert main(tiny_finetune.arguments(directory, out, "--resume")) == 1
    assert "No checkpoint in" in capsys.readouterr().err


def test_other_settings_are_refused(directory, finished, tmp_path):
    out = copied(finished, tmp_path)
    changed = ("--resume", "--rule", "pcgrad", "--learning-rate", "0.5")
    with pytest.raises(CheckpointError) as error:
        run(directory, out, *changed)
    assert "training.learning_rate was 0.01 and is 0.5" in str(error.value)
    assert "transfer.rule was 'bounded_dtnh' and is 'pcgrad'" in str(error.value)
    assert "workers" not in str(error.value)


def test_an_earlier_run_is_not_overwritten(directory, finished, tmp_path):
    with pytest.raises(DirectoryError, match=r"earlier run\. Continue it with --resume"):
        run(directory, copied(finished, tmp_path))


@pytest.mark.parametrize("lose", [damage, lambda out, step: shutil.rmtree(checkpoint(out, step))])
def test_a_lost_best_checkpoint_leaves_the_last_one(directory, finished, tmp_path, lose):
    out = copied(finished, tmp_path)
    assert finished[1].best_step == 2
    lose(out, 2)
    (out / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"of step 2.* (missing|cannot be read)"):
        again = run(directory, out, "--resume")
    assert again.best_step == 6
    assert again.validation.loss != finished[1].validation.loss
    assert (out / "model.safetensors").exists()


def test_training_goes_on_without_the_best_checkpoint(directory, finished, tmp_path, monkeypatch):
    assert stopped(directory, tmp_path, monkeypatch, before=5) == 143
    shutil.rmtree(checkpoint(tmp_path, 2))
    with pytest.warns(UserWarning, match=r"of step 2, the best so far, is missing"):
        again = run(directory, tmp_path, "--resume")
    assert again.best_step in (5, 6)
    (_, ours), (_, theirs) = (last_checkpoint(directory, out) for out in (tmp_path, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_moved_images_and_weights_are_the_same_ones(directory, finished, tmp_path):
    out, moved = copied(finished, tmp_path), tmp_path / "moved"
    shutil.copytree(directory, moved)
    (moved / "source.safetensors").rename(moved / "other.safetensors")
    paths = ("--dataset", f"{moved / 'images'}/", "--init", str(moved / "other.safetensors"))
    again = run(directory, out, "--resume", *paths)
    np.testing.assert_array_equal(again.test.confusion, finished[1].test.confusion)


def test_changed_images_are_refused(directory, finished, tmp_path, capsys):
    out, images = copied(finished, tmp_path), tmp_path / "images"
    shutil.copytree(directory / "images", images)
    shutil.copy(images / "train" / "red" / "1.png", images / "train" / "red" / "1b.png")
    arguments = tiny_finetune.arguments(directory, out, "--resume", "--dataset", str(images))
    assert main(arguments) == 1
    assert "train/red had 10 train images and has 11" in capsys.readouterr().err
    (images / "train" / "red" / "1b.png").unlink()
    (images / "train" / "red" / "1.png").write_bytes(
        (images / "train" / "red" / "1.png").read_bytes() + b" "
    )
    with pytest.warns(UserWarning, match="their files have other sizes"):
        run(directory, out, "--resume", "--dataset", str(images))


def test_a_longer_run_is_the_same_run_if_the_schedule_allows(directory, finished, tmp_path):
    with pytest.raises(CheckpointError) as error:
        run(directory, copied(finished, tmp_path), "--resume", "--steps", "8")
    assert "training.steps was 6 and is 8" in str(error.value)
    assert "model.safetensors; its head is new" in str(error.value)
    constant, outs = ("--schedule", "constant"), (tmp_path / "once", tmp_path / "twice")
    run(directory, outs[0], *constant)
    run(directory, outs[1], *constant, "--steps", "4")
    run(directory, outs[1], *constant, "--resume")
    assert_same(*(last_checkpoint(directory, out, *constant) for out in outs))
    with pytest.raises(CheckpointError, match=r"training\.steps was 6 and is 4"):
        run(directory, outs[1], *constant, "--resume", "--steps", "4")


def test_another_version_of_the_code_is_named(directory, finished, tmp_path, monkeypatch):
    out = copied(finished, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "version", lambda: "dtnh_jax 9")
        with pytest.warns(UserWarning, match=r"another version of the code, .*this is dtnh_jax 9"):
            run(directory, out, "--resume")
        patch.setattr(checkpoint_module, "_structure", lambda state: "other")
        with pytest.raises(CheckpointError, match=r"cannot be used\. They .* this is dtnh_jax 9\."):
            run(directory, out, "--resume")


def test_a_finished_run_goes_on_to_the_same_end(directory, finished, tmp_path):
    again = run(
        directory, copied(finished, tmp_path), "--resume", "--mesh", "4x2", "--workers", "0"
    )
    assert again.best_step == finished[1].best_step
    assert again.throughput.images_per_second > 0
    np.testing.assert_array_equal(again.test.confusion, finished[1].test.confusion)


def test_a_loss_that_is_not_finite_stops_the_run(directory, tmp_path):
    more = ("--schedule", "step", "--decay-at", "0.5", "--decay-factor", "1e30")
    with pytest.raises(DivergedError, match=r"loss of step 5 is not finite\. The checkpoint of "):
        run(directory, tmp_path, *more)
    progress, state = last_checkpoint(directory, tmp_path, *more)
    assert progress.step < 5
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_a_full_disk_is_an_error_that_keeps_the_last_checkpoint(
    directory, finished, tmp_path, monkeypatch, capfd
):
    out = copied(finished, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints, program = opened(directory, out)
    with checkpoints:
        progress = Progress(7, {}, (2, 0.5), {})
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=5e5))
            with pytest.raises(CheckpointError, match=r"step 7 .* 0\.5 MB are free"):
                checkpoints.save(progress, program.init())
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"step 7 .*the last good one is of step 6"):
                checkpoints.save(progress, program.init())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in capfd.readouterr().err
    assert opened(directory, out)[0].steps == [2, 6]
