"""How leaves are named, and how one tree is laid over another."""

from typing import Any

import jax
import numpy as np
import optax

PyTree = Any


def is_absent(node: Any) -> bool:
    """Whether ``node`` marks the place of a leaf that takes no part: ``None`` or optax's mask."""
    return node is None or isinstance(node, optax.MaskedNode)


def _is_box(node: Any) -> bool:
    # Flax wraps arrays in nodes of their own (nnx.Variable, linen.Partitioned). A box is not a
    # level of the model: its array goes by the name of the box.
    return hasattr(node, "get_metadata") or hasattr(node, "unbox")


def is_array(node: Any) -> bool:
    """Whether ``node`` is an array, a tracer or a number."""
    return isinstance(node, jax.Array | np.ndarray | np.generic | int | float | complex)


def unbox(node: Any) -> Any:
    """The array in a box of Flax NNX; anything else as it is."""
    return node.get_value() if hasattr(node, "get_metadata") else node


def leaves_of(tree: PyTree) -> list[Any]:
    """The leaves of ``tree`` in order, absent ones included."""
    return jax.tree.leaves(tree, is_leaf=is_absent)


def leaf_paths(tree: PyTree) -> list[tuple[str, ...]]:
    """The keys that lead to each leaf of ``tree``, in the order of :func:`leaves_of`."""

    def keys(path: Any) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    paths = []
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: is_absent(node) or _is_box(node)
    )
    for path, node in nodes:
        inner, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_absent)
        if len(inner) == 1:
            paths.append(keys(path))
        else:
            paths.extend(keys(path) + keys(rest) for rest, _ in inner)
    return paths


def path_name(path: tuple[str, ...]) -> str:
    """``("block", "conv", "kernel")`` as ``"block/conv/kernel"``; the root is ``"."``."""
    return "/".join(path) or "."


def leaf_names(tree: PyTree) -> list[str]:
    """The name of each leaf of ``tree``, in the order of :func:`leaves_of`."""
    return [path_name(path) for path in leaf_paths(tree)]


def broadcast_prefix(prefix: PyTree, tree: PyTree, *, what: str, over: str) -> list[Any]:
    """The entry of ``prefix`` that stands over each leaf of ``tree``.

    An entry of ``prefix`` may stand over a whole subtree: ``{"head": None}`` over
    ``{"head": {"kernel": k, "bias": b}}`` gives ``[None, None]``.

    Args:
        prefix: A tree that ``tree`` begins with.
        tree: The full tree.
        what: The name of ``prefix`` in errors.
        over: The name of ``tree`` in errors.

    Returns:
        One entry for each leaf of ``tree``, in the order of :func:`leaves_of`.

    Raises:
        ValueError: If ``tree`` does not begin with ``prefix``; the first difference is named.
    """
    entries: list[Any] = []

    def spread(entry: Any, subtree: PyTree) -> None:
        entries.extend([entry] * len(leaves_of(subtree)))

    try:
        jax.tree.map(spread, prefix, tree, is_leaf=is_absent)
    except (ValueError, TypeError, KeyError):
        difference = _first_difference(prefix, tree, what, over)
        raise ValueError(
            f"{what} must have the structure of {over}, but {difference}. "
            f"Where {what} has nothing for a leaf or a subtree of {over}, put None there."
        ) from None
    return entries


def _first_difference(prefix: PyTree, tree: PyTree, what: str, over: str) -> str:
    prefix_paths, tree_paths = leaf_paths(prefix), leaf_paths(tree)

    def stands_over(path: tuple[str, ...]) -> bool:
        return any(path[: len(entry)] == entry for entry in prefix_paths)

    missing = [path for path in tree_paths if not stands_over(path)]
    if missing:
        return f"{what} has nothing at {path_name(missing[0])!r}, where {over} has a leaf"
    extra = [
        entry
        for entry in prefix_paths
        if not any(path[: len(entry)] == entry for path in tree_paths)
    ]
    if extra:
        return f"{what} has {path_name(extra[0])!r}, which {over} lacks"
    return (
        "their containers differ: "
        f"{what} is {jax.tree.structure(prefix)}, {over} is {jax.tree.structure(tree)}"
    )
