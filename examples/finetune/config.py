"""The settings of a run, their presets and their checks."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dtnh_jax
from examples.common.data import DataConfig
from examples.common.objective import REGULARIZERS

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
    "bounded_sum",
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

# Arguments of dtnh_jax.dtnh_sgd and dtnh_adamw that make bounded_sum.
BOUNDED_SUM: dict[str, Any] = {
    "on_conflict": "keep",
    "max_ratio": 2.0,
    "scope": "global",
    "bound_by": "running_max",
}
# The weight λ in bounded_sum, if none is given, as a multiple of the authors'.
BOUNDED_SUM_WEIGHT = 100
# The share of the steps that each of its trial runs takes, if none is given.
TRIAL = 1 / 3

# What --held-out makes of bounded_dtnh: arguments of dtnh_jax.dtnh_sgd and dtnh_adamw.
HELD_OUT: dict[str, Any] = {
    "on_conflict": "gate",
    "max_ratio": 1.0,
    "scope": "global",
    "bound_by": "running_max",
    "reference": dtnh_jax.held_out(0.9),
}


@dataclass(frozen=True)
class ModelConfig:
    """The network and where its weights come from."""

    init: str | None = None
    """Weights: a .safetensors file, a folder with one, or a name on the Hugging Face hub such as
    timm/resnet50.a1_in1k. If not set, training is from scratch."""
    architecture: str | None = None
    """resnet18, 34, 50, 101, 152, or cifar_resnet20, 32, 44, 56, 110.
    Inferred from the weights, if there are any."""
    width: int | None = None
    """Channels of the first stage in training from scratch; the standard number if not set."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations. Weights, statistics and the optimizer state are float32."""
    frozen_batch_norm: bool = False
    """Batch norm uses the pre-trained averages and does not update them."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, as globs on their paths, such as conv1 'layer1/*'."""
    mean: tuple[float, float, float] | None = None
    """Mean of the channels, from 0 to 1, for standardising images.
    If not set, that of the weights file, or ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the channels, with the same default."""


