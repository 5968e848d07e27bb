"""SIGTERM, which clusters send before they take a machine away."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StoppedError(Exception):
    """The run was stopped by a signal, after its state was saved."""


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Handles SIGTERM within the context.

    Yields:
        A function from the step to whether to stop. All processes stop at the same step.
    """
    if jax.process_count() > 1:
        # JAX handles the signal, and the processes agree on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    received = False

    def remember(*_: Any) -> None:
        nonlocal received
        received = True

    previous = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda step: received
    finally:
        signal.signal(signal.SIGTERM, previous)
