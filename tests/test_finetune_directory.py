# ruff: noqa: E402 (the modules under test want the packages that are asked for first)
"""The fine-tuning example, who owns an output directory, and what a run is made from."""

import resource
import shutil

import needs
import pytest

needs.examples()

import tiny_finetune

from examples.common import pretrained
from examples.common.data import DataConfig
from examples.common.files import write
from examples.finetune import directory as output
from examples.finetune import logs, train
from examples.finetune.__main__ import main, parse
from examples.finetune.batches import load
from examples.finetune.config import Config, OutputConfig
from examples.finetune.directory import DirectoryError, claim, clear
from examples.finetune.fingerprint import differences, fingerprint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_finetune.make(tmp_path_factory.mktemp("tiny"))


def config(inputs, out, *more):
    return parse(tiny_finetune.arguments(inputs, out, *more))


def refused(chosen):
    """Why a directory is refused."""
    with pytest.raises(DirectoryError) as error, claim(chosen):
        pass
    return str(error.value)


def test_a_directory_has_one_run_at_a_time(inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out"
    monkeypatch.setattr(train, "load", None)  # nothing is read before the refusal
    for more in ((), ("--resume",), ("--overwrite",)):
        with claim(config(inputs, out)):
            assert "A run that has not ended uses" in refused(config(inputs, out, *more))
            assert main(tiny_finetune.arguments(inputs, out, *more)) == 1
            assert "A run that has not ended uses" in capsys.readouterr().err
        with claim(config(inputs, out, *more)):
            pass


@pytest.mark.parametrize("name", output.RESULTS)
def test_results_without_checkpoints_are_kept(inputs, tmp_path, name):
    (tmp_path / name).write_text("precious")
    for more in ((), ("--resume",)):
        assert f"has files of an earlier run, {name}," in refused(config(inputs, tmp_path, *more))
    with claim(config(inputs, tmp_path, "--overwrite")):
        assert (tmp_path / name).read_text() == "precious", "until training begins"


def test_logs_of_a_run_without_a_checkpoint(inputs, tmp_path):
    (tmp_path / "metrics.jsonl").touch()  # a run that failed before its first record
    with claim(config(inputs, tmp_path)):
        pass
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert "metrics.jsonl" in refused(config(inputs, tmp_path))
    with claim(config(inputs, tmp_path, "--resume")):
        pass


def test_event_files_of_another_program_are_kept(inputs, tmp_path):
    events = tmp_path / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir()
    events.touch()
    assert "tensorboard" in refused(config(inputs, tmp_path))


def test_checkpoints_are_continued_or_kept(inputs, tmp_path):
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    assert "Continue it with --resume" in refused(config(inputs, tmp_path))
    with claim(config(inputs, tmp_path, "--resume")):
        pass


def test_overwriting_deletes_the_files_of_a_run_alone(tmp_path):
    ours = [*output.RESULTS, "metrics.jsonl", "metrics.csv", "tensorboard/events.out.tfevents.1"]
    theirs = ["notes.txt", "tensorboard/notes.txt", "photos/1.jpg"]
    for name in [*ours, *theirs, "checkpoints/20/state"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clear(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(theirs)


def test_inputs_are_not_outputs(inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    images = tmp_path / "images"
    for out in (images, images / "results" / "new", images / "train"):
        assert "lies in the data set" in refused(config(tmp_path, out))
    monkeypatch.chdir(images)
    assert "lies in the data set" in refused(config(tmp_path, "results", "--dataset", "."))
    assert not (images / "results").exists()
    with claim(config(tmp_path, tmp_path)):
        pass
    assert "--overwrite deletes" in refused(config(tmp_path, tmp_path, "--overwrite"))


def test_a_directory_that_is_a_file(inputs, tmp_path):
    assert "must be a directory" in refused(config(inputs, tmp_path / "out", "--out", __file__))


def test_resuming_and_overwriting_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--resume to continue a run, or --overwrite"):
        Config(DataConfig("x"), output=OutputConfig(tmp_path, resume=True, overwrite=True))


def described(inputs):
    chosen = config(inputs, inputs / "out", "--held-out", "0.2")
    return fingerprint(load(chosen), pretrained.load(str(inputs / "source.safetensors")).network)


def add(images):
    shutil.copy(images / "train" / "red" / "1.png", images / "train" / "red" / "1b.png")


def remove(images):
    (images / "test" / "blue" / "0.png").unlink()


def rename(images):
    (images / "test" / "blue" / "0.png").rename(images / "test" / "blue" / "00.png")


def rename_class(images):
    for split in ("train", "test"):
        (images / split / "blue").rename(images / split / "zebra")


def change_weights(images):
    path = images.parent / "source.safetensors"
    source = pretrained.load(str(path))
    head = {name: value + 1 for name, value in source.network.params["head"].items()}
    network = source.network._replace(params=source.network.params | {"head": head})
    pretrained.export(path, source.config, network, metadata={})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (add, ["train/red had 8 train images and has 9"]),
        (remove, ["test/blue had 4 test images and has 3"]),
        (rename, ["test/blue has other test images"]),
        (rename_class, ["the class blue is gone", "the class zebra is new"]),
        (change_weights, ["the weights of the pre-trained network are other ones"]),
    ],
)
def test_what_changed_is_named(inputs, tmp_path, change, named):
    moved = tmp_path / "moved"
    shutil.copytree(inputs, moved)
    before = described(inputs)
    assert described(moved) == before, "paths do not count"
    change(moved / "images")
    found = differences(before, described(moved))
    assert set(named) <= set(found)
    assert differences(before, before) == []


def test_many_changes_are_counted(inputs):
    before = described(inputs)
    after = before | {"images": {}}
    assert differences(before, after)[5:] == ["7 more differences in images"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large: .*table\.csv"):
            write(tmp_path / "table.csv", bytes(2**12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_the_one_that_is_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    written = [logs.Logs(tmp_path, None, tensorboard=False) for _ in range(2)]
    monkeypatch.setattr(logs, "write", fail)
    error = RuntimeError("first")
    written[0].__exit__(RuntimeError, error, None)  # raises nothing of its own
    with pytest.raises(OSError, match="no space"):
        written[1].__exit__(None, None, None)
