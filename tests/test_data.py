# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

for _package in ("grain", "PIL"):
    pytest.importorskip(_package)

from PIL import Image, ImageOps

from examples.common import data
from examples.common.data import DataConfig

SIZE = 8


def config(dataset="there", **changes):
    defaults = {"image_size": SIZE, "workers": 2, "augmentation": "standard"}
    return DataConfig(str(dataset), **(defaults | changes))


def encode(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def noise(seed, height=SIZE, width=SIZE):
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def write_images(folder, counts, first=0):
    """PNGs that are all different, ``counts`` of them for each class."""
    seeds = itertools.count(first)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i:03}.png").write_bytes(
                encode(Image.fromarray(noise(next(seeds), 12, 10)))
            )
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("flat"), {"ant": 20, "bee": 10, "cat": 5})


@pytest.fixture
def corrupt(tmp_path):
    """Twelve images of which three cannot be decoded."""
    root = write_images(tmp_path / "train", {"ant": 6, "bee": 6}).parent
    write_images(root / "val", {"ant": 1, "bee": 1}, first=100)
    write_images(root / "test", {"ant": 3, "bee": 2}, first=200)
    (root / "train/ant/001.png").write_bytes(b"")
    (root / "train/ant/002.png").write_bytes(b"these are words")
    file = root / "train/bee/005.png"
    file.write_bytes(file.read_bytes()[:60])
    (root / "test/bee/000.png").write_bytes(b"")
    return root


CORRUPT = {"train/ant/001.png", "train/ant/002.png", "train/bee/005.png"}


def names(source):
    return [source[i]["name"] for i in range(len(source))]


