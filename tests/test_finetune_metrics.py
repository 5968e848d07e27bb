# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("flax")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

from examples.common.calibration import calibrated_loss
from examples.finetune import metrics

predict = jax.jit(metrics.predict)


def summarised(n_classes, *batches):
    return metrics.summarise([predict(*batch) for batch in batches], n_classes)


def some(n, n_classes, seed=0):
    """Logits that favour the true class a little, labels, and which of them are images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n).astype(np.int32)
    logits = rng.normal(size=(n, n_classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1
    return logits, labels, rng.random(n) < 0.8


def assert_equal(these, those):
    for name, value in vars(these).items():
        np.testing.assert_allclose(value, getattr(those, name), rtol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3, 5, 6, 20])
def test_metrics_are_sklearns(n_classes):
    logits, labels, valid = some(200, n_classes)
    found = summarised(n_classes, (logits, labels, valid))

    logits, labels = logits[valid].astype(np.float64), labels[valid]
    predicted, classes = logits.argmax(axis=-1), list(range(n_classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert found.n == len(labels)
    assert found.loss == pytest.approx(
        sklearn_metrics.log_loss(labels, probabilities, labels=classes), rel=1e-5
    )
    assert found.calibrated_loss == pytest.approx(float(calibrated_loss(logits, labels)), rel=1e-5)
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
        found.confusion, sklearn_metrics.confusion_matrix(labels, predicted, labels=classes)
    )
    np.testing.assert_allclose(
        found.recalls,
        sklearn_metrics.recall_score(labels, predicted, labels=classes, average=None),
    )


def test_metrics_of_batches_are_those_of_all_images():
    logits, labels, valid = some(60, 7)
    parts = [(logits[i : i + 20], labels[i : i + 20], valid[i : i + 20]) for i in (0, 20, 40)]
    assert_equal(summarised(7, *parts), summarised(7, (logits, labels, valid)))
    assert {each.dtype.name for each in predict(*parts[0])} == {"int32", "float32", "bool"}


def test_predictions_over_many_devices_are_those_of_one():
    logits, labels, valid = some(64, 7)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put((logits, labels, valid), NamedSharding(mesh, PartitionSpec("data")))
    assert_equal(summarised(7, spread), summarised(7, (logits, labels, valid)))


@pytest.mark.parametrize("label", [0, -1, 10**6])
def test_padding_is_not_counted_whatever_it_holds(label):
    logits, labels, valid = some(30, 4)
    logits[~valid], labels[~valid] = np.nan, label
    found = summarised(4, (logits, labels, valid))
    assert_equal(found, summarised(4, (logits[valid], labels[valid], np.ones(valid.sum(), bool))))
    assert np.isfinite(found.loss)


def test_an_image_with_nan_logits_counts_as_wrong_and_is_in_no_column():
    logits = np.zeros((4, 3), np.float32)
    logits[0, :] = np.nan  # argmax takes the first, which is the label
    logits[1, 1] = np.nan  # argmax takes a NaN for the largest
    logits[2, 2] = np.nan
    logits[3, 1] = np.inf
    found = summarised(3, (logits, np.array([0, 1, 0, 1], np.int32), np.ones(4, bool)))
    assert (found.n, found.accuracy, found.top5, found.confusion.sum()) == (4, 0.25, 0.25, 1)
    assert found.images.tolist() == [2, 2, 0]
    assert found.balanced_accuracy == 0.25  # none of class 0's two, one of class 1's two
    assert np.isnan(found.loss)
    assert np.isnan(found.calibrated_loss)


def test_of_equal_logits_the_lower_class_is_first():
    everywhere, valid = np.zeros((8, 8), np.float32), np.ones(8, bool)
    found = summarised(8, (everywhere, np.arange(8, dtype=np.int32), valid))
    assert (found.accuracy, found.top5) == (1 / 8, 5 / 8), "a constant classifier gets chance"
    labels = np.array([0, 0, 0, 3, 4, 5, 6, 7], np.int32)
    found = summarised(8, (everywhere, labels, valid))
    assert (found.accuracy, found.top5) == (3 / 8, 5 / 8)
    assert found.confusion[:, 0].tolist() == [3, 0, 0, 1, 1, 1, 1, 1]


def test_balanced_accuracy_is_the_mean_over_classes_that_occur():
    logits = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 0]]
    found = summarised(4, (logits, np.array([0, 0, 0, 1, 1], np.int32), np.ones(5, bool)))
    np.testing.assert_array_equal(found.recalls, [1, 0.5, np.nan, np.nan])
    assert found.balanced_accuracy == 0.75
    assert found.accuracy == 0.8


def test_bfloat16_logits_are_evaluated_in_float32():
    logits, labels, valid = some(30, 4)
    assert predict(jnp.asarray(logits, jnp.bfloat16), labels, valid).loss.dtype == jnp.float32


def test_no_images_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="at least one image; got none"):
        metrics.summarise([], 3)
