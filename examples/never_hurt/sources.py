"""The networks that fine-tuning starts from: trained here once and kept, or given as files."""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
"""Never trained: fine-tuning from it is training from scratch."""
RANDOM_LABELS = "random_labels_"
"""Before the name of a data set: its images, each with a label that was drawn."""


@dataclass(frozen=True)
class Pretraining:
    """How a source is trained."""

    source: str
    """A data set, or random_labels_ and a data set, or random_weights."""
    architecture: str
    """Of the network."""
    image_size: int
    """Height and width of what it sees, in pixels."""
    steps: int = 2500
    """Steps of SGD."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.1
    """At the beginning; it falls to 0 along a cosine."""
    weight_decay: float = 5e-4
    """Of all parameters."""
    seed: int = 0
    """Of weights, batches and random labels."""

    @property
    def file_name(self) -> str:
        """What its network is kept as: another one for other settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.source}-{self.architecture}-{self.image_size}px-{digest[:8]}.safetensors"


def is_file(source: str) -> bool:
    """Whether a source is a file of weights."""
    return source.endswith(".safetensors")


@functools.lru_cache(maxsize=8)
def obtain(pretraining: Pretraining, data: Path, kept: Path, weights: Path | None) -> Pretrained:
    """Loads a source, which is trained first if it is not there.

    Args:
        pretraining: Which source, and how it is trained.
        data: Has a folder of images for each data set.
        kept: Where trained networks are kept.
        weights: Where files of weights are.

    Returns:
        The network, with its own head.

    Raises:
        ValueError: If a file is not of the architecture, or there is no place for files.
    """
    if is_file(pretraining.source):
        if weights is None:
            raise ValueError(f"The source {pretraining.source} is a file: say where, by --weights.")
        source = pretrained.load(str(weights / pretraining.source))
        if source.config.architecture != pretraining.architecture:
            raise ValueError(
                f"{pretraining.source} is a {source.config.architecture}, the cell a "
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
    """Trains a source; the last is what it came to."""
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


def accuracy(config: ResNetConfig, network: Network, held_out: Images, chunk: int = 256) -> float:
    """The share of images that a network gets right, on its running averages."""
    n = len(held_out.labels)
    right = 0
    for start in range(0, n, chunk):
        part = held_out.images[start : start + chunk]
        filled = np.zeros((chunk, *part.shape[1:]), np.uint8)
        filled[: len(part)] = part
        guesses = np.asarray(_guess(config, network, filled))[: len(part)]
        right += int(np.sum(guesses == held_out.labels[start : start + chunk]))
    return right / n


@functools.partial(jax.jit, static_argnums=0)
def _guess(config: ResNetConfig, network: Network, of: jax.Array) -> jax.Array:
    logits = resnet.apply(config, network, batches.standardise(of), train=False).logits
    return jnp.argmax(logits, axis=-1)
