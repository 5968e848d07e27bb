"""The link that every rule is: a pair of gradients in, one direction out."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dtnh_jax._geometry import (
    Part,
    change,
    element_change,
    element_geometry,
    geometries,
    scaled,
    total,
)
from dtnh_jax._layout import Layout, Mask, Scope, check_scope, lay_out
from dtnh_jax._numerics import compute_dtype, ratio
from dtnh_jax._pair import RIGHT_CALLS, GradientPair, takes_pairs
from dtnh_jax._reference import (
    Reference,
    as_held_out,
    check_reference,
    init_reference,
    is_usable,
    reference_leaves,
)
from dtnh_jax._stats import (
    Measurement,
    PairState,
    measure,
    no_measurement,
    removed_by_element,
    removed_share,
)
from dtnh_jax._tree import PyTree, is_array, path_name
from dtnh_jax.weightings import (
    Geometry,
    Weighting,
    Weights,
    added_length,
    bounded,
    weighted_sum,
)

Weight = jax.typing.ArrayLike | optax.Schedule
RegWeight = Weight | Sequence[Weight]
BoundBy = Literal["current", "running_max"]


def combine_pair(
    weighting: Weighting,
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    reference: Reference = "batch",
    max_ratio: float | None = None,
    bound_by: BoundBy = "current",
    several: Literal["each", "sum"] = "each",
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns a pair of gradients into one direction, by a weighting: how every rule is made.

    In each group of leaves, seen as one vector, with the loss gradient $a$, the regularizer
    gradient $b$ and the reference $r$ (which is $a$ unless `reference` says otherwise):

    $$d = a + w_r\,\frac{r}{\lVert r\rVert} + w_b\,b, \qquad
    (w_r, w_b) = \text{weighting}\Bigl(\lVert r\rVert,\ \lVert b\rVert,\
    \frac{\langle r,b\rangle}{\lVert r\rVert};\ \lambda\Bigr)$$

    Every rule of this package is a call of this function, and a new rule is a function of three
    numbers: see [`dtnh_jax.weightings`][dtnh_jax.weightings.Geometry].

    Args:
        weighting: `weighting(geometry, reg_weight)`, which returns
            [`Weights`][dtnh_jax.weightings.Weights]. It must be elementwise: it is called with
            scalars, with one number for each group, and in scope `"element"` with arrays of the
            shapes of the leaves.
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: As in [`dtnh`][dtnh_jax.dtnh].
        reference: As in [`dtnh`][dtnh_jax.dtnh].
        max_ratio: As in [`dtnh`][dtnh_jax.dtnh]: a bound on what the weighting adds to $a$.
        bound_by: As in [`dtnh`][dtnh_jax.dtnh].
        several: What to do where `reg_weight` is a sequence. `"each"` applies the weighting to each
            regularizer and adds what each adds to $a$; `"sum"` applies it once, to
            $\sum_k \lambda_k b_k$ with a weight of 1.
        diagnostics: As in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles, with a
        [`PairState`][dtnh_jax.PairState]. The direction has the structure, shapes and dtypes of
        `loss_grads`.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

    Examples:
        A rule that keeps half of what conflicts:

        >>> import jax.numpy as jnp, dtnh_jax
        >>> from dtnh_jax.weightings import Weights
        >>> def keep_half(geometry, reg_weight):
        ...     conflict = jnp.minimum(geometry.along, 0.0)
        ...     return Weights(ref=-0.5 * reg_weight * conflict, reg=reg_weight)
        >>> tx = dtnh_jax.combine_pair(keep_half, reg_weight=1.0, scope="layer")
        >>> params = jnp.zeros(2)
        >>> pair = (jnp.array([2.0, 0.0]), jnp.array([-1.0, 1.0]))
        >>> direction, state = tx.update(pair, tx.init(params), params)
        >>> print(direction)
        [1.5 1. ]

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489), whose rule is
        `dtnh_jax.weightings.project`.
    """
    init, changes_of = pair_changes(
        weighting, reg_weight, scope, mask, reference, max_ratio, bound_by, several, diagnostics
    )

    def update(
        pair: GradientPair, state: Any, params: PyTree | None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        changes, state = changes_of(pair, state, params, **extra_args)
        leaves, treedef = jax.tree.flatten(pair.loss_grads)
        directions = [
            a if by is None else total(jnp.asarray(a), by).astype(jnp.result_type(a))
            for a, by in zip(leaves, changes, strict=True)
        ]
        return treedef.unflatten(directions), state

    return takes_pairs(init, update)


def pair_changes(
    weighting: Weighting,
    reg_weight: RegWeight,
    scope: Scope,
    mask: Mask,
    reference: Reference = "batch",
    max_ratio: float | None = None,
    bound_by: BoundBy = "current",
    several: Literal["each", "sum"] = "each",
    diagnostics: bool = True,
) -> tuple[optax.TransformInitFn, Callable[..., tuple[list[jax.Array | None], PairState]]]:
    """:func:`combine_pair` before its changes are added to the loss gradient.

    Returns:
        ``init`` and ``changes_of(pair, state, params, **extra_args)``, which returns for each leaf
        of ``pair.loss_grads`` ``d - a``, or ``None`` where the regularizer does not reach, and the
        state.
    """
    weights = _as_weights(reg_weight)
    check_scope(scope)
    check_reference(reference)
    by_element = isinstance(scope, str) and scope == "element"
    _check_bound(max_ratio, bound_by, by_element)
    if several not in ("each", "sum"):
        raise ValueError(f"several must be 'each' or 'sum'; got {several!r}.")
    is_sequence = isinstance(reg_weight, tuple | list)
    n_measured = len(weights) if several == "each" else 1

    def init(params: PyTree) -> Any:
        layout = lay_out(params, scope, mask)
        dtypes = [jnp.result_type(leaf) for leaf in layout.leaves]
        dtype = compute_dtype(*[dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)])
        names = _row_names(layout, n_measured)
        return PairState(
            count=jnp.zeros([], jnp.int32),
            measurement=no_measurement(len(names), dtype) if diagnostics else None,
            # optax.tree.map_params initialises a transformation on a leafless stand-in for
            # params, and wants to find that in the place of whatever params decide.
            groups=dict.fromkeys(names) if layout.leaves else params,
            reference=init_reference(reference, layout),
            largest=jnp.zeros(len(names), dtype) if bound_by == "running_max" else None,
        )

    def changes_of(
        pair: GradientPair, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[list[jax.Array | None], PairState]:
        layout = lay_out(pair.loss_grads, scope, mask)
        _check_initialised(_row_names(layout, n_measured), state)
        trees = as_trees(pair.reg_grads, len(weights)) if is_sequence else [pair.reg_grads]
        regs = [_matched(layout, tree, pair.loss_grads) for tree in trees]
        values = [w(state.count) if callable(w) else w for w in weights]
        if several == "sum" and is_sequence:
            regs, values = [_weighted(regs, values)], [1.0]
        refs, reference_state = reference_leaves(
            reference, layout, pair.loss_grads, state.reference, params, extra_args
        )
        if (usable := is_usable(reference, reference_state)) is not None:
            values = [jnp.where(usable, value, 0.0) for value in values]
        combination = _Combination(weighting, max_ratio, by_element)
        bounds = layout.leaves if as_held_out(reference) else refs
        changes, measurement, largest = combination(
            values, refs, bounds, regs, layout, state.measurement, state.largest
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        return changes, PairState(count, measurement, state.groups, reference_state, largest)

    return init, changes_of


class _Combination(NamedTuple):
    """What one update does with the leaves of both trees."""

    weighting: Weighting
    max_ratio: jax.typing.ArrayLike | None
    by_element: bool

    def __call__(
        self,
        reg_weights: Sequence[jax.typing.ArrayLike],
        refs: list[Any],
        bounds: list[Any],
        regs: Sequence[list[jax.Array | None]],
        layout: Layout,
        measurement: Measurement | None,
        largest: jax.Array | None,
    ) -> tuple[list[jax.Array | None], Measurement | None, jax.Array | None]:
        """Combines.

        Args:
            reg_weights: λ of each regularizer.
            refs: The reference, leaf by leaf.
            bounds: What ``max_ratio`` is relative to, likewise: often the same list.
            regs: The regularizers' gradients, ``None`` where they do not reach.
            layout: Of the loss gradient.
            measurement: Of the step before, if there are diagnostics.
            largest: The largest norm of ``bounds`` so far, for each group, if it is kept.

        Returns:
            What the regularizers add to each leaf, what was measured, and the next ``largest``.
        """
        n_groups = len(layout.names)
        # The groups of one regularizer after those of another: one row for each.
        parts = [
            Part(leaf, jnp.asarray(refs[leaf]), b, jnp.asarray(bounds[leaf]), k * n_groups + row)
            for k, of_leaves in enumerate(regs)
            for leaf, (b, row) in enumerate(zip(of_leaves, layout.rows, strict=True))
            if b is not None and row is not None
        ]
        dtype = compute_dtype(*[x.dtype for part in parts for x in part[1:4]])
        lambdas = [jnp.asarray(w, dtype) for w in reg_weights for _ in range(n_groups)]
        needs_geometry = not (self.by_element or self.is_sum)
        needs_bound = self.max_ratio is not None and not self.by_element
        nothing = Geometry(*[jnp.zeros([], dtype)] * 3)
        each, together, bound_norms = [nothing] * len(lambdas), None, None
        if measurement is not None or needs_geometry or needs_bound:
            is_apart = needs_bound and bounds is not refs
            each, together, bound_norms = geometries(parts, len(lambdas), dtype, is_apart)
        if largest is not None and bound_norms is not None:
            kept = [largest[row].astype(dtype) for row in range(len(lambdas))]
            bound_norms = [
                jnp.where(jnp.isfinite(new), jnp.maximum(new, old), old)
                for new, old in zip(bound_norms, kept, strict=True)
            ]
            largest = jnp.asarray(bound_norms).astype(largest.dtype)
        factors: dict[int, Weights] = {}
        for group in range(0 if self.by_element else n_groups):
            rows = range(group, len(lambdas), n_groups)
            norms = None if bound_norms is None else [bound_norms[row] for row in rows]
            found = self.weights([each[i] for i in rows], [lambdas[i] for i in rows], norms)
            for row, weights in zip(rows, found, strict=True):
                factors[row] = self.factors(each[row], lambdas[row], weights)
        changes: list[jax.Array | None] = [None] * len(refs)
        made: list[tuple[jax.Array, jax.Array, int]] = []
        by_leaf: dict[int, list[Part]] = {}
        for part in parts:
            by_leaf.setdefault(part.leaf, []).append(part)
        for leaf, of_leaf in by_leaf.items():
            if self.by_element:
                numbers = [element_geometry(part.r, part.b, dtype) for part in of_leaf]
                of_rows = [lambdas[part.row] for part in of_leaf]
                found = self.weights(numbers, of_rows, [jnp.abs(part.bound) for part in of_leaf])
                for part, geometry, weights in zip(of_leaf, numbers, found, strict=True):
                    factors[part.row] = self.factors(geometry, lambdas[part.row], weights)
            for _, r, b, _, row in of_leaf:
                ref, reg = factors[row]
                combine = element_change if self.by_element else change
                # A product with 0 would keep what is not finite.
                by = jnp.where(jnp.isnan(ref), 0, combine(r, b, ref, reg, dtype))
                before = changes[leaf]
                changes[leaf] = by if before is None else total(before, by)
                made.append((b, by, row))
        if measurement is None or together is None:
            return changes, None, largest
        reg_weight = jnp.asarray(lambdas, dtype)
        if self.by_element:
            removed = removed_by_element(together, made, reg_weight)
        else:
            norms = None if bound_norms is None else jnp.asarray(bound_norms, dtype)
            apart = functools.partial(jnp.split, indices_or_sections=len(regs))
            found = self.weights(
                [Geometry(*one) for one in zip(*map(apart, together), strict=True)],
                apart(reg_weight),
                None if norms is None else apart(norms),
            )
            ref, reg = (jnp.concatenate(x) for x in zip(*found, strict=True))
            removed = removed_share(together, Weights(ref, reg), reg_weight)
        reached = np.isin(np.arange(len(lambdas)), [part.row for part in parts])
        return changes, measure(together, removed, reached, measurement), largest

    @property
    def is_sum(self) -> bool:
        """Whether this is the sum, whose direction needs no geometry."""
        return self.weighting is weighted_sum and self.max_ratio is None

    def weights(
        self,
        geometries: Sequence[Geometry],
        reg_weights: Sequence[jax.Array],
        bound_norms: Sequence[jax.Array] | None,
    ) -> list[Weights]:
        """What the weighting returns for the regularizers of one group, checked and bounded.

        Args:
            geometries: Of each regularizer.
            reg_weights: λ of each.
            bound_norms: What the bound is relative to, for each.

        Returns:
            The weights of each regularizer.
        """
        if self.max_ratio is None or bound_norms is None:
            return [self.free(*one) for one in zip(geometries, reg_weights, strict=True)]
        weights, limits = [], []
        for geometry, reg_weight, norm in zip(geometries, reg_weights, bound_norms, strict=True):
            dtype = geometry.along.dtype
            limit = jnp.asarray(self.max_ratio, dtype) * norm.astype(dtype)
            # A schedule may return infinity, 0 times which is no number.
            reg_weight = jnp.minimum(reg_weight, float(jnp.finfo(dtype).max))
            weights.append(bounded(self.free(geometry, reg_weight), geometry, limit))
            limits.append(limit)
        if len(weights) > 1:  # their lengths together are at least the length of their sum
            lengths = [added_length(*one) for one in zip(weights, geometries, strict=True)]
            limit, length = (
                functools.reduce(function, [jnp.where(jnp.isnan(x), 0, x) for x in each])
                for function, each in ((jnp.maximum, limits), (jnp.add, lengths))
            )
            share = jnp.minimum(ratio(limit, length), 1)
            weights = [Weights(share * ref, share * reg) for ref, reg in weights]
        return weights

    def free(self, geometry: Geometry, reg_weight: jax.Array) -> Weights:
        """What the weighting returns, checked."""
        weights = self.weighting(geometry, reg_weight)
        if not isinstance(weights, tuple) or len(weights) != 2:
            raise TypeError(
                "A weighting must return dtnh_jax.weightings.Weights(ref, reg), two arrays; got "
                f"{type(weights).__name__}."
            )
        return Weights(*[jnp.asarray(x, geometry.along.dtype) for x in weights])

    def factors(self, geometry: Geometry, reg_weight: jax.Array, weights: Weights) -> Weights:
        """The numbers that multiply r and b. Where the first is NaN, b takes no part.

        No number of its own tells it, since each number of a group is a kernel.
        """
        ref = weights.ref
        if self.is_sum:
            # It compares nothing, and hands on what is not finite, as training without a rule does.
            return Weights(jnp.where(reg_weight == 0, jnp.nan, ref), weights.reg)
        ref = ref + 0 * geometry.along  # NaN where that is not finite
        if not self.by_element:  # where r is 0, the quotient is 0 or NaN
            ref = ref / jnp.where(geometry.ref_norm == 0, jnp.inf, geometry.ref_norm)
        return Weights(ref, weights.reg)


def _matched(layout: Layout, reg_grads: PyTree, loss_grads: PyTree) -> list[jax.Array | None]:
    """The leaf of ``reg_grads`` for each leaf of ``loss_grads``; ``None`` if it takes no part."""
    entries = layout.over(reg_grads, loss_grads, what="reg_grads", over="loss_grads")
    matched: list[jax.Array | None] = [None] * len(entries)
    for leaf, (a, b) in enumerate(zip(layout.leaves, entries, strict=True)):
        if b is not None and layout.rows[leaf] is not None:
            _check_leaf(layout.paths[leaf], a, b)
            matched[leaf] = jnp.asarray(b)
    return matched


def _weighted(
    regs: Sequence[list[jax.Array | None]], weights: Sequence[jax.typing.ArrayLike]
) -> list[jax.Array | None]:
    """The weighted sum of several regularizers, leaf by leaf."""
    sums: list[jax.Array | None] = [None] * len(regs[0])
    for leaves, weight in zip(regs, weights, strict=True):
        for leaf, b in enumerate(leaves):
            if b is not None:
                dtype = compute_dtype(b.dtype)
                part = scaled(b, weight, dtype)
                part = jnp.where(jnp.asarray(weight, dtype) != 0, part, 0)
                before = sums[leaf]
                sums[leaf] = part if before is None else total(before, part)
    return sums


def _row_names(layout: Layout, n_regularizers: int) -> tuple[str, ...]:
    if n_regularizers == 1:
        return layout.names
    # Padded, so that the order of the rows is the order of the names.
    width = len(str(n_regularizers - 1))
    return tuple(f"{k:0{width}}/{name}" for k in range(n_regularizers) for name in layout.names)


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
            f"A rule with {n_weights} weights in reg_weight needs reg_grads to be a tuple of as "
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
    if jnp.ndim(reg_weight) != 0 or not 0 <= np.asarray(reg_weight) < np.inf:
        raise ValueError(
            "reg_weight must be a number >= 0 and finite: it multiplies the regularizer's "
            f"gradient; got {reg_weight!r}."
        )


def _check_bound(max_ratio: Any, bound_by: str, by_element: bool) -> None:
    """Validates ``max_ratio`` and ``bound_by``."""
    if bound_by not in ("current", "running_max"):
        raise ValueError(f"bound_by must be 'current' or 'running_max'; got {bound_by!r}.")
    if bound_by == "running_max" and (max_ratio is None or by_element):
        raise ValueError(
            "bound_by='running_max' is for max_ratio, and keeps one number for each group: give "
            "max_ratio, and another scope than 'element'."
        )
    if max_ratio is None or isinstance(max_ratio, Tracer):
        return
    wanted = (
        "a number >= 0, the largest allowed ratio of what the regularizer adds to the length of "
        f"the reference; got {max_ratio!r}."
    )
    if isinstance(max_ratio, bool) or not is_array(max_ratio) or jnp.ndim(max_ratio) != 0:
        raise TypeError(f"max_ratio must be None or {wanted}")
    if not np.asarray(max_ratio) >= 0:
        raise ValueError(f"max_ratio must be {wanted}")


def _check_initialised(names: tuple[str, ...], state: Any) -> None:
    if not isinstance(state, PairState):
        raise TypeError(
            f"A dtnh_jax rule needs the state that its init(params) made; got "
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


def _check_leaf(path: tuple[str, ...], a: Any, b: Any) -> None:
    for role, leaf in (("loss_grads", a), ("reg_grads", b)):
        if not is_array(leaf):
            raise TypeError(
                f"{role} must hold arrays; got {type(leaf).__name__} at {path_name(path)!r}."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"{role} must be floating-point or complex; got "
                f"{jnp.result_type(leaf)} at {path_name(path)!r}. Integers have no gradient: "
                "put None there in reg_grads, or False in mask."
            )
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"loss_grads and reg_grads must have the same shapes; got {jnp.shape(a)} and "
            f"{jnp.shape(b)} at {path_name(path)!r}. Where the regularizer does not reach, put "
            "None in reg_grads."
        )
    if jnp.iscomplexobj(b) and not jnp.iscomplexobj(a):
        raise TypeError(
            f"reg_grads is complex at {path_name(path)!r} and loss_grads real: the direction keeps "
            "the dtype of loss_grads. Take the real part, or make both complex."
        )
