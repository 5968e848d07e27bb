"""Stops a run whose loss is not finite."""

from collections.abc import Sequence

import jax


class DivergedError(Exception):
    """The loss is not finite."""


def check_finite(diverged_at: jax.Array, saved_steps: Sequence[int]) -> None:
    """Checks the loss before a state is logged or saved.

    Args:
        diverged_at: The first step with a loss that is not finite, or 0.
        saved_steps: The steps that have a checkpoint.

    Raises:
        DivergedError: If ``diverged_at`` is not 0.
    """
    if failed := int(diverged_at):
        advice = f"The checkpoint of step {saved_steps[-1]} is kept. " if saved_steps else ""
        raise DivergedError(
            f"The loss of step {failed} is not finite. {advice}Try a smaller learning rate, a "
            "warm-up, or --clip-norm 1."
        )
