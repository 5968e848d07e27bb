"""How good a classifier is, counted batch by batch so that counts add up."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Counts(NamedTuple):
    """What is counted over a batch; the counts of many batches, devices or processes add up.

    Attributes:
        loss_sum: Cross-entropy, summed over the images. float32 scalar.
        top1: Images whose class has the largest logit. int32 scalar.
        top5: Images whose class is among the five largest logits. int32 scalar.
        images: Images of each class. int32 ``(n_classes,)``.
        confusion: Images by true class (row) and predicted class (column). An image with a NaN
            among its logits has no predicted class and is in no column. int32
            ``(n_classes, n_classes)``.
    """

    loss_sum: Any
    top1: Any
    top5: Any
    images: Any
    confusion: Any


@dataclass(frozen=True)
class Metrics:
    """How good a classifier is on some images; all shares are of 1."""

    n: int
    """Number of images."""
    loss: float
    """Mean cross-entropy."""
    accuracy: float
    """Share of the images whose class has the largest logit."""
    top5: float
    """Share of the images whose class is among the five largest logits."""
    balanced_accuracy: float
    """Mean over the classes of the share that is right of each."""


def zeros(n_classes: int) -> Counts:
    """Counts of no images, to add to."""
    none = np.zeros((), np.int32)
    return Counts(
        loss_sum=np.zeros((), np.float32),
        top1=none,
        top5=none,
        images=np.zeros(n_classes, np.int32),
        confusion=np.zeros((n_classes, n_classes), np.int32),
    )


def count(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> Counts:
    """Counts of one batch; pure, made for jit.

    Of equal logits the one of the lower class is taken as larger, so that a constant classifier
    gets no more than chance. An image with a NaN among its logits counts as wrong.

    Args:
        logits: Floats ``(n, n_classes)``.
        labels: True classes, int32 ``(n,)``.
        valid: Which images count, bool ``(n,)``; the others are padding.

    Returns:
        The counts over the valid images.
    """
    logits = logits.astype(jnp.float32)
    n_classes = logits.shape[-1]
    labels = jnp.where(valid, labels, 0)  # whatever pads may stand where no class is
    classes = jnp.arange(n_classes, dtype=labels.dtype)[None]
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
    predicted = valid & ~jnp.isnan(logits).any(axis=-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    none = jnp.zeros((n_classes, n_classes), jnp.int32)
    return Counts(
        loss_sum=jnp.sum(jnp.where(valid, losses, 0)),
        top1=jnp.sum(predicted & (rank < 1), dtype=jnp.int32),
        top5=jnp.sum(predicted & (rank < 5), dtype=jnp.int32),
        images=none[0].at[labels].add(valid.astype(jnp.int32)),
        confusion=none.at[labels, jnp.argmax(logits, axis=-1)].add(predicted.astype(jnp.int32)),
    )


def add(these: Counts, those: Counts) -> Counts:
    """The counts over both sets of images."""
    return Counts(*(this + that for this, that in zip(these, those, strict=True)))


def recalls(counts: Counts) -> np.ndarray:
    """The share that is right of each class, ``(n_classes,)``; NaN for a class without images."""
    images = np.asarray(counts.images)
    right = np.diagonal(np.asarray(counts.confusion))
    return np.divide(right, images, out=np.full(images.shape, np.nan), where=images > 0)


def summarise(counts: Counts) -> Metrics:
    """The metrics of all images that were counted.

    Raises:
        ValueError: If no image was counted.
    """
    n = int(np.sum(counts.images))
    if not n:
        raise ValueError("Metrics need at least one image; got none. Is the split empty?")
    return Metrics(
        n=n,
        loss=float(counts.loss_sum) / n,
        accuracy=int(counts.top1) / n,
        top5=int(counts.top5) / n,
        balanced_accuracy=float(np.nanmean(recalls(counts))),
    )
