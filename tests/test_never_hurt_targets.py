"""Targets that are some classes of the source's data set, or have wrong labels; Co-Tuning."""

# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import math
from dataclasses import replace

import jax
import needs
import numpy as np
import pytest

needs.examples()

from test_never_hurt import CELL, prepared
from tiny_finetune import make_images

from examples.common import resnet
from examples.never_hurt import images, labels, train

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    make_images(directory / "colours")
    return directory


@pytest.fixture(autouse=True)
def standard_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    ("name", "wanted", "label"),
    [
        ("cifar10", ("cifar10", None, 0.0), "CIFAR-10 (JPEG)"),
        ("tinyimagenet:40", ("tinyimagenet", 40, 0.0), "Tiny-ImageNet, 40 classes"),
        ("cifar10~0.4", ("cifar10", None, 0.4), "CIFAR-10 (JPEG), 40% wrong labels"),
        ("dtd10:5~0.25", ("dtd10", 5, 0.25), "DTD-10, 5 classes, 25% wrong labels"),
    ],
)
def test_names(name, wanted, label):
    assert images.parsed(name) == wanted
    assert labels.label(name) == label


@pytest.mark.parametrize("name", ["", "a:1", "a:", "a~", "a~0", "a~0.0", "a~1.0", "a~0.1:2", "a~2"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="A data set is the name of a folder"):
        images.parsed(name)


def pixels(split, label=None):
    """The images of a split, or of one of its classes, as a set."""
    return {
        image.tobytes()
        for image, of_image in zip(*split, strict=True)
        if label in (None, of_image)
    }  # fmt: skip


def test_some_classes_are_unseen_and_divided(data):
    whole = images.read(data, "colours", 8)
    seen = set()
    for seed in range(4):
        found = images.read(data, "colours:2", 8, 3, seed)
        assert found.n_classes == 2
        assert np.bincount(found.train.labels).tolist() == [3, 3]
        assert np.bincount(found.test.labels).tolist() == [1, 1]
        for split in found[:3]:
            assert not pixels(split) & pixels(whole.train)  # what a source trains on
        splits = [pixels(split) for split in found[:3]]
        assert sum(map(len, splits)) == len(set.union(*splits))
        # One class is one class of the data set in every split.
        classes = []
        for label in (0, 1):
            of_class = [pixels(split, label) for split in found[:3]]
            [name] = [
                each for each in range(3) if of_class[0] | of_class[2] <= pixels(whole.test, each)
            ]
            assert of_class[1] == pixels(whole.validation, name)
            classes.append(name)
        seen.add(tuple(classes))
    assert len(seen) > 1
    for name, per_class, message in (
        ("colours:4", 3, "has 3 classes; 4 of them"),
        ("colours:2", 4, "must be between 1 and 3; got 4"),
        ("colours:2", None, "must be between 1 and 3; got None"),
    ):
        with pytest.raises(ValueError, match=message):
            images.read(data, name, 8, per_class)


def test_wrong_labels_are_wrong_and_in_training_only(data):
    clean, noisy = (images.read(data, name, 8, 6) for name in ("colours", "colours~0.5"))
    jax.tree.map(np.testing.assert_array_equal, noisy[1:3], clean[1:3])
    np.testing.assert_array_equal(noisy.train.images, clean.train.images)
    assert np.sum(noisy.train.labels != clean.train.labels) == 9
    assert set(noisy.train.labels) <= {0, 1, 2}
    assert noisy.train.labels.dtype == clean.train.labels.dtype
    again, other = (images.read(data, "colours~0.5", 8, 6, seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.train.labels, noisy.train.labels)
    is_wrong = other.train.labels != images.read(data, "colours", 8, 6, 1).train.labels
    assert np.sum(is_wrong) == 9
    subset = images.read(data, "colours:2~0.5", 8, 2)
    assert np.bincount(subset.train.labels, minlength=2).sum() == 4


def test_co_tuning_runs_with_the_relationship_of_what_is_trained_on(data):
    ready = prepared(replace(CELL, regularizer="co_tuning", held_out=2), data)
    found = train._relationship(ready)
    kept = ~np.isin(
        np.arange(18), train.batches.held_out_images(ready.cell, ready.splits.train.labels)
    )
    assert kept.sum() == 12
    output = resnet.apply(
        ready.source.config,
        ready.source.network,
        train.batches.standardise(ready.splits.train.images[kept]),
        train=False,
    )
    shares = np.asarray(jax.nn.softmax(output.logits))
    of_training = ready.splits.train.labels[kept]
    wanted = [shares[of_training == label].mean(axis=0) for label in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    [result] = train.run([ready])
    assert math.isfinite(result.train_loss)
    assert result.length_ratio[0] > 0
