"""The loss of a classifier whose confidence has been set right, by temperature scaling.

The cross-entropy of a network early in training is mostly a matter of confidence: its logits are
still small, the more so the more a regularizer slows it down. Dividing all logits by one number,
the temperature, corrects that and changes no prediction (Guo et al., "On Calibration of Modern
Neural Networks", ICML 2017, arXiv:1706.04599, section 4.2).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

TEMPERATURES = np.geomspace(1 / 8, 8, 81, dtype=np.float32)
"""The temperatures that are compared; they are 5 % apart."""


def scaled_losses(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The cross-entropy of each image at each temperature.

    Args:
        logits: ``(n, n_classes)``.
        labels: ``(n,)``, integers.

    Returns:
        ``(n, len(TEMPERATURES))``, float32.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)

    def at(temperature: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits / temperature, labels)

    return jax.lax.map(at, jnp.asarray(TEMPERATURES)).T


def calibrated_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The mean cross-entropy at the temperature where it is lowest, a scalar.

    Args:
        logits: ``(n, n_classes)``.
        labels: ``(n,)``, integers.
    """
    return scaled_losses(logits, labels).mean(axis=0).min()


def is_lower(loss: float, than: float) -> bool:
    """Whether a loss is lower than another; any finite loss is lower than one that is not."""
    return math.isfinite(loss) and (loss < than or not math.isfinite(than))
