"""Scikit-learn's handwritten digits: many images for the source, few for the target."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from examples.digits.config import Config

N_CLASSES = 10
TEST_PER_CLASS, SOURCE_PER_CLASS, VALIDATION_PER_CLASS = 50, 95, 20


class Split(NamedTuple):
    """Some images.

    Attributes:
        images: ``(n, 8, 8, 1)``, float32, standardised.
        labels: ``(n,)``, int32, 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """The splits of one seed. No image is in two of them."""

    source: Split
    target: Split
    held_out: Split


def load(cfg: Config, seed: int) -> Data:
    """Draws the splits of ``seed``.

    The test images are the same for every seed, and no seed trains or validates on them.

    Args:
        cfg: The number of target images per class, and which images are held out.
        seed: Draws all images but those of the test.

    Returns:
        The splits, standardised by mean and standard deviation of the source's images.

    Raises:
        ValueError: If a class has too few images for ``cfg``.
    """
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8, 1).astype(np.float32)
    rng = np.random.default_rng(seed)

    test, rest = _take(TEST_PER_CLASS, np.arange(len(labels)), labels, np.random.default_rng(0))
    source, rest = _take(SOURCE_PER_CLASS, rest, labels, rng)
    validation, rest = _take(VALIDATION_PER_CLASS, rest, labels, rng)
    target, _ = _take(cfg.images_per_class, rest, labels, rng)

    mean, deviation = images[source].mean(), images[source].std()

    def split(indices: np.ndarray) -> Split:
        return Split((images[indices] - mean) / deviation, labels[indices].astype(np.int32))

    held_out = test if cfg.evaluate_on == "test" else validation
    return Data(split(source), split(target), split(held_out))


def with_permuted_labels(split: Split, seed: int) -> Split:
    """The same images with the labels in another order."""
    return split._replace(labels=np.random.default_rng(seed).permutation(split.labels))


def hold_out(split: Split, fold: int) -> tuple[Split, Split]:
    """Takes the image with the number ``fold`` of each class out; returns the rest and these."""
    # The order of _take: all images of a class, then those of the next.
    held_out = np.arange(len(split.labels)) % (len(split.labels) // N_CLASSES) == fold
    return Split(*(each[~held_out] for each in split)), Split(*(each[held_out] for each in split))


def _take(
    per_class: int, indices: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws some indices of each class; returns these, class by class, and the rest."""
    taken, rest = [], []
    for label in range(N_CLASSES):
        of_class = rng.permutation(indices[labels[indices] == label])
        if len(of_class) < per_class:
            raise ValueError(
                f"images_per_class is {per_class}, but only {len(of_class)} images of the digit "
                f"{label} are left for the target."
            )
        taken.append(of_class[:per_class])
        rest.append(of_class[per_class:])
    return np.concatenate(taken), np.concatenate(rest)
