"""Matching of pre-trained parameters to those of a network."""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dtnh_jax._tree import PyTree, is_absent, lay_over, leaf_paths, leaves_of, path_name

LABELS = ("shared", "new", "excluded")


class MatchReport(NamedTuple):
    """How each leaf was matched; `print` shows one line for each leaf.

    Attributes:
        shared: Paths of the leaves with a pre-trained value.
        new: Paths of the leaves without one, such as a new head.
        excluded: Paths of the leaves that are excluded from the regularizer.
        unused: Paths of the pre-trained leaves without a counterpart.

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
    """Pre-trained parameters, matched to those of the fine-tuned network.

    Attributes:
        pretrained: A tree with the structure of params: the pre-trained leaves, and `None` for
            leaves that are new, or excluded without a counterpart.
        mask: A tree of booleans with the structure of params, `False` for excluded leaves.
        report: A [`MatchReport`][dtnh_jax.regularizers.MatchReport] of how each leaf was matched.

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
    r"""Matches pre-trained parameters to those of a network by path.

    $$\text{params} = \underbrace{\text{shared}}_{w_0 \text{ of the same path}} \,\cup\,
    \text{new} \,\cup\, \text{excluded}$$

    A leaf without a counterpart, with another shape, or that exists only in `pretrained` is an
    error unless a pattern declares it. The error message lists all such leaves.

    A pattern is a shell-style glob on the path of the leaf or of a subtree that contains it:
    `"head"` and `"head/*"` match `head/kernel`, and `"*/bias"` matches every bias except one at
    the root. `*` matches any number of levels.

    Args:
        params: The parameters of the fine-tuned network.
        pretrained: The parameters of the pre-trained network; container types may differ.
        new: Patterns of leaves without a pre-trained value, even if `pretrained` has a leaf at
            that path. L2-SP regularizes them with $\beta$.
        excluded: Patterns of leaves to exclude from regularizers of the weights, such as
            `"*/bias"`. They need no counterpart; if there is one, it must have the same shape. A
            leaf that is also `new` has no pre-trained value and is excluded.
        labels: An alternative to patterns: a tree of `"shared"`, `"new"` and `"excluded"` that is
            a prefix of `params`.

    Returns:
        A [`Match`][dtnh_jax.regularizers.Match]: `pretrained` and `mask` for the regularizers of
        the weights, and a report.

    Raises:
        ValueError: If leaves do not match (the message lists their paths), if a pattern matches no
            leaf, if both labels and patterns are given, or if a label is unknown.

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
            raise ValueError(
                "match_pretrained takes either patterns, new= and excluded=, or labels=, not both."
            )
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
        "only in pretrained": spare,
        "with another shape in pretrained": misshaped,
        "patterns that match no leaf": idle,
    }
    if any(problems.values()):
        listed = "\n".join(
            f"  {what}: {', '.join(which)}" for what, which in problems.items() if which
        )
        raise ValueError(
            f"pretrained does not match params:\n{listed}\n"
            "Declare leaves without a counterpart by new= (L2-SP regularizes them with beta) or "
            "excluded= (they are not regularized), as in new=('head',)."
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
                f"labels must be 'shared', 'new' or 'excluded'; got {label!r} at "
                f"{path_name(path)!r}."
            )
    return found
