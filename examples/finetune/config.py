"""What can be set, what the presets set, and what cannot be."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from examples.common.data import DataConfig

RegularizerName = Literal[
    "none",
    "l2",
    "l2_sp",
    "l2_sp_fisher",
    "distillation",
    "logit_matching",
    "label_smoothing",
    "co_tuning",
    "feature_distillation",
    "attention_transfer",
    "delta",
    "delta_attention",
    "batch_spectral_shrinkage",
    "adversarial",
    "virtual_adversarial",
]
RuleName = Literal[
    "bounded_dtnh",
    "weighted_sum",
    "dtnh",
    "decoupled",
    "bloop",
    "gradient_cosine",
    "dynamic_barrier",
    "agem",
    "pcgrad",
    "upgrad",
    "mgda",
    "imtl_g",
    "cagrad",
    "config",
]
# What the authors' codes use; 0.01 where nothing is published for fine-tuning.
REG_WEIGHTS: dict[str, float] = {
    "none": 0.0,
    "l2": 5e-4,
    "l2_sp": 0.01,
    "l2_sp_fisher": 0.01,
    "distillation": 1.0,
    "logit_matching": 0.01,
    "label_smoothing": 0.1,
    "co_tuning": 2.3,
    "feature_distillation": 0.01,
    "attention_transfer": 1000.0,
    "delta": 0.01,
    "delta_attention": 0.01,
    "batch_spectral_shrinkage": 1e-3,
    "adversarial": 1.0,
    "virtual_adversarial": 1.0,
}


@dataclass(frozen=True)
class ModelConfig:
    """The network and where its weights come from."""

    init: str | None = None
    """Weights: a .safetensors file, a folder with one, or a name on the Hugging Face hub.
    Names look like timm/resnet50.a1_in1k. Without weights, training is from scratch."""
    architecture: str | None = None
    """resnet18, 34, 50, 101, 152, or cifar_resnet20, 32, 44, 56, 110.
    Read off the weights where there are any."""
    width: int | None = None
    """Channels of the first stage, where training is from scratch; the standard ones if not set."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations. Weights, statistics and the optimizer are in float32."""
    frozen_batch_norm: bool = False
    """Batch norm runs on the pre-trained averages and leaves them as they are."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, as globs on their paths: conv1 'layer1/*'."""
    mean: tuple[float, float, float] | None = None
    """Mean of the channels, from 0 to 1, that images are standardised by.
    If not set, that of the weights' file, or ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the channels, likewise."""


@dataclass(frozen=True)
class TransferConfig:
    """What is kept of the pre-trained network, and who wins where the two gradients conflict."""

    regularizer: RegularizerName = "l2_sp"
    """Ω. delta_attention is DELTA with channel weights, delta without."""
    rule: RuleName = "bounded_dtnh"
    """How the gradients of loss and regularizer become one direction.
    bounded_dtnh is the one that the experiment recommends, dtnh the paper's."""
    reg_weight: float | None = None
    """λ. If not set, the one of the regularizer's authors."""
    scope: Literal["global", "layer", "leaf", "element"] = "layer"
    """Which parameters are one vector to the rule."""
    mode: Literal["conflict", "orthogonal"] = "conflict"
    """dtnh, decoupled: whether to remove on conflict, or always."""
    action: Literal["project", "gate", "cosine", "keep"] = "project"
    """dtnh, decoupled: what to do on conflict. gate drops the regularizer's gradient."""
    max_ratio: float | None = None
    """dtnh, bounded_dtnh: how long the regularizer's part may be, as a multiple of the loss's.
    If not set, there is no bound in dtnh, and it is 1 in bounded_dtnh."""
    reference_decay: float = 0.0
    """dtnh, decoupled: hold the regularizer against an average of the loss gradient, of this decay.
    0: against the batch's own, as in the paper."""
    features: tuple[str, ...] = ()
    """Feature maps that the feature regularizers look at, by path.
    If not set, the stages' outputs; for delta_attention, the last convolution of each."""
    temperature: float = 2.0
    """Of distillation."""
    epsilon: float = 0.03
    """adversarial, virtual_adversarial: the size of the change, images being from 0 to 1.
    For the latter it is the root of the mean square."""
    estimation_images: int = 1024
    """l2_sp_fisher, delta_attention, co_tuning: training images that they are estimated from.
    Once, before training."""

    @property
    def weight(self) -> float:
        """The regularizer weight that is used."""
        return REG_WEIGHTS[self.regularizer] if self.reg_weight is None else self.reg_weight


