"""The paper's rule with its choices, and the weighted sum that it is compared with."""

import warnings
from typing import Literal, cast

import optax

from dtnh_jax import weightings
from dtnh_jax._combine import BoundBy, RegWeight, combine_pair
from dtnh_jax._layout import Mask, Scope
from dtnh_jax._reference import Reference
from dtnh_jax.weightings import Weighting

OnConflict = Literal["project", "orthogonal", "gate", "cosine", "keep"]

_WEIGHTINGS = {
    "project": weightings.project,
    "orthogonal": weightings.orthogonal,
    "gate": weightings.gate,
    "cosine": weightings.cosine,
    "keep": weightings.weighted_sum,
}


def dtnh_weighting(
    on_conflict: OnConflict, max_ratio: float | None = None, scope: Scope = "global"
) -> Weighting:
    """The weighting of :func:`dtnh` with these choices."""
    if on_conflict not in _WEIGHTINGS:
        raise ValueError(
            f"on_conflict must be one of {', '.join(map(repr, _WEIGHTINGS))}; got {on_conflict!r}."
        )
    weighting = _WEIGHTINGS[on_conflict]
    if on_conflict == "orthogonal":
        check_not_by_element(scope, "on_conflict='orthogonal'")
    if on_conflict == "keep" and max_ratio is None:
        raise ValueError(
            "on_conflict='keep' without max_ratio is the weighted sum. Give max_ratio, or use "
            "dtnh_jax.weighted_sum."
        )
    return weighting


def check_not_by_element(scope: Scope, what: str) -> None:
    """Raises an error where nothing of a single number is orthogonal to another."""
    if isinstance(scope, str) and scope == "element":
        raise ValueError(
            f"{what} with scope='element' would remove the whole regularizer: of two numbers, no "
            "part of one is orthogonal to the other. Choose another scope, or "
            "on_conflict='project'."
        )


def renamed(on_conflict: OnConflict, mode: str | None, action: str | None) -> OnConflict:
    """``on_conflict``, also from the arguments that it replaces."""
    if mode is None and action is None:
        return on_conflict
    if mode not in (None, "conflict", "orthogonal"):
        raise ValueError(f"mode must be 'conflict' or 'orthogonal'; got {mode!r}.")
    if mode == "orthogonal" and action not in (None, "project"):
        raise ValueError(f"mode='orthogonal' cannot be combined with action={action!r}.")
    now = "orthogonal" if mode == "orthogonal" else action or "project"
    warnings.warn(
        f"mode= and action= are deprecated; write on_conflict={now!r}.",
        DeprecationWarning,
        stacklevel=3,
    )
    return cast(OnConflict, now)