@dataclass(frozen=True)
class TransferConfig:
    """The regularizer, and the rule that combines its gradient with that of the loss."""

    regularizer: RegularizerName = "l2_sp"
    """The regularizer Ω. delta_attention is DELTA with channel weights, delta without."""
    rule: RuleName = "bounded_sum"
    """The rule that combines the gradients of loss and regularizer.
    bounded_sum is their sum, with a regularizer's part at most twice as long as the longest of the
    loss so far; with trial runs it keeps what helps. bounded_dtnh drops what conflicts, and hardly
    changes plain fine-tuning. Both are dtnh_sgd or dtnh_adamw, depending on the optimizer. dtnh is
    the paper's."""
    reg_weight: float | None = None
    """The weight λ of the regularizer. If not set, that of the regularizer's authors; in
    bounded_sum, whose bound makes a large weight safe, a hundred times it."""
    scope: Literal["global", "layer", "leaf", "element"] | None = None
    """The groups of parameters that the rule is applied to separately.
    If not set, layer; in bounded_sum, and in bounded_dtnh with held_out, global."""
    on_conflict: Literal["project", "orthogonal", "gate", "cosine", "keep"] = "project"
    """dtnh, decoupled: what the rule does with a conflicting regularizer gradient."""
    max_ratio: float | None = None
    """dtnh, bounded_dtnh, bounded_sum: the largest norm of the regularizer's part, as a multiple of
    the loss's. If not set, dtnh has no bound, bounded_dtnh has 1 and bounded_sum 2."""
    reference_decay: float = 0.0
    """dtnh, decoupled: compare with an exponential average of the loss gradient, with this decay.
    0: compare with the gradient of the batch, as in the paper."""
    held_out: float = 0.0
    """bounded_dtnh, dtnh, decoupled: a share of the training images of each class, at least one
    image, which are not trained on. The regularizer's gradient is compared with an average gradient
    of the loss of these images. 0: none."""
    held_out_every: int = 1
    """Steps from one gradient of held-out images to the next."""
    trial: float | None = None
    """A share of the steps. Two trial runs of this length, without the regularizer and with it, are
    compared by their calibrated loss on validation images. The run has the regularizer only if the
    loss is lower with it. 0: no trial runs. If not set, a third in bounded_sum, and 0 in others."""
    features: tuple[str, ...] = ()
    """Feature maps that the feature regularizers compare, by path.
    If not set, the output of each stage; for delta_attention, its last convolution."""
    temperature: float = 2.0
    """The temperature of distillation."""
    epsilon: float = 0.03
    """adversarial, virtual_adversarial: the size of the perturbation, for images from 0 to 1.
    The largest absolute value for the former, the root mean square for the latter."""
    estimation_images: int = 1024
    """l2_sp_fisher, delta_attention, co_tuning: training images that are used for the estimation
    before training."""

    @property
    def weight(self) -> float:
        """The weight λ."""
        if self.reg_weight is not None:
            return self.reg_weight
        times = BOUNDED_SUM_WEIGHT if self.rule == "bounded_sum" else 1
        return times * REGULARIZERS[self.regularizer].weight

    @property
    def trial_share(self) -> float:
        """The share of the steps that each of the trial runs takes; 0: there are none."""
        if self.trial is not None:
            return self.trial
        return TRIAL if self.rule == "bounded_sum" and self.regularizer != "none" else 0.0

    @property
    def groups(self) -> Literal["global", "layer", "leaf", "element"]:
        """The scope of the rule."""
        if self.scope is not None:
            return self.scope
        of_all = self.rule == "bounded_sum" or (self.held_out and self.rule == "bounded_dtnh")
        return "global" if of_all else "layer"


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, the batches and the evaluations."""

    steps: int = 2000
    """Steps of the optimizer."""
    batch_size: int = 64
    """Images in a step, over all devices and micro-batches."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: float = 0.01
    """The peak learning rate."""
    momentum: float = 0.9
    """sgd: momentum. adamw: b1."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = 0.0
    """Weight decay of kernels, not of biases and norms: part of the gradient in sgd, as in PyTorch;
    decoupled in adamw."""
    head_learning_rate: float = 1.0
    """The learning rate of the new head, as a multiple of learning_rate."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """The schedule of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0."""
    decay_at: tuple[float, ...] = (2 / 3,)
    """schedule=step: when the learning rate is decayed, as fractions of all steps."""
    decay_factor: float = 0.1
    """schedule=step: the factor of each decay."""
    label_smoothing: float = 0.0
    """Label smoothing of the loss."""
    clip_norm: float | None = None
    """The largest global norm of a gradient, which is clipped before momentum or Adam.
    bounded_dtnh clips the gradients of loss and regularizer separately, other rules their
    combination, decoupled that of the loss."""
    accumulate: int = 1
    """Micro-batches in a step. Both gradients are averaged over them before the rule."""
    average_decay: float | None = None
    """Evaluate an exponential average of the weights with this decay. If not set, evaluate the
    current weights."""
    choose_by: Literal["accuracy", "balanced_accuracy", "loss"] = "accuracy"
    """The metric on validation images that selects the best step."""
    evaluate_every: int = 200
    """Steps between evaluations on the validation images."""
    evaluation_batch_size: int = 256
    """Images in a batch of evaluation."""
    seed: int = 0
    """The seed of the new head, the batches and the augmentation."""


@dataclass(frozen=True)
class DeviceConfig:
    """Devices and processes."""

    mesh: str = "data"
    """data: shard the batch over all devices.
    fsdp: shard the weights too.
    4x2: four groups of two devices; each group shards the weights."""
    coordinator: str | None = None
    """The address host:port of the first of several processes; auto: detect the cluster."""
    processes: int | None = None
    """The number of processes."""
    process: int | None = None
    """The index of this process, from 0."""
    prefetch: int = 2
    """Batches that are transferred to the devices in advance."""


@dataclass(frozen=True)
class OutputConfig:
    """Checkpoints and logs."""

    out: Path = Path("results/finetune")
    """The directory of checkpoints, logs, tables, figures and the fine-tuned weights."""
    resume: bool = False
    """Continue from the last checkpoint in the directory, or start if there is none."""
    overwrite: bool = False
    """Delete the results, logs and checkpoints of an earlier run in the directory."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; evaluate_every if not set."""
    keep_last: int = 1
    """The number of last checkpoints that are kept, beside the best."""
    log_every: int = 20
    """Steps between records of the logs, which are averages over these steps."""
    tensorboard: bool = True
    """Write TensorBoard event files."""


PresetName = Literal["standard", "paper", "cpu"]


@dataclass(frozen=True)
class Config:
    """Fine-tune a ResNet with a regularizer that does not oppose the loss."""

    data: DataConfig
    preset: PresetName = "standard"
    """The defaults of the other settings.
    paper: the protocol and the rule of the paper: 224 px, 9,000 steps with 64 images, and a
    learning rate of 0.01 that is divided by 10 after 6,000 steps.
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
        for name in ("keep_last", "log_every", "checkpoint_every"):
            _check(self.output, name, lambda value: value >= 1, "be at least 1")
        if self.output.resume and self.output.overwrite:
            raise ValueError("Give --resume to continue a run, or --overwrite to delete it.")

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints."""
        return self.output.checkpoint_every or self.training.evaluate_every


