"""What a rule remembers of each group's conflict, and how to read it back."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtnh_jax._geometry import real_product, scaled, total
from dtnh_jax._layout import unique
from dtnh_jax._numerics import ratio
from dtnh_jax.weightings import Geometry, Weights


class Measurement(NamedTuple):
    """The numbers that the diagnostics are made from, arrays of shape ``(groups,)``.

    All are of the last step but ``not_finite``, which counts steps.
    """

    ref_norm: jax.Array
    reg_norm: jax.Array
    cosine: jax.Array
    removed: jax.Array
    reached: jax.Array
    not_finite: jax.Array


class PairState(NamedTuple):
    """State of every rule of this package.

    Attributes:
        count: Steps taken, an ``int32`` scalar; a schedule of ``reg_weight`` reads it.
        measurement: Of the last step; ``None`` without diagnostics.
        groups: The names of the groups, in the order of the arrays, as keys of a mapping to
            ``None``: a part of the tree's structure, not an array, so it passes through jit,
            scan and checkpoints.
        reference: The state of the reference: empty, or of what makes it.
        largest: With ``bound_by="running_max"``, the largest norm so far, of shape ``(groups,)``.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> state = dtnh_jax.dtnh(0.1, scope="leaf").init({"kernel": jnp.zeros((2, 2))})
        >>> isinstance(state, dtnh_jax.PairState), state.groups
        (True, {'kernel': None})
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    measurement: Measurement | None
    groups: dict[str, None]
    reference: Any = optax.EmptyState()
    largest: jax.Array | None = None


class TransformPairState(NamedTuple):
    """State of ``transform_pair``.

    Attributes:
        loss: The state of the transformation of the loss gradient.
        reg: The state of that of the regularizer gradient; a tuple with one for each of several.
    """

    loss: Any
    reg: Any


class Conflict(NamedTuple):
    """How loss gradient ``a`` and regularizer gradient ``b`` stand to each other.

    Attributes:
        cosine: ``⟨a,b⟩ / (‖a‖ ‖b‖)``, 0 where ``a`` or ``b`` is zero. float.
        conflict: ``⟨a,b⟩ < 0``. bool.
        removed: The share of ``‖b‖`` that the rule took away, ``‖b - (d - a)/λ‖ / ‖b‖`` for its
            direction ``d``; 0 where ``λ`` or ``b`` is zero. float.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.dtnh(0.1)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0]))
        >>> _, state = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print(dtnh_jax.conflict_stats(state).total.removed)
        1.0
    """

    cosine: jax.Array
    conflict: jax.Array
    removed: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConflictStats:
    """What :func:`conflict_stats` returns: a pytree, so it may leave a jitted function.

    Attributes:
        per_group: Arrays of shape ``(groups,)``.
        total: Scalars: all groups as one vector.
        reached: Whether the regularizer was compared in the group in the last step, bools of shape
            ``(groups,)``: false where ``reg_grads`` is ``None``, or a gradient is not finite.
        not_finite: In how many steps so far a gradient of the group was not finite, or too large
            for its square, ``int32`` of shape ``(groups,)``. In these steps every rule but
            ``weighted_sum`` leaves the regularizer out of the group.
        groups: The names of the groups, in the order of ``per_group``.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> stats = dtnh_jax.conflict_stats(dtnh_jax.dtnh(0.1).init(jnp.zeros(2)))
        >>> dict(zip(stats.groups, stats.per_group.cosine.tolist()))
        {'global': 0.0}
    """

    per_group: Conflict
    total: Conflict
    reached: jax.Array
    not_finite: jax.Array
    groups: tuple[str, ...] = field(metadata={"static": True})


