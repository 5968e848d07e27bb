"""Many micro-batches, one step: both gradients averaged, one projection."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from dtnh_jax._numerics import compute_dtype, ratio, widened
from dtnh_jax._pair import GradientPair, takes_pairs
from dtnh_jax._tree import PyTree, is_absent, is_array, lay_over


class AccumulationState(NamedTuple):
    """State of :func:`accumulate_pairs`.

    Attributes:
        mini_step: Micro-batches since the last step, an ``int32`` scalar.
        sums: The weighted sums of both gradients over them, two trees like params.
        weights: The sums of their weights, a scalar for each gradient.
        optimizer: The state of what is accumulated for.
    """

    mini_step: jax.Array
    sums: GradientPair
    weights: GradientPair
    optimizer: Any


def accumulate_pairs(
    optimizer: optax.GradientTransformation,
    every_k: int,
    *,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages pairs over `every_k` micro-batches, then takes one step with the mean.

    $$\bar a = \frac{\sum_i n_i\,a_i}{\sum_i n_i}, \qquad
    \bar b = \frac{\sum_i n_i\,b_i}{\sum_i n_i}, \qquad
    u = \text{optimizer}(\bar a, \bar b)$$

    The pair-aware twin of `optax.MultiSteps`: `k` micro-batches of equal size equal one big batch.
    Where they are of unequal size, such as numbers of tokens, give `update` the size $n_i$ of each
    as the extra argument `micro_batch_weight`, which is 1 by default; or a tuple of two, where loss
    and regularizer are means over different numbers. A micro-batch of size 0 takes no
    part, whatever its gradients are. If all sizes are 0, the mean is 0.

    To project each micro-batch and average the directions is another method; `optax.MultiSteps`
    around a rule would average the loss gradients alone. A leaf that is `None` in some of the
    micro-batches counts there as zero. If it is `None` in the last one, its sum waits for the next
    step in whose last micro-batch it is there.

    Args:
        optimizer: A whole chain with a rule in it, or [`decoupled`][dtnh_jax.decoupled].
        every_k: $k \ge 1$, micro-batches a step.
        accumulator_dtype: The dtype of the sums; by default float32, or wider where params are.

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles. Its
        updates are zero but at every `k`-th call, when the optimizer runs and counts one step.
        Its state holds two trees of the size of params beside the optimizer's.

    Raises:
        ValueError: If `every_k` is less than 1.
        TypeError: If `every_k` is not an integer; at `update`, if one tree comes where a pair is
            expected, or `micro_batch_weight` is no scalar or two.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = dtnh_jax.accumulate_pairs(
        ...     optax.chain(dtnh_jax.weighted_sum(1.0), optax.sgd(1.0)), every_k=2
        ... )
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> first, state = tx.update((jnp.array([1.0]), jnp.array([10.0])), state, params)
        >>> second, state = tx.update((jnp.array([3.0]), jnp.array([30.0])), state, params)
        >>> print(first, second)
        [0.] [-22.]

        Micro-batches of 3 and of 1 tokens:

        >>> pair = (jnp.array([1.0]), jnp.array([10.0]))
        >>> first, state = tx.update(pair, state, params, micro_batch_weight=3)
        >>> pair = (jnp.array([5.0]), jnp.array([30.0]))
        >>> second, state = tx.update(pair, state, params, micro_batch_weight=1)
        >>> print(second)
        [-17.]

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489), for the step; the accumulation is that of
        `optax.MultiSteps`, for two gradients.
    """
    if isinstance(every_k, bool) or not isinstance(every_k, int):
        raise TypeError(f"every_k must be an integer, micro-batches a step; got {every_k!r}.")
    if every_k < 1:
        raise ValueError(f"every_k must be at least 1, micro-batches a step; got {every_k}.")
    inner = optax.with_extra_args_support(optimizer)

    def zeros(tree: PyTree) -> PyTree:
        def zero(x: Any) -> jax.Array:
            if accumulator_dtype is not None or not jnp.issubdtype(x.dtype, jnp.inexact):
                return jnp.zeros_like(x, dtype=accumulator_dtype)
            return jnp.zeros_like(widened(x, compute_dtype(x.dtype)))

        return jax.tree.map(zero, jax.tree.map(jnp.asarray, tree))

    def init(params: PyTree) -> Any:
        return AccumulationState(
            mini_step=jnp.zeros([], jnp.int32),
            sums=GradientPair(zeros(params), zeros(params)),
            weights=GradientPair(jnp.zeros([]), jnp.zeros([])),
            optimizer=inner.init(params),
        )

    def update(
        pair: GradientPair,
        state: Any,
        params: PyTree | None,
        *,
        micro_batch_weight: Any = 1.0,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        each = _weights(micro_batch_weight)
        sums = GradientPair(
            _added(state.sums.loss_grads, pair.loss_grads, each.loss_grads, "loss_grads"),
            _added(state.sums.reg_grads, pair.reg_grads, each.reg_grads, "reg_grads"),
        )
        weights = jax.tree.map(lambda old, new: old + new.astype(old.dtype), state.weights, each)

        def step(sums: GradientPair, optimizer_state: Any) -> tuple[PyTree, GradientPair, Any]:
            means = GradientPair(
                _means(sums.loss_grads, pair.loss_grads, weights.loss_grads),
                _means(sums.reg_grads, pair.reg_grads, weights.reg_grads),
            )
            steps, optimizer_state = inner.update(means, optimizer_state, params, **extra_args)
            # What the last micro-batch has no gradient for waits for a step that has.
            left = GradientPair(*[_left(*both) for both in zip(sums, pair, strict=True)])
            return steps, left, optimizer_state

        def wait(sums: GradientPair, optimizer_state: Any) -> tuple[PyTree, GradientPair, Any]:
            like = jax.eval_shape(step, sums, optimizer_state)[0]
            # With its sharding, which is a part of the type where the mesh is explicit.
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like)
            return zero, sums, optimizer_state

        is_last = state.mini_step == every_k - 1
        steps, sums, optimizer_state = jax.lax.cond(is_last, step, wait, sums, state.optimizer)
        return steps, AccumulationState(
            mini_step=(state.mini_step + 1) % every_k,
            sums=sums,
            weights=jax.tree.map(lambda total: jnp.where(is_last, 0, total), weights),
            optimizer=optimizer_state,
        )

    return takes_pairs(init, update)


