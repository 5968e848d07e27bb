# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import dataclasses
import importlib.util
import io
import tarfile
import unittest
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

for _package in ("grain", "PIL", "array_record", "tyro"):
    pytest.importorskip(_package)
tfds = pytest.importorskip("tensorflow_datasets")

from PIL import Image

from examples.common.data import DataConfig, load
from examples.common.data.builders import caltech256, indoor67
from examples.finetune import prepare

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
needs_tensorflow = pytest.mark.skipif(not HAS_TENSORFLOW, reason="preparing takes tensorflow-cpu")

CALTECH = {
    "001.ak47/001_0001.jpg": ("JPEG", 0),
    "001.ak47/001_0002.jpg": ("JPEG", 0),
    "001.ak47/001_0003.jpg": ("JPEG", 0),
    "198.spider/198_0001.jpg": ("JPEG", 197),
    "198.spider/198_0002.jpg": ("JPEG", 197),
    "198.spider/198_0003.jpg": ("JPEG", 197),
    "256.toad/256_0001.jpg": ("JPEG", 255),
    "256.toad/256_0002.jpg": ("JPEG", 255),
    "256.toad/256_0003.jpg": ("JPEG", 255),
}
CLUTTER = {"257.clutter/257_0001.jpg": ("JPEG", 256)}
OF_NO_USE = ("198.spider/RENAME2", "056.dog/greg/vision309/readme", "056.dog/greg/056_0001.jpg~")
TRAIN = {
    f"{room}/{room}_000{i}.jpg": ("JPEG", label)
    for room, label in (("bakery", 3), ("winecellar", 66))
    for i in (1, 2, 3)
}
TRAIN["bakery/bakery gif.jpg"] = ("GIF", 3)
TEST = {"bakery/bakery_0009.jpg": ("PNG", 3), "winecellar/winecellar_0009.jpg": ("JPEG", 66)}
UNLISTED = {"bakery/bakery_0005.jpg": ("JPEG", 3)}


def picture(name, image_format):
    """A small picture that tells its name."""
    noise = np.random.default_rng(list(name.encode())).integers(256, size=(9, 12, 3))
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, image_format)
    return file.getvalue()


def archive(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def caltech_archive(folder):
    images = {name: picture(name, fmt) for name, (fmt, _) in (CALTECH | CLUTTER).items()}
    files = images | dict.fromkeys(OF_NO_USE, b"of no use")
    files = {f"256_ObjectCategories/{name}": data for name, data in files.items()}
    return archive(folder / "256_ObjectCategories.tar", files)


def indoor_archive(folder):
    files = {name: picture(name, fmt) for name, (fmt, _) in (TRAIN | TEST | UNLISTED).items()}
    (folder / "TrainImages.txt").write_text("\r\n".join(TRAIN) + "\r\n")
    (folder / "TestImages.txt").write_text("\n".join(TEST))  # the last line has no end
    files = {f"Images/{name}": data for name, data in files.items()}
    return archive(folder / "indoorCVPR_09.tar", files)


class Downloads:
    """A download manager of archives that lie in a folder."""

    def __init__(self, folder, manual=False):
        self.folder, self.manual, self.asked = folder, manual, []

    @property
    def manual_dir(self):
        assert self.manual, "as tensorflow-datasets says it"
        return self.folder

    def download(self, urls):
        def one(url):
            self.asked.append(url)
            return self.folder / url.rsplit("/", 1)[1]

        return {key: one(url) for key, url in urls.items()} if isinstance(urls, dict) else one(urls)

    def iter_archive(self, path):
        with tarfile.open(path) as tar:
            for member in tar:
                yield member.name, tar.extractfile(member)


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def examples(builder, downloads):
    """What a builder finds: split, name of the file, class and bytes of the image."""
    class_names = builder.info.features["label"].names
    return {
        split: {
            example["file_name"]: (class_names.index(example["label"]), example["image"].read())
            for _, example in generated
        }
        for split, generated in builder._split_generators(downloads).items()
    }


def test_caltech256_takes_the_images_and_leaves_the_rest(tmp_path):
    caltech_archive(tmp_path)
    downloads = Downloads(tmp_path)
    builder = caltech256.Builder(data_dir=tmp_path)
    assert builder.name == "caltech256"
    expected = {
        name.split("/")[1]: (label, picture(name, fmt)) for name, (fmt, label) in CALTECH.items()
    }
    assert examples(builder, downloads) == {"train": expected}
    checksums = Path(caltech256.__file__).with_name("checksums.tsv").read_text()
    assert downloads.asked == [checksums.split("\t")[0]]
    assert builder.info.features["label"].num_classes == 256


def test_caltech256_with_clutter_has_one_class_more(tmp_path):
    caltech_archive(tmp_path)
    builder = caltech256.Builder(data_dir=tmp_path, config="with_clutter")
    found = examples(builder, Downloads(tmp_path))["train"]
    assert Counter(label for label, _ in found.values()) == {0: 3, 197: 3, 255: 3, 256: 1}
    assert builder.info.features["label"].num_classes == 257


def test_indoor67_follows_the_published_lists(tmp_path):
    indoor_archive(tmp_path)
    downloads = Downloads(tmp_path)
    builder = indoor67.Builder(data_dir=tmp_path)
    found = examples(builder, downloads)
    for split, listed in (("train", TRAIN), ("test", TEST)):
        assert found[split].keys() == listed.keys()
        for name, (label, data) in found[split].items():
            image_format, expected = listed[name]
            assert label == expected
            original = picture(name, image_format)
            np.testing.assert_array_equal(pixels(data), pixels(original))
            assert data == original or image_format == "GIF"
            assert not data.startswith(b"GIF"), "TensorFlow reads it as a film"
    assert len(downloads.asked) == 3
    assert builder.info.features["label"].num_classes == 67


def test_indoor67_downloads_only_what_is_not_at_hand(tmp_path):
    indoor_archive(tmp_path)
    downloads = Downloads(tmp_path, manual=True)
    builder = indoor67.Builder(data_dir=tmp_path)
    assert len(examples(builder, downloads)["train"]) == len(TRAIN)
    assert downloads.asked == []


def test_indoor67_refuses_an_archive_that_lacks_images(tmp_path):
    indoor_archive(tmp_path)
    with (tmp_path / "TrainImages.txt").open("a") as names:
        names.write("office/not there.jpg\n")
    with pytest.raises(ValueError, match="lacks 1 images of the list, such as office/not there"):
        examples(indoor67.Builder(data_dir=tmp_path), Downloads(tmp_path))


@needs_tensorflow
@pytest.mark.parametrize("module", [caltech256, indoor67])
def test_builders_pass_the_standard_test(module, tmp_path, monkeypatch):
    """The one of tensorflow-datasets, which has its own test runner."""
    make, splits = {
        caltech256: (caltech_archive, {"train": len(CALTECH)}),
        indoor67: (indoor_archive, {"train": len(TRAIN), "test": len(TEST)}),
    }[module]
    path = make(tmp_path)
    names = {name: name for name in getattr(module, "_URLS", {})}

    class Standard(tfds.testing.DatasetBuilderTestCase):
        DATASET_CLASS = module.Builder
        BUILDER_CONFIG_NAMES_TO_TEST = ["objects"] if module is caltech256 else None
        EXAMPLE_DIR = tmp_path
        DL_DOWNLOAD_RESULT = names or path.name
        SPLITS = splits
        SKIP_CHECKSUMS = module is indoor67  # none are known

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Standard).run(result)
    assert result.testsRun > 5
    assert not result.errors + result.failures


