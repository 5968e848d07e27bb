"""One run of the experiment: its settings, its key and its result."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

NONE = "none"
ADDED = ("held_out", "held_out_every", "returned_at", "trial", "procedure")
"""Settings that were added after the first results."""


@dataclass(frozen=True)
class Cell:
    """All settings of one fine-tuning."""

    source: str
    """The source of the initial weights, see `sources`."""
    target: str
    """The data set of the target task, see `images.parsed`."""
    regularizer: str
    """The regularizer Ω, one of `examples.common.objective`; none for plain fine-tuning."""
    rule: str
    """The rule that combines the two gradients, see `rules`."""
    strength: float
    """λ as a multiple of the usual weight."""
    seed: int
    """Draws images, initial weights of the head and batches. Cells are compared by seed."""
    learning_rate: float
    """The initial learning rate; it decays to 0 along a cosine."""
    images_per_class: int | None
    """Training images per class; None: all."""
    test: bool
    """Whether the accuracy on test images is computed, once, after the last step."""
    order: int = 0
    """Draws other batches of the same images from the same initial weights."""
    architecture: str = "cifar_resnet8"
    """The network, see `examples.common.resnet`."""
    image_size: int = 16
    """Height and width of the input of the network, in pixels."""
    steps: int = 200
    """Steps of SGD, at least 4: conflict is reported by quarters of training."""
    batch_size: int = 32
    """Images in a step."""
    held_out: int = 0
    """Training images per class that are not trained on: their gradient is the reference."""
    held_out_every: int = 1
    """Steps from one held-out gradient to the next."""
    returned_at: float = 1.0
    """The share of training after which the held-out images are trained on, too; 1: never."""
    trial: float = 0.0
    """The share of the steps that two trial runs take, with and without the regularizer, on all but
    the held-out images, whose loss decides whether the run itself has it; 0: no trial runs."""
    procedure: str = "plain"
    """What is done around the steps of training, see `procedures`."""

    def __post_init__(self) -> None:
        # 1 and 1.0 are one setting, with one key.
        object.__setattr__(self, "strength", float(self.strength))
        object.__setattr__(self, "learning_rate", float(self.learning_rate))
        least = {"strength": 0, "learning_rate": 0, "steps": 4, "batch_size": 1}
        for name, lowest in {**least, "held_out": 0, "held_out_every": 1}.items():
            value = getattr(self, name)
            if not lowest <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least {lowest}; got {value}.")
        if not 0 < self.returned_at <= 1:
            raise ValueError(f"returned_at must be in (0, 1]; got {self.returned_at}.")
        if not 0 <= self.trial <= 1:
            raise ValueError(f"trial must be in [0, 1]; got {self.trial}.")
        if self.trial and not self.held_out:
            raise ValueError("Trial runs are compared on held-out images: set held_out.")

    def is_due(self, step: int) -> bool:
        """Whether a step computes a held-out gradient."""
        is_apart = step < round(self.returned_at * self.steps)
        has_gradient = self.held_out > 0 and not self.trial
        return has_gradient and is_apart and step % self.held_out_every == 0

    @property
    def key(self) -> str:
        """A hash of all settings."""
        settings = asdict(self)
        for name in ADDED:
            # Keys of results from before these settings existed stay as they were.
            if settings[name] == type(self).__dataclass_fields__[name].default:
                del settings[name]
        canonical = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """The result of a cell.

    Attributes:
        cell: The cell.
        validation: The accuracy on validation images after the last step, 0 to 1.
        test: The accuracy on test images; None if it was not computed.
        train_accuracy: On the augmented batches of the last tenth of training.
        train_loss: On the same batches; None if it was not finite.
        conflict: For each layer and each quarter of training the share of steps in which the two
            gradients, as the rule sees them, conflict; empty without a regularizer.
        removed: For each quarter of training the mean share of the regularizer's gradient that the
            rule removes, over all layers; None where it is not finite, after a divergence.
        trial_losses: The losses on the held-out images, calibrated as in `common.calibration`,
            after the trial run without the regularizer and after the one with it; None for one that
            is not finite, and without trial runs.
        seconds: The time of training, without compilation of its steps.
        version: The version of the project that computed it; None in files of older versions.
        held_out_accuracy: On the images that are not trained on; None without any.
        held_out_loss: On the same images; None without any, or if it was not finite.
        chosen: The number of steps at which early stopping stopped, or the share of the fine-tuned
            network in an interpolation; None with other procedures.
        shifted: The mean accuracy on test images with noise, blur and less contrast, see `shifts`;
            None if `test` was not computed.
        source_accuracy: The accuracy on test images of the task of the source, with its own head on
            the fine-tuned network; None if `test` was not computed, or the source is not a data set
            with its true labels.
        length_ratio: For each quarter of training the median over its steps of λ‖b‖ / ‖a‖, with the
            gradients b of the regularizer and a of the loss in all arrays that the regularizer
            reaches, before the rule; None where it is not finite, empty without a regularizer.
    """

    cell: Cell
    validation: float
    test: float | None
    train_accuracy: float
    train_loss: float | None
    conflict: Mapping[str, list[float]] = field(default_factory=dict)
    removed: list[float | None] = field(default_factory=list)
    trial_losses: list[float | None] | None = None
    seconds: float = 0.0
    version: str | None = None
    held_out_accuracy: float | None = None
    held_out_loss: float | None = None
    chosen: float | None = None
    shifted: float | None = None
    source_accuracy: float | None = None
    length_ratio: list[float | None] = field(default_factory=list)

    def to_json(self) -> str:
        """Formats the result as one line."""
        return json.dumps(
            {"key": self.cell.key, **asdict(self)}, separators=(",", ":"), allow_nan=False
        )

    @classmethod
    def from_json(cls, line: str) -> "Result":
        """Parses the output of `to_json`.

        Raises:
            ValueError: If the line is something else, or the key of its cell has changed.
        """
        data: dict[str, Any] = json.loads(line)
        key = data.pop("key")
        known = {each.name for each in fields(Cell)}
        if unknown := set(data["cell"]) - known:
            raise ValueError(f"A result has unknown settings: {sorted(unknown)}.")
        result = cls(**{**data, "cell": Cell(**data["cell"])})
        if result.cell.key != key:
            raise ValueError(
                f"The cell of the result {key} now has the key {result.cell.key}: cells have new "
                "settings. Run it again, with another file of results."
            )
        return result
