"""Interleaved timing, so that changes in the load of the machine affect all contestants."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

# A shorter sample on an accelerator measures mostly the synchronization.
SHORTEST_SAMPLE = 2e-3


class Samples(NamedTuple):
    """The time of one call in each repetition, in seconds.

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
        """Median, minimum and quartiles, in milliseconds."""
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
    """Times contestants in turn, in an order that changes with each repetition.

    Args:
        contestants: Functions that return arrays, by name. They are called to warm up first.
        seconds: The time limit, after the warm-up.
        repetitions: The maximum number of samples of each contestant.
        fewest: The minimum number of samples, regardless of the time limit.
        clock: A function that returns the time in seconds.

    Returns:
        The samples of each contestant, by name; equal indices are the same repetition.
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
        if jax.default_backend() != "cpu":  # calls on a CPU are not queued
            calls[name] = min(100, max(1, round(SHORTEST_SAMPLE / max(warm, 1e-9))))

    taken: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    end = clock() + seconds
    for repetition in range(repetitions):
        if repetition >= fewest and clock() >= end:
            break
        # Rotate and reverse, so that no contestant always follows the same one.
        shift = repetition // 2 % len(names)
        order = names[shift:] + names[:shift]
        for name in order if repetition % 2 == 0 else reversed(order):
            taken[name].append(sample(name, calls[name]))
    return {name: Samples(np.array(of_name)) for name, of_name in taken.items()}
