"""Which leaves form a group: a tree is laid out once, and other trees are laid over it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dtnh_jax._tree import (
    PyTree,
    is_absent,
    is_function,
    lay_over,
    leaf_paths,
    leaves_of,
    path_name,
)

SCOPES = ("global", "layer", "leaf", "element")

Scope = str | Callable[[str], str] | PyTree
Mask = PyTree | Callable[[PyTree], PyTree] | None


class Layout(NamedTuple):
    """A tree, flat, and the groups of its leaves. Absent leaves are not among them.

    Attributes:
        leaves: The leaves.
        treedef: Their tree.
        paths: The keys that lead to each leaf.
        names: The names of the groups, sorted: group ``i`` is row ``i``.
        rows: For each leaf its row, or ``None`` for a leaf in no group.
    """

    leaves: list[Any]
    treedef: Any
    paths: list[tuple[str, ...]]
    names: tuple[str, ...]
    rows: list[int | None]

    def over(self, other: PyTree, tree: PyTree, *, what: str, over: str) -> list[Any]:
        """The leaf of ``other``, or ``None``, for each leaf of ``tree``, of which this is made."""
        leaves, treedef = jax.tree.flatten(other)
        if treedef == self.treedef:
            return leaves
        entries = lay_over(other, tree, what=what, over=over, one_for_many=False)
        return [None if is_absent(x) else x for x in _at_leaves(entries, tree)]

    def only_reached(self, leaves: list[Any]) -> PyTree:
        """The tree of ``leaves``, masked where a leaf is in no group."""
        kept = zip(leaves, self.rows, strict=True)
        return self.treedef.unflatten(
            [optax.MaskedNode() if row is None else leaf for leaf, row in kept]
        )


def check_scope(scope: Scope) -> None:
    """Raises an error for a scope that no tree can have."""
    wanted = f"{', '.join(map(repr, SCOPES))}, a function of a leaf's path, or a tree of labels"
    if isinstance(scope, str) and scope not in SCOPES:
        raise ValueError(f"scope must be one of {wanted}; got {scope!r}.")
    if scope is None or isinstance(scope, bool | int | float):
        raise TypeError(
            f"scope must be one of {wanted} with the structure of params; got {scope!r}."
        )


def lay_out(tree: PyTree, scope: Scope, mask: Mask) -> Layout:
    """Flattens ``tree`` and puts each leaf into its group.

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
        The layout.

    Raises:
        ValueError: If the labels or the mask do not fit ``tree``.
        TypeError: If a label is not a string, or an entry of the mask not a boolean.
    """
    leaves, treedef = jax.tree.flatten(tree)
    paths = leaf_paths(tree, absent=False)
    labels = _labels(tree, paths, scope)
    kept = [True] * len(paths) if mask is None else _at_leaves(reached(tree, mask), tree)
    # By their keys, not their names: {"a/b": ...} and {"a": {"b": ...}} are two layers of one name.
    found = {label for label, is_kept in zip(labels, kept, strict=True) if is_kept}
    groups = sorted([("/".join(keys) or ".", keys) for keys in found])
    row_of = {keys: row for row, (_, keys) in enumerate(groups)}
    rows = [row_of[x] if is_kept else None for x, is_kept in zip(labels, kept, strict=True)]
    return Layout(leaves, treedef, paths, unique([name for name, _ in groups]), rows)


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with ``#2`` and so on where one has been there before."""
    made: dict[str, None] = {}
    for name in names:
        free, number = name, 1
        while free in made:
            number += 1
            free = f"{name}#{number}"
        made[free] = None
    return tuple(made)


def _labels(tree: PyTree, paths: list[tuple[str, ...]], scope: Scope) -> list[tuple[str, ...]]:
    """The keys of each leaf's group: a path, or a name as the only one."""
    if isinstance(scope, str):
        if scope == "global":
            return [("global",)] * len(paths)
        return [path[:-1] if scope == "layer" else path for path in paths]
    if is_function(scope):
        labels: list[Any] = [scope(path_name(path)) for path in paths]
        wanted = "a scope function must return the name of the leaf's group, a string"
    else:
        what = "the label tree of scope"
        entries = lay_over(scope, tree, what=what, over="params", one_for_many=True)
        labels = _at_leaves(entries, tree)
        wanted = f"{what} must hold strings"
    for path, label in zip(paths, labels, strict=True):
        if not isinstance(label, str):
            raise TypeError(
                f"{wanted}; got {label!r} at {path_name(path)!r}. "
                "To leave a leaf out of every group, use mask=."
            )
    return [(label,) for label in labels]


def reached(tree: PyTree, mask: Mask) -> list[bool]:
    """For each leaf of ``tree``, absent ones too, whether it is there and ``mask`` keeps it."""
    leaves = leaves_of(tree)
    if mask is None:
        return [not is_absent(leaf) for leaf in leaves]
    mask_tree = mask(tree) if is_function(mask) else mask
    entries = lay_over(mask_tree, tree, what="mask", over="params", one_for_many=True)
    for path, leaf, entry in zip(leaf_paths(tree), leaves, entries, strict=True):
        # A mask that is mapped from params has nothing where they have nothing.
        if not isinstance(entry, bool | np.bool_) and not (is_absent(leaf) and is_absent(entry)):
            raise TypeError(
                "mask must hold True (the regularizer acts here) or False (it does not); "
                f"got {entry!r} at {path_name(path)!r}."
            )
    return [
        bool(entry) and not is_absent(leaf) for entry, leaf in zip(entries, leaves, strict=True)
    ]


def _at_leaves(entries: list[Any], tree: PyTree) -> list[Any]:
    """The entries of :func:`lay_over` without those of absent leaves."""
    return [x for x, leaf in zip(entries, leaves_of(tree), strict=True) if not is_absent(leaf)]
