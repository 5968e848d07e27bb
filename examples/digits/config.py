"""What can be set, and what cannot be."""

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
    """How many seeds, 2 or more. One draws training images, initial weights and batches."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Held-out target images that accuracies are taken on. Settings are chosen on validation."""
    images_per_class: int = 5
    """Target training images a class."""
    source_images_per_class: int = 100
    """Source training images a class."""
    steps: int = 300
    """Training steps of a fine-tuning."""
    source_steps: int = 1000
    """Training steps of a source network. Random labels need more of them than right ones."""
    batch_size: int = 16
    """Images in a training step."""
    learning_rate: float = 0.01
    """Learning rate of SGD with momentum 0.9."""
    l2_sp_weights: tuple[float, ...] = (0.01, 0.1)
    """Regularizer weights to try with L2-SP: a usual one, and ten times that."""
    distillation_weights: tuple[float, ...] = (3.0,)
    """Regularizer weights to try with distillation: where the weighted sum is at its best."""
    temperature: float = 2.0
    """Temperature of distillation."""
    variants: tuple[Variant, ...] = ("gate", "decoupled", "momentum_first", "bounded_dtnh")
    """Rules to try beside weighted_sum and dtnh; those of rules.py, the last two are controls."""
    scope: Literal["global", "layer", "leaf", "element"] = "layer"
    """Which parameters are one vector to dtnh and gate, and one row of the heat map."""
    widths: tuple[int, int, int] = (16, 32, 32)
    """Channels of the three blocks."""
    evaluations: int = 10
    """Points of an accuracy curve."""

    def __post_init__(self) -> None:
        for name in (
            "images_per_class",
            "source_images_per_class",
            "steps",
            "source_steps",
            "batch_size",
            "evaluations",
        ):
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
