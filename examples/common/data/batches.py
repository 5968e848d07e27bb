"""Batches for training and evaluation, and their transfer to devices."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchDatasetIterator

from examples.common.data.config import DataConfig
from examples.common.data.images import CorruptImageError, augment, centre_crop
from examples.common.data.sources import Example, Source


class Batch(NamedTuple):
    """The input of the network, or one element of it while the batch is made.

    Attributes:
        images: ``(n, size, size, 3)``, uint8.
        labels: ``(n,)``, int32.
        valid: ``(n,)``, bool; False for padding of a batch of evaluation.
    """

    images: Any
    labels: Any
    valid: Any


def train_batches(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """Endless batches. In each epoch every image comes once, in a new order.

    Order and augmentation depend only on ``seed`` and the position in the sequence, not on the
    number of workers and processes. The concatenated rows of all processes are the batch of a
    single process.

    Args:
        source: The training images.
        config: Augmentation, corrupt images and workers.
        batch_size: Images per batch over all processes.
        seed: Of order and augmentation, 0 to 2**32 - 1.
        process_index: The index of this process.
        process_count: The number of processes.

    Returns:
        A dataset whose iterators have ``get_state`` and ``set_state``, with states in JSON.
    """
    _check(batch_size, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1; got {seed}.")
    if not len(source):
        raise ValueError("There is no image to train on.")

    def view(example: Example, rng: np.random.Generator) -> Batch:
        image = augment(example["image"], config, rng)
        return Batch(image, np.int32(example["label"]), np.bool_(True))

    examples = grain.MapDataset.source(_Readable(source, config.on_corrupt == "skip"))
    examples = examples.seed(seed).shuffle().repeat().random_map(view)
    return _batch(examples, config, batch_size, process_index, process_count)


def evaluation_batches(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """Batches of the centre crop of every image, in order; the last batch is padded.

    Args:
        source: The images.
        config: Image size, corrupt images and workers.
        batch_size: Images per batch over all processes.
        process_index: The index of this process.
        process_count: The number of processes. All get the same number of batches.

    Returns:
        A dataset of batches, in which ``valid`` marks images and not padding.
    """
    _check(batch_size, process_count)
    examples = grain.MapDataset.source(_Padded(source, config, batch_size))
    return _batch(examples, config, batch_size, process_index, process_count)


class DeviceBatches(Iterator[Batch]):
    """Batches on devices, prefetched by a thread.

    Attributes:
        waited_seconds: The total time that calls of ``next`` have waited for a batch. If it hardly
            grows after the first batch, the devices are busy.
    """

    def __init__(
        self, batches: grain.IterDataset[Batch], sharding: jax.sharding.Sharding, depth: int = 2
    ) -> None:
        def send(batch: Batch) -> Batch:
            return jax.tree.map(
                lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
            )

        if depth < 1:
            raise ValueError(f"depth must be at least 1; got {depth}.")
        self._batches = ThreadPrefetchDatasetIterator(iter(batches.map(send)), depth)
        self.waited_seconds = 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited_seconds += time.perf_counter() - start

    def __enter__(self) -> "DeviceBatches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned, without prefetched ones, as JSON."""
        # grain counts the rows of this process. The count of all rows suits any number of them.
        rows = self._batches.get_state()["next_index"]
        return {"next_row": rows * jax.process_count()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``, with the same images and any number of processes."""
        self._batches.set_state({"next_index": state["next_row"] // jax.process_count()})

    def close(self) -> None:
        """Stops the thread."""
        self._batches.close()


def to_device(
    batches: grain.IterDataset[Batch], sharding: jax.sharding.Sharding, depth: int = 2
) -> DeviceBatches:
    """Prefetches batches to devices.

    Args:
        batches: The rows of this process of each batch.
        sharding: Of the whole batch, along its first axis.
        depth: The number of prefetched batches.

    Returns:
        An iterator over arrays of the whole batch. Errors in making a batch are raised by ``next``.
    """
    return DeviceBatches(batches, sharding, depth)


def _check(batch_size: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the number of processes, {process_count}; "
            f"got {batch_size}."
        )


def _batch(
    examples: grain.MapDataset,
    config: DataConfig,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> grain.IterDataset[Batch]:
    rows = batch_size // process_count
    if process_count > 1:
        examples = grain.MapDataset.source(_Share(examples, batch_size, process_index, rows))
    reading = grain.ReadOptions(
        num_threads=config.workers, prefetch_buffer_size=2 * rows if config.workers else 0
    )
    return examples.to_iter_dataset(reading).batch(rows)


class _Readable:
    """The images of a source; an unreadable image is replaced by the next readable one."""

    def __init__(self, source: Source, skip: bool) -> None:
        self._source, self._skip = source, skip

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        for ahead in range(len(self)):
            try:
                return self._source[(index + ahead) % len(self)]
            except CorruptImageError as error:
                if not self._skip:
                    raise
                self._source.skip(error)
        raise ValueError(f"None of the {len(self)} training images can be read.")


class _Padded:
    """The images of a source for evaluation, padded to whole batches."""

    def __init__(self, source: Source, config: DataConfig, batch_size: int) -> None:
        self._source, self._config = source, config
        self._length = -(-len(source) // batch_size) * batch_size
        blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
        self._filling = Batch(blank, np.int32(0), np.bool_(False))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self._source):
            return self._filling
        try:
            example = self._source[index]
        except CorruptImageError as error:
            if self._config.on_corrupt == "refuse":
                raise
            self._source.skip(error)
            return self._filling
        image = centre_crop(example["image"], self._config)
        return Batch(image, np.int32(example["label"]), np.bool_(True))


class _Share:
    """The rows of one process in every batch."""

    def __init__(
        self, examples: grain.MapDataset, batch_size: int, process_index: int, rows: int
    ) -> None:
        self._examples, self._batch_size, self._rows = examples, batch_size, rows
        self._first = process_index * rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * self._rows

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, self._rows)
        return self._examples[batch * self._batch_size + self._first + row]
