"""How programs of the examples end."""

import contextlib
import os

import pytest

pytest.importorskip("rich")

from examples.common.command import ended
from examples.common.text import plain_console


def failing(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "printed"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (failing(ValueError("no such thing")), 1, "program: no such thing\n"),
        (failing(KeyboardInterrupt), 130, "Interrupted.\n"),
    ],
)
def test_a_program_ends_with_a_code_and_a_line(command, code, printed, capsys):
    assert ended("program", command, (ValueError,)) == code
    assert capsys.readouterr().err == printed


def test_what_is_not_expected_is_raised():
    with pytest.raises(TypeError):
        ended("program", failing(TypeError()), (ValueError,))


@contextlib.contextmanager
def nobody_reads():
    """Within the context, the reader of the standard output has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        yield


@pytest.mark.parametrize("lines", [1, 10_000], ids=["known at the end", "known before"])
def test_an_output_that_nobody_reads_ends_a_program_in_silence(lines, capsys):
    def command():
        for number in range(lines):
            print(number)

    with nobody_reads():
        assert ended("program", command, (OSError,)) == 141
    assert capsys.readouterr().err == ""


def test_a_console_that_nobody_reads_goes_on_in_silence():
    with nobody_reads():
        console = plain_console()
        for number in range(3):
            console.print(f"step {number}")
    assert console.quiet
