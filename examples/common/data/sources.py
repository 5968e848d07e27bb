"""Images from folders or tensorflow-datasets, read and decoded on access."""

import itertools
import re
import threading
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from examples.common.data.images import CorruptImageError, decode, read_bytes
from examples.common.text import printable


class Example(TypedDict):
    """One image.

    ``image`` is ``(height, width, 3)``, uint8; ``name`` is for messages.
    """

    image: np.ndarray
    label: int
    name: str


class Encoded(NamedTuple):
    """One image in its file format."""

    data: bytes
    label: int
    name: str


class Source:
    """Some of the images of a folder or a data set; ``source[i]`` decodes one.

    Attributes:
        skipped: The reasons why images could not be read, by their names, for the images read
            so far.
    """

    def __init__(
        self, images: "FolderImages | TfdsImages", indices: np.ndarray | None = None
    ) -> None:
        self._images = images
        self._indices = np.arange(len(images)) if indices is None else indices
        self.skipped: dict[str, str] = {}
        self._reporting = threading.Lock()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        data, label, name = self._images.read(int(self._indices[index]))
        return {"image": decode(data, name), "label": label, "name": name}

    @property
    def labels(self) -> np.ndarray:
        """The labels, ``(n,)``, int32; no image is decoded."""
        return self._images.labels[self._indices]

    @property
    def names(self) -> list[str]:
        """What identifies each image within the data set; no image is read."""
        return [self._images.name(int(index)) for index in self._indices]

    def n_bytes(self, most: int = 10_000) -> int:
        """The size of the files of ``most`` images or fewer, evenly spaced; 0 without files."""
        chosen = self._indices[:: -(-len(self) // most) or 1]
        return sum(self._images.n_bytes(int(index)) for index in chosen)

    @property
    def n_classes(self) -> int | None:
        """The number of classes that occur; ``None`` if all records would have to be read."""
        known = isinstance(self._images, FolderImages) or "labels" in vars(self._images)
        return len(np.unique(self.labels)) if known else None

    @property
    def files(self) -> list[Path]:
        """The files of the images; none in a data set that stores them otherwise."""
        files = self._images.files if isinstance(self._images, FolderImages) else ()
        return [files[index] for index in self._indices] if files else []

    def is_part_of(self, other: "Source") -> bool:
        """Whether both are parts of the same images."""
        return self._images is other._images

    def select(self, indices: np.ndarray) -> "Source":
        """The images at ``indices``, in the order of this source."""
        return Source(self._images, self._indices[np.sort(indices)])

    def skip(self, error: CorruptImageError) -> None:
        """Records an image that cannot be read, and warns the first time."""
        with self._reporting:
            is_new = error.name not in self.skipped
            self.skipped[error.name] = error.reason
        if is_new:
            warnings.warn(f"Left out: {error.name}, {error.reason}.", stacklevel=2)


@dataclass(frozen=True)
class FolderImages:
    """The image files of one split, class by class.

    Attributes:
        root: The names of images are relative to this folder.
        files: The files.
        labels: ``(n,)``, int32.
    """

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Encoded:
        """Reads the file at ``index``.

        Raises:
            CorruptImageError: If that is not possible.
        """
        name = printable(self.name(index))
        return Encoded(read_bytes(self.files[index], name), int(self.labels[index]), name)

    def name(self, index: int) -> str:
        """The path of the file at ``index``, relative to the folder of the data set."""
        return self.files[index].relative_to(self.root).as_posix()

    def n_bytes(self, index: int) -> int:
        """The size of the file at ``index``; 0 if it cannot be read."""
        try:
            return self.files[index].stat().st_size
        except OSError:
            return 0


class TfdsImages:
    """One split of a prepared data set, read without TensorFlow."""

    def __init__(self, builder: Any, split: str) -> None:
        import tensorflow_datasets as tfds

        image, label, *_ = builder.info.supervised_keys
        file_names = [key for key in builder.info.features if "file" in key and "name" in key]
        self._keys = image, label, *file_names[:1]
        self._where = f"{builder.info.full_name}, {split}"
        # Only these features are decoded, not boxes, masks and so on.
        self._features: Any = tfds.features.FeaturesDict(
            {key: builder.info.features[key] for key in self._keys}
        )
        self._label_alone: Any = tfds.features.FeaturesDict({label: builder.info.features[label]})
        self._decoders = {image: tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Encoded:
        """Reads the record at ``index``."""
        record = self._features.deserialize_example_np(
            self._records[index], decoders=self._decoders
        )
        image, label, *file_name = (record[key] for key in self._keys)
        name = self.name(index) + "".join(f", {text.decode()}" for text in file_name)
        return Encoded(image, int(label), name)

    def name(self, index: int) -> str:
        """The version of the data set, the split, and ``index``."""
        return f"{self._where}[{index}]"

    def n_bytes(self, index: int) -> int:
        """0: a version of a data set does not change."""
        del index
        return 0

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels, ``(n,)``, int32. The first access reads every record."""
        _, key, *_ = self._keys
        indices = range(len(self))
        chunks = (indices[start : start + 256] for start in indices[::256])
        records = itertools.chain.from_iterable(map(self._records.__getitems__, chunks))
        labels = (self._label_alone.deserialize_example_np(record)[key] for record in records)
        return np.fromiter(labels, np.int32, len(self))


def open_tfds(name: str, data_dir: str | None) -> tuple[dict[str, Source], tuple[str, ...]]:
    """Opens a data set that tensorflow-datasets has prepared.

    Args:
        name: Its name such as ``cifar10``, optionally with ``:version`` and ``/config``.
        data_dir: The folder of prepared sets; None: the default of tensorflow-datasets.

    Returns:
        The labelled splits, and the class names.

    Raises:
        ValueError: If it is unknown, not prepared, or not stored for random access.
    """
    builder = tfds_builder(name, data_dir)
    where = f" --data-dir {data_dir}" if data_dir else ""
    if not builder.is_prepared():
        raise ValueError(
            f"{name} is not prepared in {builder.data_dir}. Download and prepare it with\n"
            f"    python -m examples.finetune.prepare {name}{where}"
        )
    keys = builder.info.supervised_keys
    names = getattr(builder.info.features[keys[1]], "names", None) if keys else None
    if not names:
        raise ValueError(f"{name} is no set of images with one class each: {builder.info.features}")
    check_random_access(builder)
    splits = {
        split: TfdsImages(builder, split)
        for split in ("train", "validation", "test")
        if split in builder.info.splits
    }
    # The test images of competitions have the label -1.
    labelled = {split: x for split, x in splits.items() if len(x) and x.read(0).label >= 0}
    return {split: Source(images) for split, images in labelled.items()}, tuple(names)


def check_random_access(builder: Any) -> None:
    """Checks that a prepared data set supports random access.

    Args:
        builder: The builder of the data set.

    Raises:
        ValueError: If it is not stored as array_record.
    """
    import tensorflow_datasets as tfds

    if not builder.info.available_file_formats() & tfds.core.FileFormat.with_random_access():
        raise ValueError(
            f"{builder.data_dir} is stored as {builder.info.file_format.value}, not as "
            "array_record, which random access needs, and tensorflow-datasets stores a version "
            "only once in a place. Prepare it again elsewhere with\n"
            f"    python -m examples.finetune.prepare {builder.name} --data-dir ..."
        )


def tfds_builder(name: str, data_dir: str | None) -> Any:
    """Finds the builder of a data set of tensorflow-datasets or of this project.

    Args:
        name: Its name such as ``cifar10`` or ``indoor67``.
        data_dir: The folder of prepared sets; None: the default of tensorflow-datasets.

    Returns:
        The ``tfds.core.DatasetBuilder``.

    Raises:
        ValueError: If there is no such data set.
        ImportError: Without tensorflow-datasets.
    """
    neither = f"{printable(name)} is neither a folder here nor a name of tensorflow-datasets."
    # Names of files and of the Hugging Face hub can have other characters.
    if not re.fullmatch(r"\w+(:[\w.*]+)?(/[^\\]+)?(:[\w.*]+)?", name):
        raise ValueError(neither)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{name} is no folder here; to take it as a name of tensorflow-datasets, "
            "`pip install tensorflow-datasets`."
        ) from error
    from examples.common.data import builders  # noqa: F401 (tensorflow-datasets now knows them)

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(neither) from error
    # For a version or a configuration that there is not, and for a path: its grammar comes last.
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{neither} {str(error).strip().splitlines()[0]}") from error
