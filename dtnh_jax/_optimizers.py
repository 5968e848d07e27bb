"""Whole optimizers with a rule inside: the recommended presets."""

import warnings

import optax

from dtnh_jax._combine import BoundBy, RegWeight
from dtnh_jax._layout import Mask, Scope
from dtnh_jax._reference import Reference
from dtnh_jax._rules import OnConflict, dtnh
from dtnh_jax._transform_pair import transform_pair
from dtnh_jax._tree import PyTree


def dtnh_sgd(
    learning_rate: optax.ScalarOrSchedule,
    reg_weight: RegWeight,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    on_conflict: OnConflict = "gate",
    max_ratio: float | None = 1.0,
    scope: Scope = "layer",
    mask: Mask = None,
    reference: Reference = "batch",
    bound_by: BoundBy = "current",
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum whose regularizer never opposes or outweighs the loss in any layer.

    With the momenta $m_a$ of the loss gradient and $m_b$ of the regularizer gradient in each layer,

    $$m_a \leftarrow \mu m_a + a, \qquad m_b \leftarrow \mu m_b + b, \qquad
    w \leftarrow w - \gamma\,\Bigl(m_a +
    \min\Bigl(\lambda, \kappa\,\frac{\lVert m_a\rVert}{\lVert m_b\rVert}\Bigr)\,
    [\langle m_a, m_b\rangle \ge 0]\; m_b\Bigr).$$

    The regularizer's part is dropped in the layers where the two momenta conflict, and is at most
    $\kappa$ times as long as the loss's part, however large $\lambda$ is. Both hold for the step
    that is taken, not for one mini-batch alone. The price: once the training loss is close to zero,
    little of the regularizer passes, also of one that helps. With examples that are not trained on,
    `scope="global", reference=held_out(0.9), bound_by="running_max"` keeps a part of what such a
    regularizer gains; see [`held_out`][dtnh_jax.held_out].

    This is a whole optimizer, to be used in place of `optax.sgd`. It is this chain:

    ```python
    optax.chain(
        transform_pair(loss=optax.trace(0.9), reg=optax.trace(0.9), mask=mask),
        dtnh(reg_weight, on_conflict="gate", max_ratio=1.0, scope="layer", mask=mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    ```

    To clip gradients, put `transform_pair(loss=clip, reg=clip)` before it in a chain, with
    `clip = optax.clip_by_global_norm(1.0)`. A clip after it would cut the step. Write the chain
    yourself to add other links, such as weight decay on the loss gradient:
    `transform_pair(loss=optax.chain(optax.add_decayed_weights(1e-4), optax.trace(0.9)), ...)`.

    Args:
        learning_rate: $\gamma$, a number or an Optax schedule of the step.
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh].
        momentum: $\mu$, of both gradients.
        nesterov: Whether to use Nesterov momentum.
        on_conflict: As in [`dtnh`][dtnh_jax.dtnh].
        max_ratio: $\kappa$, as in [`dtnh`][dtnh_jax.dtnh].
        scope: As in [`dtnh`][dtnh_jax.dtnh]. A flat dict of arrays is one layer: give `"leaf"` for
            such params.
        mask: As in [`dtnh`][dtnh_jax.dtnh]. The momentum of the regularizer gradient is kept only
            where it is `True`.
        reference: As in [`dtnh`][dtnh_jax.dtnh]: `"batch"` is the momentum $m_a$.
        bound_by: As in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: As in [`dtnh`][dtnh_jax.dtnh]; of the momenta.

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles and returns
        updates to add to params. Its state holds two trees of the size of params.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.dtnh_sgd(learning_rate=1.0, reg_weight=100.0)
        >>> params = jnp.zeros(2)
        >>> pair = (jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(-updates)
        [3. 9.]

    References:
        Wan, Xiong, Li, Zhu, Huan, *Towards Making Deep Transfer Learning Never Hurt*, ICDM 2019
        (arXiv:1911.07489), for the comparison of the two gradients. Momenta, gate and bound are
        this project's.
    """
    trace = optax.trace(momentum, nesterov)
    return optax.chain(
        transform_pair(loss=trace, reg=trace, mask=mask, n_regularizers=_count(reg_weight)),
        dtnh(
            reg_weight,
            on_conflict=on_conflict,
            max_ratio=max_ratio,
            scope=scope,
            mask=mask,
            reference=reference,
            bound_by=bound_by,
            diagnostics=diagnostics,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def dtnh_adamw(
    learning_rate: optax.ScalarOrSchedule,
    reg_weight: RegWeight,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    decay_mask: PyTree | None = None,
    on_conflict: OnConflict = "gate",
    max_ratio: float | None = 1.0,
    scope: Scope = "layer",
    mask: Mask = None,
    reference: Reference = "batch",
    bound_by: BoundBy = "current",
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose regularizer never opposes or outweighs the loss in any layer.

    As [`dtnh_sgd`][dtnh_jax.dtnh_sgd], with Adam's step of each gradient in place of its momentum:

    $$s_a = \text{Adam}(a), \qquad s_b = \text{Adam}(b), \qquad
    w \leftarrow w - \gamma\,\Bigl(s_a +
    \min\Bigl(\lambda, \kappa\,\frac{\lVert s_a\rVert}{\lVert s_b\rVert}\Bigr)\,
    [\langle s_a, s_b\rangle \ge 0]\; s_b + \delta\,w\Bigr).$$

    Adam's steps have about the same length whatever the gradient's, so $\lambda$ here is a ratio of
    steps, not of gradients: 1 already gives the regularizer as much as the loss. Gradients are
    clipped before it, as in [`dtnh_sgd`][dtnh_jax.dtnh_sgd]: after it, a clip would cut Adam's
    step, whose length is about the square root of the number of parameters.

    Args:
        learning_rate: $\gamma$, a number or an Optax schedule of the step.
        reg_weight: $\lambda \ge 0$, as in [`dtnh`][dtnh_jax.dtnh].
        b1: As in `optax.adamw`.
        b2: As in `optax.adamw`.
        eps: As in `optax.adamw`.
        weight_decay: $\delta$, as in `optax.adamw`: decoupled, towards zero.
        decay_mask: As `mask` in `optax.adamw`: which parameters decay.
        on_conflict: As in [`dtnh`][dtnh_jax.dtnh].
        max_ratio: $\kappa$, as in [`dtnh`][dtnh_jax.dtnh].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: As in [`dtnh_sgd`][dtnh_jax.dtnh_sgd].
        reference: As in [`dtnh`][dtnh_jax.dtnh]: `"batch"` is Adam's step $s_a$.
        bound_by: As in [`dtnh`][dtnh_jax.dtnh].
        diagnostics: As in [`dtnh`][dtnh_jax.dtnh]; of Adam's steps.

    Returns:
        An `optax.GradientTransformationExtraArgs` that takes a pair in both call styles and returns
        updates to add to params. Its state holds four trees of the size of params.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does; at `update`, without params.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.dtnh_adamw(learning_rate=0.1, reg_weight=1.0, weight_decay=0.0)
        >>> params = jnp.zeros(2)
        >>> pair = (jnp.array([3.0, -4.0]), jnp.array([5.0, -2.0]))
        >>> updates, state = tx.update(pair, tx.init(params), params)
        >>> print(updates.round(3))
        [-0.2  0.2]

    References:
        Loshchilov, Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019 (arXiv:1711.05101),
        for AdamW; Wan et al., ICDM 2019 (arXiv:1911.07489), as in
        [`dtnh_sgd`][dtnh_jax.dtnh_sgd].
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        transform_pair(loss=adam, reg=adam, mask=mask, n_regularizers=_count(reg_weight)),
        dtnh(
            reg_weight,
            on_conflict=on_conflict,
            max_ratio=max_ratio,
            scope=scope,
            mask=mask,
            reference=reference,
            bound_by=bound_by,
            diagnostics=diagnostics,
        ),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def bounded_dtnh(
    reg_weight: RegWeight,
    *,
    each: optax.GradientTransformation | None = None,
    scope: Scope = "layer",
    action: OnConflict = "gate",
    max_ratio: float | None = 1.0,
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Deprecated: [`dtnh_sgd`][dtnh_jax.dtnh_sgd] without its learning rate.

    `optax.chain(bounded_dtnh(reg_weight), optax.scale_by_learning_rate(learning_rate))` is now
    `dtnh_sgd(learning_rate, reg_weight)`. With `each=optax.scale_by_adam()` it is
    [`dtnh_adamw`][dtnh_jax.dtnh_adamw]; with any other `each`, write the chain of
    [`transform_pair`][dtnh_jax.transform_pair] and [`dtnh`][dtnh_jax.dtnh].

    $$d = m_a + \min\Bigl(\lambda, \kappa\,\frac{\lVert m_a\rVert}{\lVert m_b\rVert}\Bigr)\,
    [\langle m_a, m_b\rangle \ge 0]\; m_b$$

    Args:
        reg_weight: As in [`dtnh_sgd`][dtnh_jax.dtnh_sgd].
        each: Applied to each gradient; `optax.trace(0.9)` if `None`.
        scope: As in [`dtnh_sgd`][dtnh_jax.dtnh_sgd].
        action: `on_conflict` of [`dtnh`][dtnh_jax.dtnh].
        max_ratio: As in [`dtnh_sgd`][dtnh_jax.dtnh_sgd].
        mask: As in [`dtnh_sgd`][dtnh_jax.dtnh_sgd].
        diagnostics: As in [`dtnh_sgd`][dtnh_jax.dtnh_sgd].

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does, or if `each` is not an Optax transformation.

    Examples:
        >>> import warnings, dtnh_jax
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     tx = dtnh_jax.bounded_dtnh(0.01)
        >>> caught[0].category.__name__
        'DeprecationWarning'

    References:
        As [`dtnh_sgd`][dtnh_jax.dtnh_sgd].
    """
    warnings.warn(
        "bounded_dtnh is deprecated; write dtnh_sgd(learning_rate, reg_weight), which includes the "
        "learning rate, or dtnh_adamw(...) for each=optax.scale_by_adam().",
        DeprecationWarning,
        stacklevel=2,
    )
    each = optax.trace(0.9) if each is None else each
    rule_choices = {"scope": scope, "mask": mask, "diagnostics": diagnostics}
    if action == "keep" and max_ratio is None:  # the weighted sum, which dtnh does not repeat
        max_ratio = float("inf")
    return optax.chain(
        transform_pair(loss=each, reg=each, mask=mask, n_regularizers=_count(reg_weight)),
        dtnh(reg_weight, on_conflict=action, max_ratio=max_ratio, **rule_choices),
    )


def _count(reg_weight: RegWeight) -> int | None:
    """How many regularizers ``reg_weight`` is for; ``None`` if it is not a sequence."""
    return len(reg_weight) if isinstance(reg_weight, tuple | list) else None
