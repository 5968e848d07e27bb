"""`python -m examples.finetune.prepare caltech256`: downloads a data set, once."""

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
    """Where prepared sets are kept; None: the default of tensorflow-datasets."""
    manual_dir: Path | None = None
    """Where you have put archives that cannot be downloaded for you, such as ImageNet's."""
    register_checksums: bool = False
    """Write down the checksums of the downloads, where a builder has none to check them with."""


def prepare(config: Config) -> Path:
    """Downloads and prepares a data set, unless that has been done.

    Args:
        config: Which, and where.

    Returns:
        The directory of the prepared set.

    Raises:
        ImportError: Without tensorflow-datasets, or TensorFlow where a builder needs it.
        ValueError: If there is no such data set, or it is stored there in another way.
    """
    data_dir = None if config.data_dir is None else str(config.data_dir.expanduser())
    builder = tfds_builder(config.dataset, data_dir)
    # Or it would be missed after the download.
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f'To prepare {config.dataset} takes TensorFlow: `pip install -e ".[tfds]"`. To train '
            "on it afterwards does not."
        )
    _prepare(builder, config)
    check_random_access(builder)  # it may have been prepared before, in another way
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
    """Prepares what the command line asks for."""
    config = tyro.cli(Config, description=Config.__doc__)
    try:
        where = prepare(config)
    # An assertion is what tensorflow-datasets says of the manual directory.
    except (ImportError, ValueError, AssertionError) as error:
        sys.exit(str(error))
    data_dir = "" if config.data_dir is None else f" --data-dir {config.data_dir}"
    print(f"{where}: train on it with --dataset {config.dataset}{data_dir}")


if __name__ == "__main__":
    main()
