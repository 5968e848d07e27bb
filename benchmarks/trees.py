"""Parameter trees with the shapes of real networks."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.common import resnet
from examples.common.resnet import ResNetConfig

VITS = {"vit_b": (768, 12), "vit_l": (1024, 24)}


def tree(name: str) -> Any:
    """The shapes of a tree.

    Args:
        name: A ResNet of the examples, with 1000 classes; ``vit_b`` or ``vit_l``, for images of
            224 px in patches of 16; ``300M``, a few large matrices; or ``small_N``, N small leaves.

    Returns:
        Nested dicts of ``jax.ShapeDtypeStruct``, float32.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in VITS:
        return vit(*VITS[name])
    if name == "300M":
        return {f"layer{i:02}": {"kernel": _array(5000, 5000)} for i in range(12)}
    if small := re.fullmatch(r"small_([1-9]\d*)", name):
        return small_leaves(int(small[1]))
    try:
        config = ResNetConfig(name, n_classes=1000)
    except ValueError:
        raise ValueError(
            f"A tree must be a ResNet such as resnet50, or vit_b, vit_l, 300M or small_N (N "
            f"leaves); got {name!r}."
        ) from None
    return jax.eval_shape(lambda: resnet.init(config, 0)).params


def vit(width: int, depth: int) -> Any:
    """The parameters of a vision transformer."""

    def linear(n_in: int, n_out: int) -> Any:
        return {"kernel": _array(n_in, n_out), "bias": _array(n_out)}

    def norm() -> Any:
        return {"scale": _array(width), "bias": _array(width)}

    def block() -> Any:
        return {
            "norm1": norm(),
            "qkv": linear(width, 3 * width),
            "projection": linear(width, width),
            "norm2": norm(),
            "mlp1": linear(width, 4 * width),
            "mlp2": linear(4 * width, width),
        }

    return {
        "patches": {"kernel": _array(16, 16, 3, width), "bias": _array(width)},
        "class": _array(1, 1, width),
        "positions": _array(1, 14 * 14 + 1, width),
        "blocks": {f"{i:02}": block() for i in range(depth)},
        "norm": norm(),
        "head": linear(width, 1000),
    }


def small_leaves(n_leaves: int) -> Any:
    """Layers with a small kernel and a bias, with ``n_leaves`` leaves in total."""
    layers: dict[str, Any] = {}
    for i in range(n_leaves):
        name, shape = ("kernel", (32, 32)) if i % 2 == 0 else ("bias", (32,))
        layers.setdefault(f"layer{i // 2:04}", {})[name] = _array(*shape)
    return layers


def random_like(shapes: Any, seed: int) -> Any:
    """A tree of normal random numbers with these shapes and dtypes, on the device."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)),
        shapes,
    )


def n_bytes(shapes: Any) -> int:
    """The size of a tree in bytes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