def first(batches, steps):
    return list(itertools.islice(iter(batches), steps))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for ours, theirs in zip(batch, other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


COLOUR = (200, 100, 50)
GREY = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
SOLID = Image.new("RGB", (6, 4), COLOUR)


@pytest.mark.parametrize(
    ("image", "image_format", "expected"),
    [
        (SOLID, "JPEG", COLOUR),
        (SOLID, "PNG", COLOUR),
        (SOLID, "WEBP", COLOUR),
        (SOLID, "BMP", COLOUR),
        (SOLID, "GIF", COLOUR),
        (SOLID.convert("CMYK"), "JPEG", COLOUR),
        (SOLID.convert("L"), "JPEG", (GREY,) * 3),
        (SOLID.convert("LA"), "PNG", (GREY,) * 3),
        (Image.new("RGBA", (6, 4), (*COLOUR, 30)), "PNG", COLOUR),
        (SOLID.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", COLOUR),
        (Image.new("1", (6, 4), 1), "PNG", (255,) * 3),
        (Image.fromarray(np.full((4, 6), 0x8000, np.uint16)), "PNG", (128,) * 3),
        (Image.fromarray(np.full((4, 6), 0x8000, np.int32)), "TIFF", (128,) * 3),
    ],
)
def test_any_mode_and_format_becomes_rgb(image, image_format, expected):
    pixels = data.decode(encode(image, image_format), "image")
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=4)


def test_a_palette_with_transparency_becomes_rgb():
    image = SOLID.convert("P", palette=Image.Palette.ADAPTIVE)
    pixels = data.decode(encode(image, transparency=bytes([128])), "image")
    np.testing.assert_allclose(pixels, np.broadcast_to(COLOUR, (4, 6, 3)), atol=4)


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_followed(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(0, 4, 6)
    pixels = data.decode(encode(Image.fromarray(stored), exif=exif), "image")
    np.testing.assert_array_equal(pixels, np.rot90(stored, turned))


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_that_of_pillow(orientation):
    """Without writing the rest of the EXIF again, which can be broken."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8825)[5] = b"\0\1"
    stored = encode(Image.fromarray(noise(0, 40, 60)), "JPEG", exif=exif)
    with Image.open(io.BytesIO(stored)) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(data.decode(stored, "image"), expected)


def test_a_broken_exif_does_not_cost_the_pixels(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored, pixels = encode(Image.fromarray(noise(0, 4, 6)), exif=exif), noise(0, 4, 6)

    def fail(self, *arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    np.testing.assert_array_equal(data.decode(stored, "image"), np.rot90(pixels, 3))
    monkeypatch.setattr(Image.Exif, "load", fail)
    np.testing.assert_array_equal(data.decode(stored, "image"), pixels)


def a_ramp(largest=255):
    """Values from 0 to ``largest``, or to the nearest that 64 steps give."""
    return np.linspace(0, largest, 64).reshape(8, 8)


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize(("dtype", "image_format"), [(np.uint16, "PNG"), (np.int32, "TIFF")])
def test_integers_of_any_depth_are_scaled_by_the_bits_in_use(bits, dtype, image_format):
    values = a_ramp(2**bits - 1).astype(dtype)
    pixels = data.decode(encode(Image.fromarray(values), image_format), "image")
    shift = next(depth for depth in (8, 10, 12, 14, 16) if depth >= bits) - 8
    np.testing.assert_array_equal(pixels, (values >> shift)[..., None].repeat(3, -1))
    assert pixels.max() >= 127


FLOATS = [(0, 1), (0, 0.6), (0, 255), (0, 4095), (0, 1e-3), (0, 2.5), (-1, 1), (0.9, 1e38)]
INTEGERS = [(-1000, 3000), (-128, 127), (0, 70_000), (0, 2**31 - 1), (-(2**31), 0)]


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(*each, np.float32) for each in FLOATS] + [(*each, np.int32) for each in INTEGERS],
)
def test_values_of_any_range_are_visible_and_in_order(low, high, dtype):
    values = (low + a_ramp(high - low)).astype(dtype)
    pixels = data.decode(encode(Image.fromarray(values), "TIFF"), "image")[..., 0].astype(int)
    assert pixels.max() >= 127
    assert (np.diff(pixels.ravel()) >= 0).all()
    if (low, high) in ((0, 1), (0, 255)):
        np.testing.assert_allclose(pixels, a_ramp(), atol=0.51)


def test_floats_that_are_no_numbers_are_black():
    values = a_ramp(1).astype(np.float32)
    values[0], values[1] = np.nan, np.inf
    pixels = data.decode(encode(Image.fromarray(values), "TIFF"), "image")
    assert not pixels[:2].any()
    np.testing.assert_allclose(pixels[2:, :, 0], a_ramp()[2:], atol=0.51)
    values[:] = np.nan
    assert not data.decode(encode(Image.fromarray(values), "TIFF"), "image").any()


def png_chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def deep_png(values, colour_type):
    """A PNG with 16 bits a channel, which Pillow does not write in colours."""
    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(png_chunk, chunks))


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
@pytest.mark.parametrize(("colour_type", "colours"), [(2, 3), (6, 3), (4, 1)])
def test_colours_of_16_bits_are_scaled_by_the_bits_in_use(bits, colour_type, colours):
    rng = np.random.default_rng(0)
    values = rng.integers(2**bits, size=(8, 8, colours + (colour_type > 2)))
    values[0, 0], values[..., colours:] = 2**bits - 1, 2**16 - 1
    pixels = data.decode(deep_png(values, colour_type), "image")
    expected = np.broadcast_to(values[..., :colours] >> (bits - 8), (8, 8, 3))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt", b"tEXt", b"eXIf"])
def test_metadata_too_large_or_broken_do_not_cost_the_pixels(kind):
    stored = encode(Image.fromarray(noise(0)))
    text = zlib.compress(bytes(2**21))
    chunks = {
        b"zTXt": b"Comment\0\0" + text,
        b"iCCP": b"profile\0\0" + text,
        b"iTXt": b"Comment\0\1\0\0\0" + text,
        b"tEXt": b"Comment\0" + b"broken",
        b"eXIf": b"no EXIF",
    }
    chunk = png_chunk(kind, chunks[kind])
    if kind == b"tEXt":
        chunk = chunk[:-4] + bytes(4)  # a wrong checksum
    place = stored.index(b"IDAT") - 4
    pixels = data.decode(stored[:place] + chunk + stored[place:], "image")
    np.testing.assert_array_equal(pixels, noise(0))


NOISE = Image.fromarray(noise(0, 40, 40))


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (b"", "it is empty"),
        (b"these are words", "it is no image that Pillow can open"),
        (encode(NOISE, "JPEG")[:-300], "truncated"),
        (encode(NOISE, "PNG")[:-300], "truncated|OSError|SyntaxError"),
    ],
)
def test_what_cannot_be_decoded_is_told_by_name(stored, reason):
    with pytest.raises(data.CorruptImageError, match=rf"ant/1\.jpg cannot .*({reason})") as error:
        data.decode(stored, "ant/1.jpg")
    assert error.value.name == "ant/1.jpg"


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(data.CorruptImageError, match=r"bomb\.png .*DecompressionBombError"):
        data.decode(encode(NOISE), "bomb.png")


@pytest.mark.parametrize(("height", "width"), [(30, 20), (20, 33), (20, 20), (9, 50), (3, 5)])
def test_the_centre_crop_is_that_of_the_resized_image(height, width):
    image = noise(0, height, width)
    crop = data.centre_crop(image, config(resize=10))
    tall, wide = (10 * height // min(height, width), 10 * width // min(height, width))
    resized = np.array(Image.fromarray(image).resize((wide, tall), Image.Resampling.BILINEAR))
    top, left = (tall - SIZE) / 2, (wide - SIZE) / 2
    np.testing.assert_array_equal(
        crop, resized[round(top) : round(top) + SIZE, round(left) : round(left) + SIZE]
    )


@pytest.mark.parametrize(("height", "width"), [(2000, 10), (10, 2000), (7, 500), (1, 300)])
def test_the_centre_crop_of_an_elongated_image_is_made_of_its_centre(height, width, monkeypatch):
    image = noise(0, height, width)
    short = min(height, width)
    tall, wide = 10 * height // short, 10 * width // short
    resized = np.array(Image.fromarray(image).resize((wide, tall), Image.Resampling.BILINEAR))
    top, left = round((tall - SIZE) / 2), round((wide - SIZE) / 2)
    expected = resized[top : top + SIZE, left : left + SIZE]
    sizes, resize = [], Image.Image.resize

    def recorded(self, size, *arguments):
        sizes.append(size)
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    crop = data.centre_crop(image, config(resize=10))
    np.testing.assert_allclose(crop.astype(int), expected, atol=1)
    assert sizes == [(SIZE, SIZE)], "no more than the crop is made"


def test_the_short_side_has_the_usual_default():
    assert DataConfig("x").short_side == 256
    assert DataConfig("x", image_size=299).short_side == 342
    assert DataConfig("x", image_size=32, augmentation="pad_crop").short_side == 32
    assert DataConfig("x", resize=232).short_side == 232


def coordinates(height, width):
    """An image that tells where each of its pixels was."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(y)], axis=-1).astype(np.uint8)


def test_random_resized_crops_have_areas_and_shapes_as_asked():
    cfg = config(image_size=200, crop_scale=(0.3, 0.6))
    image, rng = coordinates(200, 240), np.random.default_rng(0)
    shares, aspects, flips, places = [], [], 0, set()
    for _ in range(60):
        view = data.augment(image, cfg, rng).astype(int)
        assert view.shape == (200, 200, 3)
        y, x = view[..., 0], view[..., 1]
        flips += x[0, 0] > x[0, -1]
        tall, wide = np.ptp(y) + 1, np.ptp(x) + 1
        shares.append(tall * wide / (200 * 240))
        aspects.append(wide / tall)
        places.add((y.min(), x.min()))
    assert 0.28 < min(shares) < 0.35
    assert 0.55 < max(shares) < 0.62
    assert 0.73 < min(aspects) < 0.85
    assert 1.2 < max(aspects) < 1.36
    assert 15 < flips < 45
    assert len(places) > 50


@pytest.mark.parametrize(("height", "width"), [(3, 200), (200, 3)])
def test_an_image_too_long_for_any_crop_gives_its_centre(height, width):
    image = coordinates(height, width)
    cfg = config(crop_scale=(1.0, 1.0))
    view = data.augment(image, cfg, np.random.default_rng(0))
    long_axis = view[..., 0 if height > width else 1]
    assert view.shape == (SIZE, SIZE, 3)
    assert 97 <= long_axis.min() <= long_axis.max() <= 102


def test_pad_crop_shifts_by_at_most_an_eighth():
    cfg = config(image_size=32, augmentation="pad_crop")
    image, rng = noise(0, 32, 32), np.random.default_rng(0)
    image[image == 0] = 1
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {
        padded[top : top + 32, left : left + 32].tobytes(): (top, left)
        for top in range(9)
        for left in range(9)
    }
    seen = Counter()
    for _ in range(200):
        view = data.augment(image, cfg, rng)
        mirrored = view.tobytes() not in windows
        top, left = windows[(view[:, ::-1] if mirrored else view).tobytes()]
        seen.update([("mirrored", mirrored), ("top", top), ("left", left)])
    assert 70 < seen["mirrored", True] < 130
    assert {top for kind, top in seen if kind == "top"} == set(range(9))
    assert {left for kind, left in seen if kind == "left"} == set(range(9))


def test_no_augmentation_is_the_view_of_evaluation():
    cfg, image = config(augmentation="none"), noise(0, 20, 30)
    view = data.augment(image, cfg, np.random.default_rng(0))
    np.testing.assert_array_equal(view, data.centre_crop(image, cfg))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, "dataset must be"),
        ({"images_per_class": 0}, "images_per_class must be at least 1; got 0"),
        ({"validation": 0}, "validation must be a share .*got 0"),
        ({"validation": 2.5}, "whole number"),
        ({"test": -0.1}, "test must be"),
        ({"test": float("nan")}, "test must be"),
        ({"test": float("inf")}, "test must be"),
        ({"split_seed": -1}, "split_seed"),
        ({"image_size": 0}, "image_size"),
        ({"resize": 100}, "resize must be at least image_size.*100 < 224"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"workers": -1}, "workers"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**({"dataset": "x"} | changes))


