"""How does a program end? With an exit code and one line, and not with a traceback."""

import os
import signal
import sys
from collections.abc import Callable

from examples.common.text import print_anything

INTERRUPTED = "Interrupted."


def ended(
    program: str,
    command: Callable[[], int | None],
    expected: tuple[type[Exception], ...],
    *,
    interrupted: str = INTERRUPTED,
) -> int:
    """Runs a command, and prints the errors that a user can mend.

    Args:
        program: The name of the program, for errors.
        command: What to run; it returns the exit code, or ``None`` for 0.
        expected: The errors that are printed in a line.
        interrupted: What Ctrl-C prints.

    Returns:
        The exit code: 1 after an error, and that of a shell after Ctrl-C, or if the reader of the
        output has ended, as ``head`` does.
    """
    print_anything()
    try:
        code = command() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # What is left would be written at the end of Python, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # of SIGPIPE, which Windows lacks
    except expected as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return code
