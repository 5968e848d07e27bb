"""Signals that stop a run: SIGTERM, Ctrl-C, and a terminal that is closed."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# Clusters send SIGTERM before they take a machine away. Windows has no SIGHUP.
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]
SHOW_CURSOR = "\x1b[?25h"  # the progress bar hides it


class StoppedError(Exception):
    """The run was stopped by a signal, after its state was saved.

    Attributes:
        number: That of the signal.
        exit_code: That of a shell for the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[..., int]]:
    """Handles signals within the context. After the first one, Ctrl-C ends the process at once.

    A signal that is ignored, for example by nohup, stays so.

    Yields:
        A function from the step to the number of the signal that stops the run, 0 without one. All
        processes stop at the same step. Called without a step, it is 0 with several processes.
    """
    received = 0
    several = jax.process_count() > 1
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def remember(number: int, _: Any) -> None:
        nonlocal received
        if received:
            return
        received = number
        if signal.SIGINT in previous:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == getattr(signal, "SIGHUP", None):
            for stream in terminals:  # which is gone: to write to it is an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        message = f"{signal.Signals(number).name}: finishing the step and saving."
        if number == signal.SIGINT:
            message += " Press Ctrl-C again to stop at once."
        # Not with print, which the signal may have interrupted.
        with contextlib.suppress(OSError):
            os.write(2, f"{SHOW_CURSOR if terminals else ''}\n{message}\n".encode())
        if several:
            signal.raise_signal(signal.SIGTERM)

    def must_stop(step: int | None = None) -> int:
        if step is not None and several and multihost_utils.reached_preemption_sync_point(step):
            return received or signal.SIGTERM
        return 0 if several else received

    # With several processes, JAX handles SIGTERM, and they agree on a step.
    handled = [
        number
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN and not (several and number == signal.SIGTERM)
    ]
    previous = {number: signal.signal(number, remember) for number in handled}
    try:
        yield must_stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