@pytest.mark.parametrize("validation", ["val", "validation", "valid", "Valid", "dev"])
def test_published_splits_of_a_folder_are_kept(tmp_path, validation):
    write_images(tmp_path / "train", {"bee": 3, "ant": 4})
    write_images(tmp_path / validation, {"ant": 2, "bee": 1}, first=50)
    write_images(tmp_path / "test", {"ant": 1, "bee": 2}, first=90)
    (tmp_path / "train/ant/Thumbs.db").write_bytes(b"no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/bee/new.JPEG").write_bytes(encode(SOLID, "JPEG"))
    loaded = data.load(config(tmp_path))
    assert loaded.class_names == ("ant", "bee")
    assert loaded.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert loaded.validation.labels.tolist() == [0, 0, 1]
    assert loaded.test.labels.tolist() == [0, 1, 1]
    assert names(loaded.train)[-1] == "train/bee/new.JPEG"
    example = loaded.validation[2]
    assert (example["name"], example["label"]) == (f"{validation}/bee/000.png", 1)
    np.testing.assert_array_equal(example["image"], noise(52, 12, 10))


def test_a_validation_split_alone_is_the_test(tmp_path):
    write_images(tmp_path / "train", {"ant": 10, "bee": 10})
    write_images(tmp_path / "val", {"ant": 1, "bee": 1}, first=50)
    loaded = data.load(config(tmp_path))
    assert names(loaded.test) == ["val/ant/000.png", "val/bee/000.png"]
    assert Counter(loaded.validation.labels.tolist()) == {0: 1, 1: 1}
    assert Counter(loaded.train.labels.tolist()) == {0: 9, 1: 9}


