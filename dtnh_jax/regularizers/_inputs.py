"""Regularizers of what the inputs' neighbourhood does to the outputs."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from dtnh_jax._numerics import compute_dtype, ratio, unit
from dtnh_jax.regularizers._batch import (
    Reduction,
    check_choice,
    check_count,
    check_positive,
    reduced,
)
from dtnh_jax.regularizers._outputs import kl_divergence

# The spread of the noise that the ascent starts from, as in the code of TRADES: at the input
# itself the divergence is least and has no gradient.
_START = 1e-3


def adversarial(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    key: jax.Array,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Literal["inf", "2"] = "inf",
    bounds: tuple[float, float] | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    r"""Adversarial regularization (TRADES): the outputs withstand the worst small change.

    $$\Omega = \frac{1}{n}\sum_{i=1}^{n} \max_{\lVert\delta\rVert\le\epsilon}
    \mathrm{KL}\bigl(p(x_i)\,\Vert\,p(x_i+\delta)\bigr)$$

    with $p = \mathrm{softmax}\circ\text{logits}$. The maximum is sought by projected gradient
    ascent, from $x$ and normal noise of spread 0.001, in steps of the gradient's sign or, in the
    2-norm, of the gradient over its norm; of the noise, where an example's gradient is zero, as
    it is so near $x$ in bfloat16. The change that it finds is held fixed; gradients flow through
    $p(x)$ and $p(x+\delta)$ both.

    The defaults are the code of TRADES, with `bounds=(0, 1)` for images in that range; it divides
    the sum by the batch size as `"mean"` does. Its 2-norm ascent is another. The cost is
    `steps` forward and backward passes for the change, and two forward passes.

    Args:
        logits_fn: From inputs to logits of shape `(n, classes)`; it holds the parameters. It must
            be pure, so batch norms run on their averages.
        x: The inputs, shape `(n, ...)`, real floating-point.
        key: A random key, a new one each step.
        epsilon: $\epsilon > 0$, the radius of the ball, in the units of `x`.
        step_size: The length of a step of the ascent, likewise.
        steps: How many steps.
        norm: `"inf"`, the largest change of one number, or `"2"`, the length of an example's
            change.
        bounds: The least and the largest number that an input may have, or `None`.
        reduction: `"mean"` or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the logits' dtype.

    Raises:
        ValueError: If `epsilon` or `step_size` is not positive, `steps` below one, `norm` or
            `reduction` another, `x` no floating-point batch, or the logits have another shape.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> w, x = jnp.array([[1.0, -1.0], [0.0, 0.0]]), jnp.zeros((4, 2))
        >>> omega = regularizers.adversarial(
        ...     lambda x: x @ w, x, jax.random.key(0), epsilon=0.5, step_size=0.2, steps=5
        ... )
        >>> print(f"{omega:.4f}")  # log cosh 0.5
        0.1201

    References:
        Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, ICML
        2019 (arXiv:1901.08573), algorithm 1.
    """
    check_positive("epsilon", epsilon)
    check_positive("step_size", step_size)
    check_count("steps", steps)
    check_choice("norm", norm, ("inf", "2"))
    check_choice("reduction", reduction)
    x = _batch("adversarial", x)
    clean = _log_probabilities(logits_fn, x)
    fixed_clean = jax.lax.stop_gradient(clean)
    frozen = _frozen(logits_fn, x)
    # The change is kept in float32 at least: steps of a bfloat16 input would be lost.
    start = jax.lax.stop_gradient(x).astype(compute_dtype(x.dtype))
    radius, length = (jnp.asarray(value, start.dtype) for value in (epsilon, step_size))

    def projected(change: jax.Array) -> jax.Array:
        if norm == "inf":
            change = jnp.clip(change, -radius, radius)
        else:
            sizes = _sizes(change)
            change = change * jnp.where(sizes > radius, ratio(radius, sizes), 1)
        if bounds is not None:
            low, high = (jnp.asarray(bound, start.dtype) for bound in bounds)
            change = jnp.clip(start + change, low, high) - start
        return change

    def divergence(change: jax.Array) -> jax.Array:
        moved = _log_probabilities(frozen, (start + change).astype(x.dtype))
        return jnp.sum(kl_divergence(fixed_clean, moved))

    noise = _START * jax.random.normal(key, x.shape, start.dtype)

    def step(_: int, change: jax.Array) -> jax.Array:
        grad = jax.grad(divergence)(change)
        # The noise may be less than a coarse dtype resolves; without a step along it the ascent
        # would never leave the input.
        grad = jnp.where(_sizes(grad) > 0, grad, noise)
        return projected(change + length * (jnp.sign(grad) if norm == "inf" else unit(grad)))

    change = jax.lax.fori_loop(0, steps, step, projected(noise))
    moved = _log_probabilities(logits_fn, _moved(x, change))
    return reduced(kl_divergence(clean, moved), reduction)


def virtual_adversarial(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    key: jax.Array,
    *,
    epsilon: float,
    steps: int = 1,
    reduction: Reduction = "mean",
) -> jax.Array:
    r"""Virtual adversarial training (VAT): the outputs are smooth where they turn fastest.

    $$\Omega = \frac{1}{n}\sum_{i=1}^{n} \mathrm{KL}\bigl(p(x_i)\,\Vert\,p(x_i + \epsilon\,u_i)
    \bigr)$$

    with the unit vector $u_i$ along which the divergence curves most: the first eigenvector of
    its second derivative at $x_i$, sought by power iteration from a random direction. $u$ is held
    fixed, and so is $p(x)$.

    The second derivative is the input's Fisher information $J^\top(\mathrm{diag}(p) -
    pp^\top)J$ with the Jacobian $J$ of the logits, and is applied exactly, by one forward-mode and
    one reverse-mode derivative. Published code takes a finite difference of length
    $\xi$ in its place, which this is the limit of for $\xi\to 0$.

    Args:
        logits_fn: From inputs to logits of shape `(n, classes)`; it holds the parameters. It must
            be pure, so batch norms run on their averages, and have forward-mode derivatives.
        x: The inputs, shape `(n, ...)`, real floating-point.
        key: A random key, a new one each step.
        epsilon: $\epsilon > 0$, the length of an example's change, in the units of `x`.
        steps: How many power iterations.
        reduction: `"mean"` or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the logits' dtype.

    Raises:
        ValueError: If `epsilon` is not positive, `steps` below one, `reduction` another, `x` no
            floating-point batch, or the logits have another shape.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> w, x = jnp.array([[1.0, -1.0], [0.0, 0.0]]), jnp.zeros((4, 2))
        >>> omega = regularizers.virtual_adversarial(
        ...     lambda x: x @ w, x, jax.random.key(0), epsilon=0.5
        ... )
        >>> print(f"{omega:.4f}")  # log cosh 0.5
        0.1201

    References:
        Miyato, Maeda, Koyama, Ishii, *Virtual Adversarial Training*, TPAMI 2018
        (arXiv:1704.03976), section 3.
    """
    check_positive("epsilon", epsilon)
    check_count("steps", steps)
    check_choice("reduction", reduction)
    x = _batch("virtual_adversarial", x)
    frozen = _frozen(logits_fn, x)
    start = jax.lax.stop_gradient(x)
    clean = _log_probabilities(frozen, start)
    p = jnp.exp(clean)

    def log_probabilities(x: jax.Array) -> jax.Array:
        return _log_probabilities(frozen, x)

    def step(_: int, direction: jax.Array) -> jax.Array:
        # With logarithms of probabilities, p·(their tangent) is (diag(p) - ppᵀ)·(that of the
        # logits), and the pull-back of a vector that sums to zero is that of the logits.
        _, tangent = jax.jvp(log_probabilities, (start,), (direction.astype(x.dtype),))
        (turned,) = jax.vjp(log_probabilities, start)[1](p * tangent)
        turned = turned.astype(direction.dtype)
        # Where the outputs do not turn at all, any direction will do.
        return jnp.where(_sizes(turned) > 0, unit(turned), direction)

    direction = unit(jax.random.normal(key, x.shape, compute_dtype(x.dtype)))
    direction = jax.lax.fori_loop(0, steps, step, direction)
    moved = _moved(x, jnp.asarray(epsilon, direction.dtype) * direction)
    return reduced(kl_divergence(clean, _log_probabilities(logits_fn, moved)), reduction)


def _batch(what: str, x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{what} wants floating-point inputs with a leading axis of examples; got {x.dtype} "
            f"of shape {x.shape}."
        )
    return x


def _frozen(
    logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """``logits_fn`` without derivatives by what it holds, so that no search is differentiated."""
    pure, held = jax.closure_convert(logits_fn, x)
    held = jax.lax.stop_gradient(held)
    return lambda x: pure(x, *held)


def _log_probabilities(logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    logits = logits_fn(x)
    if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        raise ValueError(
            f"logits_fn must return logits of shape ({x.shape[0]}, classes) for inputs of shape "
            f"{x.shape}; got {logits.shape}."
        )
    return jax.nn.log_softmax(logits.astype(compute_dtype(logits.dtype)))


def _moved(x: jax.Array, change: jax.Array) -> jax.Array:
    """``x + change``, added in the wider dtype; derivatives by ``x`` pass, by the change not."""
    return (x.astype(change.dtype) + jax.lax.stop_gradient(change)).astype(x.dtype)


def _sizes(x: jax.Array) -> jax.Array:
    # The 2-norm of each example, by way of its largest number, so that no square underflows.
    axes = tuple(range(1, x.ndim))
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    squares = jnp.sum(jnp.square(ratio(x, largest)), axis=axes, keepdims=True)
    return largest * jnp.sqrt(squares)
