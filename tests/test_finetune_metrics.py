# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("flax")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

from examples.finetune import metrics

FIELDS = metrics.Counts._fields
count = jax.jit(metrics.count)


def some(n, n_classes, seed=0):
    """Logits that favour the true class a little, labels, and which of them are images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n).astype(np.int32)
    logits = rng.normal(size=(n, n_classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1
    return logits, labels, rng.random(n) < 0.8


def assert_equal(these, those):
    for name in FIELDS:
        np.testing.assert_allclose(getattr(these, name), getattr(those, name), rtol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3, 5, 6, 20])
def test_metrics_are_sklearns(n_classes):
    logits, labels, valid = some(200, n_classes)
    counts = count(logits, labels, valid)
    found = metrics.summarise(counts)

    logits, labels = logits[valid].astype(np.float64), labels[valid]
    predicted, classes = logits.argmax(axis=-1), list(range(n_classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert found.n == len(labels)
    assert found.loss == pytest.approx(
        sklearn_metrics.log_loss(labels, probabilities, labels=classes), rel=1e-5
    )
    assert found.accuracy == sklearn_metrics.accuracy_score(labels, predicted)
    assert found.balanced_accuracy == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(labels, predicted)
    )
    if n_classes > 5:
        assert found.top5 == sklearn_metrics.top_k_accuracy_score(
            labels, logits, k=5, labels=classes
        )
    else:
        assert found.top5 == 1
    np.testing.assert_array_equal(
        counts.confusion, sklearn_metrics.confusion_matrix(labels, predicted, labels=classes)
    )
    np.testing.assert_allclose(
        metrics.recalls(counts),
        sklearn_metrics.recall_score(labels, predicted, labels=classes, average=None),
    )


def test_counts_of_batches_add_up_to_those_of_all_images():
    logits, labels, valid = some(60, 7)
    parts = [count(logits[i : i + 20], labels[i : i + 20], valid[i : i + 20]) for i in (0, 20, 40)]
    assert_equal(
        functools.reduce(metrics.add, parts, metrics.zeros(7)), count(logits, labels, valid)
    )
    assert {each.dtype for each in parts[0]} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_counts_of_a_batch_over_many_devices_are_those_of_one():
    logits, labels, valid = some(64, 7)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put((logits, labels, valid), NamedSharding(mesh, PartitionSpec("data")))
    assert_equal(count(*spread), count(logits, labels, valid))


@pytest.mark.parametrize("label", [0, -1, 10**6])
def test_padding_counts_nothing_whatever_it_holds(label):
    logits, labels, valid = some(30, 4)
    logits[~valid], labels[~valid] = np.nan, label
    found = count(logits, labels, valid)
    assert_equal(found, count(logits[valid], labels[valid], np.ones(valid.sum(), bool)))
    assert np.isfinite(found.loss_sum)


def test_an_image_with_nan_logits_counts_as_wrong_and_is_in_no_column():
    logits = np.zeros((4, 3), np.float32)
    logits[0, :] = np.nan  # argmax takes the first, which is the label
    logits[1, 1] = np.nan  # argmax takes a NaN for the largest
    logits[2, 2] = np.nan
    logits[3, 1] = np.inf
    counts = count(logits, np.array([0, 1, 0, 1], np.int32), np.ones(4, bool))
    assert (counts.top1, counts.top5, counts.confusion.sum()) == (1, 1, 1)
    found = metrics.summarise(counts)
    assert (found.n, found.accuracy, found.top5) == (4, 0.25, 0.25)
    assert found.balanced_accuracy == 0.25  # none of class 0's two, one of class 1's two
    assert np.isnan(found.loss)


def test_of_equal_logits_the_lower_class_is_first():
    everywhere = np.zeros((8, 8), np.float32)
    counts = count(everywhere, np.arange(8, dtype=np.int32), np.ones(8, bool))
    assert (counts.top1, counts.top5) == (1, 5), "a constant classifier gets chance"
    labels = np.array([0, 0, 0, 3, 4, 5, 6, 7], np.int32)
    counts = count(everywhere, labels, np.ones(8, bool))
    assert (counts.top1, counts.top5) == (3, 5)
    assert counts.confusion[:, 0].tolist() == [3, 0, 0, 1, 1, 1, 1, 1]


def test_balanced_accuracy_is_the_mean_over_classes_that_occur():
    logits = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 0]]
    counts = count(logits, np.array([0, 0, 0, 1, 1], np.int32), np.ones(5, bool))
    np.testing.assert_array_equal(metrics.recalls(counts), [1, 0.5, np.nan, np.nan])
    assert metrics.summarise(counts).balanced_accuracy == 0.75
    assert metrics.summarise(counts).accuracy == 0.8


def test_bfloat16_logits_are_counted_in_float32():
    logits, labels, valid = some(30, 4)
    assert count(jnp.asarray(logits, jnp.bfloat16), labels, valid).loss_sum.dtype == jnp.float32


def test_no_images_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="at least one image; got none"):
        metrics.summarise(metrics.zeros(3))
