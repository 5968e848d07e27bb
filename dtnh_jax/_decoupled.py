"""The regularizer's step outside the optimizer: added to the update, as AdamW does with decay."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dtnh_jax._gradients import GradientPair
from dtnh_jax._gramian import changed, times
from dtnh_jax._groups import Mask, Scope
from dtnh_jax._numerics import compute_dtype
from dtnh_jax._reference import Reference
from dtnh_jax._rules import Action, Mode, dtnh_rule
from dtnh_jax._transform import (
    Choices,
    RegWeight,
    changes_transformation,
    pair_transformation,
)
from dtnh_jax._tree import PyTree, is_absent
from dtnh_jax._unpack import takes_pairs
from dtnh_jax.regularizers import l2_sp_gradient


class DecoupledState(NamedTuple):
    """State of :func:`decoupled`: the optimizer's, and that of the rule."""

    optimizer: Any
    rule: Any


def decoupled(
    optimizer: optax.GradientTransformation,
    reg_weight: RegWeight,
    *,
    learning_rate: optax.ScalarOrSchedule,
    scope: Scope = "global",
    mode: Mode = "conflict",
    action: Action = "project",
    reference: Reference | Literal["update"] = "batch",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the optimizer the loss gradient alone, and adds the regularizer's step after it.

    $$u = \text{optimizer}(a) - \gamma\lambda\,(b - c^- r), \qquad
    c^- = \min\left(0, \frac{\langle r,b\rangle}{\lVert r\rVert^2}\right)$$

    with the learning rate $\gamma$ and $r = a$ unless another reference is chosen. Inside a chain
    the regularizer's gradient goes into the optimizer's momentum and comes out in later steps,
    which it may oppose; out here it is what it was when it was held against the reference.
    With `reference="batch"` the regularizer's part of the update never raises the loss to first
    order, $\langle -\gamma\lambda(b - c^- a), a\rangle = -\gamma\lambda\max(0, \langle
    a,b\rangle) \le 0$, whatever the optimizer.

    Args:
        optimizer: Any optax optimizer, learning rate included.
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh]. The regularizer's step is the
            plain gradient's, not the optimizer's: with Adam, whose steps do not grow with the
            gradient, a weight means something else than inside the chain; with a momentum of
            $\mu$ it is gentler by up to $1/(1-\mu)$ out here.
        learning_rate: $\gamma$, a number or an optax schedule of the step; as a rule the one that
            `optimizer` was made with.
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mode: Likewise.
        action: Likewise.
        reference: As in [`dtnh`][dtnh_jax.dtnh], or `"update"`: the optimizer's own step, which
            the regularizer's then never opposes.
        mask: As in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles and
        returns the update, to be added to params. It is a whole optimizer: what comes after it in
        a chain acts on the regularizer's step too.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = dtnh_jax.decoupled(optax.adam(0.1), reg_weight=1.0, learning_rate=0.1)
        >>> params = jnp.zeros(3)
        >>> pair = (jnp.array([-4.0, 0.0, 1.0]), jnp.array([4.0, 2.0, -1.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(updates.round(3))
        [ 0.1 -0.2 -0.1]

    References:
        Loshchilov, Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019 (arXiv:1711.05101),
        for the decoupling.
    """
    by_update = isinstance(reference, str) and reference == "update"
    held_against: Any = "batch" if by_update else reference
    choices = Choices(reg_weight, scope, mask, diagnostics, held_against)
    rule = changes_transformation(dtnh_rule(mode, action), choices)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        return DecoupledState(optimizer.init(params), rule.init(params))

    def update(
        pair: GradientPair, state: Any, params: PyTree | None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        loss_grads, reg_grads = pair
        steps, optimizer_state = optimizer.update(loss_grads, state.optimizer, params, **extra_args)
        # The reference points where the loss rises, the step where it falls.
        against = jax.tree.map(jnp.negative, steps) if by_update else None
        count = state.rule.count
        changes, rule_state = rule.update(
            loss_grads, state.rule, params, reg_grads=reg_grads, reference=against
        )
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        leaves, treedef = jax.tree.flatten(steps, is_leaf=is_absent)
        together = [
            changed(leaf, [times(-jnp.asarray(rate, compute_dtype(x.dtype)), x) for x in of_leaf])
            if of_leaf
            else leaf
            for leaf, of_leaf in zip(leaves, changes, strict=True)
        ]
        return treedef.unflatten(together), DecoupledState(optimizer_state, rule_state)

    return takes_pairs(init, update)


def add_l2_sp(
    pretrained: PyTree,
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
    r"""Adds the pull towards the pre-trained weights, where that does not oppose the update.

    For training loops of one gradient: it stands in a chain where `optax.add_decayed_weights`
    would, and needs params but no pair. With the incoming update $u$, in the direction that the
    loss falls against, and $b = w - w_0$, the gradient of
    [`l2_sp`][dtnh_jax.regularizers.l2_sp],

    $$u + \lambda\,(b - c^- u), \qquad
    c^- = \min\left(0, \frac{\langle u,b\rangle}{\lVert u\rVert^2}\right).$$

    Before the scaling by the learning rate and after everything else it is decoupled, and held
    against the optimizer's own step; as the first link it is held against the gradient.

    Args:
        pretrained: $w_0$, with the structure and shapes of params; `None` in the place of a leaf
            or a subtree that has none, such as a new head.
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mode: Likewise.
        action: Likewise.
        reference: As in [`dtnh`][dtnh_jax.dtnh], of the incoming update: `"batch"` is $u$ itself.
        max_ratio: As in [`dtnh`][dtnh_jax.dtnh], of the incoming update: with `optax.trace(0.9)`
            before it, `scope="layer"`, `action="gate"` and `max_ratio=1.0` it is
            [`bounded_dtnh`][dtnh_jax.bounded_dtnh] for one that needs no momentum of its own.
        mask: As in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: At `update`, without params, or if `pretrained` does not match them; and as
            [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

    Examples:
        >>> import jax.numpy as jnp, optax, dtnh_jax
        >>> tx = optax.chain(
        ...     optax.scale_by_adam(),
        ...     dtnh_jax.add_l2_sp(pretrained=jnp.zeros(2), reg_weight=0.5),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> params = jnp.array([2.0, 2.0])
        >>> updates, state = tx.update(jnp.array([1.0, 0.0]), tx.init(params), params)
        >>> print(updates.round(3))
        [-0.2 -0.1]

    References:
        Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483), for L2-SP; Wan et al., ICDM 2019
        (arXiv:1911.07489), for the projection.
    """
    choices = Choices(reg_weight, scope, mask, diagnostics, reference)
    rule = pair_transformation(dtnh_rule(mode, action, max_ratio), choices)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "add_l2_sp wants the params that it pulls back to the pre-trained ones: call "
                "tx.update(grads, state, params)."
            )
        # The conjugate of a gradient points where the weight does: for complex leaves it is w - w0,
        # as what `optax.add_decayed_weights` adds is w.
        pull = jax.tree.map(jnp.conj, l2_sp_gradient(params, pretrained))
        return rule.update(GradientPair(updates, pull), state, params)

    return optax.GradientTransformationExtraArgs(rule.init, update)
