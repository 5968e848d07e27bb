"""A hash of sources, to tell versions of the code apart."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digest(folders: Iterable[Path]) -> str:
    """Hashes the names and the contents of all Python files in the folders."""
    sha256 = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            sha256.update(f"{name} {len(content)}\n".encode() + content)
    return sha256.hexdigest()[:8]
