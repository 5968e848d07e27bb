"""The augmented images of each step: drawn ahead of training, cut out on the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.common import standardisation
from examples.common.data import pad_margin
from examples.common.epochs import draw_batches
from examples.never_hurt.cell import Cell

TRIAL_VIEWS = 8
"""Views of each held-out image that a trial run is judged by."""


class Plan(NamedTuple):
    """The views of one step, or of all steps along a first axis.

    Attributes:
        which: The indices of the images, ``(n,)``, int32.
        flip: Whether left and right are swapped, ``(n,)``, bool.
        corner: The corner of the crop in the padded image, ``(n, 2)``, int32.
    """

    which: Any
    flip: Any
    corner: Any


def draw(n_images: int, image_size: int, batch_size: int, steps: int, seed: Sequence[int]) -> Plan:
    """Draws the views of all steps."""
    rng = np.random.default_rng([*seed, 1])
    which = draw_batches(n_images, batch_size, steps, rng).astype(np.int32)
    flip = rng.random(which.shape) < 0.5
    n_corners = 2 * pad_margin(image_size) + 1
    return Plan(which, flip, rng.integers(n_corners, size=(*which.shape, 2), dtype=np.int32))


class Schedule(NamedTuple):
    """The images of one step, or of all, with the steps as a first axis.

    Attributes:
        train: What is trained on.
        held_out: The images that the held-out gradient is computed on; None without.
    """

    train: Plan
    held_out: Plan | None


def schedule(cell: Cell, labels: np.ndarray) -> Schedule:
    """Draws the images of all steps of a cell.

    Of each class, ``cell.held_out`` images are drawn by the seed and not trained on, until
    ``cell.returned_at``; from there on all images are trained on, and no held-out gradient is
    computed any more. With trial runs, the run itself trains on all images.
    """
    everything = np.arange(len(labels))
    size, batch_size, seed = cell.image_size, cell.batch_size, (cell.seed, cell.order)
    if not cell.held_out or cell.trial:
        train = draw(len(labels), size, batch_size, cell.steps, seed)
        return Schedule(train, None)
    apart = round(cell.returned_at * cell.steps)
    held_out = held_out_images(cell, labels)
    train = _without(held_out, cell, labels, apart)
    if apart < cell.steps:
        returned = _of(everything, size, batch_size, cell.steps - apart, (*seed, 4))
        train = Plan(*(np.concatenate(parts) for parts in zip(train, returned, strict=True)))
    return Schedule(
        train, _of(held_out, size, min(batch_size, len(held_out)), cell.steps, (*seed, 5))
    )


def trial_schedule(cell: Cell, labels: np.ndarray) -> tuple[Schedule, Plan]:
    """Draws the images of a trial run, and the views of held-out images that it is judged by."""
    steps = max(1, round(cell.trial * cell.steps))
    held_out = held_out_images(cell, labels)
    train = _without(held_out, cell, labels, steps)
    views = _of(held_out, cell.image_size, len(held_out), TRIAL_VIEWS, (cell.seed, cell.order, 6))
    return Schedule(train, None), Plan(*(each.reshape(-1, *each.shape[2:]) for each in views))


def held_out_images(cell: Cell, labels: np.ndarray) -> np.ndarray:
    """The indices of the training images of each class that are held out."""
    rng = np.random.default_rng((cell.seed, 2))
    return np.concatenate(
        [
            rng.permutation(np.flatnonzero(labels == each))[: cell.held_out]
            for each in np.unique(labels)
        ]
    )


def _without(held_out: np.ndarray, cell: Cell, labels: np.ndarray, steps: int) -> Plan:
    which = np.setdiff1d(np.arange(len(labels)), held_out)
    return _of(which, cell.image_size, cell.batch_size, steps, (cell.seed, cell.order, 3))


def _of(which: np.ndarray, size: int, batch_size: int, steps: int, seed: Sequence[int]) -> Plan:
    plan = draw(len(which), size, batch_size, steps, seed)
    return plan._replace(which=which[plan.which].astype(np.int32))


def views(images: jax.Array, plan: Plan) -> jax.Array:
    """Makes the views of one step.

    Args:
        images: All images, ``(n, size, size, 3)``, uint8.
        plan: The plan of the step.

    Returns:
        The views, ``(batch, size, size, 3)``, float32, standardised.
    """
    size = images.shape[1]
    side = pad_margin(size)
    padded = jnp.pad(images[plan.which], ((0, 0), (side, side), (side, side), (0, 0)))

    def cut(image: jax.Array, flip: jax.Array, corner: jax.Array) -> jax.Array:
        view = jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, 3))
        return jnp.where(flip, view[:, ::-1], view)

    return standardise(jax.vmap(cut)(padded, plan.flip, plan.corner))


def standardise(images: Any) -> jax.Array:
    """Converts ``uint8`` images to the inputs of a network, with ImageNet's mean and deviation."""
    return standardisation.standardise(images, *standardisation.channel_statistics({}))