def conflict_stats(opt_state: Any) -> ConflictStats:
    r"""Measures the conflict between loss and regularizer gradients in the last step.

    For each group, and in total over all groups as one vector:

    $$\cos = \frac{\langle a, b\rangle}{\lVert a\rVert\,\lVert b\rVert}, \qquad
    \text{conflict} = [\langle a, b\rangle < 0], \qquad
    \text{removed} = \frac{\lVert b - (d - a)/\lambda\rVert}{\lVert b\rVert}.$$

    It only reads the state: the rule computes these numbers from inner products that it needs
    anyway. In scope ``"element"`` the groups are the leaves. With another reference than the batch,
    ``a`` is that reference. A group that the regularizer does not reach reads zero, and is not
    ``reached``; with a ``mask`` it is not listed.

    It sees the whole state, as no link does, and so it warns of momentum that is applied twice:
    both gradients have one before the rule, as in [`dtnh_sgd`][dtnh_jax.dtnh_sgd], and the
    direction has another after it.

    Args:
        opt_state: The state of a rule of this package, or any nesting of optax states that
            holds one or more. Several are reported side by side; where their groups share a
            name, ``#2`` and so on is added.

    Returns:
        The [`ConflictStats`][dtnh_jax.ConflictStats] of the last step; zeros before the first.

    Raises:
        ValueError: If ``opt_state`` holds no state of a rule, or one with
            ``diagnostics=False``.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(dtnh_jax.dtnh(0.1, scope="leaf"), optax.adam(1e-3))
        >>> params = {"bias": jnp.zeros(1), "kernel": jnp.zeros(3)}
        >>> loss_grads = {"bias": jnp.ones(1), "kernel": jnp.array([-4.0, 1.0, 1.0])}
        >>> reg_grads = {"bias": jnp.ones(1), "kernel": jnp.array([6.0, 1.0, 1.0])}
        >>> _, state = tx.update((loss_grads, reg_grads), tx.init(params), params)
        >>> stats = dtnh_jax.conflict_stats(state)
        >>> stats.groups
        ('bias', 'kernel')
        >>> stats.per_group.conflict.tolist()
        [False, True]
        >>> print(f"{stats.total.cosine:.3f} {stats.total.removed:.3f}")
        -0.771 0.830

    References:
        Wan et al., *Towards Making Deep Transfer Learning Never Hurt*, ICDM 2019
        (arXiv:1911.07489): conflict is "conflicted descent directions".
    """
    states = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, PairState))
        if isinstance(node, PairState)
    ]
    if not states:
        raise ValueError(
            "conflict_stats needs an optimizer state that holds the state of a dtnh_jax rule, "
            f"such as optax.chain(dtnh_jax.dtnh(0.01), optax.sgd(0.1)).init(params); "
            f"got {type(opt_state).__name__} without one."
        )
    if _has_momentum_twice(opt_state):
        warnings.warn(
            "This optimizer has momentum twice: of both gradients before the rule, as in "
            "dtnh_jax.dtnh_sgd and dtnh_adamw, and of the direction after it. After the rule put "
            "optax.scale_by_learning_rate(...) in place of optax.sgd(..., momentum) or optax.adam; "
            "after dtnh_sgd and dtnh_adamw, which have their learning rate, nothing.",
            UserWarning,
            stacklevel=2,
        )
    measurements = [state.measurement for state in states if state.measurement is not None]
    if len(measurements) < len(states):
        raise ValueError(
            "conflict_stats needs a rule that measures; this state belongs to one that was made "
            "with diagnostics=False. Make it with diagnostics=True."
        )
    joined = Measurement(
        *(
            jnp.concatenate([getattr(one, name) for one in measurements], axis=-1)
            for name in Measurement._fields
        )
    )
    return ConflictStats(
        per_group=Conflict(joined.cosine, joined.cosine < 0, joined.removed),
        total=_total(joined),
        reached=joined.reached,
        not_finite=joined.not_finite,
        groups=unique([name for state in states for name in state.groups]),
    )


def _has_momentum_twice(state: Any) -> bool:
    """Whether a chain's state has a momentum after a rule that compares momenta."""
    if not isinstance(state, tuple):
        return isinstance(state, dict) and any(map(_has_momentum_twice, state.values()))
    if type(state) is tuple:  # the state of a chain, in the order of its links
        firsts = [k for k, link in enumerate(state) if _holds(link, _is_pair_of_momenta)]
        after = state[firsts[0] + 1 :] if firsts else ()
        if any(_holds(link, _is_momentum) for link in after):
            return True
    return any(map(_has_momentum_twice, state))


def _holds(state: Any, is_it: Callable[[Any], bool]) -> bool:
    return any(map(is_it, jax.tree.leaves(state, is_leaf=is_it)))


def _is_pair_of_momenta(state: Any) -> bool:
    return isinstance(state, TransformPairState) and all(_holds(x, _is_momentum) for x in state)


