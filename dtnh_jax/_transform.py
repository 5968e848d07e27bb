"""The optax link that every rule is: pair of gradients in, one direction out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dtnh_jax._gradients import GradientPair
from dtnh_jax._gramian import (
    Gramian,
    combine,
    combine_elements,
    element_gramian,
    gramian,
    no_gramian,
)
from dtnh_jax._groups import Groups, Mask, Scope, check_scope, group_leaves
from dtnh_jax._numerics import compute_dtype
from dtnh_jax._stats import (
    Measurement,
    PairState,
    measure,
    no_measurement,
    removed_share,
    removed_share_of_leaf,
)
from dtnh_jax._tree import PyTree, is_absent, is_array, lay_over, leaf_names, leaves_of
from dtnh_jax._weightings import Weights

Weighting = Callable[[Gramian, jax.Array], Weights]
RegWeight = jax.typing.ArrayLike | optax.Schedule

RIGHT_CALLS = (
    "Call tx.update(dtnh_jax.GradientPair(loss_grads, reg_grads), state, params), "
    "or tx.update(loss_grads, state, params, reg_grads=reg_grads)"
)


def pair_transformation(
    weighting: Weighting,
    reg_weight: RegWeight,
    *,
    scope: Scope,
    mask: Mask,
    diagnostics: bool,
    needs_gramian: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of pairs from a weighting of their Gramian.

    Args:
        weighting: From the Gramian and the regularizer weight to the weights of the direction.
        reg_weight: The regularizer weight or its schedule.
        scope: Which leaves form a group.
        mask: Where the regularizer acts.
        diagnostics: Whether to keep what ``conflict_stats`` reads.
        needs_gramian: Whether the weighting looks at the inner products of the Gramian.

    Returns:
        An optax transformation whose state is a ``PairState``.

    Raises:
        ValueError: If ``reg_weight`` or ``scope`` is none.
        TypeError: Likewise.
    """
    _check_reg_weight(reg_weight)
    check_scope(scope)

    def init(params: PyTree) -> Any:
        groups = group_leaves(params, scope, mask)
        dtypes = [jnp.result_type(leaf) for leaf in leaves_of(params) if not is_absent(leaf)]
        dtype = compute_dtype(*(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)))
        return PairState(
            count=jnp.zeros([], jnp.int32),
            measurement=no_measurement(len(groups.names), dtype) if diagnostics else None,
            groups=_names_as_tree(groups, params),
        )

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        reg_grads: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        loss_grads, reg_grads = _unpack(updates, reg_grads, params)
        treedef = jax.tree.structure(loss_grads, is_leaf=is_absent)
        groups = group_leaves(loss_grads, scope, mask)
        _check_initialised(groups, loss_grads, state)
        loss_leaves = leaves_of(loss_grads)
        reg_leaves = lay_over(
            reg_grads, loss_grads, what="reg_grads", over="loss_grads", one_for_many=False
        )
        taking_part = [
            index
            for index, row in enumerate(groups.row_of_leaf)
            if row is not None and not is_absent(reg_leaves[index])
        ]
        _check_leaves(leaf_names(loss_grads), loss_leaves, reg_leaves, taking_part)
        these = _Participants(
            loss_leaves=[jnp.asarray(loss_leaves[index]) for index in taking_part],
            reg_leaves=[jnp.asarray(reg_leaves[index]) for index in taking_part],
            rows=[row for row in (groups.row_of_leaf[i] for i in taking_part) if row is not None],
            n_rows=len(groups.names),
        )
        dtype = compute_dtype(*(leaf.dtype for leaf in these.loss_leaves + these.reg_leaves))
        weight = reg_weight(state.count) if callable(reg_weight) else reg_weight
        by_element = isinstance(scope, str) and scope == "element"
        directions, measurement = (_combined_by_element if by_element else _combined)(
            weighting, jnp.asarray(weight, dtype), these, diagnostics, needs_gramian
        )
        for index, direction in zip(taking_part, directions, strict=True):
            loss_leaves[index] = direction
        return jax.tree.unflatten(treedef, loss_leaves), PairState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            measurement=_like(measurement, state.measurement),
            groups=state.groups,
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Participants(NamedTuple):
    """The leaves that both gradients have, and the group of each."""

    loss_leaves: list[jax.Array]
    reg_leaves: list[jax.Array]
    rows: list[int]
    n_rows: int


def _combined(
    weighting: Weighting,
    reg_weight: jax.Array,
    these: _Participants,
    diagnostics: bool,
    needs_gramian: bool,
) -> tuple[list[jax.Array], Measurement | None]:
    if diagnostics or needs_gramian:
        gram = gramian(*these)
    else:
        gram = no_gramian(these.n_rows, reg_weight.dtype)
    weights = weighting(gram, reg_weight)
    factors = (*weights, gram.loss_scale, gram.reg_scale)
    of_row = list(zip(*map(jnp.unstack, factors), strict=True))
    directions = [
        combine(a, b, *of_row[row])
        for a, b, row in zip(these.loss_leaves, these.reg_leaves, these.rows, strict=True)
    ]
    if not diagnostics:
        return directions, None
    return directions, measure(gram, removed_share(gram, weights, reg_weight))


