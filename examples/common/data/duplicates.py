"""Are images of one split also in another?"""

import contextlib
import filecmp
from collections.abc import Iterable
from pathlib import Path

from examples.common.data.sources import Source
from examples.common.text import printable

MOST = 1_000  # images of a split that are looked for in the training images
MOST_FILES = 50_000  # training images, the size of each of which is asked for
_PART = 2**12  # bytes that are compared before the others


def shared_images(train: Source, validation: Source, test: Source) -> list[str]:
    """Tells which validation and test images are training images, too.

    They are found by the content of their files. Of a large split, ``MOST`` images are looked for,
    evenly spaced; with more than ``MOST_FILES`` training images, none.

    Args:
        train: The training images.
        validation: The validation images.
        test: The test images.

    Returns:
        A sentence for each split with such images.
    """
    if len(train) > MOST_FILES:
        return []
    known, sentences = _Files(train.files), []
    for name, images in (("validation", validation), ("test", test)):
        files = dict(zip(images.files, images.names, strict=True))
        looked_for = [*files][:: -(-len(files) // MOST) or 1]
        if pairs := [(file, same) for file in looked_for if (same := known.find(file))]:
            one, other = pairs[0]
            names = files | dict(zip(train.files, train.names, strict=True))
            one, other = printable(names[one]), printable(names[other])
            sentences.append(
                f"{len(pairs)} of {len(looked_for)} {name} images are training images, too, and do "
                f"not measure what is learnt: for example, {one} is {other}."
            )
    return sentences


class _Files:
    """Files that are found by their content."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._by_size: dict[int, list[Path]] = {}
        for file in files:
            self._by_size.setdefault(_size(file), []).append(file)
        self._parts: dict[Path, bytes] = {}

    def find(self, file: Path) -> Path | None:
        """A file of the same content, if there is one."""
        size = _size(file)
        for other in self._by_size.get(size, []) if size else []:
            with contextlib.suppress(OSError):
                is_alike = self._part(file, size) == self._part(other, size)
                if is_alike and filecmp.cmp(file, other, shallow=False):
                    return other
        return None

    def _part(self, file: Path, size: int) -> bytes:
        """Some bytes of the middle, where images differ sooner than in their headers."""
        if file not in self._parts:
            with file.open("rb") as opened:
                opened.seek(max(0, size - _PART) // 2)
                self._parts[file] = opened.read(_PART)
        return self._parts[file]


def _size(file: Path) -> int:
    """The number of bytes; 0 for what cannot be read."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
