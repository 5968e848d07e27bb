# ruff: noqa: E402 (the modules under test want the packages that are asked for first)
"""The fine-tuning example, what it is given: images that cannot be read, weights, an install."""

import dataclasses
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import needs
import numpy as np
import pytest

needs.examples()

import tiny_finetune
from safetensors.numpy import load_file, save_file

from examples.common import data, objective
from examples.finetune import display, source
from examples.finetune.__main__ import parse

SIZE = source.ESTIMATION_BATCH


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_finetune.make_weights(tmp_path_factory.mktemp("weights") / "source.safetensors")


@pytest.fixture
def directory(tmp_path, weights):
    """Seventy training images: two batches of the estimates, and a few."""
    tiny_finetune.make_images(tmp_path / "images", per_class=25, size=8)
    (tmp_path / "source.safetensors").symlink_to(weights)
    return tmp_path


def loaded(directory, *options):
    config = parse(tiny_finetune.arguments(directory, directory / "out", *options))
    return config, data.load(config.data)


@pytest.mark.parametrize(
    ("n_broken", "wanted"), [(0, [32, 32]), (3, [32, 32]), (30, [32]), (60, [9]), (69, None)]
)
def test_the_estimates_are_made_of_the_images_that_can_be_read(directory, n_broken, wanted):
    config, dataset = loaded(directory, "--on-corrupt", "skip")
    assert len(dataset.train) == 69
    readable = {dataset.train[index]["image"].tobytes() for index in range(n_broken, 69)}
    for index in range(n_broken):
        (directory / "images" / dataset.train[index]["name"]).unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Left out")
        if wanted is None:
            with pytest.raises(ValueError, match="None of 69 training images can be read"):
                list(source._estimation_images(config, dataset))
            return
        batches = list(source._estimation_images(config, dataset))
    assert [len(images) for images, _ in batches] == wanted
    assert [len(labels) for _, labels in batches] == wanted
    found = [image.tobytes() for images, _ in batches for image in images]
    assert len(set(found)) == len(found)
    assert set(found) <= readable


def test_the_estimates_do_not_change_where_all_can_be_read(directory):
    config, dataset = loaded(directory)
    order = np.random.default_rng(config.training.seed).permutation(69)
    sample = dataset.train.select(order)
    batches = data.evaluation_batches(sample, config.data, batch_size=SIZE)
    for (images, labels), batch in zip(
        source._estimation_images(config, dataset), itertools.islice(batches, 2), strict=True
    ):
        np.testing.assert_array_equal(images, batch.images)
        np.testing.assert_array_equal(labels, batch.labels)


def test_the_old_head_is_needed_by_what_reads_it(directory):
    """A regularizer that gives NaN with a head of NaN needs it, as do two estimates."""
    arrays = load_file(directory / "source.safetensors")
    for name in ("linear.weight", "linear.bias"):
        del arrays[name]
    save_file(arrays, directory / "headless.safetensors")
    estimated = {"l2_sp_fisher", "co_tuning"}
    reading = {
        name
        for name, regularizer in objective.REGULARIZERS.items()
        if {"source_params", "source_output"} <= {*regularizer.needs}
    }
    assert set(source.OF_THE_OLD_HEAD) == reading | estimated
    for name in objective.REGULARIZERS:
        config, dataset = loaded(directory, "--regularizer", name)
        model = dataclasses.replace(config.model, init=str(directory / "headless.safetensors"))
        config = dataclasses.replace(config, model=model)
        if name in source.OF_THE_OLD_HEAD:
            with pytest.raises(ValueError, match="It has no head, which is needed here"):
                source.load_source(config, len(dataset.class_names))
        else:
            assert source.load_source(config, len(dataset.class_names)).config.n_classes == 1


@pytest.mark.parametrize(("size", "told"), [(32, False), (64, False), (224, True)])
def test_a_network_for_small_images_is_not_silent_about_large_ones(directory, size, told):
    config, _ = loaded(directory, "--image-size", str(size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source.load_source(config, 3)
    assert told == any("image_size is 224: use --preset cpu" in str(w.message) for w in caught)


def test_a_run_says_first_what_it_read_and_where_it_is(directory, capsys):
    (directory / "images" / "train" / "red" / "notes.txt").write_text("words")
    _, dataset = loaded(directory)
    display.introduce(dataset)
    assert capsys.readouterr().out.splitlines() == [
        f"{directory / 'images'}: 3 classes: blue, green, red",
        "  train: 69 images of 3 classes",
        "  validation: 6 images of 3 classes, held out of train",
        "  test: 12 images of 3 classes",
        "  left out: 1 not images that Pillow can open: train/red/notes.txt",
        f"devices: {len(jax.devices())} × cpu (cpu)",
    ]


@pytest.mark.parametrize(
    "module", ["finetune", "finetune.predict", "finetune.evaluate", "digits", "never_hurt"]
)
def test_without_its_packages_a_program_says_how_to_install_them(module):
    run = subprocess.run(
        [sys.executable, "-S", "-m", f"examples.{module}", "--help"],  # -S: nothing is installed
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    first, install = run.stderr.splitlines()
    assert "tyro" in first
    assert install.strip() == 'pip install -e ".[examples]"'