def _weights(micro_batch_weight: Any) -> GradientPair:
    """The weight of a micro-batch for each of the two gradients."""
    two = micro_batch_weight
    if not isinstance(two, tuple | list):
        two = (two, two)
    if len(two) != 2 or not all(is_array(weight) and jnp.ndim(weight) == 0 for weight in two):
        raise TypeError(
            "micro_batch_weight must be a number, such as the number of tokens in the micro-batch, "
            f"or one for the loss and one for the regularizer; got {micro_batch_weight!r}."
        )
    return GradientPair(*map(jnp.asarray, two))


def _added(sums: PyTree, grads: PyTree, weight: jax.Array, what: str) -> PyTree:
    """``sums + weight · grads`` in the dtypes of ``sums``, as they are where nothing comes."""
    leaves, treedef = jax.tree.flatten(sums, is_leaf=is_absent)
    entries = lay_over(grads, sums, what=what, over="params", one_for_many=False)
    return treedef.unflatten(
        [
            total if is_absent(grad) else total + _weighted(weight, grad, total.dtype)
            for total, grad in zip(leaves, entries, strict=True)
        ]
    )


def _weighted(weight: jax.Array, grad: Any, dtype: Any) -> jax.Array:
    # The mean over nothing is often no number.
    grad = jnp.where(weight == 0, 0, jnp.asarray(grad).astype(dtype))
    return weight.astype(dtype) * grad


def _left(sums: PyTree, grads: PyTree) -> PyTree:
    """``sums`` where ``grads`` are absent, and zeros elsewhere."""
    leaves, treedef = jax.tree.flatten(sums, is_leaf=is_absent)
    entries = lay_over(grads, sums, what="grads", over="params", one_for_many=False)
    return treedef.unflatten(
        [
            total if is_absent(total) or is_absent(grad) else jnp.zeros_like(total)
            for total, grad in zip(leaves, entries, strict=True)
        ]
    )


def _means(sums: PyTree, grads: PyTree, weight: jax.Array) -> PyTree:
    """``sums / weight`` in the dtypes of ``grads``, absent where those are."""
    entries = lay_over(grads, sums, what="grads", over="params", one_for_many=False)
    leaves, treedef = jax.tree.flatten(sums, is_leaf=is_absent)
    return treedef.unflatten(
        [
            None
            if is_absent(grad)
            else ratio(total, weight.astype(total.dtype)).astype(jnp.result_type(grad))
            for total, grad in zip(leaves, entries, strict=True)
        ]
    )
