"""What is run, and its results."""

from dataclasses import dataclass

import numpy as np

SOURCES = ("fitting", "unfitting")


@dataclass(frozen=True)
class Method:
    """How to fine-tune: the regularizer, its weight, and the rule that combines the gradients."""

    regularizer: str
    rule: str
    reg_weight: float


# Without a regularizer: any regularizer with weight 0.
PLAIN = Method("l2_sp", "weighted_sum", 0.0)


@dataclass(frozen=True)
class FineTuning:
    """The results of one fine-tuning.

    Attributes:
        seed: The seed of training images, initial weights and batches.
        source: One of the sources, or ``"scratch"``.
        method: The method.
        accuracy: On the held-out target images, at evenly spaced steps from 0 to the last.
        cosine: Between loss and regularizer gradient of the mini-batch, ``(steps, groups)``, also
            for rules that compare other vectors.
        conflict: Where the cosine is negative, ``(steps, groups)``.
        removed: What the rule removes from the regularizer's gradient, as a share of its length,
            ``(steps,)``.
        groups: The names of the groups.
    """

    seed: int
    source: str
    method: Method
    accuracy: np.ndarray
    cosine: np.ndarray
    conflict: np.ndarray
    removed: np.ndarray
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """The results of the experiment.

    Attributes:
        fine_tunings: One for each seed, source and method.
        source_accuracy: For each source and each seed the accuracy on its training images
            (with the labels that it was trained on) and on held-out images (with the true ones).
        seconds: The total time, with compilation.
    """

    fine_tunings: list[FineTuning]
    source_accuracy: dict[str, list[tuple[float, float]]]
    seconds: float

    def settings(self) -> list[tuple[str, Method]]:
        """The sources and methods, in the order in which they ran."""
        return list(dict.fromkeys((run.source, run.method) for run in self.fine_tunings))

    def of(self, source: str, method: Method) -> list[FineTuning]:
        """The fine-tunings from one source with one method, in the order of the seeds."""
        return [run for run in self.fine_tunings if (run.source, run.method) == (source, method)]
