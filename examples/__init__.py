"""Runnable examples: `python -m examples.<name>`, from the root of the repository."""

import importlib.util
import sys

_PACKAGES = (
    "flax",
    "grain",
    "huggingface_hub",
    "matplotlib",
    "orbax",
    "pandas",
    "PIL",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboardX",
    "tyro",
)

# Started as `python -m examples...`, a program without its packages says how to install them. As a
# library, the examples raise ImportError as usual.
if sys.argv[:1] == ["-m"]:
    _missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if _missing:
        sys.exit(
            f"The examples need packages that are not installed: {', '.join(_missing)}. Install "
            "them from the root of the repository:\n"
            '    pip install -e ".[examples]"'
        )
