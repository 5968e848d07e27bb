"""What is done around the steps of training: which arrays train when, and which network is kept."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax

from examples.common.resnet import Network


class Procedure(NamedTuple):
    """How training yields a network.

    Attributes:
        head_only: The share of steps, from the first on, in which only the head is trained, with
            batch norm in inference mode.
        every: The network after every so many steps, and after the last, is a candidate; None: only
            the last is.
        shares: Each interpolation between source and fine-tuned network that is a candidate, as the
            share of the fine-tuned one.
    """

    head_only: float = 0.0
    every: int | None = None
    shares: tuple[float, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether there are several candidates: the best on held-out images is kept."""
        return self.every is not None or len(self.shares) > 1


PROCEDURES: Mapping[str, Procedure] = {
    "plain": Procedure(),
    "early_stopping": Procedure(every=20),
    # Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022 (arXiv:2109.01903).
    "wise_ft": Procedure(shares=tuple(tenths / 10 for tenths in range(1, 11))),
    "wise_ft_half": Procedure(shares=(0.5,)),
    # Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
    # Out-of-Distribution", ICLR 2022 (arXiv:2202.10054).
    "lp_ft": Procedure(head_only=0.5),
}


class Candidate(NamedTuple):
    """A network that may be kept.

    Attributes:
        number: What distinguishes it: the number of steps, or the share of the fine-tuned network.
        network: The network.
        accuracy: On held-out images.
        loss: On held-out images.
    """

    number: float
    network: Network
    accuracy: float
    loss: float


def best(candidates: Iterable[Candidate]) -> Candidate:
    """The candidate with the highest accuracy; of several, that with the lowest loss."""
    return max(
        candidates,
        key=lambda each: (each.accuracy, -each.loss if math.isfinite(each.loss) else -math.inf),
    )


def interpolations(
    procedure: Procedure, source: Network, tuned: Network
) -> Iterator[tuple[float, Network]]:
    """Interpolates between source and fine-tuned network.

    All parameters and the running averages of batch norm are interpolated, but for the head, which
    is that of the fine-tuned network: the source has none for these classes.
    """
    source = source._replace(params=source.params | {"head": tuned.params["head"]})
    for share in procedure.shares:
        yield (
            share,
            jax.tree.map(lambda old, new, x=share: (1 - x) * old + x * new, source, tuned),
        )
