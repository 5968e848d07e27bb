"""Which leaves have a pre-trained value?"""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dtnh_jax._tree import PyTree, is_absent, lay_over, leaf_paths, leaves_of, path_name

LABELS = ("shared", "new", "excluded")


class MatchReport(NamedTuple):
    """What became of each leaf; printed, one line for each.

    Attributes:
        shared: The paths of the leaves that have a pre-trained value.
        new: Those of the leaves that have none, such as a new head.
        excluded: Those of the leaves that the regularizer is kept from.
        unused: Those of the pre-trained leaves that have no counterpart.

    Examples:
        >>> from dtnh_jax import regularizers
        >>> report = regularizers.MatchReport(
        ...     shared=("conv/kernel",), new=("head/kernel",), excluded=(), unused=("fc/kernel",)
        ... )
        >>> print(report)
        1 shared, 1 new, 0 excluded, 1 unused
        shared    conv/kernel
        new       head/kernel
        unused    fc/kernel
    """

    shared: tuple[str, ...]
    new: tuple[str, ...]
    excluded: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = self._asdict()
        lines = [", ".join(f"{len(paths)} {name}" for name, paths in parts.items())]
        lines += [f"{name:<9} {path}" for name, paths in parts.items() for path in paths]
        return "\n".join(lines)


class Match(NamedTuple):
    """Pre-trained parameters laid over those of the network that is fine-tuned.

    Attributes:
        pretrained: A tree with the structure of params: the pre-trained leaves, unchanged, and
            `None` at those that are new, or excluded and without a counterpart.
        mask: A tree with the structure of params: `False` at the excluded leaves.
        report: Which leaf is which, a [`MatchReport`][dtnh_jax.regularizers.MatchReport].

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> params = {"conv": jnp.ones(3), "head": jnp.ones(2)}
        >>> match = regularizers.match_pretrained(params, {"conv": jnp.zeros(3)}, new="head")
        >>> print(regularizers.l2_sp(params, match.pretrained, mask=match.mask))
        1.5
    """

    pretrained: PyTree
    mask: PyTree
    report: MatchReport


