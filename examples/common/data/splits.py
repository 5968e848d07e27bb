"""Splits images into training, validation and test images."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from examples.common.data.config import DataConfig
from examples.common.data.sources import Source

_TEST_SEED = 0  # not split_seed: runs with different seeds share their test images


def split(
    published: Mapping[str, Source], config: DataConfig, class_names: Sequence[str]
) -> tuple[Source, Source, Source]:
    """Uses the published splits, and holds out missing ones class by class.

    Without a published test split, the validation split is used for testing, as is usual with
    ImageNet.

    Args:
        published: The labelled splits: ``train``, and ``validation`` or ``test`` if they exist.
        config: ``validation``, ``test``, ``images_per_class`` and ``split_seed``.
        class_names: The names of the classes, for errors.

    Returns:
        The training, the validation and the test images.

    Raises:
        ValueError: If a class has too few images.
    """
    train, validation, test = (published.get(name) for name in ("train", "validation", "test"))
    if train is None:
        raise ValueError(f"There is no train split, only {', '.join(published) or 'none'}.")
    if test is None:
        validation, test = None, validation
    if test is None:
        test, train = hold_out(train, config.test, _TEST_SEED, "test", class_names)
    if validation is None:
        seed = config.split_seed
        validation, train = hold_out(train, config.validation, seed, "validation", class_names)
    if config.images_per_class is not None:
        train = _draw(train, config.images_per_class, config.split_seed, class_names)
    return train, validation, test


def hold_out(
    source: Source, amount: float, seed: int, name: str, class_names: Sequence[str]
) -> tuple[Source, Source]:
    """Holds out images of each class.

    Args:
        source: The images.
        amount: A share of the images of each class if below 1, with at least one of each; a number
            of images otherwise.
        seed: Draws the images.
        name: The setting that gave ``amount``, for errors.
        class_names: The names of the classes, for errors.

    Returns:
        The images that are held out, and the others.

    Raises:
        ValueError: If a class has no image left.
    """
    held_out, rest = [], []
    for label, indices in _shuffled_classes(source, seed):
        count = int(amount) if amount >= 1 else max(1, round(amount * len(indices)))
        if len(indices) <= count:
            raise ValueError(
                f"Class {class_names[label]} has {len(indices)} images; to hold out {count} for "
                f"{name} would leave none to train on. Lower {name}, or add images."
            )
        held_out.append(indices[:count])
        rest.append(indices[count:])
    return source.select(np.concatenate(held_out)), source.select(np.concatenate(rest))


def _draw(source: Source, per_class: int, seed: int, class_names: Sequence[str]) -> Source:
    """Draws images of each class; with one seed, fewer images are a subset of more."""
    drawn = []
    for label, indices in _shuffled_classes(source, seed):
        if len(indices) < per_class:
            raise ValueError(
                f"Class {class_names[label]} has {len(indices)} images to train on; "
                f"images_per_class is {per_class}. Lower it, or hold out less."
            )
        drawn.append(indices[:per_class])
    return source.select(np.concatenate(drawn))


def _shuffled_classes(source: Source, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each label that occurs, with the indices of its images in random order."""
    labels = source.labels
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        yield int(label), rng.permutation(np.flatnonzero(labels == label))
