"""The file of results: JSON lines, one per cell, each written atomically."""

import gzip
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from examples.never_hurt.cell import Result


def append(path: Path, result: Result) -> None:
    """Appends a result with a single write, so that several processes can append at once.

    Args:
        path: The file; it and its folder are created if they do not exist.
        result: The result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = result.to_json().encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # A line that a killed process left unfinished must not swallow this one.
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(file, line) != len(line):
            raise OSError(f"A result was written to {path} only in part: is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def of_grid(folder: Path, grid: str) -> Path | None:
    """The file of a grid's results, compressed or not; None without one."""
    paths = (folder / f"{grid}.jsonl{suffix}" for suffix in ("", ".gz"))
    return next((path for path in paths if path.exists()), None)


def read(path: Path) -> dict[str, Result]:
    """Reads all results.

    Args:
        path: The file, compressed if it ends in .gz. It may be missing.

    Returns:
        The results by the keys of their cells, in the order of the file. Of several results of
        one cell, the first is returned.

    Raises:
        ValueError: If a complete line is not a result.
    """
    results: dict[str, Result] = {}
    if path.exists():
        for number, line in _lines(path):
            try:
                result = Result.from_json(line)
            except json.JSONDecodeError:
                warnings.warn(f"{path}:{number} is incomplete and ignored.", stacklevel=2)
                continue
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number} is not a result: {error}") from error
            results.setdefault(result.cell.key, result)
    return results


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line
