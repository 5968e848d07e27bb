"""The mean and standard deviation that a network's images are standardised by."""

import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def channel_statistics(
    metadata: Mapping[str, str], **chosen: tuple[float, float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation of each channel, in the scale from 0 to 1.

    Args:
        metadata: The header of a weights file, with ``mean`` and ``std`` as JSON if it has them.
        **chosen: ``mean`` and ``std`` that take precedence over the header.

    Returns:
        Two arrays ``(1, 1, 1, 3)``. ImageNet's are the default.

    Raises:
        ValueError: If the header has something else than three numbers.
    """

    def of(name: str) -> np.ndarray:
        try:
            value = chosen.get(name) or json.loads(metadata.get(name, "null")) or IMAGENET[name]
            return np.array(value, np.float32).reshape(1, 1, 1, 3)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} in the header of the weights must be three numbers; got {metadata[name]}."
            ) from error

    return of("mean"), of("std")


def standardise(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Converts ``uint8`` images to the ``float32`` inputs of a network."""
    return (images.astype(jnp.float32) / 255 - mean) / std
