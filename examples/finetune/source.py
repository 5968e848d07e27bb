"""The pre-trained network, and what some regularizers estimate from it before training."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtnh_jax import regularizers
from examples.common import data, pretrained, resnet
from examples.common.data import Dataset
from examples.common.objective import (
    REGULARIZERS,
    Params,
    cross_entropy,
    default_features,
)
from examples.common.pretrained import Pretrained
from examples.common.resnet import Network, ResNetConfig
from examples.common.standardisation import standardise
from examples.finetune.config import Config, TransferConfig

# Images that go through the network at once in an estimation.
ESTIMATION_BATCH = 32
# Networks for CIFAR are applied to larger images with a warning.
LARGEST_FOR_CIFAR = 96
# Regularizers that use the head of the pre-trained network. Others do without.
OF_THE_OLD_HEAD = (
    "co_tuning",
    "distillation",
    "l2_sp_fisher",
    "label_smoothing",
    "logit_matching",
)
# Standardised images and their labels, the same ones at each call.
EstimationBatches = Callable[[], Iterator[tuple[jax.Array, jax.Array]]]


class Source(NamedTuple):
    """What a training step reads of the pre-trained network.

    Attributes:
        network: Its arrays with its own head; in training from scratch, the initial weights.
        estimates: Fields of ``RegularizerInputs`` that were estimated before training.
    """

    network: Network
    estimates: dict[str, Any]


def load_source(config: Config, n_classes: int) -> Pretrained:
    """Loads the pre-trained network; without one, initializes the network that is trained.

    Raises:
        ValueError: If no network is given, or the settings contradict its weights.
    """
    chosen, regularizer = config.model, config.transfer.regularizer
    if chosen.init is not None:
        source = pretrained.load(chosen.init, needs_head=regularizer in OF_THE_OLD_HEAD)
        size = config.data.image_size
        if source.config.plan.cifar and size > LARGEST_FOR_CIFAR:
            warnings.warn(
                f"{source.config.architecture} is a network for images of 32 pixels, and "
                f"image_size is {size}: use --preset cpu, or --image-size 32.",
                stacklevel=2,
            )
        if chosen.architecture not in (None, source.config.architecture) or chosen.width:
            raise ValueError(
                f"The weights in {chosen.init} are of {source.config.architecture}: omit "
                "--architecture and --width."
            )
        return source._replace(config=dataclasses.replace(source.config, dtype=chosen.dtype))
    if chosen.architecture is None:
        raise ValueError(
            "Give pre-trained weights, such as --init timm/resnet50.a1_in1k or a .safetensors "
            "file; or, to train from scratch, an architecture, such as --architecture resnet50."
        )
    if not {"source_params", "source_output"}.isdisjoint(REGULARIZERS[regularizer].needs):
        raise ValueError(
            f"The regularizer {regularizer} needs a pre-trained network: give its weights with "
            "--init, or use --regularizer none."
        )
    model = ResNetConfig(chosen.architecture, n_classes, dtype=chosen.dtype, width=chosen.width)
    return Pretrained(model, resnet.init(model, config.training.seed), {})


def with_features(transfer: TransferConfig, model: ResNetConfig) -> TransferConfig:
    """Fills in the default feature maps, or checks those that are given.

    Raises:
        ValueError: If the network has no such feature map.
    """
    names = resnet.feature_names(model)
    if unknown := [name for name in transfer.features if name not in names]:
        raise ValueError(f"No feature maps: {', '.join(unknown)}. There are {', '.join(names)}.")
    features = transfer.features or default_features(transfer.regularizer, model)
    return dataclasses.replace(transfer, features=features)


def estimate(
    source: Pretrained, config: Config, dataset: Dataset, mean: np.ndarray, std: np.ndarray
) -> dict[str, Any]:
    """Estimates the fields of ``RegularizerInputs`` that are constant during training.

    Args:
        source: The pre-trained network.
        config: The settings, with the feature maps of the regularizer.
        dataset: The training images are estimated from.
        mean: Mean of the channels, ``(1, 1, 1, 3)``.
        std: Standard deviation of the channels.

    Returns:
        The fields by name; empty for most regularizers.
    """

    def batches() -> Iterator[tuple[jax.Array, jax.Array]]:
        for images, labels in _estimation_images(config, dataset):
            yield standardise(jnp.asarray(images), mean, std), jnp.asarray(labels)

    regularizer, n_classes = config.transfer.regularizer, len(dataset.class_names)
    if regularizer == "l2_sp_fisher":
        return {"fisher": _fisher(source, batches, jax.random.key(config.training.seed))}
    if regularizer == "co_tuning":
        logits, _, labels = _outputs(source, batches)
        return {"relationship": regularizers.co_tuning_relationship(logits, labels, n_classes)}
    if regularizer == "delta_attention":
        features = config.transfer.features
        return {"channel_weights": _channel_weights(source, batches, features, n_classes)}
    return {}


def _fisher(source: Pretrained, batches: EstimationBatches, key: jax.Array) -> Params:
    # The labels of the source task are unknown. With labels drawn from the network's own
    # probabilities, the empirical Fisher is an unbiased estimate of the true one.
    predict = _forward(source)

    def drawn() -> Iterator[tuple[jax.Array, jax.Array]]:
        for number, (images, _) in enumerate(batches()):
            logits = predict(source.network, images).logits
            yield images, jax.random.categorical(jax.random.fold_in(key, number), logits)

    def logits_fn(params: Params, images: jax.Array) -> jax.Array:
        return predict(source.network._replace(params=params), images).logits

    return regularizers.fisher_diagonal(logits_fn, source.network.params, drawn(), chunk_size=8)


def _channel_weights(
    source: Pretrained, batches: EstimationBatches, features: tuple[str, ...], n_classes: int
) -> Any:
    _, pooled, labels = _outputs(source, batches)
    head = fit_head(pooled, labels, n_classes)
    network = source.network._replace(params=source.network.params | {"head": head})
    predict = _forward(source)

    def loss_fn(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        return cross_entropy(predict(network._replace(params=params), images).logits, labels)

    kernels = {name: f"{name}/kernel" for name in features}
    return regularizers.delta_channel_weights(loss_fn, network.params, batches(), kernels)


def fit_head(features: jax.Array, labels: jax.Array, n_classes: int, steps: int = 300) -> Params:
    """Fits a linear head to constant features ``(n, channels)`` with Adam."""
    optimizer = optax.adam(0.01)
    head = {"kernel": jnp.zeros((features.shape[1], n_classes)), "bias": jnp.zeros(n_classes)}

    @jax.jit
    def step(head: Params, state: Any) -> tuple[Params, Any]:
        grads = jax.grad(lambda head: cross_entropy(resnet.head_logits(head, features), labels))(
            head
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(head, updates), state

    state = optimizer.init(head)
    for _ in range(steps):
        head, state = step(head, state)
    return head


def _forward(source: Pretrained) -> Callable[[Network, jax.Array], resnet.Output]:
    """The source's forward pass in inference mode, compiled."""
    return jax.jit(functools.partial(resnet.apply, source.config, train=False))


