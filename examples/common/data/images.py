"""Decodes images, and crops or augments them for the network."""

import io
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from examples.common.data.config import DataConfig

_TRIES = 10
_ASPECTS = (3 / 4, 4 / 3)
_ELONGATED = 16  # long side over short side, beyond which not the whole image is resized
_DEPTHS = (8, 10, 12, 14, 16)  # bits of a channel in use
_PNG = b"\x89PNG\r\n\x1a\n"
# What a PNG needs to be shown: the palette, the pixels, transparency and the orientation.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
_SWAPPED = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
# By the value of the EXIF tag, as in Pillow's exif_transpose.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class CorruptImageError(ValueError):
    """An image that cannot be read or decoded.

    Attributes:
        name: The file's name.
        reason: Why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"The image {name} cannot be read: {reason}. Repair or remove it, or skip such "
            "images with on_corrupt=skip."
        )
        self.name = name
        self.reason = reason


def read_bytes(file: Path, name: str) -> bytes:
    """Reads a file.

    Raises:
        CorruptImageError: If that is not possible; it has ``name``.
    """
    try:
        return file.read_bytes()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CorruptImageError(name, reason) from error


def decode(data: bytes, name: str) -> np.ndarray:
    """Decodes an image; its format does not need to match its file extension.

    Args:
        data: The bytes of the file.
        name: Its name in errors.

    Returns:
        ``(height, width, 3)``, uint8, RGB, rotated according to its EXIF orientation.
        Transparency is dropped. Channels of more than 8 bits are scaled by the range that the
        image uses, see :func:`_to_8_bits`.

    Raises:
        CorruptImageError: If it is not an image, truncated or too large.
    """
    try:
        try:
            return _decode(data)
        except Exception:
            # Metadata, which is not used, can be damaged or larger than Pillow permits.
            if (bare := _without_metadata(data)) == data:
                raise
            return _decode(bare)
    except UnidentifiedImageError as error:  # its text is of the buffer
        reason = "it is no image that Pillow can open" if data else "it is empty"
        raise CorruptImageError(name, reason) from error
    except Exception as error:  # the decoders of Pillow raise many types
        reason = f"{type(error).__name__}: {error}".rstrip(".: ")
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


def _decode(data: bytes) -> np.ndarray:
    if data.startswith(_PNG) and data[24:26] == b"\x10\x04":
        return _decode_grey_and_alpha(data)
    with Image.open(io.BytesIO(data)) as image:
        tiles = image.tile
        image.load()
        pixels, turn = _to_rgb(image), _turn(image)
    # Of 16 bits of a colour, Pillow takes the high byte. Few images have so little in it.
    if (swapped := _swapped(tiles)) and np.asarray(pixels).max(initial=0) < 64:
        with Image.open(io.BytesIO(data)) as image:
            image.tile = swapped
            high, low = np.asarray(pixels).astype(np.uint16), np.asarray(_to_rgb(image))
        pixels = Image.fromarray(_to_8_bits(256 * high + low))
    return np.array(pixels if turn is None else pixels.transpose(turn))


def _decode_grey_and_alpha(data: bytes) -> np.ndarray:
    """A PNG with 16 bits of grey and of transparency, of which Pillow takes the high bytes.

    Its pixels are four bytes, and can be read as red, green, blue and transparency of 8 bits.
    """
    header = bytearray(data[12:29])
    header[12:14] = b"\x08\x06"
    checksum = struct.pack(">I", zlib.crc32(header))
    with Image.open(io.BytesIO(data[:12] + header + checksum + data[33:])) as image:
        image.load()
        parts, turn = np.asarray(image).astype(np.uint16), _turn(image)
    grey = Image.fromarray(_to_8_bits(256 * parts[..., 0] + parts[..., 1]))
    return np.array((grey if turn is None else grey.transpose(turn)).convert("RGB"))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn an image that is stored on its side."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF says nothing, and the pixels are sound
        return None


def _without_metadata(data: bytes) -> bytes:
    """A PNG without texts and colour profiles; other data as they are."""
    if not data.startswith(_PNG):
        return data
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind in _PNG_CHUNKS:
            kept.append(data[place : place + 12 + length])
        place += 12 + length
    return b"".join(kept)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # one channel, which Pillow would clip to 8 bits
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("P", "PA"):  # Pillow warns about transparent palettes that do not become RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def _swapped(tiles: list[Any]) -> list[Any]:
    """The parts of a file with colours of 16 bits, with the bytes swapped; else an empty list."""
    parts = []
    for tile in tiles:
        mode, *others = [tile.args] if isinstance(tile.args, str) else tile.args or [""]
        found = re.fullmatch(r"(RGB\w?;16)([BLN])", str(mode))
        if found is None or tile.codec_name not in ("zip", "raw"):
            return []
        mode = found[1] + _SWAPPED[found[2]]
        parts.append(tile._replace(args=(mode, *others) if others else mode))
    return parts


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales channels to 0 to 255.

    The range of integers is the smallest of 8, 10, 12, 14 and 16 bits that contains them; that of
    floats is 0 to 1 or one of these. An image that fits none, or would be almost black, is scaled
    from its smallest to its largest value. Values that are not finite become 0.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = values[finite].min().item(), values[finite].max().item()
    is_float = values.dtype.kind == "f"
    if not is_float and low >= 0 and high < 2 ** _DEPTHS[-1]:
        depth = next(depth for depth in _DEPTHS if high < 2**depth)
        return (values >> (depth - 8)).astype(np.uint8)
    ranges = (1, *(2**depth - 1 for depth in _DEPTHS)) if is_float else ()
    largest = next((each for each in ranges if high <= each), 0)
    values = np.where(finite, values, low).astype(np.float64)
    if low < 0 or not largest or (4 * high < largest and low < high):
        values, largest = values - low, high - low or 1
    return np.where(finite, np.rint(values * (255 / largest)), 0).astype(np.uint8)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _centre_crop(image: np.ndarray, short_side: int, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    tall, wide = (max(short_side, int(side * scale)) for side in (height, width))
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    if max(height, width) > _ELONGATED * min(height, width):
        # The part alone: all of it could be thousands of times as large.
        corners = (left, top, left + size, top + size)
        x, y = width / wide, height / tall
        box = tuple(corner * each for corner, each in zip(corners, (x, y, x, y), strict=True))
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box)
        return np.array(resized)
    image = _resize(image, tall, wide)
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
