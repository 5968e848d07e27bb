"""How programs of the examples end."""

# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import io
import os

import needs
import pytest

needs.examples()

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


@pytest.fixture
def closed(monkeypatch):
    """A standard output that nobody reads any longer."""
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(open(writer, "wb"), "utf-8") as stream:  # noqa: SIM115 (it closes both)
        monkeypatch.setattr("sys.stdout", stream)
        yield stream
        monkeypatch.undo()


def test_an_output_that_nobody_reads_ends_a_program_in_silence(closed, capsys):
    def command():
        for number in range(10_000):
            print(number)

    assert ended("program", command, (OSError,)) == 141
    assert capsys.readouterr().err == ""


def test_a_short_output_that_nobody_reads_is_known_before_the_end(closed):
    assert ended("program", lambda: print("a line"), (OSError,)) == 141


def test_a_console_that_nobody_reads_goes_on_in_silence(closed):
    console = plain_console()
    for number in range(3):
        console.print(f"step {number}")
    assert console.quiet
