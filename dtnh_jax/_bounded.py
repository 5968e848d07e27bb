"""The preset: momenta instead of gradients, a gate instead of a projection, and a bound."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dtnh_jax._gradients import GradientPair
from dtnh_jax._groups import Groups, Mask, Scope, group_leaves
from dtnh_jax._reference import only_reached
from dtnh_jax._rules import Action, dtnh_rule
from dtnh_jax._transform import Choices, RegWeight, as_trees, pair_transformation
from dtnh_jax._tree import PyTree, is_absent, lay_over, leaves_of
from dtnh_jax._unpack import takes_pairs


class BoundedState(NamedTuple):
    """State of :func:`bounded_dtnh`.

    Attributes:
        loss: Of the transformation of the loss gradient.
        reg: Of those of the regularizers' gradients, a tuple with one for each.
        rule: Of the rule between what they make of them.
    """

    loss: Any
    reg: tuple[Any, ...]
    rule: Any


def bounded_dtnh(
    reg_weight: RegWeight,
    *,
    each: optax.GradientTransformation | None = None,
    scope: Scope = "layer",
    action: Action = "gate",
    max_ratio: float | None = 1.0,
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The recommended preset: DTNH between the momenta of both gradients, bounded.

    With the momenta $m_a$ of the loss gradient and $m_b$ of the regularizer gradient in each layer,

    $$m_a \leftarrow \mu\, m_a + a, \qquad m_b \leftarrow \mu\, m_b + b, \qquad
    d = m_a + \min\left(\lambda, \kappa\frac{\lVert m_a\rVert}{\lVert m_b\rVert}\right)
    \left[\langle m_a, m_b\rangle \ge 0\right] m_b.$$

    Where the two momenta conflict the layer goes on as if there were no regularizer, and where they
    do not, the regularizer adds a step that is at most $\kappa$ times as long as the loss's own.
    $d$ is the step itself, so the promise is about what moves the weights:
    $\langle d, m_a\rangle \ge \lVert m_a\rVert^2$ and
    $\lVert d - m_a\rVert \le \kappa\lVert m_a\rVert$ in each layer, for every $\lambda$. A momentum
    is less noisy than the gradient of one batch, so conflict is told better; and since the bound is
    on the length of what is added, a weight that is a hundred times too large does no more than
    one that is just large enough to reach the bound.

    It takes the place of a rule and of SGD's momentum: put the learning rate after it, and no
    further momentum. How it was found, and how it compares with the paper's rule and others on
    real data, is told in the results of this project's experiment.

    Args:
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh].
        each: What makes a step of a gradient, applied to both gradients apart:
            `optax.trace(0.9)` if `None`, SGD's momentum; `optax.scale_by_adam()` for Adam, whose
            steps have one size whatever the gradient's, so that $\lambda$ means something else.
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        action: Likewise.
        max_ratio: $\kappa$, likewise; `None` for no bound.
        mask: Likewise. The momentum of the regularizer's gradient is kept for the leaves that it
            lets through: one tree of the size of params without it.
        diagnostics: As in [`dtnh`][dtnh_jax.dtnh]; of the momenta.

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles. The
        direction has the structure, shapes and dtypes of `loss_grads`.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise, or if `each` is no optax transformation.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(
        ...     dtnh_jax.bounded_dtnh(reg_weight=100.0), optax.scale_by_learning_rate(1.0)
        ... )
        >>> params = jnp.zeros(2)
        >>> pair = (jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(-updates)
        [3. 9.]

    References:
        Wan, Xiong, Li, Zhu, Huan, *Towards Making Deep Transfer Learning Never Hurt*, ICDM 2019
        (arXiv:1911.07489), for the conflict by which it is decided; the rest is this project's.
    """
    step_of = optax.trace(0.9) if each is None else each
    if not isinstance(step_of, optax.GradientTransformation):
        raise TypeError(
            "each must be an optax transformation that makes a step of a gradient, such as "
            f"optax.trace(0.9) or optax.scale_by_adam(); got {each!r}."
        )
    several = isinstance(reg_weight, tuple | list)
    n_regularizers = len(reg_weight) if several else 1
    choices = Choices(reg_weight, scope, mask, diagnostics)
    rule = pair_transformation(dtnh_rule("conflict", action, max_ratio), choices)

    def init(params: PyTree) -> Any:
        rule_state = rule.init(params)
        reached = only_reached(params, group_leaves(params, scope, mask))
        of_reg = tuple(step_of.init(reached) for _ in range(n_regularizers))
        return BoundedState(step_of.init(params), of_reg, rule_state)

    def update(
        pair: GradientPair, state: Any, params: PyTree | None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del extra_args
        loss_grads, reg_grads = pair
        loss_step, loss_state = step_of.update(loss_grads, state.loss, params)
        groups = group_leaves(loss_grads, scope, mask)
        of_params = None if params is None else only_reached(params, groups)
        trees = as_trees(reg_grads, n_regularizers) if several else [reg_grads]
        made = [
            _reg_step(step_of, tree, reg_state, of_params, loss_grads, groups)
            for tree, reg_state in zip(trees, state.reg, strict=True)
        ]
        reg_steps, reg_states = zip(*made, strict=True)
        direction, rule_state = rule.update(
            GradientPair(loss_step, reg_steps if several else reg_steps[0]), state.rule, params
        )
        return direction, BoundedState(loss_state, reg_states, rule_state)

    return takes_pairs(init, update)


def _reg_step(
    step_of: optax.GradientTransformation,
    reg_grads: PyTree,
    state: Any,
    params: PyTree | None,
    loss_grads: PyTree,
    groups: Groups,
) -> tuple[PyTree, Any]:
    """The step of one regularizer's gradient, and the next state: absent where the gradient is."""
    leaves, treedef = jax.tree.flatten(loss_grads, is_leaf=is_absent)
    entries = lay_over(
        reg_grads, loss_grads, what="reg_grads", over="loss_grads", one_for_many=False
    )
    # The state has a place for every leaf in a group: what is absent moves it by nothing.
    filled = [
        entry if is_absent(leaf) or not is_absent(entry) else jnp.zeros_like(leaf)
        for entry, leaf in zip(entries, leaves, strict=True)
    ]
    step, state = step_of.update(only_reached(treedef.unflatten(filled), groups), state, params)
    steps = [
        None if is_absent(entry) else leaf
        for entry, leaf in zip(entries, leaves_of(step), strict=True)
    ]
    return treedef.unflatten(steps), state
