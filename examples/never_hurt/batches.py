"""Which images each step sees, and how each is augmented: drawn ahead, cut out on the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.common import standardisation
from examples.common.data import pad_margin


class Plan(NamedTuple):
    """The views of one step, or of all, with the steps as a first axis.

    Attributes:
        which: ``(n,)``, int32: the image.
        flip: ``(n,)``, bool: whether left and right are swapped.
        corner: ``(n, 2)``, int32: the corner of the crop in the padded image.
    """

    which: Any
    flip: Any
    corner: Any


def draw(n_images: int, image_size: int, batch_size: int, steps: int, seed: Sequence[int]) -> Plan:
    """Draws the views of all steps: every image once in a new order before any comes again."""
    rng = np.random.default_rng([*seed, 1])
    n = steps * batch_size
    epochs = [rng.permutation(n_images) for _ in range(-(-n // n_images))]
    which = np.concatenate(epochs)[:n].astype(np.int32)
    flip = rng.random(n) < 0.5
    corner = rng.integers(2 * pad_margin(image_size) + 1, size=(n, 2), dtype=np.int32)
    return Plan(*(x.reshape(steps, batch_size, *x.shape[1:]) for x in (which, flip, corner)))


def views(images: jax.Array, plan: Plan) -> jax.Array:
    """Cuts the views of one step out of all images.

    Args:
        images: ``(n, size, size, 3)``, uint8.
        plan: Of one step.

    Returns:
        ``(batch, size, size, 3)``, float32, standardised.
    """
    size = images.shape[1]
    side = pad_margin(size)
    padded = jnp.pad(images[plan.which], ((0, 0), (side, side), (side, side), (0, 0)))

    def cut(image: jax.Array, flip: jax.Array, corner: jax.Array) -> jax.Array:
        view = jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, 3))
        return jnp.where(flip, view[:, ::-1], view)

    return standardise(jax.vmap(cut)(padded, plan.flip, plan.corner))


def standardise(images: jax.Array) -> jax.Array:
    """Converts ``uint8`` images to the inputs of a network, with ImageNet's mean and deviation."""
    return standardisation.standardise(images, *standardisation.channel_statistics({}))
