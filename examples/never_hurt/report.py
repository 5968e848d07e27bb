"""Tables and figures from files of results."""

from collections.abc import Sequence
from pathlib import Path


def report(results: Sequence[Path], out: Path, page: Path | None) -> None:
    """Makes them all."""
    raise NotImplementedError
