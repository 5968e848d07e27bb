"""What is run, and what comes out of it."""

from dataclasses import dataclass

import numpy as np

SOURCES = ("fitting", "unfitting")


@dataclass(frozen=True)
class Method:
    """How to fine-tune: which regularizer, its weight, and the rule that joins the gradients."""

    regularizer: str
    rule: str
    reg_weight: float


# Without a regularizer means: with one of weight 0.
PLAIN = Method("l2_sp", "weighted_sum", 0.0)


@dataclass(frozen=True)
class FineTuning:
    """What came out of one fine-tuning.

    Attributes:
        seed: Of training images, initial weights and batches.
        source: One of the sources, or ``"scratch"``.
        method: How it was done.
        accuracy: On the held-out target images, at evenly spaced steps from 0 to the last.
        cosine: Between loss and regularizer gradient of the mini-batch, ``(steps, groups)``,
            whatever the rule holds against each other.
        conflict: Where that is negative, likewise.
        removed: What the rule takes out of the regularizer's gradient, as a share of its length,
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
    """What came out of the experiment.

    Attributes:
        fine_tunings: One for each seed, source and method.
        source_accuracy: For each source and each seed the accuracy on its training images
            (with the labels it was given) and on held-out images (with the right ones).
        seconds: What all of it took, with compilation.
    """

    fine_tunings: list[FineTuning]
    source_accuracy: dict[str, list[tuple[float, float]]]
    seconds: float

    def settings(self) -> list[tuple[str, Method]]:
        """The sources and methods, in the order they ran in."""
        return list(dict.fromkeys((run.source, run.method) for run in self.fine_tunings))

    def of(self, source: str, method: Method) -> list[FineTuning]:
        """The fine-tunings from one source with one method, in the order of the seeds."""
        return [run for run in self.fine_tunings if (run.source, run.method) == (source, method)]
