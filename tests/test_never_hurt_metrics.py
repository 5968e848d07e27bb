"""What a result says besides the accuracy on the target."""

# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

from dataclasses import replace

import jax
import needs
import numpy as np
import pytest

needs.examples()

from test_never_hurt import CELL, prepared
from test_never_hurt_rivals import PLAIN, networks
from tiny_finetune import make_images

import dtnh_jax
from examples.common import resnet
from examples.never_hurt import images, runner, shifts, sources, train
from examples.never_hurt.images import Images

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


def test_shifts():
    rng = np.random.default_rng(0)
    some = Images(rng.integers(60, 196, (5, 16, 16, 3), np.uint8), np.arange(5))
    found = shifts.shifted(some)
    noise, blur, contrast = found.images.reshape(3, 5, 16, 16, 3).astype(float)
    before = some.images[found.labels[:5]].astype(float)  # labels tell which image it is
    assert found.images.dtype == np.uint8
    assert sorted(found.labels[:5]) == list(range(5))
    assert found.labels.tolist() == 3 * found.labels[:5].tolist()
    assert np.std(noise - before) == pytest.approx(255 * 0.08, rel=0.05)
    for image, other in zip(before, contrast, strict=True):
        assert np.std(other) == pytest.approx(0.4 * np.std(image), rel=0.02)
        assert np.mean(other) == pytest.approx(np.mean(image), abs=0.1)
    for image, other in zip(before, blur, strict=True):
        assert np.abs(np.diff(other, axis=0)).mean() < 0.5 * np.abs(np.diff(image, axis=0)).mean()
        assert np.mean(other) == pytest.approx(np.mean(image), abs=3)
        # Colours and images are not mixed.
        assert np.std(other[..., 0] - other[..., 1]) > 5
    jax.tree.map(np.testing.assert_array_equal, found, shifts.shifted(some))
    assert len(shifts.shifted(some, most=2).labels) == 6


def test_shifts_do_not_wrap_around():
    white = Images(np.full((1, 8, 8, 3), 255, np.uint8), np.zeros(1, int))
    assert shifts.shifted(white).images.min() > 128


def test_some_test_images(data):
    everything = images.read(data, "colours", 8).test
    some = images.read_test(data, "colours", 8, most=5)
    assert len(some.labels) == 5
    whole = images.read_test(data, "colours", 8)
    jax.tree.map(np.testing.assert_array_equal, whole, everything)
    kept = {(each.tobytes(), label) for each, label in zip(*everything, strict=True)}
    assert all(pair in kept for pair in ((x.tobytes(), y) for x, y in zip(*some, strict=True)))
    assert len(set(some.labels)) > 1


def test_only_sources_with_their_labels_have_a_task(data):
    for source in ("random_labels_colours", "random_weights", "colours.safetensors"):
        assert sources.own_test_images(source, data, 8) is None
    assert sources.own_test_images("colours", data, 8) is not None


def test_metrics_are_of_the_fine_tuned_network(data, tmp_path, monkeypatch):
    seen = networks(monkeypatch)
    cell = replace(PLAIN, source="colours")
    places = runner.Places(data, None, tmp_path / "r.jsonl", tmp_path)
    ready = runner.prepare(cell, places, pretraining_steps=3)
    [found] = train.run([ready])
    config = resnet.ResNetConfig(cell.architecture, 3)
    network = seen[0]
    of_shifts = [
        sources.accuracy(config, network, Images(*part))
        for part in zip(*(np.split(x, 3) for x in shifts.shifted(ready.splits.test)), strict=True)
    ]
    assert found.shifted == pytest.approx(np.mean(of_shifts), abs=1e-4)
    # The old head on the new body; this source has the classes of the target.
    head = ready.source.network.params["head"]
    old = network._replace(params=network.params | {"head": head})
    assert found.source_accuracy == sources.accuracy(config, old, ready.splits.test)
    without = runner.prepare(replace(cell, test=False), places, pretraining_steps=3)
    assert without.source_test is None
    [untested] = train.run([without])
    assert (untested.test, untested.shifted, untested.source_accuracy) == (None, None, None)


def test_the_ratio_of_lengths():
    pair = dtnh_jax.GradientPair(
        {"body": np.array([3.0, 4.0]), "head": np.array([100.0])},
        {"body": np.array([0.0, -2.0]), "head": None},
    )
    assert float(train._length_ratio(pair)) == pytest.approx(2 / 5)


def test_ratios_of_lengths_are_in_units_of_the_weight(data):
    cells = [replace(CELL, strength=x, learning_rate=0.0) for x in (1.0, 50.0)]
    weak, strong = (train.run([prepared(cell, data)])[0] for cell in cells)
    assert len(weak.length_ratio) == 4
    assert all(ratio > 0 for ratio in weak.length_ratio)
    # With a learning rate of 0 both see the same gradients.
    np.testing.assert_allclose(strong.length_ratio, 50 * np.array(weak.length_ratio), rtol=0.02)
    quarters = np.array_split(np.array([1, 2, 9, 1, 1, 7, 7, 4, np.inf]), 4)
    medians = train._by_quarter(np.concatenate(quarters), np.median)
    assert medians.tolist() == [np.median(quarter) for quarter in quarters]
