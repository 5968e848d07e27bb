"""Regularizers of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dtnh_jax._numerics import compute_dtype, widened
from dtnh_jax._tree import PyTree, check_same_shape, is_absent, lay_over, leaf_names, leaves_of


def l2_sp(
    params: PyTree, pretrained: PyTree, *, alpha: float = 1.0, beta: float = 0.0
) -> jax.Array:
    r"""L2-SP: keeps weights near their pre-trained values, the starting point.

    $$\Omega(w) = \frac{\alpha}{2}\sum_{\text{shared}}\lVert w - w_0\rVert^2
    + \frac{\beta}{2}\sum_{\text{new}}\lVert w\rVert^2$$

    A leaf is *new* where `pretrained` has `None`, and *shared* elsewhere. The gradient is
    $\alpha (w - w_0)$ and $\beta w$: zero, not NaN, at $w = w_0$. With `beta=0` the new leaves
    are out of the regularizer's reach, which keeps a new head out of the rule's groups.

    The rule multiplies the whole by `reg_weight`. The weights of Li et al. (their code:
    0.1 shared, 0.01 new) are `reg_weight=0.1, beta=0.1`; those of DELTA's code (0.01 both) are
    `reg_weight=0.01, beta=1`.

    Args:
        params: The parameters $w$, a tree of real or complex floating-point arrays.
        pretrained: The pre-trained parameters $w_0$, with the structure and shapes of
            `params`; `None` in the place of a leaf or a subtree that has none.
        alpha: $\alpha$, the weight of the shared leaves.
        beta: $\beta$, the weight of the new leaves.

    Returns:
        A scalar, in float32 or the widest dtype of `params`.

    Raises:
        ValueError: If the trees or shapes do not match; the leaf is named.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> pretrained = {"backbone": jnp.array([1.0, 2.0]), "head": None}
        >>> params = {"backbone": jnp.array([1.0, 4.0]), "head": jnp.array([3.0])}
        >>> print(regularizers.l2_sp(params, pretrained))
        2.0
        >>> print(jax.grad(regularizers.l2_sp)(params, pretrained)["backbone"])
        [0. 2.]

    References:
        Li, Grandvalet, Davoine, *Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks*, ICML 2018 (arXiv:1802.01483), eq. 3.
    """
    starts = lay_over(pretrained, params, what="pretrained", over="params", one_for_many=False)
    dtype = compute_dtype(
        *(jnp.result_type(weight) for weight in leaves_of(params) if not is_absent(weight))
    )
    shared = new = jnp.zeros((), dtype)
    for name, weight, start in zip(leaf_names(params), leaves_of(params), starts, strict=True):
        if is_absent(weight):
            continue
        if is_absent(start):
            new = new + _sum_of_squares(weight, None, dtype)
        else:
            check_same_shape(name, weight, start)
            shared = shared + _sum_of_squares(weight, start, dtype)
    # A zero weight drops its term from the graph, so that its leaves are not reached at all.
    value = jnp.zeros((), dtype)
    for factor, term in ((alpha, shared), (beta, new)):
        if isinstance(factor, Tracer) or factor != 0:
            value = value + 0.5 * jnp.asarray(factor, dtype) * term
    return value


def _sum_of_squares(weight: jax.Array, start: jax.Array | None, dtype: np.dtype) -> jax.Array:
    # The squares themselves: norm(w - w0)**2 has a NaN gradient at w = w0.
    difference = widened(jnp.asarray(weight), dtype)
    if start is not None:
        difference = difference - widened(jnp.asarray(start), dtype)
    if jnp.iscomplexobj(difference):
        return jnp.sum(jnp.square(jnp.real(difference)) + jnp.square(jnp.imag(difference)))
    return jnp.sum(jnp.square(difference))
