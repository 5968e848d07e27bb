"""How leaves are named, and how one tree is laid over another."""

import functools
from typing import Any

import jax
import numpy as np
import optax

PyTree = Any


def is_absent(node: Any) -> bool:
    """Whether ``node`` marks the place of a leaf that takes no part: ``None`` or optax's mask."""
    return node is None or isinstance(node, optax.MaskedNode)


def is_array(node: Any) -> bool:
    """Whether ``node`` is an array, a tracer or a number."""
    return isinstance(node, jax.Array | np.ndarray | np.generic | int | float | complex)


def is_function(node: Any) -> bool:
    """Whether ``node`` is to be called. A tree is a tree, also where it happens to be callable."""
    is_leaf = jax.tree_util.all_leaves([node]) or isinstance(node, functools.partial)
    return callable(node) and is_leaf


def leaves_of(tree: PyTree) -> list[Any]:
    """The leaves of ``tree`` in order, absent ones included."""
    return jax.tree.leaves(tree, is_leaf=is_absent)


def leaf_paths(tree: PyTree, *, absent: bool = True) -> list[tuple[str, ...]]:
    """The keys that lead to each leaf of ``tree``, in order, with absent leaves or without."""

    def is_leaf(node: Any) -> bool:
        # Flax wraps arrays in nodes of their own (nnx.Variable, linen.Partitioned). Such a box is
        # not a level of the model: its array goes by the name of the box.
        return (
            hasattr(node, "get_metadata")
            or hasattr(node, "unbox")
            or (absent and (node is None or isinstance(node, optax.MaskedNode)))
        )

    paths = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        keys = tuple([_key_name((key,)) for key in path])
        if isinstance(node, jax.Array | np.ndarray) or jax.tree_util.all_leaves([node]):
            paths.append(keys)
            continue
        inner = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_absent if absent else None)[0]
        if len(inner) == 1:
            paths.append(keys)
        else:
            paths.extend(keys + tuple([_key_name((key,)) for key in rest]) for rest, _ in inner)
    return paths


_key_name = functools.partial(jax.tree_util.keystr, simple=True)


def path_name(path: tuple[str, ...]) -> str:
    """``("block", "conv", "kernel")`` as ``"block/conv/kernel"``; the root is ``"."``."""
    return "/".join(path) or "."


def leaf_names(tree: PyTree) -> list[str]:
    """The name of each leaf of ``tree``, in the order of :func:`leaves_of`."""
    return [path_name(path) for path in leaf_paths(tree)]


def lay_over(other: PyTree, tree: PyTree, *, what: str, over: str, one_for_many: bool) -> list[Any]:
    """The entry of ``other`` for each leaf of ``tree``, found by its path.

    ``None`` in ``other`` may stand for a whole subtree of ``tree``: ``{"head": None}`` over
    ``{"head": {"kernel": k, "bias": b}}`` gives ``[None, None]``. What ``other`` holds at or
    below an absent leaf of ``tree`` is passed over. Containers need not be of the same types,
    nor the boxes of Flax be there in both.

    Args:
        other: The tree that is laid over.
        tree: The tree that it is laid over.
        what: The name of ``other`` in errors.
        over: The name of ``tree`` in errors.
        one_for_many: Whether any entry, and not ``None`` alone, may stand for a subtree.

    Returns:
        One entry for each leaf of ``tree``, in the order of :func:`leaves_of`.

    Raises:
        ValueError: If a leaf of ``tree`` has no entry or an entry no leaf; it is named.
    """
    entries = dict(zip(leaf_paths(other), leaves_of(other), strict=True))
    paths, leaves = leaf_paths(tree), leaves_of(tree)
    spare = f"Where {what} has nothing for a leaf or a subtree of {over}, put None there."
    found, used = [], set()
    for path, leaf in zip(paths, leaves, strict=True):
        above = [path[:length] for length in range(len(path), -1, -1) if path[:length] in entries]
        if is_absent(leaf):
            if path not in entries:
                used.update(entry for entry in entries if entry[: len(path)] == path)
            used.update(above)
            found.append(None)
        elif not above:
            raise ValueError(
                f"{what} must have the structure of {over}, but has nothing at "
                f"{path_name(path)!r}. {spare}"
            )
        elif above[0] != path and not one_for_many and not is_absent(entries[above[0]]):
            raise ValueError(
                f"{what} must have the structure of {over}, but has a leaf at "
                f"{path_name(above[0])!r}, where {over} has a subtree. {spare}"
            )
        else:
            used.add(above[0])
            found.append(entries[above[0]])
    extra = [path for path, entry in entries.items() if path not in used and not is_absent(entry)]
    if extra:
        raise ValueError(
            f"{what} must have the structure of {over}, but has {path_name(extra[0])!r}, "
            f"which {over} lacks."
        )
    return found


def check_same_shape(name: str, weight: Any, start: Any) -> None:
    """Refuses a pre-trained leaf that has another shape than the parameter of that name."""
    if np.shape(weight) != np.shape(start):
        raise ValueError(
            f"pretrained must have the shapes of params; got {np.shape(start)} for "
            f"{np.shape(weight)} at {name!r}. Where there is no pre-trained value, such as in a "
            "new head, put None in pretrained."
        )
