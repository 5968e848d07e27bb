"""Contestants timed side by side, so that what slows the machine slows them all."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

# Below this a sample on an accelerator is mostly the wait for its end.
SHORTEST_SAMPLE = 2e-3


class Samples(NamedTuple):
    """The seconds of one call, in each repetition.

    Attributes:
        seconds: ``(repetitions,)``.
    """

    seconds: np.ndarray

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return float(np.median(self.seconds))

    def over(self, base: "Samples") -> float:
        """The median of the ratios to ``base``, repetition by repetition."""
        return float(np.median(self.seconds / base.seconds))

    def cells(self) -> dict[str, float]:
        """Median and spread, in milliseconds."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return {
            "median ms": 1e3 * self.median,
            "min ms": 1e3 * float(self.seconds.min()),
            "quartile 1 ms": 1e3 * float(low),
            "quartile 3 ms": 1e3 * float(high),
        }


def compare(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    repetitions: int,
    fewest: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Times contestants in turn, in an order that turns with each repetition.

    Args:
        contestants: By name, functions that return arrays. They are called once and more to warm
            up.
        seconds: For how long, after the warm-up.
        repetitions: The most samples of each contestant.
        fewest: The fewest, whatever the time.
        clock: Seconds from some point in time.

    Returns:
        By name, the samples; all have as many, and one index is one repetition.
    """

    def sample(name: str, calls: int) -> float:
        call = contestants[name]
        start = clock()
        result = None
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (clock() - start) / calls

    calls = dict.fromkeys(contestants, 1)
    for name in contestants:
        sample(name, 1)
        warm = sample(name, 1)
        if jax.default_backend() != "cpu":  # whose calls do not queue one behind the other
            calls[name] = min(100, max(1, round(SHORTEST_SAMPLE / max(warm, 1e-9))))

    taken: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    end = clock() + seconds
    for repetition in range(repetitions):
        if repetition >= fewest and clock() >= end:
            break
        # Each follows each other one equally often; a pair is told apart from its neighbours.
        shift = repetition // 2 % len(names)
        order = names[shift:] + names[:shift]
        for name in order if repetition % 2 == 0 else reversed(order):
            taken[name].append(sample(name, calls[name]))
    return {name: Samples(np.array(of_name)) for name, of_name in taken.items()}
