"""Frozen parameters: selected by globs on paths, and ``None`` in the tree that is trained."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax

Params = Any


def trained(params: Params, frozen: Sequence[str]) -> Params:
    """Replaces frozen parameters by ``None``.

    Args:
        params: All parameters.
        frozen: Globs on paths, such as ``"conv1"`` or ``"layer1/*"``. A match freezes the whole
            subtree.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: If a glob matches nothing, or no parameter is left to train.
    """
    paths = [_path(keys) for keys, _ in jax.tree.leaves_with_path(params)]
    for pattern in frozen:
        if not any(_matches(pattern, path) for path in paths):
            raise ValueError(
                f"freeze: {pattern!r} matches no parameter. Paths look like {paths[0]}, "
                f"{paths[-1]}."
            )
    if all(any(_matches(pattern, path) for pattern in frozen) for path in paths):
        raise ValueError(f"freeze={tuple(frozen)} leaves no parameter to train.")
    return jax.tree.map_with_path(
        lambda keys, leaf: None if any(_matches(each, _path(keys)) for each in frozen) else leaf,
        params,
    )


def complete(params: Params, everything: Params) -> Params:
    """Fills in the frozen parameters of ``params`` from ``everything``."""
    return jax.tree.map(
        lambda param, value: value if param is None else param,
        params,
        everything,
        is_leaf=lambda leaf: leaf is None,
    )


def _matches(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
