"""The optax link that every rule is: a pair of gradients in, one direction out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dtnh_jax._gradients import GradientPair
from dtnh_jax._gramian import (
    Gramian,
    change,
    changed,
    element_change,
    element_gramian,
    gramians,
    no_gramian,
)
from dtnh_jax._groups import Groups, Mask, Scope, check_scope, group_leaves
from dtnh_jax._numerics import compute_dtype, widened
from dtnh_jax._reference import (
    Reference,
    check_reference,
    init_reference,
    reference_leaves,
)
from dtnh_jax._stats import (
    Measurement,
    PairState,
    join,
    measure,
    no_measurement,
    removed_share,
    removed_share_of_leaf,
)
from dtnh_jax._tree import PyTree, is_absent, is_array, lay_over, leaf_names, leaves_of
from dtnh_jax._unpack import RIGHT_CALLS, takes_pairs
from dtnh_jax._weightings import Weights

Weight = jax.typing.ArrayLike | optax.Schedule
RegWeight = Weight | Sequence[Weight]


class Rule(NamedTuple):
    """How a group's direction is made.

    Attributes:
        weighting: From the Gramian and the regularizer weight to the weights of the direction.
        needs_gramian: Whether it looks at the inner products.
        one_by_one: Whether several regularizers are each held against the reference and their
            changes added. If not, their weighted sum is one gradient.
    """

    weighting: Callable[[Gramian, jax.Array], Weights]
    needs_gramian: bool = True
    one_by_one: bool = True


class Choices(NamedTuple):
    """What the user chose for a rule, the same for all of them."""

    reg_weight: RegWeight
    scope: Scope = "global"
    mask: Mask = None
    diagnostics: bool = True
    reference: Reference = "batch"


def pair_transformation(rule: Rule, choices: Choices) -> optax.GradientTransformationExtraArgs:
    """A transformation of pairs into directions.

    Args:
        rule: How a group's direction is made.
        choices: What the user chose.

    Returns:
        An optax transformation whose state is a ``PairState``.

    Raises:
        ValueError: If a choice is out of its range.
        TypeError: If a choice is of the wrong type.
    """
    apart = changes_transformation(rule, choices)

    def update(
        pair: GradientPair, state: Any, params: PyTree | None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del extra_args
        loss_grads, reg_grads = pair
        changes, state = apart.update(loss_grads, state, params, reg_grads=reg_grads)
        leaves, treedef = jax.tree.flatten(loss_grads, is_leaf=is_absent)
        directions = [
            changed(leaf, of_leaf) if of_leaf else leaf
            for leaf, of_leaf in zip(leaves, changes, strict=True)
        ]
        return treedef.unflatten(directions), state

    return takes_pairs(apart.init, update)


class ChangesTransformation(NamedTuple):
    """A rule before its changes are added to the loss gradient.

    Attributes:
        init: From params to the state.
        update: ``update(loss_grads, state, params, *, reg_grads, reference=None)``, which
            returns for each leaf a list of changes, empty where the regularizer does not reach,
            and the state. ``reference`` is a tree that takes the place of the chosen one.
    """

    init: optax.TransformInitFn
    update: Callable[..., tuple[list[list[jax.Array]], PairState]]


def changes_transformation(rule: Rule, choices: Choices) -> ChangesTransformation:
    """:func:`pair_transformation` before the changes are added to the loss gradient."""
    weights = _as_weights(choices.reg_weight)
    several = isinstance(choices.reg_weight, tuple | list)
    check_scope(choices.scope)
    check_reference(choices.reference)
    n_measured = len(weights) if rule.one_by_one else 1

    def init(params: PyTree) -> Any:
        groups = group_leaves(params, choices.scope, choices.mask)
        dtypes = [jnp.result_type(leaf) for leaf in leaves_of(params) if not is_absent(leaf)]
        dtype = compute_dtype(*(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)))
        names = _row_names(groups, n_measured)
        return PairState(
            count=jnp.zeros([], jnp.int32),
            measurement=no_measurement(len(names), dtype) if choices.diagnostics else None,
            # optax.tree.map_params initialises a transformation on a leafless stand-in for
            # params, and wants to find that in the place of whatever params decide.
            groups=dict.fromkeys(names) if jax.tree.leaves(params) else params,
            reference=init_reference(choices.reference, params, groups),
        )

    def update(
        loss_grads: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        reg_grads: PyTree,
        reference: PyTree | None = None,
    ) -> tuple[list[list[jax.Array]], PairState]:
        groups = group_leaves(loss_grads, choices.scope, choices.mask)
        _check_initialised(_row_names(groups, n_measured), state)
        reg_trees = as_trees(reg_grads, len(weights)) if several else [reg_grads]
        each = [_matched(loss_grads, reg_tree, groups) for reg_tree in reg_trees]
        values = [w(state.count) if callable(w) else w for w in weights]
        if not rule.one_by_one and several:
            each, values = [_weighted(each, values)], [1.0]
        if reference is None:
            ref_leaves, reference_state = reference_leaves(
                choices.reference, loss_grads, state.reference, params, groups
            )
        else:
            ref_leaves, reference_state = leaves_of(reference), state.reference

        changes: list[list[jax.Array]] = [[] for _ in ref_leaves]
        measurements = []
        for reg_leaves, value in zip(each, values, strict=True):
            of_leaves, measurement = _changes(rule, value, ref_leaves, reg_leaves, groups, choices)
            for index, of_leaf in of_leaves.items():
                changes[index].append(of_leaf)
            measurements.append(measurement)
        return changes, PairState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            measurement=join(measurements, state.measurement),
            groups=state.groups,
            reference=reference_state,
        )

    return ChangesTransformation(init, update)


def _changes(
    rule: Rule,
    reg_weight: jax.typing.ArrayLike,
    ref_leaves: list[Any],
    reg_leaves: dict[int, jax.Array],
    groups: Groups,
    choices: Choices,
) -> tuple[dict[int, jax.Array], Measurement | None]:
    """The change of each leaf that one regularizer reaches, and what was measured."""
    refs = [jnp.asarray(ref_leaves[index]) for index in reg_leaves]
    regs = list(reg_leaves.values())
    rows = tuple(
        row for row in (groups.row_of_leaf[index] for index in reg_leaves) if row is not None
    )
    n_rows = len(groups.names)
    dtype = compute_dtype(*(leaf.dtype for leaf in refs + regs))
    weight = jnp.asarray(reg_weight, dtype)
    by_element = isinstance(choices.scope, str) and choices.scope == "element"

    if choices.diagnostics or (rule.needs_gramian and not by_element):
        grams, gram = gramians(refs, regs, rows, n_rows)
    else:
        grams, gram = [no_gramian(dtype)] * n_rows, None
    if by_element:
        each = [
            rule.weighting(element_gramian(r, b), weight) for r, b in zip(refs, regs, strict=True)
        ]
        changes = [element_change(r, b, *w) for r, b, w in zip(refs, regs, each, strict=True)]
    else:
        of_rows = [rule.weighting(of_row, weight) for of_row in grams]
        changes = [change(r, b, *of_rows[row]) for r, b, row in zip(refs, regs, rows, strict=True)]
    of_leaves = dict(zip(reg_leaves, changes, strict=True))
    if not choices.diagnostics or gram is None:
        return of_leaves, None
    if by_element:
        shares = [jnp.zeros_like(weight)] * n_rows
        for b, of_leaf, row in zip(regs, changes, rows, strict=True):
            shares[row] = removed_share_of_leaf(b, of_leaf, weight, grams[row])
        removed = jnp.asarray(shares, dtype)
    else:
        removed = removed_share(gram, rule.weighting(gram, weight), weight)
    return of_leaves, measure(gram, removed)


def _matched(loss_grads: PyTree, reg_grads: PyTree, groups: Groups) -> dict[int, jax.Array]:
    """The leaves of ``reg_grads`` that take part, by the index of their leaf in ``loss_grads``."""
    loss_leaves, names = leaves_of(loss_grads), leaf_names(loss_grads)
    reg_leaves = lay_over(
        reg_grads, loss_grads, what="reg_grads", over="loss_grads", one_for_many=False
    )
    taking_part = {}
    for index, (a, b) in enumerate(zip(loss_leaves, reg_leaves, strict=True)):
        if groups.row_of_leaf[index] is not None and not is_absent(b):
            _check_leaf(names[index], a, b)
            taking_part[index] = jnp.asarray(b)
    return taking_part


def _weighted(
    each: Sequence[dict[int, jax.Array]], weights: Sequence[jax.typing.ArrayLike]
) -> dict[int, jax.Array]:
    """The weighted sum of several regularizers, leaf by leaf."""
    total: dict[int, jax.Array] = {}
    for reg_leaves, weight in zip(each, weights, strict=True):
        for index, b in reg_leaves.items():
            dtype = compute_dtype(b.dtype)
            part = widened(b, dtype) * jnp.asarray(weight, dtype)
            total[index] = total[index] + part if index in total else part
    return dict(sorted(total.items()))


def _row_names(groups: Groups, n_regularizers: int) -> tuple[str, ...]:
    if n_regularizers == 1:
        return groups.names
    # Padded, so that the order of the rows is the order of the names.
    width = len(str(n_regularizers - 1))
    return tuple(f"{k:0{width}}/{name}" for k in range(n_regularizers) for name in groups.names)


def _as_weights(reg_weight: RegWeight) -> list[Weight]:
    weights: list[Any] = [*reg_weight] if isinstance(reg_weight, tuple | list) else [reg_weight]
    if not weights:
        raise ValueError("reg_weight must hold a weight for each regularizer; got none.")
    for weight in weights:
        _check_reg_weight(weight)
    return weights


def as_trees(reg_grads: PyTree, n_weights: int) -> list[PyTree]:
    """The trees of several regularizers, one for each weight."""
    if not isinstance(reg_grads, tuple | list) or len(reg_grads) != n_weights:
        got = (
            f"{type(reg_grads).__name__} of {len(reg_grads)}"
            if isinstance(reg_grads, tuple | list)
            else type(reg_grads).__name__
        )
        raise TypeError(
            f"A rule with {n_weights} weights in reg_weight wants reg_grads to be a tuple of as "
            f"many trees, one for each regularizer; got {got}."
        )
    return list(reg_grads)


def _check_reg_weight(reg_weight: Any) -> None:
    if callable(reg_weight) or isinstance(reg_weight, Tracer):
        return
    if isinstance(reg_weight, bool) or not is_array(reg_weight):
        raise TypeError(
            "reg_weight must be a number >= 0 or an optax schedule (a function of the step), or a "
            f"sequence of them, one for each regularizer; got {reg_weight!r}."
        )
    if jnp.ndim(reg_weight) != 0 or not np.asarray(reg_weight) >= 0:
        raise ValueError(
            "reg_weight must be a number >= 0: it multiplies the regularizer's gradient; "
            f"got {reg_weight!r}."
        )


def _check_initialised(names: tuple[str, ...], state: Any) -> None:
    if not isinstance(state, PairState):
        raise TypeError(
            f"A dtnh_jax rule wants the state that its init(params) made; got "
            f"{type(state).__name__}."
        )
    known = set(state.groups) if isinstance(state.groups, Mapping) else set()
    if names and set(names) != known:
        unknown = sorted(set(names) ^ known)
        raise ValueError(
            "The gradients do not have the groups of the params that init saw: "
            f"{unknown[0]!r} is in only one of them. Pass loss_grads with the structure of "
            f"params. {RIGHT_CALLS}."
        )


def _check_leaf(name: str, a: Any, b: Any) -> None:
    for role, leaf in (("loss_grads", a), ("reg_grads", b)):
        if not is_array(leaf):
            raise TypeError(f"{role} must hold arrays; got {type(leaf).__name__} at {name!r}.")
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"{role} must be floating-point or complex; got "
                f"{jnp.result_type(leaf)} at {name!r}. Integers have no gradient: "
                "put None there in reg_grads, or False in mask."
            )
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"loss_grads and reg_grads must have the same shapes; got {jnp.shape(a)} and "
            f"{jnp.shape(b)} at {name!r}. Where the regularizer does not reach, put None "
            "in reg_grads."
        )
    if jnp.iscomplexobj(b) and not jnp.iscomplexobj(a):
        raise TypeError(
            f"reg_grads is complex at {name!r} and loss_grads real: the direction keeps "
            "the dtype of loss_grads. Take the real part, or make both complex."
        )
