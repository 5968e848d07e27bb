"""The rules that join two gradients, one public function each."""

from typing import Literal

import optax

from dtnh_jax import _weightings
from dtnh_jax._groups import Mask, Scope
from dtnh_jax._transform import RegWeight, pair_transformation


def dtnh(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mode: Literal["conflict", "orthogonal"] = "conflict",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes from the regularizer's gradient what conflicts with the loss's.

    With the loss gradient $a = \nabla L(w)$ and the regularizer gradient
    $b = \nabla\Omega(w)$ of a group of leaves, seen as one vector each, the direction is

    $$d = a + \lambda\,(b - c^- a), \qquad
    c^- = \min\left(0, \frac{\langle a,b\rangle}{\lVert a\rVert^2}\right)$$

    and $c^- = 0$ where $a = 0$. Without conflict, $\langle a,b\rangle \ge 0$, it is exactly the
    weighted sum $a + \lambda b$. It *never hurts* to first order:
    $\langle d,a\rangle = \lVert a\rVert^2 + \lambda\max(0, \langle a,b\rangle) \ge
    \lVert a\rVert^2$, in each group and so in total. The inequality is about the loss gradient
    of this mini-batch and about this direction: momentum, Adam and weight decay after it, and
    the noise of the mini-batch, are outside it.

    The result is an optax transformation that turns a pair of gradients into one direction, to
    stand first in `optax.chain`. Its `update` takes the pair,
    `tx.update((loss_grads, reg_grads), state, params)`, or the two apart,
    `tx.update(loss_grads, state, params, reg_grads=reg_grads)`. A leaf that is `None` in
    `reg_grads` or `False` in `mask` passes through bit for bit and counts in no inner product:
    a new head belongs there, above all with scope `"global"`, where its large loss gradient
    would drown the backbone's.

    Args:
        reg_weight: $\lambda \ge 0$, a number or an optax schedule of the step. It multiplies
            after the projection.
        scope: Which leaves are one vector. `"global"`: all that the regularizer reaches;
            `"layer"`: those under one parent in the tree, such as kernel and bias of a layer;
            `"leaf"`: every array; `"element"`: every number, so that $b$ is dropped where its
            sign is against $a$'s (a complex number is a plane); a function from a leaf's path
            (`"block/conv/kernel"`) to the name of its group; or a tree of names with the
            structure of params (a name may stand for a subtree).
        mode: `"conflict"` removes on conflict only, as above. `"orthogonal"` removes the
            component along $a$ always, $c$ for $c^-$, as the authors' published code does.
        mask: `None`, or a tree of booleans with the structure of params (one may stand for a
            subtree), or a function from params to it: `False` where the regularizer shall not
            act.
        diagnostics: Whether the state keeps what
            [`conflict_stats`][dtnh_jax.conflict_stats] reads: four numbers a group, out of
            inner products that the rule takes anyway (scope `"element"` takes them for this).

    Returns:
        An `optax.GradientTransformationExtraArgs`. The direction has the structure, shapes and
        dtypes of `loss_grads`; inner products are taken in float32, or wider if a leaf is.

    Raises:
        ValueError: If `reg_weight` is negative or NaN, or `scope` or `mode` unknown; at
            `update`, if trees or shapes do not match, or the state is of other params.
        TypeError: At `update`, if one tree comes where a pair is due, `reg_grads` comes twice,
            or a leaf is an integer.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(dtnh_jax.dtnh(reg_weight=0.1), optax.sgd(1.0))
        >>> params = jnp.zeros(3)
        >>> pair = (jnp.array([-4.0, 1.0, 1.0]), jnp.array([6.0, 1.0, 1.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(-updates)
        [-3.8888888  1.2222222  1.2222222]

    References:
        Wan, Xiong, Li, Zhu, Huan, *Towards Making Deep Transfer Learning Never Hurt*, ICDM 2019
        (arXiv:1911.07489); Xiong et al., *GrOD*, ACM TKDD 2022 (doi:10.1145/3530836).
    """
    weightings = {"conflict": _weightings.conflict, "orthogonal": _weightings.orthogonal}
    if mode not in weightings:
        raise ValueError(f"mode must be 'conflict' or 'orthogonal'; got {mode!r}.")
    return pair_transformation(
        weightings[mode], reg_weight, scope=scope, mask=mask, diagnostics=diagnostics
    )


def weighted_sum(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the two gradients: the plain baseline, in the form of the other rules.

    $$d = a + \lambda\, b$$

    The gradient of $L + \lambda\,\Omega$, as regularized transfer is done without a rule. What
    it takes and gives is as in [`dtnh`][dtnh_jax.dtnh], so that a training loop changes method
    by changing a name.

    Args:
        reg_weight: $\lambda \ge 0$, a number or an optax schedule of the step.
        scope: Which leaves are one group in the diagnostics; the direction does not depend
            on it.
        mask: `False` where the regularizer shall not act, as in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: Whether to measure conflict, which costs this rule a pass over both trees
            that it would not need.

    Returns:
        An `optax.GradientTransformationExtraArgs`, whose direction has the structure, shapes
        and dtypes of `loss_grads`.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(dtnh_jax.weighted_sum(reg_weight=0.5), optax.sgd(1.0))
        >>> params = jnp.zeros(3)
        >>> pair = (jnp.array([-4.0, 1.0, 1.0]), jnp.array([6.0, 1.0, 1.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(-updates)
        [-1.   1.5  1.5]

    References:
        Li, Grandvalet, Davoine, *Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks*, ICML 2018 (arXiv:1802.01483), whose training this is.
    """
    return pair_transformation(
        _weightings.weighted_sum,
        reg_weight,
        scope=scope,
        mask=mask,
        diagnostics=diagnostics,
        needs_gramian=False,
    )