@pytest.mark.parametrize("split_seed", [0, 1])
def test_a_folder_without_splits_is_parted_class_by_class(flat, split_seed):
    loaded = data.load(config(flat, split_seed=split_seed))
    counts = [
        Counter(part.labels.tolist()) for part in (loaded.test, loaded.validation, loaded.train)
    ]
    assert counts == [{0: 4, 1: 2, 2: 1}, {0: 2, 1: 1, 2: 1}, {0: 14, 1: 7, 2: 3}]
    for part in (loaded.train, loaded.validation, loaded.test):
        assert names(part) == sorted(names(part)), "the order of the folder is kept"
    parts = [set(names(part)) for part in (loaded.train, loaded.validation, loaded.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 35


def test_seeds_draw_what_is_chosen_on_and_not_what_is_tested_on(flat):
    one, same, other = (data.load(config(flat, split_seed=seed)) for seed in (1, 1, 2))
    for part, again in zip(one[1:4], same[1:4], strict=True):
        assert names(part) == names(again)
    assert names(one.test) == names(other.test)
    assert names(one.validation) != names(other.validation)


def test_n_images_a_class_are_drawn_after_validation(flat):
    everything, few, more = (
        data.load(config(flat, images_per_class=n, split_seed=3)) for n in (None, 2, 3)
    )
    assert Counter(few.train.labels.tolist()) == {0: 2, 1: 2, 2: 2}
    assert names(few.validation) == names(everything.validation)
    assert set(names(few.train)) < set(names(more.train)) < set(names(everything.train))


def test_a_number_of_images_a_class_can_be_held_out(flat):
    loaded = data.load(config(flat, validation=1, test=3))
    assert Counter(loaded.test.labels.tolist()) == {0: 3, 1: 3, 2: 3}
    assert Counter(loaded.validation.labels.tolist()) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_class": 4}, "Class cat has 3 images to train on; images_per_class is 4"),
        ({"validation": 4}, "Class cat has 4 images; to hold out 4 for validation"),
        ({"test": 5}, "Class cat has 5 images; to hold out 5 for test"),
        ({"data_dir": "elsewhere"}, "data_dir is for tensorflow-datasets; got elsewhere"),
    ],
)
def test_classes_too_small_for_the_settings_are_refused(flat, changes, message):
    with pytest.raises(ValueError, match=message):
        data.load(config(flat, **changes))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "two or more classes; it has 0: none"),
        (["ant/1.png"], "two or more classes; it has 1: ant"),
        (["1.png", "2.png"], "two or more classes; it has 0: none, and 2 images in no folder"),
        (["a/1.png", "b/1.png", "s/a/1.png", "s/b/1.png"], "s is taken .* other classes: a, b"),
        (
            ["train/a/1.png", "train/b/1.png", "train/test/a/1.png"],
            "test is taken as a class, .* folders with the names of other classes: a. If it is a s",
        ),
        (["a/train/1.png", "a/test/1.png", "b/train/1.png"], "a is .* but the splits test, train"),
        (["ant/1.png", "bee/1.txt"], r"bee has no image that Pillow can open; it has \.txt"),
        (["ant/1.png", "bee/.hidden.png"], r"bee has no image .*it has \.png"),
        (["ant/1.png", "bee/day/1.txt"], r"bee has no image .*it has \.txt"),
        (["a/ant/1.png", "a/bee/1.png"], r"it has 1: a\. To read the folders in it, give .*/a\."),
        # What is a split, and what is a class?
        (
            ["bus/1.png", "car/1.png", "train/1.png"],
            r"train is taken as a split .*none, beside bus",
        ),
        (
            ["bus/1.png", "car/1.png", "Test/1.png"],
            r"Test is taken .* put all class folders into .*",
        ),
        (["bus/d/1.png", "car/e/1.png", "train/a/1.png", "train/b/1.png"], "if train is a class"),
        (["train/1.png", "test/1.png"], "test is taken as a split .*it has none"),
        (
            ["train/a/1.png", "train/b/1.png", "Training/a/1.png"],
            "Training and train, .* both names",
        ),
        (["val/a/1.png", "valid/a/1.png", "train/a/1.png"], "val and valid, .* validation split"),
        (["train/a/1.png", "train/b/1.png", "holdout/a/1.png"], "holdout has folders of the same"),
        (
            ["train_images/a/1.png", "val_images/a/1.png"],
            "train_images has .*rename it: train, val",
        ),
        (["c/1.png", "d/1.png", "val2017/a/1.png"], "val2017 has folders and no images"),
        (["test/ant/1.png", "test/bee/1.png"], "has test but no train"),
        (
            ["train/ant/1.png", "train/bee/1.png", "test/bee/1.png", "test/wasp/1.png"],
            "test has classes that there are no training images of: wasp",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no images of")
def test_folders_that_make_no_sense_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"words" if name.endswith("txt") else encode(SOLID))
    with pytest.raises(ValueError, match=message):
        data.load(config(tmp_path))


def test_a_class_missing_from_the_test_is_told(tmp_path):
    write_images(tmp_path / "train", {"ant": 3, "bee": 3})
    write_images(tmp_path / "test", {"bee": 2}, first=50)
    with pytest.warns(UserWarning, match="test has no images of ant"):
        loaded = data.load(config(tmp_path))
    assert loaded.test.labels.tolist() == [1, 1]


FORMATS = {
    "a.jpg": "JPEG",
    "a.JFIF": "JPEG",
    "a.tif": "TIFF",
    "a.gif": "GIF",
    "a.webp": "WEBP",
    "a.bmp": "BMP",
    "a.ppm": "PPM",
    "a.jp2": "JPEG2000",
    "a": "PNG",  # without an extension
    "a.photo": "JPEG",  # with an unknown one
    "deep/er/a.png": "PNG",
}


def write_every_format(folder):
    for name, image_format in FORMATS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(SOLID, image_format))


