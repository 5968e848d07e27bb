"""Shifted images: test images with noise, blur or less contrast, the same in every run."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage

from examples.never_hurt.images import Images

NOISE = 0.08
"""The standard deviation of the noise, where 1 is the range of a pixel."""
BLUR = 0.05
"""The standard deviation of the blur, as a share of the size of the image."""
CONTRAST = 0.4
"""The share of each pixel's difference from the mean of its image that is left."""


def _noise(images: np.ndarray) -> np.ndarray:
    return images + 255 * NOISE * np.random.default_rng(0).standard_normal(images.shape)


def _blur(images: np.ndarray) -> np.ndarray:
    radius = BLUR * images.shape[1]
    return ndimage.gaussian_filter(images, (0, radius, radius, 0), mode="nearest")


def _contrast(images: np.ndarray) -> np.ndarray:
    means = images.mean(axis=(1, 2, 3), keepdims=True)
    return means + CONTRAST * (images - means)


SHIFTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
}


def shifted(images: Images, most: int = 500) -> Images:
    """Every shift of the images, or of so many of them that are drawn once and for all."""
    drawn = np.random.default_rng(0).permutation(len(images.labels))[:most]
    pixels, labels = images.images[drawn].astype(np.float32), images.labels[drawn]
    changed = [np.clip(np.rint(shift(pixels)), 0, 255) for shift in SHIFTS.values()]
    return Images(np.concatenate(changed).astype(np.uint8), np.tile(labels, len(SHIFTS)))
