"""The regularizer's step outside the optimizer: added to the update, as AdamW does with decay."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dtnh_jax._combine import BoundBy, RegWeight, combine_pair, pair_changes
from dtnh_jax._geometry import scaled, total
from dtnh_jax._layout import Mask, Scope, lay_out
from dtnh_jax._numerics import compute_dtype
from dtnh_jax._pair import GradientPair, takes_pairs
from dtnh_jax._reference import Reference
from dtnh_jax._rules import OnConflict, dtnh_weighting, renamed
from dtnh_jax._transform_pair import transform_pair
from dtnh_jax._tree import PyTree
from dtnh_jax.regularizers import l2_sp_gradient

_NOT_GIVEN: Any = object()


class DecoupledState(NamedTuple):
    """State of :func:`decoupled`: the optimizer's, and that of the rule."""

    optimizer: Any
    rule: Any


def decoupled(
    optimizer: optax.GradientTransformation,
    reg_weight: RegWeight,
    *,
    learning_rate: optax.ScalarOrSchedule,
    on_conflict: OnConflict = "project",
    max_ratio: float | None = None,
    scope: Scope = "global",
    mask: Mask = None,
    reference: Reference | Literal["update"] = "batch",
    bound_by: BoundBy = "current",
    diagnostics: bool = True,
    mode: str | None = None,
    action: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the optimizer the loss gradient alone, and adds the regularizer's step after it.

    $$u = \text{optimizer}(a) - \gamma\lambda\,(b - c^- r), \qquad
    c^- = \min\left(0, \frac{\langle r,b\rangle}{\lVert r\rVert^2}\right)$$

    with the learning rate $\gamma$ and $r = a$ unless another reference is chosen. In a chain, the
    regularizer gradient enters the optimizer's momentum and acts in later steps, which it may
    oppose. Here it acts only in the step in which it was compared with the reference. With
    `reference="batch"` the regularizer's part of the update does not raise the loss of the batch
    to first order, $\langle -\gamma\lambda(b - c^- a), a\rangle = -\gamma\lambda\max(0, \langle
    a,b\rangle) \le 0$, whatever the optimizer.

    Args:
        optimizer: Any optax optimizer, learning rate included. Leaves that it freezes, such as
            with `optax.set_to_zero`, are still moved by the regularizer: set `mask` to `False`
            there.
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh]. The regularizer's step is the
            plain gradient's, not the optimizer's. With Adam, whose steps do not grow with the
            gradient, a weight has another meaning than in a chain; with a momentum of $\mu$, the
            effect is smaller than in a chain by up to $1/(1-\mu)$.
        learning_rate: $\gamma$, a number or an Optax schedule of the step; usually that of
            `optimizer`.
        on_conflict: As in [`dtnh`][dtnh_jax.dtnh].
        max_ratio: As in [`dtnh`][dtnh_jax.dtnh].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: As in [`dtnh`][dtnh_jax.dtnh].
        reference: As in [`dtnh`][dtnh_jax.dtnh], or `"update"`: the optimizer's own step, which
            the regularizer's step then does not oppose.
        bound_by: As in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: As in [`dtnh`][dtnh_jax.dtnh].
        mode: Deprecated; use `on_conflict`.
        action: Deprecated; use `on_conflict`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles and
        returns the update, to be added to params. It is a whole optimizer: what comes after it in
        a chain acts on the regularizer's step too.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    weighting = dtnh_weighting(renamed(on_conflict, mode, action), max_ratio, scope)
    choices: dict[str, Any] = {
        "scope": scope,
        "mask": mask,
        "max_ratio": max_ratio,
        "bound_by": bound_by,
        "diagnostics": diagnostics,
    }
    if isinstance(reference, str) and reference == "update":
        # The optimizer's step points where the loss falls, a gradient where it rises.
        return optax.chain(
            transform_pair(loss=optax.chain(optimizer, optax.scale(-1.0))),
            combine_pair(weighting, _times_rate(reg_weight, learning_rate), **choices),
            optax.scale(-1.0),
        )
    init_rule, changes_of = pair_changes(weighting, reg_weight, reference=reference, **choices)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        return DecoupledState(optimizer.init(params), init_rule(params))

    def update(
        pair: GradientPair, state: Any, params: PyTree | None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        steps, optimizer_state = optimizer.update(
            pair.loss_grads, state.optimizer, params, **extra_args
        )
        changes, rule_state = changes_of(pair, state.rule, params, **extra_args)
        rate = -jnp.asarray(_at(learning_rate, state.rule.count))
        leaves, treedef = jax.tree.flatten(steps)
        together = [
            leaf
            if by is None
            else total(leaf, scaled(by, rate, compute_dtype(by.dtype))).astype(leaf.dtype)
            for leaf, by in zip(leaves, changes, strict=True)
        ]
        return treedef.unflatten(together), DecoupledState(optimizer_state, rule_state)

    return takes_pairs(init, update)


def _at(value: optax.ScalarOrSchedule, count: jax.Array) -> jax.typing.ArrayLike:
    return value(count) if callable(value) else value


def _times_rate(reg_weight: RegWeight, rate: optax.ScalarOrSchedule) -> RegWeight:
    if isinstance(reg_weight, tuple | list):
        return [_times_rate(each, rate) for each in reg_weight]  # type: ignore[misc]
    return lambda count: _at(reg_weight, count) * _at(rate, count)  # type: ignore[operator]


class StartState(NamedTuple):
    """State of :func:`add_l2_sp` that holds where it began.

    Attributes:
        start: A copy of the params that init saw, where the regularizer reaches.
        rule: The state of the rule.
    """

    start: Any
    rule: Any


def add_l2_sp(
    pretrained: PyTree | Literal["init", "argument"],
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
    r"""Adds the pull towards the pre-trained weights, where that does not oppose the update.

    For training loops with one gradient. It takes the place of `optax.add_decayed_weights` in a
    chain, and needs params but no pair. With the incoming update $u$, which is a gradient or points
    like one, and $b = w - w_0$, the gradient of [`l2_sp`][dtnh_jax.regularizers.l2_sp], it returns

    $$u + \lambda\,(b - c^- u), \qquad
    c^- = \min\left(0, \frac{\langle u,b\rangle}{\lVert u\rVert^2}\right).$$

    As the last link before the learning rate it is decoupled, and $b$ is compared with the
    optimizer's own step; as the first link, with the gradient.

    Args:
        pretrained: $w_0$, with the structure and shapes of params; `None` in the place of a leaf
            or a subtree that has none, such as a new head. A tree given here is a constant of the
            program: `jax.jit` compiles it in, and refuses it if it spans several processes. In
            place of a tree:

            - `"init"`: the params that `init` sees. A copy of them is kept in the state, sharded
              and saved with it. Exclude a new head by `mask`. After a restart, restore the state;
              `init` with trained params would start from them.
            - `"argument"`: the extra argument `source_params` of `update`, a tree as above.
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh].
        on_conflict: As in [`dtnh`][dtnh_jax.dtnh].
        max_ratio: As in [`dtnh`][dtnh_jax.dtnh], relative to the incoming update. With
            `optax.trace(0.9)` before it, `scope="layer"`, `on_conflict="gate"` and `max_ratio=1.0`
            this is [`dtnh_sgd`][dtnh_jax.dtnh_sgd] for a regularizer without momentum.
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: As in [`dtnh`][dtnh_jax.dtnh].
        reference: As in [`dtnh`][dtnh_jax.dtnh], of the incoming update: `"batch"` is $u$ itself.
        bound_by: As in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: As in [`dtnh`][dtnh_jax.dtnh].
        mode: Deprecated; use `on_conflict`.
        action: Deprecated; use `on_conflict`.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: At `update`, without params, or if `pretrained` does not match them; for another
            string; and as [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: At `update`, without `source_params` where they are to be given; and as
            [`dtnh`][dtnh_jax.dtnh] does.

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

        Towards the params that the optimizer began with:

        >>> tx = optax.chain(dtnh_jax.add_l2_sp("init", reg_weight=0.5), optax.sgd(1.0))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.array([1.0, 0.0]), state, params + 4.0)
        >>> print(updates)
        [-3. -2.]

    References:
        Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483), for L2-SP; Wan et al., ICDM 2019
        (arXiv:1911.07489), for the projection.
    """
    rule = combine_pair(
        dtnh_weighting(renamed(on_conflict, mode, action), max_ratio, scope),
        reg_weight,
        scope=scope,
        mask=mask,
        reference=reference,
        max_ratio=max_ratio,
        bound_by=bound_by,
        diagnostics=diagnostics,
    )

    where = pretrained if isinstance(pretrained, str) else "given"
    if where not in ("init", "argument", "given"):
        raise ValueError(
            "pretrained must be a tree like params, or 'init' for the params that init sees, or "
            f"'argument' for source_params= of update; got {pretrained!r}."
        )

    def init(params: PyTree) -> Any:
        state = rule.init(params)
        if where != "init":
            return state
        layout = lay_out(params, "global", mask)
        # A copy, so that params and state can both be donated.
        return StartState(layout.only_reached([jnp.copy(x) for x in layout.leaves]), state)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        source_params: PyTree = _NOT_GIVEN,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "add_l2_sp needs the params, which it pulls towards the pre-trained ones: call "
                "tx.update(grads, state, params)."
            )
        start = state.start if where == "init" else pretrained
        if where == "argument":
            if source_params is _NOT_GIVEN:
                raise TypeError(
                    "add_l2_sp('argument', ...) needs the pre-trained params at each step: call "
                    "tx.update(grads, state, params, source_params=pretrained)."
                )
            start = source_params
        # The conjugate of a gradient points where the weight does: for complex leaves it is w - w0,
        # as what `optax.add_decayed_weights` adds is w.
        pull = jax.tree.map(jnp.conj, l2_sp_gradient(params, start, mask=mask))
        rule_state = state.rule if where == "init" else state
        updates, rule_state = rule.update(
            GradientPair(updates, pull), rule_state, params, **extra_args
        )
        return updates, StartState(start, rule_state) if where == "init" else rule_state

    return optax.GradientTransformationExtraArgs(init, update)
