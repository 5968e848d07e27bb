"""Opens a data set by name, from a folder or tensorflow-datasets."""

from pathlib import Path
from typing import NamedTuple

from examples.common.data.config import DataConfig
from examples.common.data.sources import Source, open_folder, open_tfds
from examples.common.data.splits import split


class Dataset(NamedTuple):
    """Images for training, model selection and testing.

    Attributes:
        name: ``DataConfig.dataset``.
        train: Training images.
        validation: Images for choosing settings and checkpoints.
        test: Images for the final test.
        class_names: The name of each label.
        held_out: Images that are not trained on, for the reference of a rule; ``None`` without.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    class_names: tuple[str, ...]
    held_out: Source | None = None


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
    folder = Path(config.dataset).expanduser()
    if folder.is_dir():
        if config.data_dir is not None:
            raise ValueError(
                f"{folder} is a folder of images, and data_dir is for tensorflow-datasets; got "
                f"{config.data_dir}. Set only one of them."
            )
        published, class_names = open_folder(folder)
    elif config.dataset.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {folder}.")
    else:
        published, class_names = open_tfds(config.dataset, config.data_dir)
    return Dataset(config.dataset, *split(published, config, class_names), class_names)
