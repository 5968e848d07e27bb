"""ResNets in Flax NNX that match torchvision, used as pure functions."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Plan(NamedTuple):
    """The structure of an architecture.

    Attributes:
        blocks: The number of residual blocks of each stage.
        bottleneck: Whether a block has 1×1, 3×3 and 1×1 convolutions instead of two 3×3 ones.
        cifar: Whether it is a network for small images: a 3×3 stem without pooling, fewer
            channels, and shortcuts without parameters.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = False
    cifar: bool = False


IMAGENET_PLANS = {
    "resnet18": Plan((2, 2, 2, 2)),
    "resnet34": Plan((3, 4, 6, 3)),
    "resnet50": Plan((3, 4, 6, 3), bottleneck=True),
    "resnet101": Plan((3, 4, 23, 3), bottleneck=True),
    "resnet152": Plan((3, 8, 36, 3), bottleneck=True),
}


def plan_of(architecture: str) -> Plan:
    """Looks an architecture up by its name.

    Raises:
        ValueError: If there is no such architecture.
    """
    if architecture in IMAGENET_PLANS:
        return IMAGENET_PLANS[architecture]
    depth = re.fullmatch(r"cifar_resnet([1-9]\d*)", architecture)
    if depth and int(depth[1]) % 6 == 2 and int(depth[1]) >= 8:
        return Plan((int(depth[1]) // 6,) * 3, cifar=True)
    raise ValueError(
        f"architecture must be one of {', '.join(IMAGENET_PLANS)}, or cifar_resnetN with "
        f"N = 6n+2 (8, 14, 20, 32, 44, 56, 110, ...); got {architecture!r}."
    )


@dataclass(frozen=True)
class ResNetConfig:
    """A ResNet without its weights."""

    architecture: str
    """resnet18, 34, 50, 101 or 152, or cifar_resnetN with N = 6n+2."""
    n_classes: int
    """Number of logits."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations. Parameters and statistics are float32."""
    frozen_batch_norm: bool = False
    """Use and keep the running averages of batch norm in training, too."""
    width: int | None = None
    """Channels of the first stage; by default 64, and 16 for CIFAR."""

    def __post_init__(self) -> None:
        plan_of(self.architecture)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16; got {self.dtype!r}.")
        for name in ("n_classes", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")

    @property
    def plan(self) -> Plan:
        """The structure of the architecture."""
        return plan_of(self.architecture)

    @property
    def first_width(self) -> int:
        """Channels of the first stage."""
        return self.width or (16 if self.plan.cifar else 64)

    @property
    def last_width(self) -> int:
        """Channels of the input of the head."""
        return self.first_width * 2 ** (len(self.plan.blocks) - 1) * self.expansion

    @property
    def expansion(self) -> int:
        """The width of a block's output relative to its 3×3 convolution."""
        return 4 if self.plan.bottleneck else 1


class Network(NamedTuple):
    """A network as two nested dicts of float32 arrays, with torchvision's names as keys.

    Attributes:
        params: The trainable arrays, such as ``params["layer1"]["0"]["conv1"]["kernel"]``;
            the last layer is ``params["head"]``.
        batch_stats: The running averages of batch norm, ``"mean"`` and ``"var"``.
    """

    params: Any
    batch_stats: Any


class Output(NamedTuple):
    """The output of a forward pass.

    Attributes:
        logits: ``(n, n_classes)``, float32.
        features: By name, in the order of `feature_names`: the output ``(n, h, w, channels)`` of
            every convolution and batch norm (``"layer1/0/conv2"``), block (``"layer1/0"``) and
            stage (``"layer1"``); and ``"pooled"``, ``(n, channels)``, float32, the input of the
            head.
        batch_stats: The running averages after the pass.
    """

    logits: jax.Array
    features: dict[str, jax.Array]
    batch_stats: Any


def init(config: ResNetConfig, seed: int | jax.Array) -> Network:
    """Makes a network with random weights from the distributions of torchvision.

    Args:
        config: The network.
        seed: A number, or a key of `jax.random`.

    Returns:
        The network, which is determined by the seed.
    """
    model = ResNet(config, rngs=nnx.Rngs(seed))
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return Network(nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats))


def init_head(config: ResNetConfig, seed: int | jax.Array) -> dict[str, jax.Array]:
    """Draws only the last layer: ``kernel`` ``(channels, n_classes)`` and ``bias``."""
    return nnx.to_pure_dict(nnx.state(_head(config, nnx.Rngs(seed)), nnx.Param))


def apply(config: ResNetConfig, network: Network, images: jax.Array, *, train: bool) -> Output:
    """Runs a network on images.

    A pure function, for `jax.jit` with ``config`` and ``train`` static. Under `jax.jit` a batch may
    be sharded over devices: batch norm computes its statistics over the whole batch.

    Args:
        config: The network.
        network: Its arrays.
        images: ``(n, height, width, 3)``, floating point, normalized; any height and width.
        train: Whether batch norm normalizes by the batch and updates its running averages, which
            ``config.frozen_batch_norm`` prevents.

    Returns:
        Logits, features and running averages.

    Raises:
        TypeError: If images are not floating point.
        ValueError: If images have another shape, or batch norm gets only one value per channel.
    """
    model = build(config, network)
    if train:
        model.train()
    else:
        model.eval()
    logits, features = model.with_features(images)
    return Output(logits, features, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


def head_logits(head: Any, pooled: jax.Array) -> jax.Array:
    """Applies a head, of this network or another, to ``(n, channels)`` pooled features."""
    return pooled @ head["kernel"] + head["bias"][None]


def layer_names(config: ResNetConfig) -> tuple[str, ...]:
    """Names the layers that have parameters, from the image to the logits."""
    return _blueprint(config).layers


def feature_names(config: ResNetConfig) -> tuple[str, ...]:
    """Names everything in ``Output.features``, from the image to the logits."""
    return _blueprint(config).features


def build(config: ResNetConfig, network: Network) -> "ResNet":
    """Makes the NNX module that has the arrays of ``network``."""
    return nnx.merge(_blueprint(config).graphdef, network.params, network.batch_stats)


class BatchNorm(nnx.Module):
    """Batch norm as in PyTorch, in float32 for any dtype of activations.

    `nnx.BatchNorm` computes in the dtype of activations, and averages the biased variance.
    """

    momentum = 0.9
    epsilon = 1e-5

    def __init__(self, width: int, frozen: bool):
        self.frozen = frozen
        self.use_running_average = False  # set by train() and eval() of the module
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(width, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes each channel of ``(n, height, width, channels)``."""
        x32 = x.astype(jnp.float32)
        if self.use_running_average or self.frozen:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = jnp.mean(x32, axis=(0, 1, 2)), jnp.var(x32, axis=(0, 1, 2))
            self._remember(mean, var, x.size // x.shape[-1])
        mean, var, scale, bias = (
            each[None, None, None] for each in (mean, var, self.scale[...], self.bias[...])
        )
        return ((x32 - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(x.dtype)

    def _remember(self, mean: jax.Array, var: jax.Array, n_values: int) -> None:
        if n_values < 2:
            raise ValueError(
                "Batch norm in training needs at least two values per channel, and got one: a "
                "single image, of one pixel here. Use a larger batch or image, or "
                "frozen_batch_norm=True."
            )
        for average, value in (self.mean, mean), (self.var, var * (n_values / (n_values - 1))):
            average[...] = self.momentum * average[...] + (1 - self.momentum) * value


class Block(nnx.Module):
    """Two or three convolutions and a shortcut."""

    def __init__(
        self, width_in: int, width: int, stride: int, config: ResNetConfig, rngs: nnx.Rngs
    ):
        width_out = width * config.expansion
        # Width, kernel size and stride of each convolution. torchvision puts the stride of a
        # bottleneck on its 3×3 convolution ("v1.5"), the paper on the first.
        convs = (
            ((width, 1, 1), (width, 3, stride), (width_out, 1, 1))
            if config.plan.bottleneck
            else ((width, 3, stride), (width_out, 3, 1))
        )
        self.n_convs = len(convs)
        self.stride, self.width_out = stride, width_out
        last_width = width_in
        for i, (channels, size, conv_stride) in enumerate(convs, start=1):
            conv = _conv(last_width, channels, size, conv_stride, config, rngs)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", BatchNorm(channels, config.frozen_batch_norm))
            last_width = channels
        if config.plan.cifar or (stride == 1 and width_in == width_out):
            self.downsample = None
        else:
            conv = _conv(width_in, width_out, 1, stride, config, rngs)
            norm = BatchNorm(width_out, config.frozen_batch_norm)
            self.downsample = nnx.Dict({"0": conv, "1": norm})

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the output and all features of ``(n, height, width, channels)``."""
        features = {}
        residual = x
        for i in range(1, self.n_convs + 1):
            residual = features[f"conv{i}"] = getattr(self, f"conv{i}")(residual)
            residual = features[f"bn{i}"] = getattr(self, f"bn{i}")(residual)
            if i < self.n_convs:
                residual = nnx.relu(residual)
        if self.downsample is None:
            shortcut = _shortcut_without_parameters(x, self.stride, self.width_out)
        else:
            shortcut = features["downsample/0"] = self.downsample["0"](x)
            shortcut = features["downsample/1"] = self.downsample["1"](shortcut)
        return nnx.relu(residual + shortcut), features


class ResNet(nnx.Module):
    """A ResNet: a stem, stages of residual blocks, and a linear head."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        stem_size, stem_stride = (3, 1) if config.plan.cifar else (7, 2)
        width_in = config.first_width
        self.conv1 = _conv(3, width_in, stem_size, stem_stride, config, rngs)
        self.bn1 = BatchNorm(width_in, config.frozen_batch_norm)
        for stage, n_blocks in enumerate(config.plan.blocks):
            width = config.first_width * 2**stage
            blocks = {}
            for i in range(n_blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks[str(i)] = Block(width_in, width, stride, config, rngs)
                width_in = width * config.expansion
            setattr(self, f"layer{stage + 1}", Stage(blocks))
        self.head = _head(config, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``(n, n_classes)`` of ``(n, height, width, 3)`` images."""
        return self.with_features(images)[0]

    def with_features(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits, and every feature by its name."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images must have the shape (n, height, width, 3); got {images.shape}."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"images must be floating point, scaled and normalized; got {images.dtype}."
            )
        features = {}
        x = features["conv1"] = self.conv1(images)
        x = features["bn1"] = self.bn1(x)
        x = nnx.relu(x)
        if not self.config.plan.cifar:
            x = _max_pool(x)
        for stage, n_blocks in enumerate(self.config.plan.blocks, start=1):
            for i in range(n_blocks):
                path = f"layer{stage}/{i}"
                x, of_block = getattr(self, f"layer{stage}")[str(i)](x)
                features |= {f"{path}/{name}": feature for name, feature in of_block.items()}
                features[path] = x
            features[f"layer{stage}"] = x
        pooled = features["pooled"] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self.head(pooled), features


class Stage(nnx.Dict):
    """Blocks by their numbers."""


def _conv(
    width_in: int, width_out: int, size: int, stride: int, config: ResNetConfig, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        width_in,
        width_out,
        (size, size),
        strides=stride,
        padding=size // 2,  # on every side, which "SAME" is not when the stride is 2
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.variance_scaling(2, "fan_out", "normal"),
        rngs=rngs,
    )


def _max_pool(x: jax.Array) -> jax.Array:
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


def _head(config: ResNetConfig, rngs: nnx.Rngs) -> nnx.Linear:
    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any, out_sharding=None) -> jax.Array:
        bound = config.last_width**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        config.last_width, config.n_classes, kernel_init=uniform, bias_init=uniform, rngs=rngs
    )


def _shortcut_without_parameters(x: jax.Array, stride: int, width_out: int) -> jax.Array:
    """Option A of the paper: every ``stride``-th pixel, and zeros for the new channels."""
    new = width_out - x.shape[-1]
    sides = (new // 2, new - new // 2)
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), sides))


class _Blueprint(NamedTuple):
    graphdef: Any
    layers: tuple[str, ...]
    features: tuple[str, ...]


@functools.cache
def _blueprint(config: ResNetConfig) -> _Blueprint:
    names = []

    def model() -> ResNet:
        model = ResNet(config, rngs=nnx.Rngs(0))
        names.extend(_names(model))
        return model

    graphdef = nnx.graphdef(nnx.eval_shape(model))
    layers = tuple(name for name, kind in names if kind not in (Block, Stage))
    features = tuple(name for name, kind in names if kind is not nnx.Linear)
    return _Blueprint(graphdef, layers, (*features, "pooled"))


def _names(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, type]]:
    for name, child in vars(module).items():
        if isinstance(child, nnx.Module):
            yield from _names(child, f"{prefix}{name}/")
            if type(child) is not nnx.Dict:
                yield f"{prefix}{name}", type(child)