def preset(name: PresetName, dataset: Any) -> Config:
    """The settings of a preset.

    Args:
        name: The preset.
        dataset: The data set, or a placeholder for it.

    Returns:
        A config without a network.
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
    for name in ("steps", "batch_size", "accumulate", "evaluate_every", "evaluation_batch_size"):
        _check(training, name, lambda value: value >= 1, "be at least 1")
    for name in ("learning_rate", "head_learning_rate", "clip_norm"):
        _check(training, name, lambda value: value > 0, "be positive")
    for name in ("momentum", "label_smoothing", "average_decay"):
        _check(training, name, lambda value: 0 <= value < 1, "be at least 0 and below 1")
    _check(training, "weight_decay", lambda value: value >= 0, "not be negative")
    below_steps = f"be at least 0 and below steps, {training.steps}"
    _check(training, "warmup_steps", lambda value: 0 <= value < training.steps, below_steps)
    in_range = "be fractions of all steps, in (0, 1)"
    _check(training, "decay_at", lambda shares: all(0 < x < 1 for x in shares), in_range)
    if training.batch_size % training.accumulate:
        raise ValueError(
            f"batch_size must be a multiple of accumulate; got {training.batch_size} images in "
            f"{training.accumulate} micro-batches."
        )


def _check_transfer(transfer: TransferConfig) -> None:
    for name in ("reg_weight", "max_ratio"):
        _check(transfer, name, lambda value: value >= 0, "not be negative")
    for name in ("temperature", "epsilon", "estimation_images"):
        _check(transfer, name, lambda value: value > 0, "be positive")
    for name in ("reference_decay", "held_out"):
        _check(transfer, name, lambda value: 0 <= value < 1, "be at least 0 and below 1")
    _check(transfer, "held_out_every", lambda value: value >= 1, "be at least 1")
    if transfer.trial is not None:
        _check(transfer, "trial", lambda value: 0 <= value <= 1, "be at least 0 and at most 1")
    for name, rules in (
        ("on_conflict", ("dtnh", "decoupled")),
        ("reference_decay", ("dtnh", "decoupled")),
        ("max_ratio", ("dtnh", "bounded_dtnh", "bounded_sum")),
        ("held_out", ("bounded_dtnh", "dtnh", "decoupled")),
    ):
        is_set = getattr(transfer, name) != getattr(TransferConfig, name)
        if is_set and transfer.rule not in rules:
            raise ValueError(
                f"{name} is an option of the rules {' and '.join(rules)}, not of {transfer.rule}. "
                "Omit it, or choose one of these with --rule."
            )
    if transfer.trial and transfer.regularizer == "none":
        raise ValueError(
            "trial decides whether the run has its regularizer, and the regularizer is none. Omit "
            "it, or choose a regularizer."
        )
    if transfer.rule == "bounded_sum" and transfer.scope == "element":
        raise ValueError(
            "bounded_sum keeps a bound for each group, so that groups of one number are not "
            "possible. Choose another --scope than element."
        )
    _check_held_out(transfer)


def _check_held_out(transfer: TransferConfig) -> None:
    if not transfer.held_out:
        if transfer.held_out_every != 1:
            raise ValueError(
                "held_out_every is for held-out images, and there are none. Give their share too, "
                "such as --held-out 0.1, or omit it."
            )
        return
    if transfer.trial:
        raise ValueError(
            "trial and held_out are two ways to decide what the regularizer may do. Give only one "
            "of them."
        )
    if transfer.regularizer == "none":
        raise ValueError(
            "held_out is for comparing the regularizer with images that are not trained on, and "
            "the regularizer is none. Omit it, or choose a regularizer."
        )
    if transfer.reference_decay:
        raise ValueError(
            "reference_decay averages the gradient of training images, and held_out compares with "
            "that of other images. Give only one of them."
        )
    if transfer.rule == "bounded_dtnh" and transfer.scope == "element":
        raise ValueError(
            "With held_out, bounded_dtnh keeps a bound for each group, so that groups of one "
            "number are not possible. Choose another --scope than element."
        )


def _check_devices(devices: DeviceConfig) -> None:
    mesh = re.compile(r"data|fsdp|[1-9]\d*x[1-9]\d*")
    _check(devices, "mesh", mesh.fullmatch, "be data, fsdp, or like 4x2")
    _check(devices, "prefetch", lambda value: value >= 1, "be at least 1")
    together = devices.coordinator is not None and devices.coordinator != "auto"
    if together != (devices.processes is not None) or together != (devices.process is not None):
        raise ValueError(
            "Several processes need coordinator, processes and process, all three; or "
            "coordinator=auto alone, on a cluster that JAX detects."
        )


def _check(settings: Any, name: str, is_valid: Callable[[Any], Any], requirement: str) -> None:
    value = getattr(settings, name)
    if value is not None and not is_valid(value):
        raise ValueError(f"{name} must {requirement}; got {value!r}.")
