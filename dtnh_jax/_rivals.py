"""Rules of the literature, behind the signature and the state of the project's own."""

import functools

import optax

from dtnh_jax import _weightings
from dtnh_jax._groups import Mask, Scope
from dtnh_jax._transform import Choices, RegWeight, Rule, pair_transformation


def bloop(
    reg_weight: RegWeight,
    *,
    ema: float = 0.01,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps of the regularizer what is orthogonal to an average of the loss gradient.

    $$m \leftarrow m + \eta\,(a - m), \qquad
    d = a + \lambda\Bigl(b - \frac{\langle m,b\rangle}{\lVert m\rVert^2}\,m\Bigr)$$

    It is `dtnh(mode="orthogonal", reference=optax.ema(1 - ema))`.

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh].
        ema: $\eta$, the share of the new gradient in the average, in (0, 1].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. Its state
        holds the average, one tree of the size of params.

    Raises:
        ValueError: If `ema` is not in (0, 1], and as [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.bloop(reg_weight=1.0)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([2.0, 3.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print(direction)
        [1. 3.]

    References:
        Hsieh et al., *Careful with that Scalpel: Improving Gradient Surgery with an EMA*, 2024
        (arXiv:2402.02998).
    """
    if not 0 < ema <= 1:
        raise ValueError(f"ema must be in (0, 1], the share of the new gradient; got {ema!r}.")
    reference = optax.ema(1 - ema, debias=False)
    choices = Choices(reg_weight, scope, mask, diagnostics, reference)
    return pair_transformation(Rule(_weightings.orthogonal), choices)


def gradient_cosine(
    reg_weight: RegWeight,
    *,
    weighted: bool = True,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the regularizer by how well it agrees with the loss.

    $$d = a + \lambda \max(0, \cos(a, b))\, b, \qquad
    \text{unweighted:}\quad d = a + \lambda\,[\cos(a, b) \ge 0]\, b$$

    It is [`dtnh`][dtnh_jax.dtnh] with `action="cosine"` or `action="gate"`.

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh].
        weighted: Whether to weigh by the cosine, or keep all of $b$ where it is not negative.
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.gradient_cosine(reg_weight=1.0)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print([f"{x:.2f}" for x in direction])
        ['2.80', '2.40']

    References:
        Du et al., *Adapting Auxiliary Losses Using Gradient Similarity*, 2018
        (arXiv:1812.02224).
    """
    rule = Rule(_weightings.cosine if weighted else _weightings.gate)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def dynamic_barrier(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes from the regularizer its component along the loss gradient, up to a barrier.

    $$d = a + \lambda\,(b - \rho a), \qquad
    \rho = \min\left(\frac{\langle a,b\rangle}{\lVert a\rVert^2}, \frac{1}{\lambda}\right)$$

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.dynamic_barrier(reg_weight=1.0)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([2.0, 3.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print(direction)
        [2. 3.]

    References:
        Gong, Liu, Liu, NeurIPS 2021, in the form that arXiv:2402.02998 gives it.
    """
    rule = Rule(_weightings.dynamic_barrier)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def agem(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the weighted sum, where that opposes the loss gradient.

    $$g = a + \lambda b, \qquad
    d = g - \min\left(0, \frac{\langle g,a\rangle}{\lVert a\rVert^2}\right) a$$

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh]; several regularizers are one sum.
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.agem(reg_weight=1.0)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([-2.0, 3.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print(direction)
        [0. 3.]

    References:
        Chaudhry et al., *Efficient Lifelong Learning with A-GEM*, ICLR 2019 (arXiv:1812.00420),
        eq. 11, with the loss in the place of the memory.
    """
    rule = Rule(_weightings.agem, one_by_one=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def pcgrad(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Projects each of the two gradients onto the normal plane of the other, on conflict.

    $$d = \Bigl(1 - \frac{\langle a,\lambda b\rangle}{\lVert a\rVert^2}\Bigr) a
    + \Bigl(1 - \frac{\langle a,\lambda b\rangle}{\lVert\lambda b\rVert^2}\Bigr) \lambda b
    \quad\text{if } \langle a,b\rangle < 0, \qquad d = a + \lambda b \quad\text{else.}$$

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh]; it multiplies $b$ before the rule.
            Several regularizers are one sum.
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.pcgrad(reg_weight=1.0)
        >>> pair = (jnp.array([-4.0, 1.0, 1.0]), jnp.array([6.0, 1.0, 1.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(3)))
        >>> print([f"{x:.4f}" for x in direction])
        ['0.5848', '3.8012', '3.8012']

    References:
        Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020 (arXiv:2001.06782),
        algorithm 1 for two tasks.
    """
    rule = Rule(_weightings.pcgrad, one_by_one=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def upgrad(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The mean of the two gradients, each projected so that it opposes neither.

    $$d = \tfrac12\, d_{\text{PCGrad}}(a, \lambda b) \quad\text{for two gradients.}$$

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.upgrad(reg_weight=1.0)
        >>> pair = (jnp.array([-4.0, 1.0, 1.0]), jnp.array([6.0, 1.0, 1.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(3)))
        >>> print([f"{x:.4f}" for x in direction])
        ['0.2924', '1.9006', '1.9006']

    References:
        Quinton, Rey, *Jacobian Descent for Multi-Objective Optimization*, 2024
        (arXiv:2406.16232).
    """
    rule = Rule(_weightings.upgrad, one_by_one=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def mgda(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The shortest vector between the two gradients.

    $$d = t\,a + (1-t)\,\lambda b, \qquad
    t = \mathrm{clip}\left(\frac{\lVert\lambda b\rVert^2 - \langle a,\lambda b\rangle}
    {\lVert a-\lambda b\rVert^2}, 0, 1\right)$$

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. Where either
        gradient is zero so is the direction.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.mgda(reg_weight=1.0)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print(direction)
        [0.5 0.5]

    References:
        Désidéri, *Multiple-gradient descent algorithm*, 2012; Sener, Koltun, *Multi-Task Learning
        as Multi-Objective Optimization*, NeurIPS 2018 (arXiv:1810.04650), algorithm 1.
    """
    rule = Rule(_weightings.mgda, one_by_one=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def imtl_g(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The combination whose projections onto both gradients are equally long.

    $$d = \frac{\lVert\lambda b\rVert\, a + \lVert a\rVert\,\lambda b}
    {\lVert a\rVert + \lVert\lambda b\rVert}$$

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. Where either
        gradient is zero so is the direction, and where both are.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.imtl_g(reg_weight=1.0)
        >>> pair = (jnp.array([3.0, 0.0]), jnp.array([0.0, 1.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print(direction)
        [0.75 0.75]

    References:
        Liu et al., *Towards Impartial Multi-Task Learning*, ICLR 2021.
    """
    rule = Rule(_weightings.imtl_g, one_by_one=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def cagrad(
    reg_weight: RegWeight,
    *,
    c: float = 0.5,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The best for the worse-off objective within a ball around the mean gradient.

    $$d = g_0 + c\,\lVert g_0\rVert \frac{g_t}{\lVert g_t\rVert}, \qquad
    g_0 = \tfrac12 (a + \lambda b), \quad g_t = t a + (1-t) \lambda b,$$

    where $t \in [0, 1]$ minimises
    $\langle g_t, g_0\rangle + c\,\lVert g_0\rVert\,\lVert g_t\rVert$, in closed form.

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        c: The radius of the ball relative to the mean gradient, in [0, 1).
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: If `c` is not in [0, 1), and as [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.cagrad(reg_weight=1.0)
        >>> pair = (jnp.array([-4.0, 1.0, 1.0]), jnp.array([6.0, 1.0, 1.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(3)))
        >>> print([f"{x:.4f}" for x in direction])
        ['0.1835', '1.2041', '1.2041']

    References:
        Liu et al., *Conflict-Averse Gradient Descent for Multi-task Learning*, NeurIPS 2021
        (arXiv:2110.14048), algorithm 1.
    """
    if not 0 <= c < 1:
        raise ValueError(f"c must be in [0, 1), the radius of the ball; got {c!r}.")
    rule = Rule(functools.partial(_weightings.cagrad, c=c), one_by_one=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))


def config(
    reg_weight: RegWeight,
    *,
    scope: Scope = "global",
    mask: Mask = None,
    diagnostics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Along the bisector of the two gradients, as far as both together reach.

    $$d = \bigl(\langle a,v\rangle + \langle\lambda b,v\rangle\bigr)\,v, \qquad
    v = U\bigl(U(O(a,\lambda b)) + U(O(\lambda b,a))\bigr)$$

    with $O(x, y) = y - \langle x,y\rangle x / \lVert x\rVert^2$ and $U$ the unit vector. For two
    gradients $v$ bisects them, and
    $d = \tfrac12 (\lVert a\rVert + \lVert\lambda b\rVert)(a/\lVert a\rVert + b/\lVert b\rVert)$;
    that form is used, which parallel gradients have too.

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        scope: As in [`dtnh`][dtnh_jax.dtnh].
        mask: Likewise.
        diagnostics: Likewise.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. The unit
        vector of a zero gradient counts as zero.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: Likewise.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.config(reg_weight=1.0)
        >>> pair = (jnp.array([3.0, 0.0]), jnp.array([0.0, 1.0]))
        >>> direction, _ = tx.update(pair, tx.init(jnp.zeros(2)))
        >>> print(direction)
        [2. 2.]

    References:
        Liu, Chu, Thuerey, *ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks*, 2024 (arXiv:2408.11104), for two losses.
    """
    rule = Rule(_weightings.config, one_by_one=False)
    return pair_transformation(rule, Choices(reg_weight, scope, mask, diagnostics))
