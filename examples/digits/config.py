"""The settings of the demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    """Fine-tune a small ResNet on few digits, from a fitting and from an unfitting source."""

    out: Path = Path("results/digits")
    """Directory for the figure, the table and the numbers."""
    seeds: int = 8
    """Number of seeds, at least 2. A seed draws training images, initial weights and batches."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Images that accuracies are computed on. Choose settings on validation."""
    images_per_class: int = 3
    """Target training images per class, at least 2."""
    folds: int = 1
    """Trials of the regularizer, each with another image of every class held out."""
    reg_weight: float = 1.0
    """λ, the weight of L2-SP."""
    learning_rate: float = 0.01
    """Learning rate of a fine-tuning by SGD with momentum 0.9; it falls to 0 along a cosine."""
    steps: int = 600
    """Training steps of a fine-tuning; a trial run has a third of them."""
    source_steps: int = 600
    """Training steps of the fitting source."""
    memorize_steps: int = 1500
    """Training steps of the unfitting source: permuted labels take longer to learn."""
    batch_size: int = 16
    """Images in a training step."""
    widths: tuple[int, int, int] = (16, 32, 32)
    """Channels of the three blocks."""
    evaluations: int = 12
    """Number of evaluations during a training."""

    def __post_init__(self) -> None:
        least = {"seeds": 2, "images_per_class": 2, "steps": 3}
        counts = ("folds", "source_steps", "memorize_steps", "batch_size", "evaluations")
        for name, bound in (least | dict.fromkeys(counts, 1)).items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}; got {getattr(self, name)}.")
        for name in ("learning_rate", "reg_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if min(self.widths) < 1:
            raise ValueError(f"widths must be at least 1; got {self.widths}.")
        for name, most in (("folds", "images_per_class"), ("evaluations", "steps")):
            if getattr(self, name) > getattr(self, most):
                raise ValueError(
                    f"{name} must be at most {most}; got {getattr(self, name)} > "
                    f"{getattr(self, most)}."
                )
