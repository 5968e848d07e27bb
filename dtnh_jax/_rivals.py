"""Rules of the literature, behind the signature and the state of the project's own."""

import functools
import warnings
from typing import TypedDict, Unpack

import optax

from dtnh_jax import weightings
from dtnh_jax._combine import RegWeight, combine_pair
from dtnh_jax._layout import Mask, Scope
from dtnh_jax._rules import check_not_by_element


class Choices(TypedDict, total=False):
    """The choices that all rules share; see :func:`dtnh_jax.dtnh`."""

    scope: Scope
    mask: Mask
    diagnostics: bool


def bloop(
    reg_weight: RegWeight,
    *,
    decay: float = 0.99,
    ema: float | None = None,
    **choices: Unpack[Choices],
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps of the regularizer what is orthogonal to an average of the loss gradient.

    $$m \leftarrow \mu\,m + (1 - \mu)\,a, \qquad
    d = a + \lambda\Bigl(b - \frac{\langle m,b\rangle}{\lVert m\rVert^2}\,m\Bigr)$$

    It is `dtnh(on_conflict="orthogonal", reference=optax.ema(decay, debias=False))`.

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh].
        decay: $\mu$ in [0, 1), as in `optax.ema`. The paper's $\eta$ is $1 - \mu$.
        ema: Deprecated: $\eta$.
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh]. `scope` cannot
            be `"element"`: of two numbers, no part of one is orthogonal to the other.

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. Its state
        holds the average, one tree of the size of params.

    Raises:
        ValueError: If `decay` is not in [0, 1) or `scope` is `"element"`, and as
            [`dtnh`][dtnh_jax.dtnh] does.
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
    if ema is not None:
        warnings.warn(
            f"ema= is deprecated; write decay={1 - ema:g}, the share of the old average.",
            DeprecationWarning,
            stacklevel=2,
        )
        decay = 1 - ema
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), the share of the old average; got {decay!r}.")
    check_not_by_element(choices.get("scope", "global"), "bloop")
    return combine_pair(
        weightings.orthogonal, reg_weight, reference=optax.ema(decay, debias=False), **choices
    )


def gradient_cosine(
    reg_weight: RegWeight,
    *,
    weighted: bool = True,
    **choices: Unpack[Choices],
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the regularizer by how well it agrees with the loss.

    $$d = a + \lambda \max(0, \cos(a, b))\, b, \qquad
    \text{unweighted:}\quad d = a + \lambda\,[\cos(a, b) \ge 0]\, b$$

    It is [`dtnh`][dtnh_jax.dtnh] with `action="cosine"` or `action="gate"`.

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh].
        weighted: Whether to weigh by the cosine, or keep all of $b$ where it is not negative.
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.cosine if weighted else weightings.gate, reg_weight, **choices)


def dynamic_barrier(
    reg_weight: RegWeight, **choices: Unpack[Choices]
) -> optax.GradientTransformationExtraArgs:
    r"""Takes from the regularizer its component along the loss gradient, up to a barrier.

    $$d = a + \lambda\,(b - \rho a), \qquad
    \rho = \min\left(\frac{\langle a,b\rangle}{\lVert a\rVert^2}, \frac{1}{\lambda}\right)$$

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh].
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.dynamic_barrier, reg_weight, **choices)


def agem(
    reg_weight: RegWeight, **choices: Unpack[Choices]
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the weighted sum, where that opposes the loss gradient.

    $$g = a + \lambda b, \qquad
    d = g - \min\left(0, \frac{\langle g,a\rangle}{\lVert a\rVert^2}\right) a$$

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh]; several regularizers are one sum.
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.agem, reg_weight, several="sum", **choices)


def pcgrad(
    reg_weight: RegWeight, **choices: Unpack[Choices]
) -> optax.GradientTransformationExtraArgs:
    r"""Projects each of the two gradients onto the normal plane of the other, on conflict.

    $$d = \Bigl(1 - \frac{\langle a,\lambda b\rangle}{\lVert a\rVert^2}\Bigr) a
    + \Bigl(1 - \frac{\langle a,\lambda b\rangle}{\lVert\lambda b\rVert^2}\Bigr) \lambda b
    \quad\text{if } \langle a,b\rangle < 0, \qquad d = a + \lambda b \quad\text{else.}$$

    Args:
        reg_weight: $\lambda$, as in [`dtnh`][dtnh_jax.dtnh]; it multiplies $b$ before the rule.
            Several regularizers are one sum.
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.pcgrad, reg_weight, several="sum", **choices)


def upgrad(
    reg_weight: RegWeight, **choices: Unpack[Choices]
) -> optax.GradientTransformationExtraArgs:
    r"""The mean of the two gradients, each projected so that it opposes neither.

    $$d = \tfrac12\, d_{\text{PCGrad}}(a, \lambda b) \quad\text{for two gradients.}$$

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.upgrad, reg_weight, several="sum", **choices)


def mgda(
    reg_weight: RegWeight, **choices: Unpack[Choices]
) -> optax.GradientTransformationExtraArgs:
    r"""The shortest vector between the two gradients.

    $$d = t\,a + (1-t)\,\lambda b, \qquad
    t = \mathrm{clip}\left(\frac{\lVert\lambda b\rVert^2 - \langle a,\lambda b\rangle}
    {\lVert a-\lambda b\rVert^2}, 0, 1\right)$$

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. Where either
        gradient is zero so is the direction.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.mgda, reg_weight, several="sum", **choices)


def imtl_g(
    reg_weight: RegWeight, **choices: Unpack[Choices]
) -> optax.GradientTransformationExtraArgs:
    r"""The combination whose projections onto both gradients are equally long.

    $$d = \frac{\lVert\lambda b\rVert\, a + \lVert a\rVert\,\lambda b}
    {\lVert a\rVert + \lVert\lambda b\rVert}$$

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. Where either
        gradient is zero so is the direction, and where both are.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.imtl_g, reg_weight, several="sum", **choices)


def cagrad(
    reg_weight: RegWeight,
    *,
    c: float = 0.5,
    **choices: Unpack[Choices],
) -> optax.GradientTransformationExtraArgs:
    r"""The best for the worse-off objective within a ball around the mean gradient.

    $$d = g_0 + c\,\lVert g_0\rVert \frac{g_t}{\lVert g_t\rVert}, \qquad
    g_0 = \tfrac12 (a + \lambda b), \quad g_t = t a + (1-t) \lambda b,$$

    where $t \in [0, 1]$ minimises
    $\langle g_t, g_0\rangle + c\,\lVert g_0\rVert\,\lVert g_t\rVert$, in closed form.

    Args:
        reg_weight: $\lambda$, as in [`pcgrad`][dtnh_jax.pcgrad].
        c: The radius of the ball relative to the mean gradient, in [0, 1).
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

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
    return combine_pair(
        functools.partial(weightings.cagrad, c=c), reg_weight, several="sum", **choices
    )


def config(
    reg_weight: RegWeight, **choices: Unpack[Choices]
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
        **choices: `scope`, `mask` and `diagnostics`, as in [`dtnh`][dtnh_jax.dtnh].

    Returns:
        An `optax.GradientTransformationExtraArgs`, as [`dtnh`][dtnh_jax.dtnh] does. The unit
        vector of a zero gradient counts as zero.

    Raises:
        ValueError: As [`dtnh`][dtnh_jax.dtnh] does.
        TypeError: As [`dtnh`][dtnh_jax.dtnh] does.

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
    return combine_pair(weightings.config, reg_weight, several="sum", **choices)
