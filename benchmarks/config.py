"""Command-line options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax

from benchmarks import trees
from examples.common.resnet import plan_of

Regularizer = Literal["l2_sp", "distillation"]
Layout = Literal["replicated", "sharded"]
Section = Literal[
    "combination",
    "step",
    "memory",
    "compile",
    "scaling",
    "torch",
    "accelerators",
    "accelerator_steps",
]
SECTIONS: tuple[Section, ...] = get_args(Section)


@dataclass(frozen=True)
class Config:
    """Measures time, memory, compilation and communication of the rules of dtnh_jax."""

    out: Path = Path("results/benchmarks")
    """Directory for the tables, as Markdown and JSON."""
    only: tuple[Section, ...] = SECTIONS
    """Benchmarks to run."""
    trees: tuple[str, ...] | None = None
    """Parameter trees for the combination: resnet18, resnet50, ..., vit_b, vit_l, 300M, small_N (N
    leaves). By default resnet18, resnet50 and vit_b; on accelerators also vit_l and 300M."""
    all_rules_on: tuple[str, ...] = ("resnet50",)
    """Trees on which all rules are measured. On the others, a subset."""
    architectures: tuple[str, ...] | None = None
    """ResNets of the training step. By default resnet18; on accelerators resnet50."""
    image_size: int | None = None
    """Height and width of the images. By default 64; on accelerators 224."""
    batch_size: int | None = None
    """Batch size. By default 8; on accelerators 128."""
    width: int | None = None
    """Channels of the first stage of the ResNets. By default those of the architecture."""
    activations: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations. By default float32; on accelerators bfloat16."""
    regularizers: tuple[Regularizer, ...] = ("l2_sp", "distillation")
    """Regularizers of the training step."""
    leaves: tuple[int, ...] = (50, 100, 200, 500, 1000, 2000)
    """Numbers of leaves for the compilation benchmark."""
    compile_seconds: float = 120.0
    """Approximate time limit of the compilation benchmark."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of simulated CPU devices for which programs are compiled."""
    layouts: tuple[Layout, ...] = ("replicated", "sharded")
    """Whether parameters and gradients are replicated or sharded."""
    scaling_architecture: str = "resnet18"
    """The ResNet for the communication benchmark."""
    targets: tuple[str, ...] = ("v5e:2x2", "h100", "v6e:2x2", "v5p:2x2x1")
    """What programs are compiled for, one device of each; nothing is run there. Topologies of
    TPUs, and h100."""
    slices: tuple[str, ...] = ("v5e:2x2", "v5e:16x16")
    """Topologies of TPUs for whose devices together training steps are compiled."""
    target_seconds: float = 900.0
    """Time limit for compiling one program for a target."""
    seconds: float = 20.0
    """Time for each comparison, after compilation."""
    repetitions: int = 200
    """Maximum number of samples of each contestant."""
    ceiling_megabytes: int | None = None
    """Array size for measuring bandwidth. By default 100 MB, the size of ResNet-50; on accelerators
    1000 MB."""
    matmul_size: int | None = None
    """Matrix size for measuring matrix products. By default 2048; on accelerators 8192."""
    smoke: bool = False
    """Use tiny sizes for a quick check; overrides all options but `out` and `only`."""

    def __post_init__(self) -> None:
        for name in ("seconds", "compile_seconds", "target_seconds", "repetitions"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("leaves", "devices"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive numbers; got {getattr(self, name)}.")

        # Validate names before the benchmarks run.
        for name in self.trees or ():
            trees.tree(name)
        for architecture in (*(self.architectures or ()), self.scaling_architecture):
            plan_of(architecture)

    def settled(self) -> "Sizes":
        """The sizes for this machine, with defaults filled in."""
        if self.smoke:
            return Sizes(
                trees=("small_6",),
                all_rules_on=(),
                architectures=("cifar_resnet8",),
                image_size=8,
                batch_size=2,
                width=2,
                activations="float32",
                regularizers=("distillation",),
                all_steps=False,
                leaves=(2, 4),
                compile_seconds=60.0,
                devices=(2,),
                layouts=("sharded",),
                scaling_architecture="cifar_resnet8",
                targets=("v5e:2x2",),
                slices=("v5e:2x2",),
                target_step=("cifar_resnet8", 8, 2, "float32"),
                target_seconds=self.target_seconds,
                compiled=str(self.out / "compiled"),
                seconds=0.2,
                repetitions=3,
                ceiling_megabytes=1,
                matmul_size=64,
            )
        accelerator = jax.default_backend() != "cpu"
        trees = ("resnet18", "resnet50", "vit_b", *(("vit_l", "300M") if accelerator else ()))
        return Sizes(
            trees=self.trees or trees,
            all_rules_on=self.all_rules_on,
            architectures=self.architectures or (("resnet50",) if accelerator else ("resnet18",)),
            image_size=self.image_size or (224 if accelerator else 64),
            batch_size=self.batch_size or (128 if accelerator else 8),
            width=self.width,
            activations=self.activations or ("bfloat16" if accelerator else "float32"),
            regularizers=self.regularizers,
            all_steps=True,
            leaves=self.leaves,
            compile_seconds=self.compile_seconds,
            devices=self.devices,
            layouts=self.layouts,
            scaling_architecture=self.scaling_architecture,
            targets=self.targets,
            slices=self.slices,
            target_step=("resnet50", 224, 128, "bfloat16"),
            target_seconds=self.target_seconds,
            compiled=str(self.out / "compiled"),
            seconds=self.seconds,
            repetitions=self.repetitions,
            ceiling_megabytes=self.ceiling_megabytes or (1000 if accelerator else 100),
            matmul_size=self.matmul_size or (8192 if accelerator else 2048),
        )


@dataclass(frozen=True)
class Sizes:
    """A :class:`Config` with all defaults filled in.

    Attributes that are not in :class:`Config`:
        all_steps: Whether to time all variants of the training step, or only those with goals.
        target_step: Of the step that is compiled for targets: the ResNet, the size of its images,
            the batch size of one device, and the dtype of activations.
        compiled: The directory that keeps what was found in programs that were compiled for
            targets, so that they are not compiled again.
    """

    trees: tuple[str, ...]
    all_rules_on: tuple[str, ...]
    architectures: tuple[str, ...]
    image_size: int
    batch_size: int
    width: int | None
    activations: Literal["float32", "bfloat16"]
    regularizers: tuple[Regularizer, ...]
    all_steps: bool
    leaves: tuple[int, ...]
    compile_seconds: float
    devices: tuple[int, ...]
    layouts: tuple[Layout, ...]
    scaling_architecture: str
    targets: tuple[str, ...]
    slices: tuple[str, ...]
    target_step: tuple[str, int, int, Literal["float32", "bfloat16"]]
    target_seconds: float
    compiled: str
    seconds: float
    repetitions: int
    ceiling_megabytes: int
    matmul_size: int
