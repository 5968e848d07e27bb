"""Trial runs: the settings of two short runs, and what they decide."""

from dataclasses import replace
from typing import NamedTuple

from examples.common.calibration import is_lower
from examples.finetune.config import Config, TransferConfig

FOLDER = "trials"
"""The directory of the trial runs in that of the run."""


class Trial(NamedTuple):
    """The result of two trial runs.

    Attributes:
        steps: The steps of each.
        loss_without: The calibrated loss on validation images after the run without the
            regularizer, see `examples.common.calibration`.
        loss_with: The same with the regularizer.
    """

    steps: int
    loss_without: float
    loss_with: float

    @property
    def helps(self) -> bool:
        """Whether the loss is lower with the regularizer."""
        return is_lower(self.loss_with, than=self.loss_without)

    def __str__(self) -> str:
        decision = "has" if self.helps else "does not have"
        return (
            f"Trial runs of {self.steps} steps: the calibrated loss on validation images is "
            f"{self.loss_with:.3f} with the regularizer and {self.loss_without:.3f} without. So "
            f"this run {decision} it."
        )


def settings(config: Config, *, has_regularizer: bool) -> Config:
    """The settings of a run without trial runs, and without the regularizer if so decided."""
    kept = replace(config.transfer, trial=0.0)
    return replace(config, transfer=kept if has_regularizer else TransferConfig(regularizer="none"))


def shortened(config: Config, *, has_regularizer: bool) -> Config:
    """The settings of a trial run: a share of the steps, evaluated after the last one alone."""
    training, output, share = config.training, config.output, config.transfer.trial_share
    steps = max(1, round(share * training.steps))
    name = "with" if has_regularizer else "without"
    return replace(
        settings(config, has_regularizer=has_regularizer),
        training=replace(
            training,
            steps=steps,
            warmup_steps=min(steps - 1, round(share * training.warmup_steps)),
            evaluate_every=steps,
        ),
        # As often as in the run itself, since nothing is evaluated before the end.
        output=replace(
            output, out=output.out / FOLDER / name, checkpoint_every=config.checkpoint_every
        ),
    )