@dataclass(frozen=True)
class TrainingConfig:
    """How the optimizer goes."""

    steps: int = 2000
    """Steps of the optimizer."""
    batch_size: int = 64
    """Images in a step, over all devices and micro-batches."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: float = 0.01
    """The largest learning rate."""
    momentum: float = 0.9
    """sgd: momentum. adamw: b1."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = 0.0
    """Of kernels, not of biases and norms: coupled in sgd, as in PyTorch, decoupled in adamw."""
    head_learning_rate: float = 1.0
    """The new head's learning rate, as a multiple of the others'."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0, linearly."""
    decay_at: tuple[float, ...] = (2 / 3,)
    """schedule=step: when the learning rate falls, as shares of all steps."""
    decay_factor: float = 0.1
    """schedule=step: what it is multiplied by."""
    label_smoothing: float = 0.0
    """The share of the label that goes to all classes alike."""
    clip_norm: float | None = None
    """The longest direction.
    It is clipped after the rule. Before it, the loss's would shrink with the regularizer's."""
    accumulate: int = 1
    """Micro-batches in a step. Both gradients are averaged over them, then the rule acts once."""
    average_decay: float | None = None
    """Evaluate an exponential average of the weights with this decay, rather than the last ones."""
    choose_by: Literal["accuracy", "balanced_accuracy", "loss"] = "accuracy"
    """What the best step is chosen by, on validation images."""
    evaluate_every: int = 200
    """Steps between looks at the validation images."""
    evaluation_batch_size: int = 256
    """Images in a batch of an evaluation."""
    seed: int = 0
    """Draws the new head's weights, the batches and the augmentation."""


@dataclass(frozen=True)
class DeviceConfig:
    """Which devices share the work."""

    mesh: str = "data"
    """data: every device has all weights and a part of the batch.
    fsdp: and a part of the weights.
    4x2: four such groups of two that share the weights."""
    coordinator: str | None = None
    """Address, host:port, of the first of several processes; auto: what the cluster says."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    prefetch: int = 2
    """Batches that are moved to the devices ahead of time."""


@dataclass(frozen=True)
class OutputConfig:
    """What is kept of the run."""

    out: Path = Path("results/finetune")
    """Directory for checkpoints, logs, tables, figures and the fine-tuned weights."""
    resume: bool = False
    """Go on from the last checkpoint in the directory, or begin if there is none."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; if not set, as often as there is an evaluation."""
    keep_last: int = 1
    """How many of the last checkpoints are kept, beside the best."""
    log_every: int = 20
    """Steps between lines of the logs, which have the means over them."""
    tensorboard: bool = True
    """Write TensorBoard's event files too."""


PresetName = Literal["standard", "paper", "cpu"]

# Regularizers that hold the network against the pre-trained one.
NEED_SOURCE = frozenset(REG_WEIGHTS) - {
    "none",
    "l2",
    "batch_spectral_shrinkage",
    "adversarial",
    "virtual_adversarial",
}


