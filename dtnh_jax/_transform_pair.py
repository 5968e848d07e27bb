"""A link from pairs to pairs: any Optax transformation of one gradient, applied to both."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtnh_jax._combine import as_trees
from dtnh_jax._layout import Layout, Mask, lay_out
from dtnh_jax._numerics import widened
from dtnh_jax._pair import GradientPair, takes_pairs
from dtnh_jax._stats import TransformPairState
from dtnh_jax._tree import PyTree


def transform_pair(
    loss: optax.GradientTransformation | None = None,
    reg: optax.GradientTransformation | None = None,
    *,
    mask: Mask = None,
    n_regularizers: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies one Optax transformation to each gradient of a pair, and returns a pair.

    $$(a, b) \;\mapsto\; \bigl(\text{loss}(a),\ \text{reg}(b)\bigr)$$

    Both gradients are transformed in float32, or wider where `loss_grads` are, and so are the
    states and what is returned: a momentum in half precision would lose small gradients, and in
    float16 overflow. A number of the state of `reg` that is not finite starts anew in the next
    step; in its own step the rule leaves the regularizer out.

    It stands before a rule in a chain. With `optax.trace(0.9)` for both, the rule compares momenta
    in place of the gradients of one batch, which is what [`dtnh_sgd`][dtnh_jax.dtnh_sgd] does. With
    `optax.clip_by_global_norm(1.0)` for both, each gradient is clipped by its own norm.

    Args:
        loss: Transforms the loss gradient; `None` leaves it as it is.
        reg: Transforms the regularizer gradient; `None` leaves it as it is. Where that gradient is
            `None`, the transformation sees zeros, and the result is `None` again.
        mask: As in [`dtnh`][dtnh_jax.dtnh]: `reg` sees, and keeps state for, the leaves with `True`
            only; elsewhere the regularizer gradient becomes `None`.
        n_regularizers: `None` for one regularizer. A number if `reg_grads` is a sequence of that
            many trees: each is transformed on its own.

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles and returns
        a [`GradientPair`][dtnh_jax.GradientPair] with the structure, shapes and dtypes that the
        transformations give, of float32 or wider input.

    Raises:
        ValueError: At `update`, if `reg_grads` or `mask` does not have the structure of
            `loss_grads`.
        TypeError: If `loss` or `reg` is not an Optax transformation; at `update`, if one tree comes
            where a pair is expected.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(
        ...     dtnh_jax.transform_pair(loss=optax.trace(0.9), reg=optax.trace(0.9)),
        ...     dtnh_jax.dtnh(0.5),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> params = jnp.zeros(2)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(updates)
        [-0.1 -0.1]

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489), for the pair; the transformations are Optax's.
    """
    for name, transformation in (("loss", loss), ("reg", reg)):
        if not isinstance(transformation, optax.GradientTransformation | None):
            raise TypeError(
                f"{name} must be an optax transformation, such as optax.trace(0.9) or "
                f"optax.scale_by_adam(), or None; got {transformation!r}."
            )
    of_loss, of_reg = (optax.with_extra_args_support(tx or optax.identity()) for tx in (loss, reg))
    n_trees = 1 if n_regularizers is None else n_regularizers

    def init(params: PyTree) -> Any:
        params = jax.tree.map(_wide, params)
        layout = lay_out(params, "global", mask)
        reached = layout.only_reached(layout.leaves)
        states = tuple(of_reg.init(reached) for _ in range(n_trees))
        return TransformPairState(
            of_loss.init(params), states[0] if n_regularizers is None else states
        )

    def update(
        pair: GradientPair, state: Any, params: PyTree | None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        reg_grads = pair.reg_grads
        loss_grads = jax.tree.map(_wide, pair.loss_grads)
        layout = lay_out(loss_grads, "global", mask)
        reached = None
        if params is not None:
            params = jax.tree.map(_wide, params)
            leaves = layout.over(params, loss_grads, what="params", over="loss_grads")
            reached = layout.only_reached(leaves)
        loss_grads, loss_state = of_loss.update(loss_grads, state.loss, params, **extra_args)

        def transformed(tree: PyTree, reg_state: Any) -> tuple[PyTree, Any]:
            entries = layout.over(tree, pair.loss_grads, what="reg_grads", over="loss_grads")
            filled = _filled(layout, entries)
            reg_state = _restarted(reg_state, of_reg.init(filled if reached is None else reached))
            tree, reg_state = of_reg.update(filled, reg_state, reached, **extra_args)
            made = iter(jax.tree.leaves(tree))
            leaves = [None if row is None else next(made) for row in layout.rows]
            kept = [None if b is None else x for b, x in zip(entries, leaves, strict=True)]
            return layout.treedef.unflatten(kept), reg_state

        if n_regularizers is None:
            reg_grads, reg_state = transformed(reg_grads, state.reg)
        else:
            trees = as_trees(reg_grads, n_regularizers)
            made = [transformed(*each) for each in zip(trees, state.reg, strict=True)]
            reg_grads, reg_state = zip(*made, strict=True)
        return GradientPair(loss_grads, reg_grads), TransformPairState(loss_state, reg_state)

    return takes_pairs(init, update)


def _filled(layout: Layout, entries: list[Any]) -> PyTree:
    """A tree with a leaf for each leaf in a group: zeros where the regularizer has none."""
    # The state has a place for each of them, in the dtypes of the loss gradients.
    return layout.only_reached(
        [
            jnp.zeros_like(a) if b is None else _in_width_of(a, jnp.asarray(b))
            for a, b in zip(layout.leaves, entries, strict=True)
        ]
    )


def _wide(x: Any) -> Any:
    """``x`` in float32 where it is narrower."""
    dtype = getattr(x, "dtype", None)
    is_narrow = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.asarray(x).astype(jnp.float32) if is_narrow else x


def _in_width_of(a: Any, b: Any) -> Any:
    """``b`` in the width of ``a``, both wide."""
    if not jnp.issubdtype(jnp.result_type(b), jnp.inexact) or jnp.result_type(a) == b.dtype:
        return b
    return widened(jnp.asarray(b), np.dtype(jnp.finfo(jnp.result_type(a)).dtype))


def _restarted(state: Any, start: Any) -> Any:
    """``state`` with the numbers of ``start`` where it is not finite."""

    def number(now: Any, then: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(now), jnp.inexact):
            return now
        return jnp.where(jnp.isfinite(now), now, jnp.asarray(then).astype(jnp.result_type(now)))

    return jax.tree.map(number, state, start)
