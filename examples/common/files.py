"""Atomic writing of files."""

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader never sees a part of it.

    Raises:
        OSError: If that is not possible; it names the file, and leaves no part of it.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