def test_every_image_below_a_class_is_read_and_all_else_is_told(tmp_path):
    for name in ("ant", "bee"):
        write_every_format(tmp_path / name)
    root, ant = tmp_path, tmp_path / "ant"
    hidden = [ant / ".DS_Store", root / ".cache/1.png", root / "__MACOSX/ant/1.png"]
    hidden += [ant / "@eaDir/1.png", root / "lost+found/1.png"]
    foreign = [ant / "notes.txt", ant / "deep/labels.csv", ant / "a.heic", root / "README"]
    foreign += [ant / "data.h5", ant / "film.mpg"]
    for path in [*hidden, *foreign]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"neither")
    (root / "loose.png").write_bytes(encode(SOLID))
    (ant / "album.jpg").mkdir()
    (ant / "up").symlink_to(root)
    (ant / "gone").symlink_to(root / "nowhere")
    (ant / "itself").symlink_to(ant / "itself")

    loaded = data.load(config(root, validation=1, test=1))
    found = {name for part in loaded[1:4] for name in names(part)}
    assert found == {f"{folder}/{name}" for folder in ("ant", "bee") for name in FORMATS}
    assert sorted(data.find_images(ant).images) == sorted(ant / name for name in FORMATS)
    notes = "\n".join(loaded.notes)
    for expected in (
        "left out: 6 not images that Pillow can open: README, ant/a.heic, ant/data.h5, ...",
        "left out: 5 hidden files or folders: .cache, __MACOSX, lost+found, ...",
        "left out: 1 images without a class: loose.png",
        "left out: 1 links to folders that are read already: ant/up",
        "left out: 2 broken links or special files: ant/gone, ant/itself",
    ):
        assert expected in notes
    assert loaded.summary[:4] == [
        f"{root}: 2 classes: ant, bee",
        "  train: 18 images of 2 classes",
        "  validation: 2 images of 2 classes, held out of train",
        "  test: 2 images of 2 classes, held out of train",
    ]


def test_images_beside_the_splits_are_told(tmp_path):
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "test", {"a": 1, "b": 1}, first=50)
    for name in ("1.png", "train/2.png", "unlabelled/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode(SOLID))
    loaded = data.load(config(tmp_path, validation=1))
    assert loaded.notes == (
        "left out: 2 images outside of the splits: 1.png, unlabelled/3.png",
        "left out: 1 images without a class: train/2.png",
    )
    assert len(loaded.train) == 2


@pytest.mark.parametrize("how", ["copied", "linked", "renamed", "unreadable"])
def test_images_of_two_splits_are_told(tmp_path, how):
    train = write_images(tmp_path / "train", {"a": 4, "b": 4})
    test = write_images(tmp_path / "test", {"a": 2, "b": 2}, first=50)
    one, other = train / "b/002.png", test / ("b/new.png" if how == "renamed" else "b/002.png")
    if how in ("copied", "renamed"):
        other.write_bytes(one.read_bytes())
    else:
        other.symlink_to(one if how == "linked" else tmp_path / "nowhere")
    # As long as another, and the same in the middle.
    content = bytearray((train / "a/001.png").read_bytes())
    content[:4] = b"junk"
    (test / "a/000.png").write_bytes(content)
    loaded = data.load(config(tmp_path, validation=1, split_seed=1))
    assert "train/b/002.png" in names(loaded.train)
    expected = (
        "1 of 5 test images are training images, too, and do not measure what is learnt: for "
        f"example, test/b/{other.name} is train/b/002.png.",
    )
    assert loaded.notes == (() if how == "unreadable" else expected)


def test_copies_in_one_folder_are_told_when_they_are_parted(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})
    for name in ("a", "b"):
        for number in range(2, 6):
            (tmp_path / name / f"{number}.png").write_bytes(encode(SOLID))
    [of_validation, of_test] = data.load(config(tmp_path, validation=3, test=1)).notes
    assert "validation images are training images" in of_validation
    assert "test images are training images" in of_test


def test_classes_that_may_be_splits_are_told(tmp_path):
    for folder in ("monday", "tuesday"):
        write_images(tmp_path / folder, {"a": 3, "b": 3}, first=len(folder) * 10)
    [note] = data.load(config(tmp_path)).notes
    assert note.startswith("The classes have no images of their own, and all have folders of the ")
    (tmp_path / "monday/1.png").write_bytes(encode(SOLID))
    assert not data.load(config(tmp_path)).notes


def test_a_class_may_have_the_name_of_a_split_inside_of_one(tmp_path):
    write_images(tmp_path / "Train", {"train": 3, "test": 3, "bus": 3})
    assert data.load(config(tmp_path, test=1)).class_names == ("bus", "test", "train")


def test_names_are_compared_by_what_they_look_like(tmp_path):
    composed, parted = "caf\u00e9", "cafe\u0301"
    write_images(tmp_path / "train", {composed: 3, "tea": 3})
    write_images(tmp_path / "test", {parted: 1, "tea": 1}, first=50)
    loaded = data.load(config(tmp_path))
    assert loaded.class_names == (composed, "tea")
    assert loaded.test.labels.tolist() == [0, 1]
    write_images(tmp_path / "train", {parted: 3})
    with pytest.raises(ValueError, match=r"two folders named caf.*Unicode form .*\\u0301.*\\xe9"):
        data.load(config(tmp_path))


def test_names_that_are_no_text_are_read_with_escapes(tmp_path):
    folder = os.fsdecode(b"caf\xe9")
    write_images(tmp_path, {folder: 3, "line\nbreak": 3})
    loaded = data.load(config(tmp_path, validation=1, test=1))
    assert loaded.class_names == (r"caf\xe9", r"line\nbreak")
    assert [name.encode() for name in names(loaded.train)]


@pytest.mark.parametrize(
    "name", ["photos.zip", "uoft-cs/cifar10", r"C:\photos", "a b", "data/photos/", "photos/a:1"]
)
def test_what_is_no_folder_and_no_name_says_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="neither a folder here nor a name") as error:
        data.load(config(name))
    assert len(str(error.value).splitlines()) == 1
    if "/" not in name:
        Path(name).touch()
        with pytest.raises(ValueError, match=r"is a file, .*unpack it and give the folder"):
            data.load(config(name))