def dtnh(
    reg_weight: RegWeight,
    *,
    on_conflict: OnConflict = "project",
    max_ratio: float | None = None,
    scope: Scope = "global",
    mask: Mask = None,
    reference: Reference = "batch",
    bound_by: BoundBy = "current",
    diagnostics: bool = True,
    mode: str | None = None,
    action: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes from the regularizer gradient the part that conflicts with the loss gradient.

    With the loss gradient $a = \nabla L(w)$ and the regularizer gradient $b = \nabla\Omega(w)$ of a
    group of leaves, each seen as one vector, the direction is

    $$d = a + \lambda\,(b - c^- a), \qquad
    c^- = \min\left(0, \frac{\langle a,b\rangle}{\lVert a\rVert^2}\right)$$

    and $c^- = 0$ where $a = 0$. Without conflict, $\langle a,b\rangle \ge 0$, this is exactly the
    weighted sum $a + \lambda b$. In each group, and so in total,
    $\langle d,a\rangle = \lVert a\rVert^2 + \lambda\max(0, \langle a,b\rangle) \ge
    \lVert a\rVert^2$: to first order, a step along $-d$ lowers the loss of this mini-batch at least
    as much as a step along $-a$. This says nothing about other images, or about what momentum,
    Adam and weight decay do after the rule. In experiments the paper's rule, which is the default,
    performs about the same as the weighted sum; for a rule that limits harm, see
    [`dtnh_sgd`][dtnh_jax.dtnh_sgd].

    Where a gradient of a group is not finite, or too large for its square, nothing can be compared:
    the regularizer is left out of that group in that step, which
    [`conflict_stats`][dtnh_jax.conflict_stats] counts.

    The result is an Optax transformation that turns a pair of gradients into one direction. Put it
    first in `optax.chain`. Its `update` takes the pair,
    `tx.update((loss_grads, reg_grads), state, params)`, or the two separately,
    `tx.update(loss_grads, state, params, reg_grads=reg_grads)`. A leaf that is `None` in
    `reg_grads`, or `False` in `mask`, passes through unchanged and counts in no inner product. A
    new head belongs there: in scope `"global"` its large loss gradient would dominate the
    inner product.

    Args:
        reg_weight: $\lambda \ge 0$, a finite number or an Optax schedule of the step. It multiplies
            after the projection. A sequence of them for several regularizers: `reg_grads` is then a
            sequence of as many trees, each compared with the reference on its own.
        on_conflict: What to do with $b$ where $\langle a,b\rangle < 0$. `"project"`, the default:
            remove the component along $a$, as above. `"gate"`: drop $b$ in that group. `"cosine"`:
            scale $b$ by $\max(0, \cos(a, b))$, without conflict too. `"orthogonal"`: remove the
            component along $a$, without conflict too, as the authors' published code does.
            `"keep"`: nothing, so that `max_ratio` acts alone. For real numbers in scope
            `"element"`, `"project"`, `"gate"` and `"cosine"` are the same.
        max_ratio: $\kappa \ge 0$: shortens what the regularizer adds to a group where it is longer
            than $\kappa\lVert a\rVert$, so that $\lVert d - a\rVert \le \kappa\lVert a\rVert$ for
            every $\lambda$. Several regularizers share it. `None`: no bound, as in the paper.
        scope: Which leaves form one vector. `"global"`: all that the regularizer reaches.
            `"layer"`: those under one parent in the tree, such as kernel and bias of a layer.
            `"leaf"`: each array. `"element"`: each number (a complex number is a vector of two).
            Or a function from a leaf's path (`"block/conv/kernel"`) to the name of its group, or a
            tree of names with the structure of params, in which a name may stand for a subtree.
        mask: `None`, or a tree of booleans with the structure of params, in which one may stand for
            a subtree, or a function from params to such a tree. `False` where the regularizer
            should not act.
        reference: What $b$ is compared with, $r$ in place of $a$ in $c^-$. `"batch"`: $a$ itself.
            An Optax transformation: what it makes of $a$, such as `optax.ema(0.99)`, the mean over
            many batches; $\lVert r\rVert$ takes the place of $\lVert a\rVert$ in `max_ratio` too.
            `"held_out"` or [`held_out`][dtnh_jax.held_out]`(0.9)`: the gradient, or an average of
            the gradients, that `update` gets as `held_out_grads=`. With each of these
            $\langle d - a, r\rangle \ge 0$ holds, and the inequality above need not. The state
            holds an average, one tree of the size of params.
        bound_by: What `max_ratio` is relative to. `"current"`: the norm in this step.
            `"running_max"`: the largest norm so far in each group, so that the bound does not fade
            as the training loss goes to zero.
        diagnostics: Whether the state keeps what [`conflict_stats`][dtnh_jax.conflict_stats] reads:
            four numbers for each group, from inner products that the rule needs anyway (scope
            `"element"` computes them for this).
        mode: Deprecated; use `on_conflict`.
        action: Deprecated; use `on_conflict`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. The direction has the structure, shapes and
        dtypes of `loss_grads`. Inner products are computed in float32, or wider if a leaf is.

    Raises:
        ValueError: If `reg_weight` is negative or not finite, `max_ratio` is negative or NaN,
            `scope` or `on_conflict` is unknown, or they do not go together; at `update`, if trees
            or shapes do not match, or the state was made for other params.
        TypeError: If an argument has the wrong type; at `update`, if one tree comes where a pair is
            expected, `reg_grads` comes twice, or a leaf is an integer.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(dtnh_jax.dtnh(reg_weight=0.1), optax.sgd(1.0))
        >>> params = jnp.zeros(3)
        >>> pair = (jnp.array([-4.0, 1.0, 1.0]), jnp.array([6.0, 1.0, 1.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(-updates)
        [-3.8888888  1.2222222  1.2222222]

        Compare with a slow average, element by element:

        >>> slow = dtnh_jax.dtnh(0.1, scope="element", reference=optax.ema(0.99))
        >>> direction, _ = slow.update(pair, slow.init(params), params)
        >>> print(direction)
        [-4.   1.1  1.1]

        With a bound, a weight that is far too large adds no more than the length of $a$:

        >>> bounded = dtnh_jax.dtnh(1e6, on_conflict="gate", max_ratio=1.0)
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
    on_conflict = renamed(on_conflict, mode, action)
    return combine_pair(
        dtnh_weighting(on_conflict, max_ratio, scope),
        reg_weight,
        scope=scope,
        mask=mask,
        reference=reference,
        max_ratio=max_ratio,
        bound_by=bound_by,
        diagnostics=diagnostics,
    )


def weighted_sum(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the two gradients: the baseline, in the form of the other rules.

    $$d = a + \lambda\, b$$

    This is the gradient of $L + \lambda\,\Omega$: regularized transfer without a rule. It is called
    as [`dtnh`][dtnh_jax.dtnh] is, so that a training loop changes method by changing a name. It is
    the sum also where that is not finite.

    Args:
        reg_weight: $\lambda \ge 0$, a number or an Optax schedule of the step, or a sequence of
            them for as many regularizers.
        scope: Which leaves are one group in the diagnostics; the direction does not depend on it.
        mask: `False` where the regularizer should not act, as in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: Whether to measure conflict. This rule would not need the pass over both trees
            that it takes.

    Returns:
        An `optax.GradientTransformationExtraArgs`, whose direction has the structure, shapes
        and dtypes of `loss_grads`.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(
        weightings.weighted_sum, reg_weight, scope=scope, mask=mask, diagnostics=diagnostics
    )
