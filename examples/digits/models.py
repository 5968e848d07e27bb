"""A small ResNet for grayscale images in Flax NNX, used as pure functions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common.resnet import Network
from examples.digits.data import N_CLASSES


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(width_in, width_out, 3, stride, rngs)
        self.norm1 = _norm(width_out, rngs)
        self.conv2 = _conv(width_out, width_out, 3, 1, rngs)
        self.norm2 = _norm(width_out, rngs)
        is_identity = stride == 1 and width_in == width_out
        self.shortcut = None if is_identity else _conv(width_in, width_out, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(n, height, width, channels)`` to the same layout, smaller by the stride."""
        residual = nnx.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return nnx.relu(residual + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A stem, three basic blocks and a linear head."""

    def __init__(self, widths: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.stem_conv = _conv(1, widths[0], 3, 1, rngs)
        self.stem_norm = _norm(widths[0], rngs)
        self.block1 = BasicBlock(widths[0], widths[0], 1, rngs=rngs)
        self.block2 = BasicBlock(widths[0], widths[1], 2, rngs=rngs)
        self.block3 = BasicBlock(widths[1], widths[2], 2, rngs=rngs)
        self.head = nnx.Linear(widths[2], N_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, ``(n, 10)``, of ``(n, 8, 8, 1)`` images."""
        x = nnx.relu(self.stem_norm(self.stem_conv(images)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))


def init(widths: tuple[int, int, int], seed: int) -> Network:
    """Makes a network with random weights."""
    model = ResNet(widths, rngs=nnx.Rngs(seed))
    return Network(_as_dicts(model, nnx.Param), batch_stats(model))


def build(network: Network, widths: tuple[int, int, int]) -> ResNet:
    """Makes the NNX module that has the arrays of ``network``."""
    without_arrays = nnx.eval_shape(lambda: ResNet(widths, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(without_arrays), network.params, network.batch_stats)


def batch_stats(model: ResNet) -> Any:
    """The running averages of batch norm."""
    return _as_dicts(model, nnx.BatchStat)


def _as_dicts(model: ResNet, kind: type[nnx.Variable]) -> Any:
    return nnx.to_pure_dict(nnx.state(model, kind))


def _conv(width_in: int, width_out: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(width_in, width_out, (size, size), strides=stride, use_bias=False, rngs=rngs)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # A fine-tuning of a few hundred steps is too short for running averages of the usual 0.99.
    return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
