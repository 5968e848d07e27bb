"""Opens a data set by name, from a folder or tensorflow-datasets."""

from pathlib import Path
from typing import NamedTuple

from examples.common.data.config import DataConfig
from examples.common.data.duplicates import shared_images
from examples.common.data.folders import open_folder
from examples.common.data.sources import Source, open_tfds
from examples.common.data.splits import split
from examples.common.text import printable

_LISTED = 8


class Dataset(NamedTuple):
    """Images for training, model selection and testing.

    Attributes:
        name: ``DataConfig.dataset``.
        train: Training images.
        validation: Images for choosing settings and checkpoints.
        test: Images for the final test.
        class_names: The name of each label.
        held_out: Images that are not trained on, for the reference of a rule; ``None`` without.
        notes: What was left out, and other things to know about the splits.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    class_names: tuple[str, ...]
    held_out: Source | None = None
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> list[str]:
        """What was read and what was not, in lines."""
        names = ", ".join(self.class_names[:_LISTED])
        more = ", ..." if self.class_names[_LISTED:] else ""
        lines = [f"{printable(self.name)}: {len(self.class_names)} classes: {names}{more}"]
        for name in ("train", "held_out", "validation", "test"):
            source = getattr(self, name)
            if source is None:
                continue
            of = "" if source.n_classes is None else f" of {source.n_classes} classes"
            held_out = name != "train" and source.is_part_of(self.train)
            lines.append(f"  {name}: {len(source)} images{of}" + ", held out of train" * held_out)
        return lines + [f"  {each}" for each in self.notes]


def load(config: DataConfig) -> Dataset:
    """Opens the data set of ``config`` and splits it.

    Args:
        config: The data set and its splits.

    Returns:
        The splits. They have no images in common unless the published splits do.

    Raises:
        ValueError: If there is no such data set, or it does not fit ``config``.
        ImportError: If it needs tensorflow-datasets and that is not installed.
    """
    folder, notes = Path(config.dataset).expanduser(), []
    if folder.is_dir():
        if config.data_dir is not None:
            raise ValueError(
                f"{folder} is a folder of images, and data_dir is for tensorflow-datasets; got "
                f"{config.data_dir}. Set only one of them."
            )
        published, class_names, notes = open_folder(folder)
    elif folder.exists():
        raise ValueError(
            f"{folder} is a file, and a data set is a folder of images. If it is an archive, "
            "unpack it and give the folder."
        )
    elif config.dataset.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {folder}.")
    else:
        published, class_names = open_tfds(config.dataset, config.data_dir)
    parts = split(published, config, class_names)
    if folder.is_dir():
        notes += shared_images(*parts)
    if "validation" in published and "test" not in published:
        notes.append("The validation images of the data set are the test images.")
    return Dataset(config.dataset, *parts, class_names, notes=tuple(notes))
