"""The loss L and the regularizers Ω of one batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dtnh_jax import regularizers
from examples.common import resnet
from examples.common.resnet import Output, ResNetConfig

Params = Any


class RegularizerInputs(NamedTuple):
    """What a regularizer is computed from.

    Every regularizer takes ``params`` and ``output``. Of the others it takes those in the ``needs``
    of its :class:`Regularizer`; the rest can be left out.

    Attributes:
        params: Parameters of the network that is fine-tuned; ``None`` for those that are frozen.
        output: Its output for the images, in training mode.
        source_params: Parameters of the pre-trained network, with its own head.
        source_output: Its output for the same images, in inference mode.
        images: ``(n, height, width, 3)``, standardised.
        labels: ``(n,)``, integers.
        predict: Computes the logits of images with ``params``, in inference mode.
        key: A random key.
        features: Names of the feature maps that are compared.
        temperature: Of distillation.
        epsilon: ``(3,)``, the size of an adversarial perturbation, in the units of ``images``.
        fisher: The diagonal of the Fisher information, a tree like ``source_params``.
        channel_weights: The weights of each feature map's channels, ``(channels,)``.
        relationship: ``(target classes, source classes)``, each row a distribution.
    """

    params: Params
    output: Output
    source_params: Params = None
    source_output: Any = None
    images: Any = None
    labels: Any = None
    predict: Any = None
    key: Any = None
    features: Sequence[str] = ()
    temperature: float = 2.0
    epsilon: Any = None
    fisher: Any = None
    channel_weights: Any = None
    relationship: Any = None


class Regularizer(NamedTuple):
    """A regularizer of the library, as a function of :class:`RegularizerInputs`.

    Attributes:
        weight: λ as in the authors' code; 0.01 where none is published for fine-tuning.
        needs: The optional fields of the inputs that ``compute`` reads.
        compute: Returns the value, a scalar.
    """

    weight: float
    needs: tuple[str, ...]
    compute: Callable[[RegularizerInputs], jax.Array]

    def __call__(self, inputs: RegularizerInputs) -> jax.Array:
        """Computes the value.

        Raises:
            ValueError: If a field in ``needs`` is missing.
        """
        if missing := [name for name in self.needs if getattr(inputs, name) is None]:
            raise ValueError(f"This regularizer needs {', '.join(missing)}; got None.")
        return self.compute(inputs)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The mean cross-entropy, against smoothed labels."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def _trained(x: RegularizerInputs, tree: Params) -> Params:
    """``tree`` without the head, which is new, and without frozen parameters."""
    return jax.tree.map(
        lambda param, value: None if param is None else value,
        x.params,
        tree | {"head": dict.fromkeys(x.params["head"])},
        is_leaf=lambda leaf: leaf is None,
    )


def _shared(x: RegularizerInputs) -> Params:
    return _trained(x, x.source_params)


def _source_head(x: RegularizerInputs) -> jax.Array:
    """The logits of the source's head on the features of the network that is fine-tuned."""
    return resnet.head_logits(x.source_params["head"], x.output.features["pooled"])


def _logits(x: RegularizerInputs) -> tuple[jax.Array, jax.Array]:
    return _source_head(x), x.source_output.logits


def _features(x: RegularizerInputs) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    ours, theirs = x.output.features, x.source_output.features
    return {name: ours[name] for name in x.features}, {name: theirs[name] for name in x.features}


def _in_epsilons(x: RegularizerInputs) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    return lambda scaled: x.predict(scaled * x.epsilon), x.images / x.epsilon


_HEAD = ("source_params", "source_output")
_MAPS = ("source_output",)
_PERTURBED = ("images", "predict", "key", "epsilon")

REGULARIZERS = {
    "none": Regularizer(0.0, (), lambda x: jnp.zeros([])),
    "l2": Regularizer(5e-4, (), lambda x: regularizers.l2(x.params)),
    "l2_sp": Regularizer(
        0.01, ("source_params",), lambda x: regularizers.l2_sp(x.params, _shared(x))
    ),
    "l2_sp_fisher": Regularizer(
        0.01,
        ("source_params", "fisher"),
        lambda x: regularizers.l2_sp_fisher(x.params, _shared(x), _trained(x, x.fisher)),
    ),
    # Learning without forgetting: the head of the source keeps its outputs on the new features.
    "distillation": Regularizer(
        1.0, _HEAD, lambda x: regularizers.distillation(*_logits(x), temperature=x.temperature)
    ),
    "logit_matching": Regularizer(0.01, _HEAD, lambda x: regularizers.logit_matching(*_logits(x))),
    "label_smoothing": Regularizer(0.1, _HEAD, lambda x: regularizers.label_smoothing(*_logits(x))),
    "co_tuning": Regularizer(
        2.3,
        ("source_params", "labels", "relationship"),
        lambda x: regularizers.co_tuning(_source_head(x), x.labels, x.relationship),
    ),
    # The paper's knowledge distillation.
    "feature_distillation": Regularizer(
        0.01, _MAPS, lambda x: regularizers.feature_distillation(*_features(x))
    ),
    "attention_transfer": Regularizer(
        1000.0, _MAPS, lambda x: regularizers.attention_transfer(*_features(x))
    ),
    "delta": Regularizer(0.01, _MAPS, lambda x: regularizers.delta(*_features(x))),
    # DELTA with channel weights, in the scale of the authors' code.
    "delta_attention": Regularizer(
        0.01,
        (*_MAPS, "channel_weights"),
        lambda x: regularizers.delta(*_features(x), x.channel_weights, scale="channels/positions"),
    ),
    "batch_spectral_shrinkage": Regularizer(
        1e-3, (), lambda x: regularizers.batch_spectral_shrinkage(x.output.features["pooled"])
    ),
    # The perturbation is measured in units of epsilon, which differs by channel.
    "adversarial": Regularizer(
        1.0,
        _PERTURBED,
        lambda x: regularizers.adversarial(
            *_in_epsilons(x), x.key, epsilon=1.0, step_size=0.25, steps=5
        ),
    ),
    "virtual_adversarial": Regularizer(
        1.0,
        _PERTURBED,
        lambda x: regularizers.virtual_adversarial(
            *_in_epsilons(x), x.key, epsilon=x.images[0].size ** 0.5
        ),
    ),
}


def default_features(regularizer: str, model: ResNetConfig) -> tuple[str, ...]:
    """The feature maps that a regularizer compares by default: the output of each stage.

    DELTA with channel weights compares the last convolution of each stage, because a channel
    weight belongs to a filter.
    """
    names = resnet.feature_names(model)
    stages = [name for name in names if name.startswith("layer") and "/" not in name]
    if regularizer != "delta_attention":
        return tuple(stages)
    return tuple(
        [name for name in names if name.startswith(f"{stage}/") and "/conv" in name][-1]
        for stage in stages
    )
