"""MIT Indoor 67: scenes, with the published lists of training and test images."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

_ARCHIVE = "indoorCVPR_09.tar"
_URLS = {
    _ARCHIVE: f"http://groups.csail.mit.edu/vision/LabelMe/NewImages/{_ARCHIVE}",
    "TrainImages.txt": "http://web.mit.edu/torralba/www/TrainImages.txt",
    "TestImages.txt": "http://web.mit.edu/torralba/www/TestImages.txt",
}
_LABELS = Path(__file__).with_name("labels.txt")


class Builder(tfds.core.GeneratorBasedBuilder):
    """MIT Indoor 67.

    Some images are no JPEG though their names end in ``.jpg``. The publisher tells no checksums, so
    checksums.tsv is empty: compare what you download with what you trust, or record it with
    ``--register-checksums``. What is in the manual directory is not downloaded.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The published lists, 5,360 and 1,340 images."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Nothing must be downloaded by hand. If a server no longer has a file, put your copy into "
        f"the manual directory: {', '.join(_URLS)}."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(names_file=_LABELS),
                    "file_name": tfds.features.Text(),  # such as bakery/bakery_0001.jpg
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://web.mit.edu/torralba/www/indoor.html",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        paths = _files(dl_manager)
        return {
            split: self._generate_examples(
                dl_manager.iter_archive(paths[_ARCHIVE]), paths[names].read_text().splitlines()
            )
            for split, names in (("train", "TrainImages.txt"), ("test", "TestImages.txt"))
        }

    def _generate_examples(
        self, files: Iterable[tuple[str, Any]], names: Iterable[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        awaited = {name.strip() for name in names} - {""}
        for path, file in files:
            name = "/".join(path.split("/")[-2:])
            if name in awaited:
                awaited.remove(name)
                image = _without_gif(file.read())
                yield name, {"image": image, "label": name.split("/")[0], "file_name": name}
        if awaited:
            raise ValueError(
                f"{_ARCHIVE} lacks {len(awaited)} images of the list, such as {min(awaited)}: it "
                "is cut short, or not the published one."
            )


def _without_gif(data: bytes) -> io.BytesIO:
    """An image as it is, or the first of a GIF as PNG: TensorFlow makes a film of a GIF."""
    if not data.startswith(b"GIF"):
        return io.BytesIO(data)
    png = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(png, "PNG")
    png.seek(0)
    return png


def _files(dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    """Where each file is: in the manual directory, or else downloaded."""
    try:
        manual = dl_manager.manual_dir
    except AssertionError:  # there is none
        at_hand = {}
    else:
        at_hand = {name: manual / name for name in _URLS if (manual / name).exists()}
    missing = {name: url for name, url in _URLS.items() if name not in at_hand}
    downloaded: Any = dl_manager.download(missing)
    return at_hand | downloaded
