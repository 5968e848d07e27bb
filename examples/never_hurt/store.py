"""The one file of results: a line for each cell, there whole or not at all."""

import gzip
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from examples.never_hurt.cell import Result


def append(path: Path, result: Result) -> None:
    """Adds a line by a single write, which processes may do at the same time.

    Args:
        path: The file; it and its folder are made if they are not there.
        result: What to add.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = result.to_json().encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # What a killed process left unfinished shall not take this line with it.
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(file, line) != len(line):
            raise OSError(f"{path} took only a part of a result: is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> dict[str, Result]:
    """Reads all results, by the keys of their cells; of a cell that was run twice the first.

    Args:
        path: The file, which need not be there; one that ends in .gz is compressed.

    Returns:
        The results, in the order of the file.

    Raises:
        ValueError: If a line that is whole is no result.
    """
    results: dict[str, Result] = {}
    if path.exists():
        for number, line in _lines(path):
            try:
                result = Result.from_json(line)
            except json.JSONDecodeError:
                warnings.warn(f"{path}:{number} is cut off, and left out.", stacklevel=2)
                continue
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number} is no result: {error}") from error
            results.setdefault(result.cell.key, result)
    return results


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line
