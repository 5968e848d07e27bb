"""Whole data sets of small images as arrays in memory."""

import functools
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


@functools.lru_cache(maxsize=16)
def read(
    root: Path, name: str, image_size: int, images_per_class: int | None = None, seed: int = 0
) -> Splits:
    """Reads a data set.

    Args:
        root: Has a folder of images for each data set.
        name: The name of the folder.
        image_size: The size to which images are resized, in pixels.
        images_per_class: Training images per class; None: all but the validation images.
        seed: Draws the validation images, and then the training images of each class.

    Returns:
        The splits.

    Raises:
        ValueError: If there is no such folder, or it has too few images.
    """
    folder = root / name
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {name} in {root}: each data set is a folder there, of "
            "train/<class>/*.jpg and test/<class>/*.jpg."
        )
    config = DataConfig(
        str(folder),
        image_size=image_size,
        augmentation="pad_crop",
        validation=VALIDATION,
        images_per_class=images_per_class,
        split_seed=seed,
    )
    dataset = load(config)
    splits = dataset.train, dataset.validation, dataset.test
    train, validation, test = (_decoded(each, config) for each in splits)
    return Splits(train, validation, test, len(dataset.class_names))


def _decoded(source: Source, config: DataConfig) -> Images:
    size = config.image_size
    images = np.empty((len(source), size, size, 3), np.uint8)
    for index in range(len(source)):
        images[index] = centre_crop(source[index]["image"], config)
    return Images(images, source.labels)
