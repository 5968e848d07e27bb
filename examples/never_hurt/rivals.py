"""Rules of the literature that are more than a combination of two gradients before SGD.

SPD and FTP project the weights onto the source. They take the deviation from it to be the gradient
of the regularizer, which it is for L2-SP only.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import dtnh_jax

Optimizer = optax.GradientTransformationExtraArgs
Tree = Any
TINY = 1e-8


def selective_projection(optimizer: Optimizer, reg_weight: ArrayLike) -> Optimizer:
    r"""SPD: projects towards the source where the loss gradient agrees, array by array.

    With the deviation $b = w - w_0$ before the step of the optimizer, and $b'$ after it,

    $$w' \leftarrow w' - \lambda\,\frac{\max(0, \lVert b'\rVert - \lVert b\rVert)}
    {\lVert b'\rVert}\,b' \quad\text{where } \langle a, b\rangle > 0.$$

    λ = 1 returns to the distance before the step. The product of λ and the fraction is at most 1
    here, so that a large λ does not move beyond the source; the authors' code has no such limit.

    Args:
        optimizer: From pairs of gradients to updates. It leaves the regularizer out.
        reg_weight: λ.

    Returns:
        The optimizer with the projection.

    References:
        Tian et al., *Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models*, NeurIPS
        2024 (arXiv:2411.01713), and the authors' code.
    """

    def project(update: jax.Array, loss_grad: jax.Array, deviation: jax.Array) -> jax.Array:
        moved = deviation + update
        before, after = jnp.linalg.norm(deviation), jnp.linalg.norm(moved)
        share = jnp.maximum(after - before, 0) / jnp.maximum(after, TINY)
        agrees = jnp.vdot(loss_grad, deviation) > 0
        return update - jnp.where(agrees, jnp.minimum(reg_weight * share, 1), 0) * moved

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Tree, Any]:
        loss_grads, deviations = updates
        updates, state = optimizer.update(updates, state, params, **extra)
        return _where_reached(project, updates, loss_grads, deviations), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


class TrainableProjectionState(NamedTuple):
    """State of FTP.

    Attributes:
        radii: The radius of each array.
        directions: The last deviations before their projection, each row of length 1.
        adam: The state of Adam, which moves the radii.
        inner: The state of the optimizer.
    """

    radii: Tree
    directions: Tree
    adam: Any
    inner: Any


def trainable_projection(optimizer: Optimizer, rate: float = 0.01) -> Optimizer:
    r"""FTP: projects onto a ball around the source, with a radius that the next batch moves.

    Each array has one radius γ for all its rows, the weights of one output channel, whose
    deviations from the source are bounded by γ in the sum of their absolute values. In the next
    step the gradient $a$ of another batch tells whether a larger radius would have been better:
    Adam descends on γ with the gradient $\sum_{\text{rows}}\langle a, b\rangle / \lVert b\rVert_1$,
    where $b$ is the deviation before its projection. There is no λ.

    Args:
        optimizer: From pairs of gradients to updates. It leaves the regularizer out.
        rate: The learning rate of γ.

    Returns:
        The optimizer with the projection.

    References:
        Tian et al., *Fast Trainable Projection for Robust Fine-Tuning*, NeurIPS 2023
        (arXiv:2310.19182), and the authors' code, with its defaults.
    """
    adam = optax.adam(rate)

    def lengths(rows: jax.Array) -> jax.Array:
        axes = tuple(range(rows.ndim - 1)) if rows.ndim > 1 else None
        return jnp.sum(jnp.abs(rows), axes, keepdims=True) + TINY

    def project(update: jax.Array, radius: jax.Array, deviation: jax.Array) -> jax.Array:
        moved = deviation + update
        return jnp.minimum(radius / lengths(moved), 1) * moved - deviation

    def init(params: Tree) -> TrainableProjectionState:
        radii = jax.tree.map(lambda _: jnp.float32(TINY), params)
        directions = jax.tree.map(jnp.zeros_like, params)
        return TrainableProjectionState(radii, directions, adam.init(radii), optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Tree, Any]:
        loss_grads, deviations = updates
        updates, inner = optimizer.update(updates, state.inner, params, **extra)
        moved = jax.tree.map(
            lambda u, b: jnp.zeros_like(u) if b is None else b + u, updates, deviations
        )
        slopes = jax.tree.map(jnp.vdot, loss_grads, state.directions)
        steps, adam_state = adam.update(slopes, state.adam)
        radii = jax.tree.map(
            lambda radius, step, rows: jnp.clip(radius + step, TINY, jnp.max(lengths(rows))),
            *(state.radii, steps, moved),
        )
        directions = jax.tree.map(lambda rows: rows / lengths(rows), moved)
        updates = _where_reached(project, updates, radii, deviations)
        return updates, TrainableProjectionState(radii, directions, adam_state, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _where_reached(
    change: Callable[..., jax.Array], updates: Tree, others: Tree, deviations: Tree
) -> Tree:
    """Changes the updates of the arrays that the regularizer reaches."""
    return jax.tree.map(
        lambda update, other, deviation: (
            update if deviation is None else change(update, other, deviation)
        ),
        *(updates, others, deviations),
    )


class AutoLambdaState(NamedTuple):
    """State of Auto-λ: λ as a multiple of that at the beginning, its Adam's, the optimizer's."""

    multiple: jax.Array
    adam: Any
    inner: Any


def auto_lambda(
    optimizer: Callable[[ArrayLike], Optimizer], reg_weight: ArrayLike, rate: float = 0.05
) -> Optimizer:
    r"""Auto-λ of first order: λ follows the loss of held-out images.

    A step along $-(a + \lambda b)$ changes the held-out loss by $-\gamma\langle v, b\rangle$ for
    each unit of λ, with its gradient $v$. Adam descends on that, and λ is clipped at 0. λ is one
    number for all arrays, learned as a multiple of the λ that it starts from.

    Differences from the publication: $v$ is the gradient before the step and not after it; λ starts
    from the λ of the cell and not from 0.1; the learning rate is larger, because a cell has a few
    hundred steps.

    Args:
        optimizer: From λ to an optimizer, whose state does not depend on λ.
        reg_weight: λ at the beginning.
        rate: The learning rate of the multiple, about the most that it changes in a step.

    Returns:
        An optimizer that takes ``held_out_grads``, as the held-out rules of the library do. In
        steps without a new gradient λ stays.

    References:
        Liu et al., *Auto-Lambda: Disentangling Dynamic Task Relationships*, TMLR 2022
        (arXiv:2202.03091).
    """
    adam = optax.adam(rate)

    def init(params: Tree) -> AutoLambdaState:
        multiple = jnp.ones([])
        return AutoLambdaState(multiple, adam.init(multiple), optimizer(reg_weight).init(params))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        held_out_grads: dtnh_jax.HeldOutGrads | None = None,
        **extra: Any,
    ) -> tuple[Tree, Any]:
        if held_out_grads is None:
            raise TypeError("Auto-λ needs held_out_grads: set held_out of the cell above 0.")
        products = jax.tree.map(
            lambda v, b: jnp.zeros([]) if b is None else jnp.vdot(v, b),
            *(held_out_grads.grads, updates[1]),
        )
        slope = -functools.reduce(jnp.add, jax.tree.leaves(products))
        step, adam_state = adam.update(slope, state.adam)
        moved = jnp.maximum(state.multiple + step, 0), adam_state
        multiple, adam_state = jax.tree.map(
            lambda new, old: jnp.where(held_out_grads.is_new, new, old),
            *(moved, (state.multiple, state.adam)),
        )
        inner_now = optimizer(reg_weight * multiple)
        updates, inner = inner_now.update(updates, state.inner, params, **extra)
        return updates, AutoLambdaState(multiple, adam_state, inner)

    return optax.GradientTransformationExtraArgs(init, update)