def test_a_path_that_is_not_there_is_no_name_of_a_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*absent"):
        data.load(config(tmp_path / "absent"))


@pytest.fixture(scope="module")
def source(flat):
    return data.load(config(flat, validation=1, test=1)).train  # 29 images


def train(source, steps=5, batch_size=8, seed=0, cfg=None, **kwargs):
    cfg = cfg or config()
    return first(data.train_batches(source, cfg, batch_size=batch_size, seed=seed, **kwargs), steps)


def test_batches_are_what_they_say(source):
    for batch in train(source):
        assert batch.images.shape == (8, SIZE, SIZE, 3)
        assert batch.images.dtype == np.uint8
        assert (batch.labels.shape, batch.labels.dtype) == ((8,), np.int32)
        assert (batch.valid.shape, batch.valid.dtype) == ((8,), np.bool_)
        assert batch.valid.all()


def test_every_image_comes_once_an_epoch_in_a_new_order(source):
    cfg = config(augmentation="none")
    batches = train(source, steps=3, batch_size=len(source), cfg=cfg)
    expected = {data.centre_crop(source[i]["image"], cfg).tobytes() for i in range(len(source))}
    orders = [[image.tobytes() for image in batch.images] for batch in batches]
    labels = {
        data.centre_crop(x["image"], cfg).tobytes(): x["label"]
        for x in map(source.__getitem__, range(len(source)))
    }
    for order, batch in zip(orders, batches, strict=True):
        assert len(order) == len(expected)
        assert set(order) == expected
        assert [labels[image] for image in order] == batch.labels.tolist()
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_seed_alone_decides(source):
    assert_same(train(source), train(source))
    ours, theirs = (np.concatenate([b.images for b in train(source, seed=s)]) for s in (0, 1))
    assert np.any(ours != theirs, axis=(1, 2, 3)).mean() > 0.9


def test_an_image_looks_different_each_time(tmp_path):
    source = data.load(config(write_images(tmp_path, {"ant": 3, "bee": 3}))).train.select(
        np.array([0])
    )
    views = {batch.images.tobytes() for batch in train(source, steps=10, batch_size=1)}
    assert len(views) > 7


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_number_of_workers_changes_nothing(source, workers):
    assert_same(train(source), train(source, cfg=config(workers=workers)))


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_have_the_parts_of_one_batch(source, process_count):
    parts = [
        train(source, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    joined = [
        data.Batch(*map(np.concatenate, zip(*rows, strict=True)))
        for rows in zip(*parts, strict=True)
    ]
    assert_same(joined, train(source))


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_training_goes_on_where_it_stopped(source, step, process_count):
    batches = data.train_batches(
        source, config(), batch_size=6, seed=4, process_index=0, process_count=process_count
    )
    iterator = iter(batches)
    for _ in range(step):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(8)]  # over the end of an epoch
    resumed = iter(batches)
    next(resumed)
    resumed.set_state(state)
    assert_same([next(resumed) for _ in range(8)], expected)


def test_a_batch_may_be_larger_than_the_images(source):
    few = source.select(np.arange(3))
    (batch,) = train(few, steps=1, batch_size=7, cfg=config(augmentation="none"))
    assert max(Counter(image.tobytes() for image in batch.images).values()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive multiple .*got 0"),
        ({"batch_size": 7, "process_count": 2}, "number of processes, 2; got 7"),
        ({"seed": -1}, "seed must be from 0 .*got -1"),
    ],
)
def test_impossible_batches_are_refused(source, changes, message):
    with pytest.raises(ValueError, match=message):
        train(source, **changes)


