"""The batches of a run: of training images and, if there are any, of held-out images."""

from typing import Any, Self

from jax.sharding import Mesh

from examples.common import data
from examples.common.data import Dataset, DeviceBatches, Source
from examples.finetune import devices
from examples.finetune.config import Config


def load(config: Config) -> Dataset:
    """Opens the data set, and takes the held-out images from the training images.

    Raises:
        ValueError: If there is no such data set, or it does not fit the settings.
        ImportError: If it needs tensorflow-datasets and that is not installed.
    """
    dataset, share = data.load(config.data), config.transfer.held_out
    if not share:
        return dataset
    held_out, train = data.hold_out(
        dataset.train, share, config.data.split_seed, "held_out", dataset.class_names
    )
    return dataset._replace(train=train, held_out=held_out)


class TrainingBatches:
    """Endless micro-batches on the devices. A context manager.

    Args:
        config: Batch size, augmentation and seed.
        dataset: The images, from :func:`load`.
        mesh: The devices.

    Attributes:
        train: Micro-batches of training images.
        held_out: Micro-batches of held-out images, augmented likewise; ``None`` without.
    """

    def __init__(self, config: Config, dataset: Dataset, mesh: Mesh) -> None:
        training = config.training

        def on_devices(images: Source, seed: int) -> DeviceBatches:
            batches = data.train_batches(
                images,
                config.data,
                batch_size=training.batch_size // training.accumulate,
                seed=seed,
                **devices.process(),
            )
            return data.to_device(batches, devices.batch_sharding(mesh), config.devices.prefetch)

        self.train = on_devices(dataset.train, training.seed)
        self.held_out = None
        if dataset.held_out is not None:
            # Another seed, so that the two do not have the same crops.
            self.held_out = on_devices(dataset.held_out, (training.seed + 1) % 2**32)

    @property
    def waited_seconds(self) -> float:
        """The total time that the devices have waited for a batch."""
        held_out = 0.0 if self.held_out is None else self.held_out.waited_seconds
        return self.train.waited_seconds + held_out

    def get_state(self) -> dict[str, Any]:
        """The position in the images, as JSON."""
        held_out = {} if self.held_out is None else {"held_out": self.held_out.get_state()}
        return self.train.get_state() | held_out

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``."""
        self.train.set_state(state)
        if self.held_out is not None:
            self.held_out.set_state(state["held_out"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()
        if self.held_out is not None:
            self.held_out.close()
