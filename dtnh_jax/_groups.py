"""Which leaves form a group: one scope, one list of rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dtnh_jax._tree import PyTree, is_absent, lay_over, leaf_paths, leaves_of, path_name

SCOPES = ("global", "layer", "leaf", "element")

Scope = str | Callable[[str], str] | PyTree
Mask = PyTree | Callable[[PyTree], PyTree] | None


class Groups(NamedTuple):
    """The groups of a tree: one row for each group, rows in the order of their names.

    Attributes:
        names: The name of each row.
        row_of_leaf: For each leaf of the tree its row, or ``None`` for a leaf in no group.
    """

    names: tuple[str, ...]
    row_of_leaf: tuple[int | None, ...]


def check_scope(scope: Scope) -> None:
    """Refuses a scope that no tree can have."""
    if isinstance(scope, str) and scope not in SCOPES:
        raise ValueError(
            f"scope must be one of {', '.join(map(repr, SCOPES))}, a function of a leaf's path, "
            f"or a tree of labels; got {scope!r}."
        )
    if scope is None or isinstance(scope, bool | int | float):
        raise TypeError(
            f"scope must be one of {', '.join(map(repr, SCOPES))}, a function of a leaf's path, "
            f"or a tree of labels with the structure of params; got {scope!r}."
        )


def group_leaves(tree: PyTree, scope: Scope, mask: Mask) -> Groups:
    """Puts each leaf of ``tree`` into its group.

    In scope ``"element"`` every number is a group of its own; its rows, which only the
    diagnostics use, are the leaves.

    Args:
        tree: Parameters or gradients.
        scope: A name from :data:`SCOPES`; a function from a leaf's path
            (``"block/conv/kernel"``) to the name of its group; or a tree of labels, in
            which a label may stand for a subtree.
        mask: ``None``, or a tree of booleans, in which one may stand for a subtree, or a
            function from ``tree`` to it: ``False`` puts a leaf into no group.

    Returns:
        The groups. Absent leaves are in none.

    Raises:
        ValueError: If the labels or the mask do not fit ``tree``.
        TypeError: If a label is no string or a mask's entry no boolean.
    """
    paths = leaf_paths(tree)
    labels = _labels(tree, paths, scope)
    kept_leaves = reached(tree, mask)
    names = tuple(sorted({label for label, kept in zip(labels, kept_leaves, strict=True) if kept}))
    row = {name: index for index, name in enumerate(names)}
    return Groups(
        names=names,
        row_of_leaf=tuple(
            row[label] if kept else None for label, kept in zip(labels, kept_leaves, strict=True)
        ),
    )


def _labels(tree: PyTree, paths: list[tuple[str, ...]], scope: Scope) -> list[str]:
    if scope == "global":
        return ["global"] * len(paths)
    if scope == "layer":
        return [path_name(path[:-1]) for path in paths]
    if scope == "leaf" or scope == "element":
        return [path_name(path) for path in paths]
    if callable(scope):
        labels: list[Any] = [scope(path_name(path)) for path in paths]
        wanted = "a scope function must return the name of the leaf's group, a string"
    else:
        labels = lay_over(
            scope, tree, what="the label tree of scope", over="params", one_for_many=True
        )
        wanted = "the label tree of scope must hold strings"
    for path, label in zip(paths, labels, strict=True):
        if not isinstance(label, str):
            raise TypeError(
                f"{wanted}; got {label!r} at {path_name(path)!r}. "
                "To leave a leaf out of every group, use mask=."
            )
    return labels


def reached(tree: PyTree, mask: Mask) -> list[bool]:
    """For each leaf of ``tree`` whether it is there and ``mask`` does not take it out."""
    paths, leaves = leaf_paths(tree), leaves_of(tree)
    if mask is None:
        entries: list[Any] = [True] * len(leaves)
    else:
        mask_tree = mask(tree) if callable(mask) else mask
        entries = lay_over(mask_tree, tree, what="mask", over="params", one_for_many=True)
    for path, leaf, entry in zip(paths, leaves, entries, strict=True):
        # A mask that is mapped from params has nothing where they have nothing.
        if not isinstance(entry, bool | np.bool_) and not (is_absent(leaf) and is_absent(entry)):
            raise TypeError(
                "mask must hold True (the regularizer acts here) or False (it does not); "
                f"got {entry!r} at {path_name(path)!r}."
            )
    return [
        bool(entry) and not is_absent(leaf) for entry, leaf in zip(entries, leaves, strict=True)
    ]
