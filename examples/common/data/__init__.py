"""Loads, splits, augments and batches images, and sends them to devices."""

from examples.common.data.batches import (
    Batch,
    DeviceBatches,
    evaluation_batches,
    to_device,
    train_batches,
)
from examples.common.data.config import DataConfig
from examples.common.data.dataset import Dataset, load
from examples.common.data.folders import find_images, listing
from examples.common.data.images import (
    CorruptImageError,
    augment,
    centre_crop,
    decode,
    pad_margin,
    read_bytes,
)
from examples.common.data.sources import Source
from examples.common.data.splits import hold_out

__all__ = [
    "Batch",
    "CorruptImageError",
    "DataConfig",
    "Dataset",
    "DeviceBatches",
    "Source",
    "augment",
    "centre_crop",
    "decode",
    "evaluation_batches",
    "find_images",
    "hold_out",
    "listing",
    "load",
    "pad_margin",
    "read_bytes",
    "to_device",
    "train_batches",
]