def _combined_by_element(
    weighting: Weighting,
    reg_weight: jax.Array,
    these: _Participants,
    diagnostics: bool,
    needs_gramian: bool,
) -> tuple[list[jax.Array], Measurement | None]:
    del needs_gramian  # The Gramian of an element is no pass of its own.
    directions = []
    removed = [jnp.zeros_like(reg_weight)] * these.n_rows
    gram = gramian(*these) if diagnostics else None
    for a, b, row in zip(these.loss_leaves, these.reg_leaves, these.rows, strict=True):
        each = element_gramian(a, b)
        weights = weighting(each, reg_weight.astype(each.inner.dtype))
        direction, change = combine_elements(a, b, *weights)
        directions.append(direction)
        if gram is not None:
            leaf = Gramian(*(of_row[row] for of_row in gram))
            removed[row] = removed_share_of_leaf(b, change, reg_weight, leaf)
    if gram is None:
        return directions, None
    return directions, measure(gram, jnp.asarray(removed, reg_weight.dtype))


def _unpack(updates: PyTree, reg_grads: PyTree | None, params: PyTree | None) -> GradientPair:
    """The pair out of either call style, or an error that shows both."""
    pair = _as_pair(updates)
    if reg_grads is not None:
        if isinstance(updates, GradientPair) or (
            pair is not None
            and not _same_structure(updates, reg_grads)
            and _same_structure(pair.loss_grads, reg_grads)
        ):
            raise TypeError(
                "reg_grads came twice: in the pair and as reg_grads=. "
                f"{RIGHT_CALLS}; not both at once."
            )
        return GradientPair(updates, reg_grads)
    is_params_like = params is not None and _same_structure(updates, params)
    if pair is None or (is_params_like and not isinstance(updates, GradientPair)):
        raise TypeError(
            "A dtnh_jax rule wants the gradients of loss and regularizer as a pair; got one "
            f"tree ({type(updates).__name__}) and no reg_grads=. {RIGHT_CALLS}."
        )
    return pair


def _as_pair(updates: PyTree) -> GradientPair | None:
    if isinstance(updates, GradientPair):
        return updates
    if type(updates) is tuple and len(updates) == 2:
        return GradientPair(*updates)
    # nnx.Optimizer.update(model, pair) turns the tuple into an nnx.State by its indices, and a
    # GradientPair into one by its field names. A dict is params of somebody, never a pair.
    if isinstance(updates, Mapping) and not isinstance(updates, dict):
        for keys in ((0, 1), GradientPair._fields):
            if set(updates) == set(keys):
                return GradientPair(*(updates[key] for key in keys))
    return None


def _same_structure(one: PyTree, other: PyTree) -> bool:
    return jax.tree.structure(one, is_leaf=is_absent) == jax.tree.structure(
        other, is_leaf=is_absent
    )


def _names_as_tree(groups: Groups, params: PyTree) -> dict[str, None]:
    # optax.tree.map_params initialises a transformation on a leafless stand-in for params, and
    # wants to find that in the place of whatever params decide: here, the names.
    return dict.fromkeys(groups.names) if jax.tree.leaves(params) else params


def _like(measurement: Measurement | None, before: Measurement | None) -> Measurement | None:
    # The state keeps its dtypes whatever the gradients' are: a scan carries it.
    if measurement is None or before is None:
        return measurement
    return jax.tree.map(lambda new, old: new.astype(old.dtype), measurement, before)


def _check_reg_weight(reg_weight: RegWeight) -> None:
    if callable(reg_weight) or isinstance(reg_weight, Tracer):
        return
    if isinstance(reg_weight, bool) or not is_array(reg_weight):
        raise TypeError(
            "reg_weight must be a number >= 0 or an optax schedule (a function of the step); "
            f"got {reg_weight!r}."
        )
    if jnp.ndim(reg_weight) != 0 or not np.asarray(reg_weight) >= 0:
        raise ValueError(
            "reg_weight must be a number >= 0: it multiplies the regularizer's gradient; "
            f"got {reg_weight!r}."
        )


def _check_initialised(groups: Groups, loss_grads: PyTree, state: Any) -> None:
    if not isinstance(state, PairState):
        raise TypeError(
            f"A dtnh_jax rule wants the state that its init(params) made; got "
            f"{type(state).__name__}."
        )
    known = tuple(sorted(state.groups)) if isinstance(state.groups, Mapping) else ()
    if groups.names and groups.names != known:
        unknown = sorted(set(groups.names) ^ set(known))
        raise ValueError(
            "The gradients do not have the groups of the params that init saw: "
            f"{unknown[0]!r} is in only one of them. Pass loss_grads with the structure of "
            f"params. {RIGHT_CALLS}."
        )


def _check_leaves(
    names: list[str], loss_leaves: list[Any], reg_leaves: list[Any], taking_part: list[int]
) -> None:
    for index in taking_part:
        a, b, name = loss_leaves[index], reg_leaves[index], names[index]
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
