"""`python -m examples.finetune.prepare caltech256`: downloads and prepares a data set."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.common.data.sources import check_random_access, tfds_builder


@dataclass(frozen=True)
class Config:
    """Download a data set of tensorflow-datasets and store it so that training can read it."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Its name, such as cifar10, caltech256, indoor67 or imagenet2012."""
    data_dir: Path | None = None
    """The directory of prepared data sets; None for the default of tensorflow-datasets."""
    manual_dir: Path | None = None
    """The directory of archives that must be downloaded by hand, such as ImageNet's."""
    register_checksums: bool = False
    """Record the checksums of the downloads, for builders that have none."""


def prepare(config: Config) -> Path:
    """Downloads and prepares a data set, unless it is prepared already.

    Args:
        config: The data set and the directories.

    Returns:
        The directory of the prepared data set.

    Raises:
        ImportError: Without tensorflow-datasets, or TensorFlow where a builder needs it.
        ValueError: If there is no such data set, or it is prepared in another file format.
    """
    data_dir = None if config.data_dir is None else str(config.data_dir.expanduser())
    builder = tfds_builder(config.dataset, data_dir)
    # Check before the download, not after it.
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f'Preparing {config.dataset} needs TensorFlow: `pip install -e ".[tfds]"`. Training '
            "on it does not."
        )
    _prepare(builder, config)
    check_random_access(builder)  # it may have been prepared earlier, in another format
    return Path(builder.data_dir)


def _prepare(builder: Any, config: Config) -> None:
    import tensorflow_datasets as tfds

    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(
            manual_dir=config.manual_dir, register_checksums=config.register_checksums
        ),
    )


def main() -> None:
    """Runs the command line."""
    config = tyro.cli(Config, description=Config.__doc__)
    try:
        where = prepare(config)
    # tensorflow-datasets raises AssertionError if the manual directory lacks an archive.
    except (ImportError, ValueError, AssertionError) as error:
        sys.exit(str(error))
    data_dir = "" if config.data_dir is None else f" --data-dir {config.data_dir}"
    print(f"{where}: train on it with --dataset {config.dataset}{data_dir}")


if __name__ == "__main__":
    main()
