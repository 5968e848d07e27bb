"""The rule of the project and its baseline."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dtnh_jax import _weightings
from dtnh_jax._gramian import Gramian
from dtnh_jax._groups import Mask, Scope
from dtnh_jax._reference import Reference
from dtnh_jax._transform import Choices, RegWeight, Rule, pair_transformation
from dtnh_jax._tree import is_array
from dtnh_jax._weightings import Weights

Mode = Literal["conflict", "orthogonal"]
Action = Literal["project", "gate", "cosine", "keep"]


def dtnh_rule(mode: Mode, action: Action, max_ratio: float | None = None) -> Rule:
    """The rule of :func:`dtnh` with these choices."""
    if mode not in ("conflict", "orthogonal"):
        raise ValueError(f"mode must be 'conflict' or 'orthogonal'; got {mode!r}.")
    actions = {
        "project": _weightings.project if mode == "conflict" else _weightings.orthogonal,
        "gate": _weightings.gate,
        "cosine": _weightings.cosine,
        "keep": _weightings.weighted_sum,
    }
    if action not in actions:
        raise ValueError(f"action must be 'project', 'gate', 'cosine' or 'keep'; got {action!r}.")
    if mode == "orthogonal" and action != "project":
        raise ValueError(
            f"mode='orthogonal' is a way to project; got it with action={action!r}, which acts on "
            "conflict alone. Leave out one of the two."
        )
    if max_ratio is None:
        return Rule(actions[action])
    check_max_ratio(max_ratio)

    def weighting(gram: Gramian, reg_weight: jax.Array) -> Weights:
        return _weightings.bounded(actions[action](gram, reg_weight), gram, max_ratio)

    return Rule(weighting)


def check_max_ratio(max_ratio: Any) -> None:
    """Refuses what is no bound."""
    if isinstance(max_ratio, Tracer):
        return
    if isinstance(max_ratio, bool) or not is_array(max_ratio) or jnp.ndim(max_ratio) != 0:
        raise TypeError(
            "max_ratio must be None or a number >= 0, the most that the regularizer's part may be "
            f"as long as the reference; got {max_ratio!r}."
        )
    if not np.asarray(max_ratio) >= 0:
        raise ValueError(
            "max_ratio must be a number >= 0, the most that the regularizer's part may be as long "
            f"as the reference; got {max_ratio!r}."
        )


def dtnh(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mode: Mode = "conflict",
    action: Action = "project",
    reference: Reference = "batch",
    max_ratio: float | None = None,
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
    the noise of the mini-batch, are outside it. `max_ratio`, `action`, `reference` and a finer
    `scope` are the ways to a stronger rule, and [`bounded_dtnh`][dtnh_jax.bounded_dtnh] the one to
    take; [`decoupled`][dtnh_jax.decoupled] takes the regularizer out of the optimizer's momentum.

    The result is an optax transformation that turns a pair of gradients into one direction, to
    stand first in `optax.chain`. Its `update` takes the pair,
    `tx.update((loss_grads, reg_grads), state, params)`, or the two apart,
    `tx.update(loss_grads, state, params, reg_grads=reg_grads)`. A leaf that is `None` in
    `reg_grads` or `False` in `mask` passes through bit for bit and counts in no inner product:
    a new head belongs there, above all with scope `"global"`, where its large loss gradient
    would drown the backbone's.

    Args:
        reg_weight: $\lambda \ge 0$, a number or an optax schedule of the step. It multiplies
            after the projection. A sequence of them for several regularizers: `reg_grads` is then
            a sequence of as many trees, each held against the reference by itself.
        scope: Which leaves are one vector. `"global"`: all that the regularizer reaches;
            `"layer"`: those under one parent in the tree, such as kernel and bias of a layer;
            `"leaf"`: every array; `"element"`: every number, so that $b$ is dropped where its
            sign is against $a$'s (a complex number is a plane); a function from a leaf's path
            (`"block/conv/kernel"`) to the name of its group; or a tree of names with the
            structure of params (a name may stand for a subtree).
        mode: `"conflict"` removes on conflict only, as above. `"orthogonal"` removes the
            component along $a$ always, $c$ for $c^-$, as the authors' published code does.
        action: What is done to $b$. `"project"`, as above; `"gate"` drops all of $b$ in a
            group in conflict; `"cosine"` weighs $b$ by $\max(0, \cos(a, b))$; `"keep"` does
            nothing, for `max_ratio` alone to act, or as a control.
        reference: What $b$ is held against, $r$ in the place of $a$ in $c^-$: `"batch"` is $a$
            itself. An optax transformation makes another one from $a$: `optax.ema(0.99)`, the
            mean over many batches, `optax.trace(0.9)`, the momentum of SGD,
            `optax.scale_by_adam()`, Adam's step. Then $\langle d - a, r\rangle \ge 0$ is
            promised, and the inequality above is not. It costs the transformation's state, for an
            average one tree of the size of params. With scope `"element"` it is for regularizers
            without noise, such as L2-SP: in the demo a slow average hurt distillation.
        max_ratio: $\kappa \ge 0$: makes the regularizer's part of each group shorter where it is
            longer than $\kappa\lVert r\rVert$, so that $\lVert d - a\rVert \le \kappa\lVert
            r\rVert$ however large $\lambda$ is. `None`, as in the paper: no bound.
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
        ValueError: If `reg_weight` or `max_ratio` is negative or NaN, or `scope`, `mode` or
            `action` unknown; at `update`, if trees or shapes do not match, or the state is of
            other params.
        TypeError: If `reference` or `max_ratio` is none; at `update`, if one tree comes where a
            pair is due, `reg_grads` comes twice, or a leaf is an integer.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(dtnh_jax.dtnh(reg_weight=0.1), optax.sgd(1.0))
        >>> params = jnp.zeros(3)
        >>> pair = (jnp.array([-4.0, 1.0, 1.0]), jnp.array([6.0, 1.0, 1.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(-updates)
        [-3.8888888  1.2222222  1.2222222]

        Held against a slow average, element by element:

        >>> strong = dtnh_jax.dtnh(0.1, scope="element", reference=optax.ema(0.99))
        >>> direction, _ = strong.update(pair, strong.init(params), params)
        >>> print(direction)
        [-4.   1.1  1.1]

        However large the weight, no more than as long as the loss gradient:

        >>> bounded = dtnh_jax.dtnh(1e6, action="gate", max_ratio=1.0)
        >>> pair = (jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))
        >>> direction, _ = bounded.update(pair, bounded.init(jnp.zeros(2)))
        >>> print(direction)
        [3. 9.]

    References:
        Wan, Xiong, Li, Zhu, Huan, *Towards Making Deep Transfer Learning Never Hurt*, ICDM 2019
        (arXiv:1911.07489); Xiong et al., *GrOD*, ACM TKDD 2022 (doi:10.1145/3530836). An average
        as reference: Hsieh et al., *BLOOP* (arXiv:2402.02998). The cosine: Du et al., *Adapting
        Auxiliary Losses Using Gradient Similarity* (arXiv:1812.02224).
    """
    choices = Choices(reg_weight, scope, mask, diagnostics, reference)
    return pair_transformation(dtnh_rule(mode, action, max_ratio), choices)


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
        reg_weight: $\lambda \ge 0$, a number or an optax schedule of the step, or a sequence of
            them for as many regularizers.
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
    rule = Rule(_weightings.weighted_sum, needs_gramian=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))
