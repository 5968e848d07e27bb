"""Scikit-learn's handwritten digits: 0 to 4 are the source task, 5 to 9 the target task."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from examples.digits.config import Config

N_CLASSES = 5
TEST_PER_CLASS = 100


class Split(NamedTuple):
    """Some images of a task.

    Attributes:
        images: ``(n, 8, 8, 1)``, float32, standardised.
        labels: ``(n,)``, int32, 0 to 4.
    """

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """The splits of one seed."""

    source_train: Split
    source_held_out: Split
    target_train: Split
    target_held_out: Split


def load(cfg: Config, seed: int) -> Data:
    """Draws the splits of ``seed``.

    The test images of the target are the same for every seed, and no seed trains or validates on
    them.

    Args:
        cfg: The number of training images per class, and which images are held out.
        seed: Draws the training images.

    Returns:
        The splits, standardised by mean and standard deviation of the source's training images.

    Raises:
        ValueError: If a class has too few images for ``cfg``.
    """
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8, 1).astype(np.float32)
    rng = np.random.default_rng(seed)

    source, target = np.flatnonzero(labels < N_CLASSES), np.flatnonzero(labels >= N_CLASSES)
    test, pool = _take(TEST_PER_CLASS, target, labels, np.random.default_rng(0))
    target_train, validation = _take(cfg.images_per_class, pool, labels, rng)
    source_train, source_held_out = _take(cfg.source_images_per_class, source, labels, rng)

    mean, deviation = images[source_train].mean(), images[source_train].std()

    def split(indices: np.ndarray) -> Split:
        standardised = (images[indices] - mean) / deviation
        return Split(standardised, (labels[indices] % N_CLASSES).astype(np.int32))

    return Data(
        source_train=split(source_train),
        source_held_out=split(source_held_out),
        target_train=split(target_train),
        target_held_out=split(test if cfg.evaluate_on == "test" else validation),
    )


def with_random_labels(split: Split, seed: int) -> Split:
    """The same images with random labels."""
    rng = np.random.default_rng(seed)
    return split._replace(labels=rng.integers(N_CLASSES, size=len(split.labels), dtype=np.int32))


def _take(
    per_class: int, indices: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws some indices of each class; returns these and the rest."""
    taken, rest = [], []
    for label in np.unique(labels[indices]):
        of_class = rng.permutation(indices[labels[indices] == label])
        if len(of_class) <= per_class:
            raise ValueError(
                f"Digit {label} has {len(of_class)} images; {per_class} for training would leave "
                "none to hold out."
            )
        taken.append(of_class[:per_class])
        rest.append(of_class[per_class:])
    return np.concatenate(taken), np.concatenate(rest)
