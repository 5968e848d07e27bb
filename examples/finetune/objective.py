"""What the loss L is and what the regularizer Ω is, of one batch."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from dtnh_jax import regularizers
from examples.common import resnet
from examples.common.pretrained import Pretrained
from examples.common.resnet import Network, Output, ResNetConfig
from examples.finetune.config import TransferConfig

Params = Any


class Estimates(NamedTuple):
    """What some regularizers know of the task before training begins; ``None`` for the others.

    Attributes:
        fisher: Like the source's params.
        channel_weights: For each feature map ``(channels,)``.
        relationship: ``(target classes, source classes)``, each row a distribution.
    """

    fisher: Any = None
    channel_weights: Any = None
    relationship: jax.Array | None = None


class Source(NamedTuple):
    """What is kept of the pre-trained network.

    Attributes:
        network: All of it, with its own head; of a run from scratch the first weights.
        estimates: What was estimated from it.
    """

    network: Network
    estimates: Estimates


class Situation(NamedTuple):
    """What a regularizer may look at.

    Attributes:
        params: Those of the network that is fine-tuned.
        output: What it made of the images, in training mode.
        predict: From images to its logits, in inference mode.
        teacher: What the pre-trained network made of the same images, in inference mode.
        source: The pre-trained network.
        images: ``(n, height, width, 3)``, standardised.
        labels: ``(n,)``.
        epsilon: ``(3,)``, the size of an adversarial change, in the units of ``images``.
        key: A random key of the step.
        config: What the user chose.
    """

    params: Params
    output: Output
    predict: Callable[[jax.Array], jax.Array]
    teacher: Output
    source: Source
    images: jax.Array
    labels: jax.Array
    epsilon: jax.Array
    key: jax.Array
    config: TransferConfig


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """The loss: the mean cross-entropy against smoothed labels."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def none(at: Situation) -> jax.Array:
    """Nothing is kept."""
    del at
    return jnp.zeros([])


def l2(at: Situation) -> jax.Array:
    """Weights stay near zero."""
    return regularizers.l2(at.params)


def l2_sp(at: Situation) -> jax.Array:
    """Weights stay near the pre-trained ones."""
    return regularizers.l2_sp(at.params, _of_trained(at, at.source.network.params))


def l2_sp_fisher(at: Situation) -> jax.Array:
    """Likewise, the more the source task needs them."""
    pretrained = _of_trained(at, at.source.network.params)
    fisher = _of_trained(at, at.source.estimates.fisher)
    return regularizers.l2_sp_fisher(at.params, pretrained, fisher)


def distillation(at: Situation) -> jax.Array:
    """What the source's head says of the features stays as it was: learning without forgetting."""
    return regularizers.distillation(
        _source_logits(at), at.teacher.logits, temperature=at.config.temperature
    )


def logit_matching(at: Situation) -> jax.Array:
    """Likewise, by the distance of the logits."""
    return regularizers.logit_matching(_source_logits(at), at.teacher.logits)


def label_smoothing(at: Situation) -> jax.Array:
    """Likewise, by the cross-entropy."""
    return regularizers.label_smoothing(_source_logits(at), at.teacher.logits)


def co_tuning(at: Situation) -> jax.Array:
    """The source's head goes on to say what the label means to it."""
    assert at.source.estimates.relationship is not None
    return regularizers.co_tuning(_source_logits(at), at.labels, at.source.estimates.relationship)


def feature_distillation(at: Situation) -> jax.Array:
    """Feature maps stay near the pre-trained ones: the paper's knowledge distillation."""
    return regularizers.feature_distillation(*_feature_maps(at))


def attention_transfer(at: Situation) -> jax.Array:
    """Where the network looks stays as it was."""
    return regularizers.attention_transfer(*_feature_maps(at))


def delta(at: Situation) -> jax.Array:
    """DELTA's behavioural form, which sums over the batch."""
    return regularizers.delta(*_feature_maps(at))


def delta_attention(at: Situation) -> jax.Array:
    """DELTA with channel weights, in the scale of the authors' code."""
    return regularizers.delta(
        *_feature_maps(at), at.source.estimates.channel_weights, scale="channels/positions"
    )


def batch_spectral_shrinkage(at: Situation) -> jax.Array:
    """The features' smallest singular value goes."""
    return regularizers.batch_spectral_shrinkage(at.output.features["pooled"])


def adversarial(at: Situation) -> jax.Array:
    """The outputs withstand the worst small change of the images."""
    return regularizers.adversarial(
        lambda scaled: at.predict(scaled * at.epsilon),
        at.images / at.epsilon,
        at.key,
        epsilon=1.0,
        step_size=0.25,
        steps=5,
    )


def virtual_adversarial(at: Situation) -> jax.Array:
    """The outputs are smooth where they turn fastest."""
    n_numbers = at.images[0].size
    return regularizers.virtual_adversarial(
        lambda scaled: at.predict(scaled * at.epsilon),
        at.images / at.epsilon,
        at.key,
        epsilon=n_numbers**0.5,
    )


