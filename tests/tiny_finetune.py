"""A tiny fine-tuning: images of three colours, and a network that a few steps of training fit.

As a script it is a run, which kills itself: `tiny_finetune.py WHERE OUT ...`
with `step`, `checkpoint` or `nowhere`, and then the command line of the run.
"""

import dataclasses
import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from examples.common import pretrained, resnet
from examples.common.resnet import ResNetConfig
from examples.finetune import train
from examples.finetune.__main__ import main, parse
from examples.finetune.batches import load
from examples.finetune.checkpoint import Checkpoints, Progress
from examples.finetune.logs import Record, read

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}
N_SOURCE_CLASSES = 5


def make_images(directory: Path, per_class: int = 12, size: int = 10) -> Path:
    """Writes train and test images of three colours, with noise."""
    rng = np.random.default_rng(0)
    for split, n_images in (("train", per_class), ("test", 4)):
        for name, colour in COLOURS.items():
            folder = directory / split / name
            folder.mkdir(parents=True)
            for number in range(n_images):
                pixels = np.clip(rng.normal(colour, 60, (size, size, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return directory


def make_weights(path: Path) -> Path:
    """Writes a source network with random weights."""
    config = ResNetConfig("cifar_resnet8", N_SOURCE_CLASSES, width=4)
    pretrained.export(path, config, jax.device_get(resnet.init(config, 1)), metadata={})
    return path


def make(directory: Path) -> Path:
    """Writes images and weights."""
    make_images(directory / "images")
    make_weights(directory / "source.safetensors")
    return directory


def arguments(directory: Path, out: Path, *more: str) -> list[str]:
    """A command line for a run of six steps that is saved after every second."""
    settings = {
        "--preset": "cpu",
        "--dataset": directory / "images",
        "--init": directory / "source.safetensors",
        "--image-size": 8,
        "--validation": 2,
        "--rule": "bounded_dtnh",  # the default has trial runs
        "--steps": 6,
        "--batch-size": 8,
        "--evaluate-every": 2,
        "--evaluation-batch-size": 8,
        "--log-every": 1,
        "--workers": 2,
        "--out": out,
    }
    return [str(word) for pair in settings.items() for word in pair] + list(more)


def opened(directory: Path, out: Path, *more: str) -> tuple[Checkpoints, train.Program]:
    """The checkpoints of a run, and its program."""
    config = parse(arguments(directory, out, *more))
    task = train.setup(config, load(config))
    return Checkpoints(out / "checkpoints", config, task.made_from), train.make_program(task)


def last_checkpoint(directory: Path, out: Path, *more: str) -> tuple[Progress, train.TrainState]:
    """How far a run has come, and all arrays of its state."""
    checkpoints, program = opened(directory, out, *more)
    with checkpoints:
        restored = checkpoints.restore_last(program.like)
    assert restored is not None
    return restored[0], jax.device_get(restored[1])


def assert_same(these: tuple[Progress, Any], those: tuple[Progress, Any]) -> None:
    """Two last checkpoints are the same bit for bit, but for the clock."""
    one, other = (each._replace(meter=each.meter["pending"]) for each, _ in (these, those))
    if not (one.evaluated and other.evaluated):  # then the best may not have been known yet
        one, other = (each._replace(best=None, evaluated=True) for each in (one, other))
    assert one == other
    assert jax.tree.structure(these[1]) == jax.tree.structure(those[1])
    for this, that in zip(jax.tree.leaves(these[1]), jax.tree.leaves(those[1]), strict=True):
        np.testing.assert_array_equal(this, that)


def timeless(out: Path) -> list[Record]:
    """The records of a run, without the clock."""
    nothing = {"images_per_second": None, "waiting": None}
    return [dataclasses.replace(record, **nothing) for record in read(out)]


def kill_at_step(step: int) -> None:
    """Kills the process when the step is asked for."""
    make_program = train.make_program

    def with_kill(task):
        program, calls = make_program(task), itertools.count(1)

        def train_step(*arguments):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return program.train(*arguments)

        return program._replace(train=train_step)

    train.make_program = with_kill


def kill_in_checkpoint(step: int, directory: Path) -> None:
    """Kills the process as soon as it begins to write the step's checkpoint."""

    def watch() -> None:
        while not any(directory.glob(f"{step}.orbax-checkpoint-tmp*")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    where, out, command = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if where == "step":
        kill_at_step(4)
    elif where == "checkpoint":
        kill_in_checkpoint(4, out / "checkpoints")
        kill_at_step(6)
    sys.exit(main(command))
