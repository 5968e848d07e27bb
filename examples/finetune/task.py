"""What stays the same during a run: the devices, the networks, and what is to be kept of them."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from examples.common import data, pretrained, resnet
from examples.common.data import Dataset
from examples.common.pretrained import Pretrained
from examples.common.resnet import Network, ResNetConfig
from examples.finetune import devices, objective
from examples.finetune.config import NEED_SOURCE, Config
from examples.finetune.objective import Source

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Images of an estimate that go through the network at once.
ESTIMATION_BATCH = 32


class Task(NamedTuple):
    """What stays the same during a run.

    Attributes:
        config: What the user chose, with the feature maps filled in.
        mesh: The devices.
        model: The network that is fine-tuned.
        first: Its weights before the first step.
        source_model: The network that is kept.
        source: Its weights and what was estimated from them, on every device.
        mean: Of the channels, from 0 to 1, ``(1, 1, 1, 3)``.
        std: Likewise.
    """

    config: Config
    mesh: Mesh
    model: ResNetConfig
    first: Network
    source_model: ResNetConfig
    source: Source
    mean: np.ndarray
    std: np.ndarray


def make_task(config: Config, dataset: Dataset) -> Task:
    """Lays out the devices, loads the weights, and estimates what the regularizer needs.

    Args:
        config: What the user chose.
        dataset: The images.

    Returns:
        The task.

    Raises:
        ValueError: If devices, weights, regularizer and data do not fit.
    """
    training, n_classes = config.training, len(dataset.class_names)
    mesh = devices.make_mesh(config.devices, training.batch_size // training.accumulate)
    source = load_source(config, n_classes)
    model, first = source.config, source.network
    if config.model.init is not None:
        model, first = pretrained.with_new_head(source, n_classes, training.seed)
    features = objective.resolve_features(config.transfer, model)
    transfer = dataclasses.replace(config.transfer, features=features)
    mean, std = (
        np.array(
            getattr(config.model, name)
            or json.loads(source.metadata.get(name, "null"))
            or IMAGENET[name],
            np.float32,
        ).reshape(1, 1, 1, 3)
        for name in ("mean", "std")
    )

    def batches() -> Iterator[tuple[jax.Array, jax.Array]]:
        for images, labels in estimation_images(config, dataset):
            yield objective.standardise(jnp.asarray(images), mean, std), jnp.asarray(labels)

    key = jax.random.key(training.seed)
    estimates = objective.estimate(source, transfer, n_classes, batches, key)
    kept = Source(source.network, estimates)
    return Task(
        config=dataclasses.replace(config, transfer=transfer),
        mesh=mesh,
        model=dataclasses.replace(model, frozen_batch_norm=config.model.frozen_batch_norm),
        first=first,
        source_model=source.config,
        source=devices.place(kept, jax.tree.map(lambda _: devices.replicated(mesh), kept)),
        mean=mean,
        std=std,
    )


def load_source(config: Config, n_classes: int) -> Pretrained:
    """The pre-trained network; without one, the first weights of the new network.

    Raises:
        ValueError: If there is no network, or it is another than the one that was asked for.
    """
    chosen, regularizer = config.model, config.transfer.regularizer
    if chosen.init is not None:
        source = pretrained.load(chosen.init)
        if chosen.architecture not in (None, source.config.architecture) or chosen.width:
            raise ValueError(
                f"The weights in {chosen.init} are of {source.config.architecture}: leave "
                "architecture and width away."
            )
        return source._replace(config=dataclasses.replace(source.config, dtype=chosen.dtype))
    if chosen.architecture is None:
        raise ValueError(
            "Give pre-trained weights, such as --init timm/resnet50.a1_in1k or a .safetensors "
            "file; or, to train from scratch, an architecture, such as --architecture resnet50."
        )
    if regularizer in NEED_SOURCE:
        raise ValueError(
            f"The regularizer {regularizer} keeps the network near a pre-trained one: give its "
            "weights by --init, or take --regularizer none."
        )
    model = ResNetConfig(chosen.architecture, n_classes, dtype=chosen.dtype, width=chosen.width)
    return Pretrained(model, resnet.init(model, config.training.seed), {})


def estimation_images(config: Config, dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training images of all classes and their labels, whole batches, the same at every call.

    Every process reads all of them, so that all come to the same estimate.
    """
    rng = np.random.default_rng(config.training.seed)
    n_images = min(config.transfer.estimation_images, len(dataset.train))
    drawn = dataset.train.select(rng.permutation(len(dataset.train))[:n_images])
    size = min(ESTIMATION_BATCH, n_images)
    for batch in itertools.islice(
        data.evaluation_batches(drawn, config.data, batch_size=size), n_images // size
    ):
        yield batch.images[batch.valid], batch.labels[batch.valid]
