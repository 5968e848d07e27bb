"""What tests ask for before they import it: without it they skip, and say so."""

import pytest

EXAMPLES = (
    "flax",
    "grain",
    "huggingface_hub",
    "matplotlib",
    "orbax.checkpoint",
    "pandas",
    "PIL",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboardX",
    "tyro",
)


def examples():
    """Asks for all that the extra named examples brings, but tensorflow-datasets."""
    for package in EXAMPLES:
        pytest.importorskip(package)
