"""Atomic writing of files."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader never sees a part of it."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
