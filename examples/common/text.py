"""Text of the user's, such as names of files and classes, for files and terminals."""

import io
import os
import re
import sys
import unicodedata

from rich.console import Console

_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # controls, surrogates, and separators of lines


def printable(text: str) -> str:
    r"""Text in one line that can be encoded and printed.

    Args:
        text: Any string, such as a name of a file. In one that is not UTF-8, Python has surrogates
            for the bytes.

    Returns:
        The text, with escapes such as ``\xe9`` for bytes that are no text and for controls.
    """
    return "".join(
        _escape(each) if unicodedata.category(each) in _UNPRINTABLE else each for each in text
    )


def _escape(character: str) -> str:
    code = ord(character)
    is_byte = 0xDC80 <= code <= 0xDCFF
    return f"\\x{code - 0xDC00:02x}" if is_byte else ascii(character)[1:-1]


def normalized(name: str) -> str:
    """A name that equals others that look the same: printable, in the composed form (NFC)."""
    return unicodedata.normalize("NFC", printable(name))


def markdown(text: str) -> str:
    """Escapes what Markdown would not show as it is."""
    return re.sub(r"([\\`*<>\[\]|~$#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(text))


def plain_console() -> Console:
    """A console that prints text as it is, though it contain ``[bold]`` or ``:car:``.

    If nobody reads what it prints any longer, as after ``| head``, it prints no more: a training
    does not end for that.
    """
    return _Plain(highlight=False, markup=False, emoji=False)


class _Plain(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_anything() -> None:
    r"""Makes the program print what its terminal cannot show as escapes such as ``\u03bb``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not, for example, in a notebook
            stream.reconfigure(errors="backslashreplace")