@dataclass(frozen=True)
class Config:
    """Fine-tune a ResNet, and keep the regularizer from fighting the task."""

    data: DataConfig
    preset: PresetName = "standard"
    """What is not set on the command line.
    paper: the literature's protocol, 224 px, 9,000 steps of 64 at 0.01, tenfold less after 6,000,
    and the paper's rule.
    cpu: 32 px and 300 steps, for a CIFAR ResNet."""
    model: ModelConfig = field(default_factory=ModelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _check_training(self.training)
        _check_transfer(self.transfer)
        _check_devices(self.devices)
        if self.output.keep_last < 1 or self.output.log_every < 1 or self.checkpoint_every < 1:
            raise ValueError(
                "keep_last, log_every and checkpoint_every must be at least 1; got "
                f"{self.output.keep_last}, {self.output.log_every}, {self.checkpoint_every}."
            )

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints."""
        return self.output.checkpoint_every or self.training.evaluate_every


def preset(name: PresetName, dataset: Any) -> Config:
    """The settings of a preset.

    Args:
        name: Which one.
        dataset: The data set, or what stands for one that is still to be given.

    Returns:
        A config that lacks the network.
    """
    if name == "cpu":
        return Config(
            DataConfig(dataset=dataset, image_size=32, augmentation="pad_crop"),
            preset=name,
            training=TrainingConfig(steps=300, batch_size=32, evaluate_every=50),
            output=OutputConfig(log_every=10),
        )
    if name == "paper":
        return Config(
            DataConfig(dataset=dataset, image_size=224),
            preset=name,
            transfer=TransferConfig(rule="dtnh"),
            training=TrainingConfig(steps=9000, schedule="step", evaluate_every=500),
        )
    return Config(DataConfig(dataset=dataset), preset=name)


def _check_training(training: TrainingConfig) -> None:
    for name in (
        "steps",
        "batch_size",
        "accumulate",
        "evaluate_every",
        "evaluation_batch_size",
    ):
        if getattr(training, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(training, name)}.")
    for name in ("learning_rate", "head_learning_rate"):
        if not getattr(training, name) > 0:
            raise ValueError(f"{name} must be positive; got {getattr(training, name)}.")
    for name in ("momentum", "label_smoothing", "average_decay"):
        value = getattr(training, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {value}.")
    if training.weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative; got {training.weight_decay}.")
    if training.clip_norm is not None and not training.clip_norm > 0:
        raise ValueError(f"clip_norm must be positive; got {training.clip_norm}.")
    if not 0 <= training.warmup_steps < training.steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and below steps, {training.steps}; got "
            f"{training.warmup_steps}."
        )
    if not all(0 < share < 1 for share in training.decay_at):
        raise ValueError(f"decay_at has shares of all steps, in (0, 1); got {training.decay_at}.")
    if training.batch_size % training.accumulate:
        raise ValueError(
            f"batch_size must be a multiple of accumulate; got {training.batch_size} images in "
            f"{training.accumulate} micro-batches."
        )


def _check_transfer(transfer: TransferConfig) -> None:
    if transfer.reg_weight is not None and not transfer.reg_weight >= 0:
        raise ValueError(f"reg_weight must not be negative; got {transfer.reg_weight}.")
    if not 0 <= transfer.reference_decay < 1:
        raise ValueError(
            f"reference_decay must be at least 0 and below 1; got {transfer.reference_decay}."
        )
    for name in ("temperature", "epsilon", "estimation_images"):
        if not getattr(transfer, name) > 0:
            raise ValueError(f"{name} must be positive; got {getattr(transfer, name)}.")
    chosen = {
        "mode": transfer.mode != "conflict",
        "action": transfer.action != "project",
        "reference_decay": transfer.reference_decay != 0,
    }
    if transfer.rule not in ("dtnh", "decoupled") and any(chosen.values()):
        names = ", ".join(name for name, is_chosen in chosen.items() if is_chosen)
        raise ValueError(f"{names}: a choice of the rules dtnh and decoupled, not {transfer.rule}.")
    if transfer.max_ratio is not None:
        if transfer.rule not in ("dtnh", "bounded_dtnh"):
            raise ValueError(
                f"max_ratio: a choice of the rules dtnh and bounded_dtnh, not {transfer.rule}."
            )
        if not transfer.max_ratio >= 0:
            raise ValueError(f"max_ratio must not be negative; got {transfer.max_ratio}.")


def _check_devices(devices: DeviceConfig) -> None:
    if devices.mesh not in ("data", "fsdp") and not re.fullmatch(
        r"[1-9]\d*x[1-9]\d*", devices.mesh
    ):
        raise ValueError(f"mesh must be data, fsdp, or like 4x2; got {devices.mesh!r}.")
    if devices.prefetch < 1:
        raise ValueError(f"prefetch must be at least 1; got {devices.prefetch}.")
    together = devices.coordinator is not None and devices.coordinator != "auto"
    if together != (devices.processes is not None) or together != (devices.process is not None):
        raise ValueError(
            "Several processes want coordinator, processes and process, all three; or "
            "coordinator=auto alone, on a cluster that JAX knows."
        )