@pytest.mark.parametrize("module", [caltech256, indoor67])
def test_builders_describe_their_data(module, tmp_path):
    info = module.Builder(data_dir=tmp_path).info
    assert info.description
    assert "@" in info.citation
    assert info.homepage.startswith("https://")
    names = info.features["label"].names
    assert len(set(names)) == len(names)


@pytest.mark.skipif(HAS_TENSORFLOW, reason="TensorFlow is here")
def test_preparing_without_tensorflow_says_what_to_install(tmp_path):
    with pytest.raises(ImportError, match=r'pip install -e "\.\[tfds\]"'):
        prepare.prepare(prepare.Config("caltech256", data_dir=tmp_path))


@needs_tensorflow
@pytest.mark.filterwarnings("default")
def test_prepared_archives_are_read_back(tmp_path, capsys, monkeypatch):
    indoor_archive(tmp_path)
    data_dir = tmp_path / "data"
    argv = ["prepare", "indoor67", "--data-dir", str(data_dir), "--manual-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    prepare.main()
    assert f"--dataset indoor67 --data-dir {data_dir}" in capsys.readouterr().out

    config = DataConfig("indoor67", data_dir=str(data_dir), validation=1)
    data = load(config)
    assert len(data.class_names) == 67
    assert (len(data.train), len(data.validation), len(data.test)) == (len(TRAIN) - 2, 2, 2)
    for source, listed in ((data.train, TRAIN), (data.validation, TRAIN), (data.test, TEST)):
        for i, label in enumerate(source.labels):
            example = source[i]
            name = example["name"].split(", ")[-1]
            image_format, expected = listed[name]
            assert label == example["label"] == expected
            np.testing.assert_array_equal(example["image"], pixels(picture(name, image_format)))
    with pytest.raises(ValueError, match=r"indoor67 is not prepared in .*other"):
        load(dataclasses.replace(config, data_dir=str(tmp_path / "other")))


@needs_tensorflow
@pytest.mark.filterwarnings("default")
def test_another_storage_is_told_apart(tmp_path):
    indoor_archive(tmp_path)
    builder = indoor67.Builder(data_dir=tmp_path / "data", file_format="tfrecord")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path))
    with pytest.raises(ValueError, match="is stored as tfrecord, not as array_record"):
        load(DataConfig("indoor67", data_dir=str(tmp_path / "data")))
    with pytest.raises(ValueError, match="is stored as tfrecord, not as array_record"):
        prepare.prepare(prepare.Config("indoor67", data_dir=tmp_path / "data"))
