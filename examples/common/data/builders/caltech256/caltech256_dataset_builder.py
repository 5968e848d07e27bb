"""Caltech-256: objects, with or without the clutter class."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

_URL = "https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar"
_CLUTTER = "clutter"
# The archive holds a note, 198.spider/RENAME2, and in 056.dog a folder of no use, greg.
_IMAGE = re.compile(r"(?:^|/)(\d{3})\.([^/]+)/(\1_\d{4}\.jpg)$", re.IGNORECASE)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Caltech-256.

    The one split is ``train``: the publisher draws none. The SHA-256 in checksums.tsv is what
    torchvision's prototype data sets hold the archive against; the publisher gives no such sum.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The archive of CaltechDATA, 30,607 images."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="objects", description="The 256 classes of objects."),
        tfds.core.BuilderConfig(name="with_clutter", description="The objects, and clutter."),
    ]

    def _class_names(self) -> list[str]:
        names = Path(__file__).with_name("labels.txt").read_text().split()
        if self.builder_config == self.BUILDER_CONFIGS[0]:
            names.remove(_CLUTTER)
        return names

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(names=self._class_names()),
                    "file_name": tfds.features.Text(),  # such as 001_0001.jpg
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.22002/D1.20087",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        archive = dl_manager.download(_URL)
        return {"train": self._generate_examples(dl_manager.iter_archive(archive))}

    def _generate_examples(
        self, files: Iterable[tuple[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        class_names = self._class_names()
        for path, file in files:
            if (match := _IMAGE.search(path)) and match[2] in class_names:
                yield match[3], {"image": file, "label": match[2], "file_name": match[3]}