REGULARIZERS: dict[str, Callable[[Situation], jax.Array]] = {
    each.__name__: each
    for each in (
        none,
        l2,
        l2_sp,
        l2_sp_fisher,
        distillation,
        logit_matching,
        label_smoothing,
        co_tuning,
        feature_distillation,
        attention_transfer,
        delta,
        delta_attention,
        batch_spectral_shrinkage,
        adversarial,
        virtual_adversarial,
    )
}


def resolve_features(transfer: TransferConfig, model: ResNetConfig) -> tuple[str, ...]:
    """The feature maps that the regularizer looks at.

    Raises:
        ValueError: If the network has no such feature map.
    """
    names = resnet.feature_names(model)
    if transfer.features:
        unknown = [name for name in transfer.features if name not in names]
        if unknown:
            raise ValueError(
                f"No feature maps: {', '.join(unknown)}. There are {', '.join(names)}."
            )
        return transfer.features
    stages = [name for name in names if name.startswith("layer") and "/" not in name]
    if transfer.regularizer != "delta_attention":
        return tuple(stages)
    # A channel weight is that of a filter, so the maps are those that filters make.
    convolutions = [name for name in names if "/conv" in name]
    return tuple(
        [name for name in convolutions if name.startswith(f"{stage}/")][-1] for stage in stages
    )


def estimate(
    source: Pretrained,
    transfer: TransferConfig,
    n_classes: int,
    batches: Callable[[], Iterable[tuple[jax.Array, jax.Array]]],
    key: jax.Array,
) -> Estimates:
    """Estimates what the regularizer has to know before training begins.

    Args:
        source: The pre-trained network.
        transfer: Which regularizer it is for.
        n_classes: Classes of the target task.
        batches: Gives standardised training images ``(n, height, width, 3)`` and their labels
            ``(n,)``, the same ones at each call.
        key: A random key.

    Returns:
        The estimates, on the device.
    """
    config, network = source.config, source.network

    @jax.jit
    def predict(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = resnet.apply(config, network, images, train=False)
        return output.logits, output.features["pooled"]

    if transfer.regularizer == "l2_sp_fisher":
        # The source's labels are not at hand. With labels drawn from the network's own
        # probabilities, the empirical Fisher is an unbiased estimate of the true one.
        def drawn() -> Iterable[tuple[jax.Array, jax.Array]]:
            for number, (images, _) in enumerate(batches()):
                of_batch = jax.random.fold_in(key, number)
                yield images, jax.random.categorical(of_batch, predict(images)[0])

        def logits_fn(params: Params, images: jax.Array) -> jax.Array:
            return resnet.apply(config, network._replace(params=params), images, train=False).logits

        fisher = regularizers.fisher_diagonal(logits_fn, network.params, drawn(), chunk_size=8)
        return Estimates(fisher=fisher)
    if transfer.regularizer == "co_tuning":
        logits = jnp.concatenate([predict(images)[0] for images, _ in batches()])
        labels = jnp.concatenate([labels for _, labels in batches()])
        relationship = regularizers.co_tuning_relationship(logits, labels, n_classes)
        return Estimates(relationship=relationship)
    if transfer.regularizer == "delta_attention":
        features = jnp.concatenate([predict(images)[1] for images, _ in batches()])
        labels = jnp.concatenate([labels for _, labels in batches()])
        fitting = network._replace(
            params=network.params | {"head": fit_head(features, labels, n_classes)}
        )

        def loss_fn(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            images, labels = batch
            of_params = fitting._replace(params=params)
            output = resnet.apply(config, of_params, images, train=False)
            return cross_entropy(output.logits, labels, 0.0)

        kernels = {name: f"{name}/kernel" for name in resolve_features(transfer, config)}
        return Estimates(
            channel_weights=regularizers.delta_channel_weights(
                loss_fn, fitting.params, batches(), kernels
            )
        )
    return Estimates()


def fit_head(features: jax.Array, labels: jax.Array, n_classes: int, steps: int = 300) -> Params:
    """A linear head on features that stay as they are, ``(n, channels)``, by Adam."""
    optimizer = optax.adam(0.01)
    head = {
        "kernel": jnp.zeros((features.shape[1], n_classes)),
        "bias": jnp.zeros(n_classes),
    }

    @jax.jit
    def step(head: Params, state: Any) -> tuple[Params, Any]:
        grads = jax.grad(
            lambda head: cross_entropy(resnet.head_logits(head, features), labels, 0.0)
        )(head)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(head, updates), state

    state = optimizer.init(head)
    for _ in range(steps):
        head, state = step(head, state)
    return head


def standardise(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """From ``uint8`` to what the network was trained on."""
    return (images.astype(jnp.float32) / 255 - mean) / std


def _of_trained(at: Situation, tree: Params) -> Params:
    """``tree`` where parameters are trained and the source has them: not the new head."""
    head = dict.fromkeys(at.params["head"])
    return jax.tree.map(
        lambda param, value: None if param is None else value,
        at.params,
        tree | {"head": head},
        is_leaf=lambda x: x is None,
    )


def _source_logits(at: Situation) -> jax.Array:
    head = at.source.network.params["head"]
    return resnet.head_logits(head, at.output.features["pooled"])


def _feature_maps(at: Situation) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    names = at.config.features
    student, teacher = at.output.features, at.teacher.features
    return {name: student[name] for name in names}, {name: teacher[name] for name in names}
