"""Decodes images, and crops or augments them for the network."""

import io

import numpy as np
from PIL import Image, ImageOps

from examples.common.data.config import DataConfig

_TRIES = 10
_ASPECTS = (3 / 4, 4 / 3)


class CorruptImageError(ValueError):
    """An image that cannot be decoded.

    Attributes:
        name: The file's name.
        reason: Why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"The image {name} cannot be decoded: {reason}. Repair or remove it, or skip such "
            "images with on_corrupt=skip."
        )
        self.name = name
        self.reason = reason


def decode(data: bytes, name: str) -> np.ndarray:
    """Decodes an image; its format does not need to match its file extension.

    Args:
        data: The bytes of the file.
        name: Its name in errors.

    Returns:
        ``(height, width, 3)``, uint8, RGB, rotated according to its EXIF orientation.
        Transparency is dropped, and 16 bits per channel are reduced to 8.

    Raises:
        CorruptImageError: If it is not an image, truncated or too large.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # the decoders of Pillow raise many types
        reason = "it is empty" if not data else f"{type(error).__name__}: {error}".rstrip(".")
        raise CorruptImageError(name, reason) from error


def centre_crop(image: np.ndarray, config: DataConfig) -> np.ndarray:
    """Resizes the short side and crops the centre, for evaluation.

    Args:
        image: ``(height, width, 3)``, uint8.
        config: ``image_size`` and ``resize``.

    Returns:
        ``(image_size, image_size, 3)``, uint8.
    """
    return _centre_crop(image, config.short_side, config.image_size)


def augment(image: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Augments a training image.

    Args:
        image: ``(height, width, 3)``, uint8.
        config: ``augmentation`` and its settings.
        rng: The source of randomness.

    Returns:
        ``(image_size, image_size, 3)``, uint8.
    """
    match config.augmentation:
        case "none":
            return centre_crop(image, config)
        case "standard":
            view = _random_resized_crop(image, config.image_size, config.crop_scale, rng)
        case "pad_crop":
            view = _pad_crop(_centre_crop(image, config.short_side, config.image_size), rng)
    return np.ascontiguousarray(view[:, ::-1]) if rng.random() < 0.5 else view


def pad_margin(size: int) -> int:
    """The padding of pad_crop for an image of ``size`` pixels: 4 for the 32 of CIFAR."""
    return max(1, size // 8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # Pillow warns about transparent palettes that do not become RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _centre_crop(image: np.ndarray, short_side: int, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    height, width = (max(short_side, int(side * scale)) for side in (height, width))
    image = _resize(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def _random_resized_crop(
    image: np.ndarray, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Crops a rectangle of random area, aspect ratio and position, as in Inception."""
    height, width = image.shape[:2]
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(_ASPECTS)))
        crop_width, crop_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = rng.integers(height - crop_height + 1)
            left = rng.integers(width - crop_width + 1)
            return _resize(image[top : top + crop_height, left : left + crop_width], size, size)
    # No crop fits into a very long image: take the largest centre crop of a permitted shape.
    narrowest, widest = _ASPECTS
    crop_width = min(width, max(1, round(height * widest)))
    crop_height = min(height, max(1, round(width / narrowest)))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return _resize(image[top : top + crop_height, left : left + crop_width], size, size)


def _pad_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = image.shape[0]
    margin = pad_margin(size)
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    top, left = rng.integers(2 * margin + 1, size=2)
    return np.ascontiguousarray(padded[top : top + size, left : left + size])