def _is_momentum(state: Any) -> bool:
    # So are the fields of Optax's momenta named: trace, the average of ema, and Adam's and others'.
    return bool({"trace", "ema", "mu"} & set(getattr(state, "_fields", ())))


def no_measurement(n_rows: int, dtype: Any) -> Measurement:
    """The measurement before the first step."""
    numbers = jnp.zeros(n_rows, dtype)
    counts = jnp.zeros(n_rows, jnp.int32)
    return Measurement(numbers, numbers, numbers, numbers, jnp.zeros(n_rows, bool), counts)


def measure(
    geometry: Geometry, removed: jax.Array, reached: np.ndarray, before: Measurement
) -> Measurement:
    """The measurement of each group, from numbers that the rule has computed anyway.

    Args:
        geometry: Of all groups, as arrays.
        removed: As in :class:`Conflict`.
        reached: Whether the regularizer has a gradient in the group.
        before: The measurement of the step before, whose dtypes it keeps: a scan carries it.
    """
    finite = jnp.isfinite(geometry.along)
    cos = jnp.clip(ratio(geometry.along, geometry.reg_norm), -1, 1)
    found = (geometry.ref_norm, geometry.reg_norm, cos, removed)
    numbers = [
        jnp.where(finite, x, 0).astype(old.dtype) for x, old in zip(found, before[:4], strict=True)
    ]
    not_finite = before.not_finite + (~finite).astype(jnp.int32)
    return Measurement(*numbers, reached=finite & reached, not_finite=not_finite)


def removed_share(geometry: Geometry, weights: Weights, reg_weight: jax.Array) -> jax.Array:
    """``‖b - (d - a)/λ‖ / ‖b‖`` of each group, for a direction ``d`` with these weights."""
    cos = ratio(geometry.along, geometry.reg_norm)
    # The rule's parts along r and b in units of λ‖b‖. A rule that scales the loss gradient may
    # leave a tiny b with shares beyond any meaning, whose squares must not overflow.
    limit = _largest_share(cos)
    x = jnp.clip(ratio(weights.ref, reg_weight * geometry.reg_norm), -limit, limit)
    y = jnp.clip(ratio(weights.reg - reg_weight, reg_weight), -limit, limit)
    removed_sq = jnp.maximum(x**2 + 2 * x * y * cos + y**2, 0)
    return jnp.where(geometry.reg_norm > 0, jnp.sqrt(removed_sq), 0)


def _largest_share(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).max) ** 0.25


def removed_by_element(
    geometry: Geometry, parts: Iterable[tuple[jax.Array, jax.Array, int]], reg_weight: jax.Array
) -> jax.Array:
    """:func:`removed_share` of each leaf from its ``b`` and ``d - a``, each element a group."""
    dtype = reg_weight.dtype
    shares = [jnp.zeros([], dtype)] * len(reg_weight)
    for b, change, row in parts:
        inverse = ratio(jnp.ones([], dtype), reg_weight[row])
        removed = total(scaled(b, 1, dtype), scaled(change, -inverse, dtype))
        squares = jnp.sum(real_product(removed, removed, dtype))
        shares[row] = ratio(jnp.sqrt(squares), geometry.reg_norm[row])
    share = jnp.asarray(shares, dtype)
    return jnp.where(reg_weight > 0, jnp.minimum(share, _largest_share(share)), 0)


def _total(each: Measurement) -> Conflict:
    # Norms relative to the largest: their squares neither over- nor underflow.
    ref_norm, reg_norm = _relative(each.ref_norm), _relative(each.reg_norm)
    ref_sq, reg_sq = jnp.sum(ref_norm**2, axis=-1), jnp.sum(reg_norm**2, axis=-1)
    inner = jnp.sum(each.cosine * ref_norm * reg_norm, axis=-1)
    removed_sq = jnp.sum((each.removed * reg_norm) ** 2, axis=-1)
    return Conflict(
        cosine=jnp.clip(ratio(inner, jnp.sqrt(ref_sq) * jnp.sqrt(reg_sq)), -1, 1),
        conflict=inner < 0,
        removed=jnp.sqrt(ratio(removed_sq, reg_sq)),
    )


def _relative(norms: jax.Array) -> jax.Array:
    return ratio(norms, jnp.max(norms, axis=-1, keepdims=True, initial=0))