def _outputs(
    source: Pretrained, batches: EstimationBatches
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, pooled features and labels of all images."""
    predict = _forward(source)
    outputs = []
    for images, labels in batches():
        output = predict(source.network, images)
        outputs.append((output.logits, output.features["pooled"], labels))
    logits, pooled, labels = (jnp.concatenate(each) for each in zip(*outputs, strict=True))
    return logits, pooled, labels


def _estimation_images(config: Config, dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A random sample of the training images with labels, in full batches.

    Images that are skipped count for nothing. Every process reads all of them, so that all
    processes get the same estimate.

    Raises:
        ValueError: If none can be read.
    """
    rng = np.random.default_rng(config.training.seed)
    n_images = min(config.transfer.estimation_images, len(dataset.train))
    sample = dataset.train.select(rng.permutation(len(dataset.train))[:n_images])
    size = min(ESTIMATION_BATCH, n_images)
    waiting, full = [], False
    for batch in data.evaluation_batches(sample, config.data, batch_size=size):
        waiting += list(zip(batch.images[batch.valid], batch.labels[batch.valid], strict=True))
        while len(waiting) >= size:
            full = True
            yield _stacked(waiting[:size])
            waiting = waiting[size:]
    if not full:
        if not waiting:
            raise ValueError(f"None of {n_images} training images can be read, for the estimates.")
        yield _stacked(waiting)


def _stacked(examples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*examples, strict=True)
    return np.stack(images), np.stack(labels)