def match_pretrained(
    params: PyTree,
    pretrained: PyTree,
    *,
    new: str | Sequence[str] = (),
    excluded: str | Sequence[str] = (),
    labels: PyTree = None,
) -> Match:
    r"""Lays pre-trained parameters over those of a network, by path, and tells what matched.

    $$\text{params} = \underbrace{\text{shared}}_{w_0 \text{ of the same path}} \,\cup\,
    \text{new} \,\cup\, \text{excluded}$$

    Nothing is left to chance: a leaf without a counterpart, of another shape, or that the new
    network lacks is an error, unless a pattern says that it is meant. The error lists them all.

    A pattern is a glob, as in a shell, on the leaf's path or on that of a subtree that holds it:
    `"head"` and `"head/*"` take `head/kernel`, `"*/bias"` takes every bias but one at the root.
    The `*` goes over any number of levels.

    Args:
        params: The parameters of the network that is fine-tuned.
        pretrained: Those of the pre-trained network; the containers may be of other types.
        new: Patterns of leaves that have no pre-trained value, even where `pretrained` has a
            leaf of that path: L2-SP's $\beta$ holds them.
        excluded: Patterns of leaves that no regularizer of the weights is to touch, such as
            `"*/bias"`. They need no counterpart; one that is there must have the right shape. A
            leaf that is also `new` gets no pre-trained value and is excluded.
        labels: In the place of patterns a tree of `"shared"`, `"new"` and `"excluded"` over
            `params`, in which one may stand for a subtree.

    Returns:
        A [`Match`][dtnh_jax.regularizers.Match]: `pretrained` and `mask` for the regularizers of
        the weights, and a report.

    Raises:
        ValueError: If leaves do not match, listed with their paths; if a pattern meets no leaf;
            if labels and patterns are both given, or a label is another.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> params = {
        ...     "conv": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        ...     "head": {"kernel": jnp.ones((4, 2))},
        ... }
        >>> source = {
        ...     "conv": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
        ...     "head": {"kernel": jnp.zeros((4, 10))},
        ... }
        >>> match = regularizers.match_pretrained(params, source, new="head", excluded="*/bias")
        >>> print(match.report)
        1 shared, 1 new, 1 excluded, 1 unused
        shared    conv/kernel
        new       head/kernel
        excluded  conv/bias
        unused    head/kernel
        >>> print(regularizers.l2_sp(params, match.pretrained, mask=match.mask))
        6.0

    References:
        Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483), for shared and new.
    """
    patterns = {
        "new": (new,) if isinstance(new, str) else tuple(new),
        "excluded": (excluded,) if isinstance(excluded, str) else tuple(excluded),
    }
    paths, leaves = leaf_paths(params), leaves_of(params)
    if labels is None:
        kinds = [
            {kind for kind, globs in patterns.items() if any(_takes(g, path) for g in globs)}
            for path in paths
        ]
    else:
        if patterns["new"] or patterns["excluded"]:
            raise ValueError("match_pretrained takes patterns, new= and excluded=, or labels=.")
        kinds = [{label} for label in _labels_of(params, paths, labels)]
    sources = {
        path: leaf
        for path, leaf in zip(leaf_paths(pretrained), leaves_of(pretrained), strict=True)
        if not is_absent(leaf)
    }

    parts: dict[str, list[str]] = {name: [] for name in (*LABELS, "unused")}
    missing, misshaped, used = [], [], set()
    starts, mask, waived = [], [], set()
    for path, leaf, kind in zip(paths, leaves, kinds, strict=True):
        start = None if "new" in kind else sources.get(path)
        if "new" in kind or "excluded" in kind:
            waived.add(path)
        starts.append(start)
        mask.append("excluded" not in kind)
        if is_absent(leaf):
            continue
        if start is not None:
            used.add(path)
            if np.shape(start) != np.shape(leaf):
                misshaped.append(f"{path_name(path)!r}: {np.shape(start)} for {np.shape(leaf)}")
        name = "excluded" if "excluded" in kind else "new" if "new" in kind else "shared"
        parts[name].append(path_name(path))
        if name == "shared" and start is None:
            missing.append(repr(path_name(path)))
    globs = [glob for of_kind in patterns.values() for glob in of_kind]
    unused = [path for path in sources if path not in used]
    parts["unused"] = [path_name(path) for path in unused]
    spare = [
        repr(path_name(path))
        for path in unused
        if path not in waived and not any(_takes(glob, path) for glob in globs)
    ]
    idle = [repr(g) for g in globs if not any(_takes(g, path) for path in (*paths, *sources))]
    problems = {
        "without a pre-trained value": missing,
        "pre-trained, but not in params": spare,
        "of another shape in pretrained": misshaped,
        "patterns that meet no leaf": idle,
    }
    if any(problems.values()):
        listed = "\n".join(
            f"  {what}: {', '.join(which)}" for what, which in problems.items() if which
        )
        raise ValueError(
            f"pretrained does not match params:\n{listed}\n"
            "Leaves that are meant to have no counterpart are named by new= (L2-SP's beta holds "
            "them) or excluded= (nothing does), as in new=('head',)."
        )
    treedef = jax.tree.structure(params, is_leaf=is_absent)
    report = MatchReport(**{name: tuple(names) for name, names in parts.items()})
    return Match(treedef.unflatten(starts), treedef.unflatten(mask), report)


def _takes(glob: str, path: tuple[str, ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(path_name(path[:length]), glob) for length in range(1, len(path) + 1)
    ) or (not path and glob == ".")


def _labels_of(params: PyTree, paths: list[tuple[str, ...]], labels: PyTree) -> list[str]:
    found = lay_over(labels, params, what="labels", over="params", one_for_many=True)
    for path, leaf, label in zip(paths, leaves_of(params), found, strict=True):
        if label not in LABELS and not is_absent(leaf):
            raise ValueError(
                f"labels must hold 'shared', 'new' or 'excluded'; got {label!r} at "
                f"{path_name(path)!r}."
            )
    return found
