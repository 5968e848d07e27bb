"""The order of training images."""

import numpy as np


def draw_batches(
    n_images: int, batch_size: int, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws the images of each step, by index.

    In each epoch every image comes once, in a new order. A batch may span two epochs.

    Args:
        n_images: How many images there are.
        batch_size: Images in a step.
        steps: The number of steps.
        rng: The source of randomness.

    Returns:
        Indices, ``(steps, batch_size)``.
    """
    n = steps * batch_size
    epochs = [rng.permutation(n_images) for _ in range(-(-n // n_images))]
    return np.concatenate(epochs)[:n].reshape(steps, batch_size)
