"""How good a classifier is: predictions made batch by batch on the devices, metrics on the host."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import confusion_matrix

from examples.common import calibration

LAST_RANK = np.iinfo(np.int32).max


class Predictions(NamedTuple):
    """The predictions for ``n`` images.

    Attributes:
        labels: True classes, int32 ``(n,)``.
        predicted: The class with the largest logit, int32 ``(n,)``; -1 if a logit is NaN.
        rank: The number of classes before the true one, int32 ``(n,)``: 0 if it is predicted,
            ``LAST_RANK`` if a logit is NaN.
        loss: Cross-entropy, float32 ``(n,)``.
        scaled_losses: The same at each of the temperatures of ``common.calibration``, float32
            ``(n, temperatures)``.
        valid: Whether it is an image and not padding, bool ``(n,)``.
    """

    labels: Any
    predicted: Any
    rank: Any
    loss: Any
    scaled_losses: Any
    valid: Any


@dataclass(frozen=True)
class Metrics:
    """How good a classifier is on some images. Shares are from 0 to 1."""

    n: int
    """Number of images."""
    loss: float
    """Mean cross-entropy."""
    calibrated_loss: float
    """The same at the temperature where it is lowest, which does not depend on confidence."""
    accuracy: float
    """Share of the images whose class has the largest logit."""
    top5: float
    """Share of the images whose class is among the five largest logits."""
    balanced_accuracy: float
    """Mean recall of the classes that occur."""
    images: np.ndarray
    """Images of each class, ``(n_classes,)``."""
    recalls: np.ndarray
    """Recall of each class, ``(n_classes,)``; NaN for a class without images."""
    confusion: np.ndarray
    """Images by true class (row) and predicted class (column), ``(n_classes, n_classes)``.
    An image with a NaN among its logits is in no column."""

    @property
    def scalars(self) -> dict[str, float]:
        """The metrics that are one number."""
        names = ("n", "loss", "calibrated_loss", "accuracy", "top5", "balanced_accuracy")
        return {name: getattr(self, name) for name in names}


def predict(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> Predictions:
    """The predictions for one batch; pure, to be compiled.

    Of equal logits the one of the lower class ranks first, so that a constant classifier has the
    accuracy of chance. An image with a NaN among its logits counts as wrong.

    Args:
        logits: Floats ``(n, n_classes)``.
        labels: True classes, int32 ``(n,)``.
        valid: ``False`` for padding, bool ``(n,)``.

    Returns:
        The predictions.
    """
    logits = logits.astype(jnp.float32)
    labels = jnp.where(valid, labels, 0)  # padding may have labels that are no class
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None]
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    has_nan = jnp.isnan(logits).any(axis=-1)
    return Predictions(
        labels=labels,
        predicted=jnp.where(has_nan, -1, jnp.argmax(logits, axis=-1).astype(jnp.int32)),
        rank=jnp.where(has_nan, LAST_RANK, jnp.sum(before, axis=-1, dtype=jnp.int32)),
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        scaled_losses=calibration.scaled_losses(logits, labels),
        valid=valid,
    )


def score(metrics: Metrics, choose_by: str) -> float:
    """The value that the best step maximizes."""
    return -metrics.loss if choose_by == "loss" else getattr(metrics, choose_by)


def summarise(batches: Iterable[Predictions], n_classes: int) -> Metrics:
    """The metrics of all images of some batches.

    Raises:
        ValueError: If there is no image.
    """
    parts = [jax.device_get(batch) for batch in batches]
    valid = np.concatenate([part.valid for part in parts] or [np.zeros(0, bool)])
    if not valid.any():
        raise ValueError("Metrics need at least one image; got none. Is the split empty?")
    labels, predicted, rank, loss, scaled_losses, _ = (
        np.concatenate(column)[valid] for column in zip(*parts, strict=True)
    )
    images = np.bincount(labels, minlength=n_classes)
    confusion = confusion_matrix(labels, predicted, labels=np.arange(n_classes))
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        recalls = np.diagonal(confusion) / images
    return Metrics(
        n=len(labels),
        loss=float(loss.mean(dtype=np.float64)),
        calibrated_loss=float(scaled_losses.mean(axis=0, dtype=np.float64).min()),
        accuracy=float(np.mean(rank < 1)),
        top5=float(np.mean(rank < 5)),
        balanced_accuracy=float(np.nanmean(recalls)),
        images=images,
        recalls=recalls,
        confusion=confusion,
    )
