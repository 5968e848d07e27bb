"""The settings of the data."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """The images, their splits and their batches."""

    dataset: str
    """A folder of images, or a name of tensorflow-datasets such as cifar10 or imagenet2012:5.1.0.
    A folder contains a folder of images for each class, or `train`, `validation` and `test`, each
    with a folder for each class."""
    data_dir: str | None = None
    """Folder of the prepared sets of tensorflow-datasets; None: its default. Not for folders."""
    images_per_class: int | None = None
    """Training images per class, drawn by split_seed; None: all."""
    validation: float = 0.1
    """Held out of the training images of each class if no validation split is published:
    a share if below 1, a number of images otherwise."""
    test: float = 0.2
    """Held out of each class if no test split is published, likewise a share or a number.
    The same images for every split_seed."""
    split_seed: int = 0
    """Draws the validation images and then the training images of each class."""
    image_size: int = 224
    """Height and width of the input of the network, in pixels."""
    resize: int | None = None
    """The short side before the centre crop of evaluation.
    None: image_size × 256/224, or image_size with pad_crop."""
    augmentation: Literal["standard", "pad_crop", "none"] = "standard"
    """Augmentation of training images. standard: a random resized crop and a flip.
    pad_crop, for small images such as CIFAR: pad by an eighth (4 pixels of 32), crop and flip.
    none: the centre crop of evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """The smallest and the largest share of an image in a random resized crop."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Whether an image that cannot be read stops the run or is skipped with a warning."""
    workers: int = 8
    """Threads that read and augment images; 0: make each batch on demand."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset must be a folder or a name of tensorflow-datasets; got ''.")
        if self.images_per_class is not None and self.images_per_class < 1:
            raise ValueError(f"images_per_class must be at least 1; got {self.images_per_class}.")
        for name in ("validation", "test"):
            held_out = getattr(self, name)
            if not 0 < held_out < math.inf or (held_out > 1 and held_out % 1):
                raise ValueError(
                    f"{name} must be a share between 0 and 1, or a whole number of images a class;"
                    f" got {held_out}."
                )
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be from 0 to 2**32 - 1; got {self.split_seed}.")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1; got {self.image_size}.")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize must be at least image_size, which is cropped out of it; got "
                f"{self.resize} < {self.image_size}."
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < least ≤ greatest ≤ 1; got {low}, {high}.")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0; got {self.workers}.")

    @property
    def short_side(self) -> int:
        """The short side of an image before its centre crop."""
        if self.resize is not None:
            return self.resize
        if self.augmentation == "pad_crop":
            return self.image_size
        return round(self.image_size * 256 / 224)
