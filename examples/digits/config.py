"""The settings of the experiment."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Variant = Literal[
    "bounded_dtnh", "gate", "decoupled", "momentum_first", "decoupled_sum", "same_length"
]


@dataclass(frozen=True)
class Config:
    """Fine-tune a small ResNet on the digits 5 to 9, starting from one that has seen 0 to 4."""

    out: Path = Path("results/digits")
    """Directory for the figure, the table and the numbers."""
    seeds: int = 8
    """Number of seeds, at least 2. A seed draws training images, initial weights and batches."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Held-out target images that accuracies are computed on. Choose settings on validation."""
    images_per_class: int = 5
    """Target training images per class."""
    source_images_per_class: int = 100
    """Source training images per class."""
    steps: int = 300
    """Training steps of a fine-tuning."""
    source_steps: int = 1000
    """Training steps of a source network. Random labels need more steps than true ones."""
    batch_size: int = 16
    """Images in a training step."""
    learning_rate: float = 0.01
    """Learning rate of SGD with momentum 0.9."""
    l2_sp_weights: tuple[float, ...] = (0.01, 0.1)
    """Regularizer weights with L2-SP: the usual one, and ten times that."""
    distillation_weights: tuple[float, ...] = (3.0,)
    """Regularizer weights with distillation: the best one for the weighted sum."""
    temperature: float = 2.0
    """Temperature of distillation."""
    variants: tuple[Variant, ...] = ("gate", "decoupled", "momentum_first", "bounded_dtnh")
    """Rules to run besides weighted_sum and dtnh. decoupled_sum and same_length are controls."""
    scope: Literal["global", "layer", "leaf", "element"] = "layer"
    """The groups of parameters for dtnh, gate and bounded_dtnh, and the rows of the heat map."""
    widths: tuple[int, int, int] = (16, 32, 32)
    """Channels of the three blocks."""
    evaluations: int = 10
    """Number of evaluations during a training."""

    def __post_init__(self) -> None:
        counts = ("images_per_class", "source_images_per_class", "steps", "source_steps")
        for name in (*counts, "batch_size", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("l2_sp_weights", "distillation_weights"):
            weights = getattr(self, name)
            if not weights or not all(weight > 0 for weight in weights):
                raise ValueError(f"{name} must be one or more positive numbers; got {weights}.")
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, for a spread; got {self.seeds}.")
        if min(self.widths) < 1:
            raise ValueError(f"widths must be at least 1; got {self.widths}.")
        if self.evaluations > self.steps:
            raise ValueError(
                f"evaluations must be at most steps; got {self.evaluations} > {self.steps}."
            )
