"""The pre-trained networks: trained once and stored, or read from given files."""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.common import pretrained, resnet
from examples.common.pretrained import Pretrained
from examples.common.resnet import Network, ResNetConfig
from examples.never_hurt import batches, images
from examples.never_hurt.images import Images

RANDOM_WEIGHTS = "random_weights"
"""An untrained network: fine-tuning from it is training from scratch."""
RANDOM_LABELS = "random_labels_"
"""The prefix of a data set whose labels are replaced by random ones."""


@dataclass(frozen=True)
class Pretraining:
    """The settings that a source is trained with."""

    source: str
    """A data set, or random_labels_ and a data set, or random_weights."""
    architecture: str
    """The network, see `examples.common.resnet`."""
    image_size: int
    """Height and width of its input, in pixels."""
    steps: int = 2500
    """Steps of SGD."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.1
    """The initial learning rate; it decays to 0 along a cosine."""
    weight_decay: float = 5e-4
    """Of all parameters."""
    seed: int = 0
    """Of weights, batches and random labels."""

    @property
    def file_name(self) -> str:
        """The name of the file of the network, which depends on all settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.source}-{self.architecture}-{self.image_size}px-{digest[:8]}.safetensors"


def is_file(source: str) -> bool:
    """Whether a source is a file of weights."""
    return source.endswith(".safetensors")


@functools.lru_cache(maxsize=8)
def obtain(pretraining: Pretraining, data: Path, kept: Path, weights: Path | None) -> Pretrained:
    """Loads a source; it is trained first if its file does not exist.

    Args:
        pretraining: The source and its settings.
        data: Has a folder of images for each data set.
        kept: The folder of the networks that are trained here.
        weights: The folder of the given files; None if there is none.

    Returns:
        The network, with its own head.

    Raises:
        ValueError: If a file has another architecture, or ``weights`` is needed and None.
    """
    if is_file(pretraining.source):
        if weights is None:
            raise ValueError(
                f"The source {pretraining.source} is a file: pass its folder by --weights."
            )
        source = pretrained.load(str(weights / pretraining.source))
        if source.config.architecture != pretraining.architecture:
            raise ValueError(
                f"{pretraining.source} is a {source.config.architecture}, but the cell needs a "
                f"{pretraining.architecture}."
            )
        return source
    file = kept / pretraining.file_name
    if not file.exists():
        config, network, metadata = train(pretraining, data)
        kept.mkdir(parents=True, exist_ok=True)
        pretrained.export(file, config, network, metadata=metadata)
    return pretrained.load(str(file))


def train(pretraining: Pretraining, data: Path) -> tuple[ResNetConfig, Network, dict[str, str]]:
    """Trains a source; returns the network and its accuracies."""
    if pretraining.source == RANDOM_WEIGHTS:
        config = ResNetConfig(pretraining.architecture, n_classes=10)
        return config, resnet.init(config, pretraining.seed), {}
    name = pretraining.source.removeprefix(RANDOM_LABELS)
    splits = images.read(data, name, pretraining.image_size)
    train_images = splits.train
    if pretraining.source != name:
        drawn = np.random.default_rng(pretraining.seed).permutation(train_images.labels)
        train_images = train_images._replace(labels=drawn)
    config = ResNetConfig(pretraining.architecture, splits.n_classes)
    network = _sgd(pretraining, config, train_images)
    accuracies = {
        "train_accuracy": accuracy(config, network, train_images),
        "held_out_accuracy": accuracy(config, network, splits.test),
    }
    return config, network, {name: f"{value:.4f}" for name, value in accuracies.items()}


def _sgd(pretraining: Pretraining, config: ResNetConfig, train_images: Images) -> Network:
    rate = optax.cosine_decay_schedule(pretraining.learning_rate, pretraining.steps)
    optimizer = optax.chain(
        optax.add_decayed_weights(pretraining.weight_decay), optax.sgd(rate, momentum=0.9)
    )
    plan = batches.draw(
        len(train_images.labels),
        pretraining.image_size,
        pretraining.batch_size,
        pretraining.steps,
        (pretraining.seed,),
    )
    everything = jax.tree.map(jnp.asarray, train_images)

    @jax.jit
    def step(network: Network, opt_state: optax.OptState, views: batches.Plan):
        def loss(params):
            output = resnet.apply(
                config,
                network._replace(params=params),
                batches.views(everything.images, views),
                train=True,
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                output.logits, everything.labels[views.which]
            )
            return losses.mean(), output.batch_stats

        grads, batch_stats = jax.grad(loss, has_aux=True)(network.params)
        updates, opt_state = optimizer.update(grads, opt_state, network.params)
        return Network(optax.apply_updates(network.params, updates), batch_stats), opt_state

    network = resnet.init(config, pretraining.seed)
    opt_state = optimizer.init(network.params)
    for i in range(pretraining.steps):
        network, opt_state = step(network, opt_state, jax.tree.map(lambda x, i=i: x[i], plan))
    return network


class Score(NamedTuple):
    """The accuracy of a network on some images, 0 to 1, and its mean loss."""

    accuracy: float
    loss: float


def accuracy(config: ResNetConfig, network: Network, held_out: Images) -> float:
    """The share of images that a network classifies correctly, in evaluation mode."""
    return score(config, network, held_out).accuracy


def score(config: ResNetConfig, network: Network, held_out: Images, chunk: int = 256) -> Score:
    """Evaluates a network in evaluation mode, on so many images at once."""
    n = len(held_out.labels)
    right, loss = 0, 0.0
    for start in range(0, n, chunk):
        part = jax.tree.map(lambda x, start=start: x[start : start + chunk], held_out)
        filled = jax.tree.map(
            lambda x: np.concatenate([x, np.zeros((chunk - len(x), *x.shape[1:]), x.dtype)]), part
        )
        is_right, losses = _outcomes(config, network, filled)
        right += int(np.sum(np.asarray(is_right)[: len(part.labels)]))
        loss += float(np.sum(np.asarray(losses, np.float64)[: len(part.labels)]))
    return Score(right / n, loss / n)


@functools.partial(jax.jit, static_argnums=0)
def _outcomes(config: ResNetConfig, network: Network, of: Images) -> tuple[jax.Array, jax.Array]:
    logits = resnet.apply(config, network, batches.standardise(of.images), train=False).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, of.labels)
    return jnp.argmax(logits, axis=-1) == of.labels, losses
