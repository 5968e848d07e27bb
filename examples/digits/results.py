"""What is run, and its results."""

from dataclasses import dataclass

import numpy as np

SOURCES = ("fitting", "unfitting")
# Without a regularizer; with it by each of three rules; and with or without it, as trials say.
METHODS = ("plain", "weighted_sum", "dtnh", "dtnh_sgd", "trial_runs")


@dataclass(frozen=True)
class FineTuning:
    """The results of one fine-tuning.

    Attributes:
        seed: The seed of training images, initial weights and batches.
        source: One of the sources, or ``"scratch"``.
        method: One of the methods.
        regularized: Whether the run had the regularizer.
        accuracy: On the held-out images, at evenly spaced steps from 0 to the last.
        diverged: Whether the logits were no longer finite after the last step.
    """

    seed: int
    source: str
    method: str
    regularized: bool
    accuracy: np.ndarray
    diverged: bool


@dataclass(frozen=True)
class Results:
    """The results of the demo.

    Attributes:
        fine_tunings: One for each seed, source and method.
        source_accuracy: For each source and each seed the accuracy on its training images (with
            the labels that it was trained on) and on the held-out images (with the true ones).
        seconds: The total time, with compilation.
    """

    fine_tunings: list[FineTuning]
    source_accuracy: dict[str, list[tuple[float, float]]]
    seconds: float

    def of(self, source: str, method: str = "plain") -> list[FineTuning]:
        """The fine-tunings from one source with one method, in the order of the seeds."""
        return [run for run in self.fine_tunings if (run.source, run.method) == (source, method)]

    def accuracies(self, source: str, method: str = "plain") -> np.ndarray:
        """Their accuracies in percent, ``(seeds, evaluations + 1)``."""
        return 100 * np.stack([run.accuracy for run in self.of(source, method)])
