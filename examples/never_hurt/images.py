"""Data sets of small images as arrays in memory, whole, some of their classes, with label noise."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.common.data import DataConfig, Source, centre_crop, load

VALIDATION = 0.2


class Images(NamedTuple):
    """Images ``(n, size, size, 3)``, uint8, and their labels ``(n,)``, int32."""

    images: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """The images of a data set for training, model selection and testing."""

    train: Images
    validation: Images
    test: Images
    n_classes: int


class Name(NamedTuple):
    """What the name of a data set means.

    Attributes:
        folder: The name of its folder.
        n_classes: So many of its classes, and none of the images that a source trains on; None:
            the whole data set.
        noise: The share of the training labels that are wrong.
    """

    folder: str
    n_classes: int | None
    noise: float


def parsed(name: str) -> Name:
    """Parses the name of a data set.

    Args:
        name: The name of a folder, and after it, if wanted, ``:40`` for 40 of its classes and
            ``~0.4`` for 40 % wrong labels.

    Raises:
        ValueError: If the number of classes is below 2, or the share is not between 0 and 1.
    """
    found = re.fullmatch(r"([^:~]+)(?::(\d+))?(?:~(0\.\d+))?", name)
    if found is None or int(found[2] or 2) < 2 or float(found[3] or 1) == 0:
        raise ValueError(
            "A data set is the name of a folder, and after it, if wanted, :40 for 40 of its "
            f"classes and ~0.4 for 40 % wrong labels; got {name!r}."
        )
    return Name(found[1], int(found[2]) if found[2] else None, float(found[3] or 0))


@functools.lru_cache(maxsize=16)
def read(
    root: Path, name: str, image_size: int, images_per_class: int | None = None, seed: int = 0
) -> Splits:
    """Reads a data set.

    Args:
        root: Has a folder of images for each data set.
        name: See `parsed`.
        image_size: The size to which images are resized, in pixels.
        images_per_class: Training images per class; None: all but the validation images.
        seed: Draws the classes, if only some are wanted, the validation images, the training images
            of each class, and the wrong labels.

    Returns:
        The splits.

    Raises:
        ValueError: If there is no such folder, or it has too few classes or images.
    """
    folder, n_classes, noise = parsed(name)
    splits = (
        _whole(root, folder, image_size, images_per_class, seed)
        if n_classes is None
        else _unseen(root, folder, n_classes, image_size, images_per_class, seed)
    )
    return splits._replace(train=_with_wrong_labels(splits, noise, seed)) if noise else splits


def _with_wrong_labels(splits: Splits, share: float, seed: int) -> Images:
    """The training images, so many of which have the label of another class."""
    images, labels = splits.train
    rng = np.random.default_rng((seed, 7))
    which = rng.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.copy()
    labels[which] += rng.integers(1, splits.n_classes, len(which), dtype=labels.dtype)
    return Images(images, labels % splits.n_classes)


def _unseen(
    root: Path, folder: str, n_classes: int, image_size: int, per_class: int | None, seed: int
) -> Splits:
    """Some classes of a data set, without the images that a source of this name trains on.

    The training images are from the test split, whose other images are for testing. The validation
    images are those of the source.
    """
    config = _config(root, folder, image_size)
    dataset = load(config)
    if n_classes > len(dataset.class_names):
        raise ValueError(
            f"{folder} has {len(dataset.class_names)} classes; {n_classes} of them are wanted."
        )
    rng = np.random.default_rng((seed, 6))
    classes = np.sort(rng.permutation(len(dataset.class_names))[:n_classes])
    train, test = [], []
    for each in classes:
        of_class = rng.permutation(np.flatnonzero(dataset.test.labels == each))
        if per_class is None or not 0 < per_class < len(of_class):
            raise ValueError(
                f"{folder}:{n_classes} divides the test images of each class, {len(of_class)} of "
                f"{dataset.class_names[each]}, among training and testing: images_per_class must "
                f"be between 1 and {len(of_class) - 1}; got {per_class}."
            )
        train.append(of_class[:per_class])
        test.append(of_class[per_class:])
    validation = np.flatnonzero(np.isin(dataset.validation.labels, classes))

    def decoded(source: Source) -> Images:
        found = _decoded(source, config)
        return found._replace(labels=np.searchsorted(classes, found.labels).astype(np.int32))

    return Splits(
        decoded(dataset.test.select(np.concatenate(train))),
        decoded(dataset.validation.select(validation)),
        decoded(dataset.test.select(np.concatenate(test))),
        n_classes,
    )


def _whole(
    root: Path, folder: str, image_size: int, images_per_class: int | None, seed: int
) -> Splits:
    config = _config(root, folder, image_size, images_per_class, seed)
    dataset = load(config)
    splits = dataset.train, dataset.validation, dataset.test
    train, validation, test = (_decoded(each, config) for each in splits)
    return Splits(train, validation, test, len(dataset.class_names))


@functools.lru_cache(maxsize=16)
def read_test(root: Path, name: str, image_size: int, most: int = 500) -> Images:
    """Reads test images of a data set, so many at most, which are drawn once and for all.

    Raises:
        ValueError: If there is no such folder.
    """
    config = _config(root, name, image_size)
    test = load(config).test
    drawn = np.random.default_rng(0).permutation(len(test))[:most]
    return _decoded(test.select(drawn), config)


def _config(
    root: Path, name: str, image_size: int, images_per_class: int | None = None, seed: int = 0
) -> DataConfig:
    folder = root / name
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {name} in {root}: each data set is a folder there, of "
            "train/<class>/*.jpg and test/<class>/*.jpg."
        )
    return DataConfig(
        str(folder),
        image_size=image_size,
        augmentation="pad_crop",
        validation=VALIDATION,
        images_per_class=images_per_class,
        split_seed=seed,
    )


def _decoded(source: Source, config: DataConfig) -> Images:
    size = config.image_size
    images = np.empty((len(source), size, size, 3), np.uint8)
    for index in range(len(source)):
        images[index] = centre_crop(source[index]["image"], config)
    return Images(images, source.labels)