def test_no_images_are_refused(source):
    with pytest.raises(ValueError, match="no image to train on"):
        train(source.select(np.arange(0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_refuses_a_corrupt_image_by_its_name(corrupt, workers):
    loaded = data.load(config(corrupt, workers=workers))
    with pytest.raises(data.CorruptImageError, match=r"train/(ant|bee)/00\d\.png"):
        train(loaded.train, steps=2, cfg=config(workers=workers))


def test_training_can_leave_corrupt_images_out(corrupt):
    cfg = config(corrupt, on_corrupt="skip", augmentation="none")
    source = data.load(cfg).train
    with pytest.warns(UserWarning, match="Left out") as caught:
        batches = train(source, steps=2, batch_size=12, cfg=cfg)
    assert set(source.skipped) == CORRUPT
    assert sorted(str(w.message).split(",")[0] for w in caught) == [
        f"Left out: {name}" for name in sorted(CORRUPT)
    ], "each once, though it came twice"
    readable = [source[i] for i in range(12) if i not in (1, 2, 11)]
    views = Counter(data.centre_crop(x["image"], cfg).tobytes() for x in readable)
    views[data.centre_crop(source[3]["image"], cfg).tobytes()] += 2  # the next after 1 and 2
    views[data.centre_crop(source[0]["image"], cfg).tobytes()] += 1  # the next after the last
    for batch in batches:
        assert Counter(image.tobytes() for image in batch.images) == views
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(batches, train(data.load(cfg).train, steps=2, batch_size=12, cfg=cfg))


def test_nothing_but_corrupt_images_is_an_error(corrupt):
    cfg = config(corrupt, on_corrupt="skip")
    with (
        pytest.warns(UserWarning, match="Left out"),
        pytest.raises(ValueError, match="None of the 2 training images can be read"),
    ):
        train(data.load(cfg).train.select(np.array([1, 2])), cfg=cfg)


def test_evaluation_refuses_or_marks_a_corrupt_image(corrupt):
    cfg = config(corrupt)
    source = data.load(cfg).test
    with pytest.raises(data.CorruptImageError, match=r"test/bee/000\.png"):
        list(data.evaluation_batches(source, cfg, batch_size=5))
    cfg = config(corrupt, on_corrupt="skip")
    with pytest.warns(UserWarning, match=r"Left out: test/bee/000\.png, it is empty"):
        (batch,) = data.evaluation_batches(source, cfg, batch_size=5)
    assert batch.valid.tolist() == [True, True, True, False, True]
    assert source.skipped == {"test/bee/000.png": "it is empty"}


@pytest.mark.parametrize("reason", ["Is a directory", "No such file or directory"])
def test_what_cannot_be_read_is_skipped_like_what_cannot_be_decoded(corrupt, reason):
    cfg = config(corrupt, on_corrupt="skip")
    (corrupt / "test/bee/000.png").unlink()
    source, file = data.load(cfg).test, corrupt / "test/ant/000.png"
    file.unlink()
    if reason == "Is a directory":
        file.mkdir()
    else:
        file.symlink_to(corrupt / "nowhere")  # it is not there when the folder is read, either
        assert len(data.load(cfg).test) == len(source)
    with pytest.warns(UserWarning, match=f"Left out: test/ant/000.png, {reason}"):
        (batch,) = data.evaluation_batches(source, cfg, batch_size=4)
    assert batch.valid.tolist() == [False, True, True, True]
    with pytest.raises(data.CorruptImageError, match=f"test/ant/000.png cannot be read: {reason}"):
        list(data.evaluation_batches(source, config(corrupt), batch_size=4))


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 32])
def test_evaluation_sees_every_image_once_and_in_order(source, batch_size, process_count):
    cfg = config()
    parts = [
        list(
            data.evaluation_batches(
                source,
                cfg,
                batch_size=batch_size,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-29 // batch_size)}
    whole = data.Batch(
        *(
            np.concatenate(
                [rows for step in zip(*parts, strict=True) for rows in step_rows(step, field)]
            )
            for field in data.Batch._fields
        )
    )
    assert len(whole.valid) == -(-29 // batch_size) * batch_size
    assert whole.valid.tolist() == [True] * 29 + [False] * (len(whole.valid) - 29)
    assert whole.labels[:29].tolist() == source.labels.tolist()
    for i in range(29):
        np.testing.assert_array_equal(whole.images[i], data.centre_crop(source[i]["image"], cfg))
    assert not whole.images[29:].any()


def step_rows(step, field):
    return [getattr(batch, field) for batch in step]


def test_no_images_make_no_batches(source):
    assert list(data.evaluation_batches(source.select(np.arange(0)), config(), batch_size=4)) == []


@pytest.fixture(scope="module")
def sharding():
    mesh = jax.make_mesh((8,), ("data",))
    return NamedSharding(mesh, PartitionSpec("data"))


def test_batches_reach_the_devices_as_they_are(source, sharding):
    batches = data.train_batches(source, config(), batch_size=16, seed=0)
    with data.to_device(batches, sharding) as on_devices:
        sent = [next(on_devices) for _ in range(4)]
        assert on_devices.waited_seconds > 0
    for batch in sent:
        for leaf in batch:
            assert isinstance(leaf, jax.Array)
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            assert len(leaf.addressable_shards) == 8
            assert leaf.addressable_shards[0].data.shape == (2, *leaf.shape[1:])
    assert_same(sent, first(batches, 4))


def test_the_state_is_that_of_the_batch_handed_out(source, sharding, monkeypatch):
    batches = data.train_batches(source, config(), batch_size=8, seed=0)
    expected = first(batches, 7)
    with data.to_device(batches, sharding, depth=3) as on_devices:
        start = on_devices.get_state()
        assert_same([next(on_devices) for _ in range(3)], expected[:3])
        state = json.loads(json.dumps(on_devices.get_state()))
        next(on_devices)
        on_devices.set_state(state)
        assert_same([next(on_devices) for _ in range(2)], expected[3:5])
    with data.to_device(batches, sharding) as resumed:
        resumed.set_state(state)
        assert_same([next(resumed) for _ in range(4)], expected[3:])
        resumed.set_state(start)
        assert_same([next(resumed)], expected[:1])
    # Of all processes together: in two, each has half of the rows behind it.
    assert state == {"next_row": 24}
    shares = [
        data.to_device(
            data.train_batches(
                source, config(), batch_size=8, seed=0, process_index=i, process_count=2
            ),
            sharding,
        )
        for i in range(2)
    ]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for share in shares:
        with share:
            share.set_state(state)
            assert share.get_state() == state
            assert share._batches.get_state() == {"next_index": 12}


def test_an_error_of_the_thread_is_raised_by_next(corrupt, sharding):
    cfg = config(corrupt)
    batches = data.train_batches(data.load(cfg).train, cfg, batch_size=8, seed=0)
    with (
        data.to_device(batches, sharding) as on_devices,
        pytest.raises(data.CorruptImageError, match="train/"),
    ):
        list(itertools.islice(on_devices, 3))


def test_evaluation_ends_on_devices_too(source, sharding):
    batches = data.evaluation_batches(source, config(), batch_size=8)
    with data.to_device(batches, sharding) as on_devices:
        assert sum(int(batch.valid.sum()) for batch in on_devices) == 29


def test_a_depth_of_none_is_refused(source, sharding):
    batches = data.evaluation_batches(source, config(), batch_size=8)
    with pytest.raises(ValueError, match="depth must be at least 1; got 0"):
        data.to_device(batches, sharding, depth=0)


TFDS_CLASSES = ["ant", "bee"]


def tfds_examples(split, count, labelled=True):
    for i in range(count):
        name = f"{split}_{i}.png"
        image = io.BytesIO(encode(Image.fromarray(noise(hash_of(name), 9, 7))))
        label = i % 2 if labelled else -1
        yield name, {"image": image, "label": label, "image/file_name": name, "boxes": [i] * i}


def hash_of(name):
    return list(name.encode())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepares a data set of a name, in which splits have so many images, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    root = tmp_path_factory.mktemp("tfds")

    def prepare(name, splits, unlabelled=()):
        if not (root / name).exists():
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=TFDS_CLASSES),
                "image/file_name": tfds.features.Text(),
                "boxes": tfds.features.Sequence(np.int64),
            }

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, _):
                return {
                    split: self._generate_examples(split, count) for split, count in splits.items()
                }

            def _generate_examples(self, split, count):
                return tfds_examples(split, count, split not in unlabelled)

            members = {
                "name": name,
                "VERSION": tfds.core.Version("1.0.0"),
                "pkg_dir_path": root,
                "url_infos": {},
                "_info": _info,
                "_split_generators": _split_generators,
                "_generate_examples": _generate_examples,
            }
            builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                builder(data_dir=root).download_and_prepare(file_format="array_record")
        return root

    return prepare


def tfds_config(name, data_dir, **changes):
    return config(name, data_dir=str(data_dir), **changes)


def file_names(source):
    return [name.rsplit(", ", 1)[1] for name in names(source)]


def test_a_prepared_data_set_is_read(prepared):
    root = prepared("insects", {"train": 12, "test": 4})
    loaded = data.load(tfds_config("insects", root, validation=2))
    assert loaded.class_names == ("ant", "bee")
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (8, 4, 4)
    assert Counter(loaded.validation.labels.tolist()) == {0: 2, 1: 2}
    found = file_names(loaded.train) + file_names(loaded.validation)
    assert sorted(found) == sorted(f"train_{i}.png" for i in range(12))
    assert sorted(file_names(loaded.test)) == [f"test_{i}.png" for i in range(4)]
    for part in loaded[1:4]:
        for i in range(len(part)):
            example = part[i]
            name = example["name"].rsplit(", ", 1)[1]
            np.testing.assert_array_equal(example["image"], noise(hash_of(name), 9, 7))
            assert example["label"] == part.labels[i] == int(name[:-4].split("_")[1]) % 2
            assert example["name"].startswith("insects/1.0.0, t")


def test_all_published_splits_are_taken(prepared):
    root = prepared("insects_of_three", {"train": 6, "validation": 4, "test": 2, "extra": 2})
    loaded = data.load(tfds_config("insects_of_three", root, images_per_class=2))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (4, 4, 2)
    assert file_names(loaded.validation)[0].startswith("validation_")


def test_without_labels_in_the_test_validation_is_the_test(prepared):
    root = prepared("insects_secret", {"train": 8, "validation": 2, "test": 2}, ("test",))
    loaded = data.load(tfds_config("insects_secret:1.0.0", root, validation=1))
    assert sorted(file_names(loaded.test)) == ["validation_0.png", "validation_1.png"]
    assert Counter(loaded.validation.labels.tolist()) == {0: 1, 1: 1}


def test_a_prepared_data_set_makes_batches_and_resumes(prepared):
    root = prepared("insects", {"train": 12, "test": 4})
    cfg = tfds_config("insects", root)
    batches = data.train_batches(data.load(cfg).train, cfg, batch_size=5, seed=0)
    expected = first(batches, 6)
    resumed = iter(batches)
    resumed.set_state({"next_index": 15})
    assert_same([next(resumed) for _ in range(3)], expected[3:])


def test_data_sets_that_cannot_be_read_say_how_to_mend_it(prepared, tmp_path):
    root = prepared("insects_stored", {"train": 4})
    with pytest.raises(ValueError, match="neither a folder here nor a name"):
        data.load(tfds_config("no_such_insects", root))
    command = f"python -m examples.finetune.prepare insects_stored --data-dir {tmp_path}"
    with pytest.raises(ValueError, match=f"(?s)insects_stored is not prepared.*{command}"):
        data.load(tfds_config("insects_stored", tmp_path))
    info = root / "insects_stored/1.0.0/dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="stored as tfrecord, not as array_record"):
        data.load(tfds_config("insects_stored", root))


def test_reading_imports_no_tensorflow(prepared):
    root = prepared("insects", {"train": 12, "test": 4})
    program = (
        "import sys; from examples.common import data\n"
        f"cfg = data.DataConfig('insects', data_dir={str(root)!r}, image_size=8)\n"
        "loaded = data.load(cfg)\n"
        "next(iter(data.train_batches(loaded.train, cfg, batch_size=4, seed=0)))\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_folders_ask_for_no_tensorflow_datasets(flat):
    program = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from examples.common import data\n"
        f"assert len(data.load(data.DataConfig({str(flat)!r})).class_names) == 3\n"
        "try: data.load(data.DataConfig('cifar10'))\n"
        "except ImportError as error: assert 'pip install tensorflow-datasets' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.skipif("DTNH_DATA" not in os.environ, reason="DTNH_DATA, a folder of images, is unset")
def test_real_images_are_decoded():
    cfg = DataConfig(os.environ["DTNH_DATA"], image_size=64, images_per_class=1)
    loaded = data.load(cfg)
    n_classes = len(loaded.class_names)
    (batch,) = data.evaluation_batches(loaded.train, cfg, batch_size=n_classes)
    assert batch.valid.all()
    assert batch.labels.tolist() == list(range(n_classes))
    assert batch.images.std(axis=(1, 2, 3)).min() > 0
