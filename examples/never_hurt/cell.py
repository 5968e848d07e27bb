"""One run of the experiment: what it is, what it is called, and what comes out of it."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

NONE = "none"


@dataclass(frozen=True)
class Cell:
    """One fine-tuning, down to the last setting."""

    source: str
    """Where the weights come from: a name of `sources`."""
    target: str
    """The data set that is learnt: a folder beside those of the sources."""
    regularizer: str
    """Ω, one of `examples.common.objective`; none for plain fine-tuning."""
    rule: str
    """How the two gradients become one update: a name of `rules`."""
    strength: float
    """λ as a multiple of the usual weight."""
    seed: int
    """Draws images, first weights of the head, and batches. Cells of one seed are pairs."""
    learning_rate: float
    """At the beginning; it falls to 0 along a cosine."""
    images_per_class: int | None
    """Training images a class; None: all."""
    test: bool
    """Whether accuracy is taken on the test images too, once, after the last step."""
    order: int = 0
    """Draws the batches anew, from the same images and first weights: what chance alone does."""
    architecture: str = "cifar_resnet8"
    """Of the network."""
    image_size: int = 16
    """Height and width of what the network sees, in pixels."""
    steps: int = 200
    """Steps of SGD, four at least: what is measured is told by quarters."""
    batch_size: int = 32
    """Images in a step."""

    def __post_init__(self) -> None:
        # So that 1 and 1.0 are one setting, with one key.
        object.__setattr__(self, "strength", float(self.strength))
        object.__setattr__(self, "learning_rate", float(self.learning_rate))
        for name, least in (("strength", 0), ("learning_rate", 0), ("steps", 4), ("batch_size", 1)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be a number from {least} on; got {value}.")

    @property
    def key(self) -> str:
        """A name that no other settings have."""
        canonical = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What came out of a cell.

    Attributes:
        cell: What was run.
        validation: The accuracy on validation images after the last step, 0 to 1.
        test: The accuracy on test images, if they were looked at.
        train_accuracy: On the batches of the last tenth of training, as they were augmented.
        train_loss: Likewise; None if it was not finite.
        conflict: For each layer and each quarter of training the share of steps in which the two
            gradients, as the rule sees them, are in conflict; empty without a regularizer.
        removed: For each quarter of training the mean share of the regularizer's gradient that the
            rule took out, over all layers; None where that is not finite: training has diverged.
        seconds: What it took, without compilation.
    """

    cell: Cell
    validation: float
    test: float | None
    train_accuracy: float
    train_loss: float | None
    conflict: Mapping[str, list[float]] = field(default_factory=dict)
    removed: list[float | None] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(
            {"key": self.cell.key, **asdict(self)}, separators=(",", ":"), allow_nan=False
        )

    @classmethod
    def from_json(cls, line: str) -> "Result":
        """Reads `to_json`.

        Raises:
            ValueError: If it is no such line, or its cell no longer has the key that it had.
        """
        data: dict[str, Any] = json.loads(line)
        key = data.pop("key")
        known = {each.name for each in fields(Cell)}
        if unknown := set(data["cell"]) - known:
            raise ValueError(f"A result has settings that cells do not have: {sorted(unknown)}.")
        result = cls(**{**data, "cell": Cell(**data["cell"])})
        if result.cell.key != key:
            raise ValueError(
                f"The result {key} is of a cell whose key is now {result.cell.key}: settings were "
                "added to cells since. Run it again, in another file."
            )
        return result
