"""Which version of the project computes a result."""

import functools
from pathlib import Path

import dtnh_jax
from examples.common.version import digest

EXAMPLES = Path(__file__).parents[1]
FOLDERS = (Path(dtnh_jax.__file__).parent, EXAMPLES / "common", EXAMPLES / "never_hurt")


@functools.cache
def version() -> str:
    """The version of dtnh_jax and a hash of the sources, for example ``0.1.0+1a2b3c4d``."""
    return f"{dtnh_jax.__version__}+{digest(FOLDERS)}"
