"""Regularizers of the change of the outputs under small changes of the inputs."""

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

# The standard deviation of the noise that the ascent starts from, as in the code of TRADES. At the
# input itself the divergence is minimal and its gradient is zero.
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
    r"""Adversarial regularization (TRADES): penalizes the worst change of the outputs in a ball.

    $$\Omega = \frac{1}{n}\sum_{i=1}^{n} \max_{\lVert\delta\rVert\le\epsilon}
    \mathrm{KL}\bigl(p(x_i)\,\Vert\,p(x_i+\delta)\bigr)$$

    with $p = \mathrm{softmax}\circ\text{logits}$. The maximum is approximated by projected gradient
    ascent from $x$ plus normal noise with standard deviation 0.001. Steps are along the sign of
    the gradient, or along the normalized gradient for the 2-norm; along the noise for examples
    whose gradient is zero, as can happen this close to $x$ in bfloat16. The resulting $\delta$ is
    treated as a constant; gradients flow through both $p(x)$ and $p(x+\delta)$.

    The defaults follow the code of TRADES, which uses `bounds=(0, 1)` for images in that range and
    divides the sum by the batch size, as `"mean"` does. Its ascent for the 2-norm differs. The
    cost is `steps` forward and backward passes for $\delta$, and two forward passes.

    Args:
        logits_fn: A function from inputs to logits of shape `(n, classes)` that closes over the
            parameters. It must be pure, so batch normalization must use running averages.
        x: The inputs, shape `(n, ...)`, real floating-point.
        key: A random key; use a new one for each step.
        epsilon: $\epsilon > 0$, the radius of the ball, in the units of `x`.
        step_size: The step size of the ascent, in the units of `x`.
        steps: The number of steps.
        norm: `"inf"` or `"2"`, the norm that defines the ball of each example.
        bounds: The smallest and the largest allowed input value, or `None`.
        reduction: `"mean"` or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the logits' dtype.

    Raises:
        ValueError: If `epsilon` or `step_size` is not positive, `steps` is less than one, `norm`
            or `reduction` is unknown, `x` is not a floating-point batch, or the logits have a
            wrong shape.

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
    # At least float32: small steps would be lost to rounding in bfloat16.
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
        # In a low precision the noise can be rounded away, and the gradient is zero at the input.
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
    r"""Virtual adversarial training (VAT): penalizes change in the most sensitive direction.

    $$\Omega = \frac{1}{n}\sum_{i=1}^{n} \mathrm{KL}\bigl(p(x_i)\,\Vert\,p(x_i + \epsilon\,u_i)
    \bigr)$$

    with the unit vector $u_i$ along which the curvature of the divergence is largest: the first
    eigenvector of its Hessian at $x_i$, approximated by power iteration from a random direction.
    $u$ and $p(x)$ are treated as constants.

    The Hessian is the Fisher information of the input, $J^\top(\mathrm{diag}(p) - pp^\top)J$ with
    the Jacobian $J$ of the logits. Its products with vectors are exact, from one forward-mode and
    one reverse-mode derivative. Published code uses a finite difference of length $\xi$, whose
    limit for $\xi\to 0$ this is.

    Args:
        logits_fn: A function from inputs to logits of shape `(n, classes)` that closes over the
            parameters. It must be pure, so batch normalization must use running averages, and it
            must support forward-mode differentiation.
        x: The inputs, shape `(n, ...)`, real floating-point.
        key: A random key; use a new one for each step.
        epsilon: $\epsilon > 0$, the length of the change of each example, in the units of `x`.
        steps: The number of power iterations.
        reduction: `"mean"` or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the logits' dtype.

    Raises:
        ValueError: If `epsilon` is not positive, `steps` is less than one, `reduction` is unknown,
            `x` is not a floating-point batch, or the logits have a wrong shape.

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
        # For log-probabilities, p·(their tangent) is (diag(p) - ppᵀ)·(tangent of the logits), and
        # the VJP of a vector that sums to zero equals that of the logits.
        _, tangent = jax.jvp(log_probabilities, (start,), (direction.astype(x.dtype),))
        (turned,) = jax.vjp(log_probabilities, start)[1](p * tangent)
        turned = turned.astype(direction.dtype)
        # If the outputs do not change at all, keep the direction.
        return jnp.where(_sizes(turned) > 0, unit(turned), direction)

    direction = unit(jax.random.normal(key, x.shape, compute_dtype(x.dtype)))
    direction = jax.lax.fori_loop(0, steps, step, direction)
    moved = _moved(x, jnp.asarray(epsilon, direction.dtype) * direction)
    return reduced(kl_divergence(clean, _log_probabilities(logits_fn, moved)), reduction)


def _batch(what: str, x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{what} expects floating-point inputs with a leading axis of examples; got {x.dtype} "
            f"of shape {x.shape}."
        )
    return x


def _frozen(
    logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """``logits_fn`` with its closed-over values as constants, so the search has no gradient."""
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
    """``x + change``, added in the wider dtype, with no gradient with respect to ``change``."""
    return (x.astype(change.dtype) + jax.lax.stop_gradient(change)).astype(x.dtype)


def _sizes(x: jax.Array) -> jax.Array:
    # The 2-norm of each example, relative to its largest element, so that squares do not underflow.
    axes = tuple(range(1, x.ndim))
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    squares = jnp.sum(jnp.square(ratio(x, largest)), axis=axes, keepdims=True)
    return largest * jnp.sqrt(squares)
