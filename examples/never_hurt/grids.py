"""What is run: each grid as data, from which its cells follow."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.never_hurt.cell import NONE, Cell, Result

FITTING, NEUTRAL, UNFITTING = "fitting", "neutral", "unfitting"
KINDS = {
    "tinyimagenet": FITTING,
    "imagenette": FITTING,
    "cifar10": FITTING,
    "cifar10_resnet20.safetensors": FITTING,
    "gtsrb": NEUTRAL,
    "medmnist": UNFITTING,
    "random_labels_imagenette": UNFITTING,
    "random_labels_medmnist": UNFITTING,
    "random_weights": UNFITTING,
}
"""How well a source is expected to suit targets of natural photographs."""

PER_CLASS: Mapping[str, int | None] = {
    "caltech101": 15,
    "scene15": 30,
    "flowers17": None,
    "dtd10": None,
    "cifar10": 50,
}
"""Targets, and how many images a class they are learnt from."""


PLAIN_RUNS = 4
"""Plain runs of each source, target and seed, which differ in the order of their batches."""


@dataclass(frozen=True)
class Part:
    """Every regularizer with every rule and strength, from every source to every target."""

    sources: Sequence[str]
    targets: Sequence[str]
    regularizers: Sequence[str]
    rules: Sequence[str]
    strengths: Sequence[float]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Grid:
    """An experiment.

    Attributes:
        parts: What is run, beside plain fine-tuning of the same sources, targets and seeds.
        learning_rates: What plain fine-tuning is tried with, source by source and target by
            target; the best on validation images is then that of every rule.
        tuning_seeds: The seeds that it is tried with.
        architecture: Of all networks.
        image_size: In pixels.
        steps: Of a cell.
        batch_size: Of a cell.
        pretraining_steps: Of a source that is trained here.
        test: Whether the test images are looked at.
    """

    parts: Sequence[Part]
    learning_rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3)
    tuning_seeds: Sequence[int] = (0, 1)
    architecture: str = "cifar_resnet8"
    image_size: int = 16
    steps: int = 200
    batch_size: int = 32
    pretraining_steps: int = 2500
    test: bool = True

    def tuning(self) -> list[Cell]:
        """The cells that the learning rates are chosen by. They see no test image."""
        return [
            replace(
                self._plain(source, target, seed, learning_rate),
                test=False,
            )
            for source, target in self._pairs()
            for learning_rate in self.learning_rates
            for seed in self.tuning_seeds
        ]

    def cells(self, results: Mapping[str, Result]) -> list[Cell]:
        """All cells, once the learning rates can be chosen.

        Args:
            results: By key; those of :meth:`tuning` must be among them.

        Raises:
            ValueError: If one of them is not.
        """
        rates = self.chosen_rates(results)
        cells: dict[Cell, None] = {}
        for part in self.parts:
            for source, target, seed in itertools.product(part.sources, part.targets, part.seeds):
                plain = self._plain(source, target, seed, rates[source, target])
                # Other batches too: what is compared with shall not be one lucky run.
                cells |= dict.fromkeys(replace(plain, order=order) for order in range(PLAIN_RUNS))
                for regularizer, rule, strength in itertools.product(
                    part.regularizers, part.rules, part.strengths
                ):
                    cells[replace(plain, regularizer=regularizer, rule=rule, strength=strength)] = (
                        None
                    )
        return list(cells)

    def chosen_rates(self, results: Mapping[str, Result]) -> dict[tuple[str, str], float]:
        """For each source and target the learning rate of the best mean validation accuracy."""
        accuracies: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for cell in self.tuning():
            if cell.key not in results:
                raise ValueError(f"The learning rate cannot be chosen: {cell} has no result.")
            of_pair = accuracies[cell.source, cell.target]
            of_pair[cell.learning_rate].append(results[cell.key].validation)
        return {
            pair: max(of_pair, key=lambda rate: np.mean(of_pair[rate]))
            for pair, of_pair in accuracies.items()
        }

    def _pairs(self) -> Iterable[tuple[str, str]]:
        return dict.fromkeys(
            pair for part in self.parts for pair in itertools.product(part.sources, part.targets)
        )

    def _plain(self, source: str, target: str, seed: int, learning_rate: float) -> Cell:
        return Cell(
            source=source,
            target=target,
            regularizer=NONE,
            rule=NONE,
            strength=0.0,
            seed=seed,
            learning_rate=learning_rate,
            images_per_class=PER_CLASS[target],
            test=self.test,
            architecture=self.architecture,
            image_size=self.image_size,
            steps=self.steps,
            batch_size=self.batch_size,
        )

    def smoke(self) -> "Grid":
        """The same, so small that it shows nothing but that it runs."""
        return replace(
            self,
            parts=[
                replace(
                    part,
                    sources=part.sources[-1:],
                    targets=part.targets[:1],
                    regularizers=part.regularizers[:2],
                    rules=part.rules[:2],
                    strengths=part.strengths[-1:],
                    seeds=part.seeds[:1],
                )
                for part in self.parts[:1]
            ],
            learning_rates=self.learning_rates[:1],
            tuning_seeds=self.tuning_seeds[:1],
            steps=4,
            batch_size=8,
            pretraining_steps=4,
        )


SOURCES = ("tinyimagenet", "gtsrb", "medmnist", "random_labels_imagenette", "random_weights")
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
PRESET_AND_SUM = ("weighted_sum", "bounded_dtnh")
AGAIN = tuple(range(3, 11))
TRANSFER = ("l2_sp", "distillation")
RIVALS = (
    "dtnh_global",
    "orthogonal",
    "bloop",
    "pcgrad",
    "dynamic_barrier",
    "agem",
    "mgda",
    "imtl_g",
    "upgrad",
    "cagrad",
    "config",
)
VARIANTS = (
    "gate_bounded",
    "gate_bounded_0.3",
    "project_bounded",
    "cosine_bounded",
    "element_bounded",
    "keep_bounded",
    "average_gate_bounded",
    "momenta_gate",
    "momenta_gate_0.3",
    "momenta_gate_2",
    "momenta_project",
    "momenta_cosine",
    "momenta_keep",
    "momenta_global",
    "momenta_element",
    "placebo",
)

GRIDS: Mapping[str, Grid] = {
    # The question itself.
    "small": Grid(
        [
            Part(
                SOURCES,
                ("caltech101", "cifar10", "scene15"),
                TRANSFER,
                ("weighted_sum", "dtnh_layer", "gradient_cosine", "gate", "bounded_dtnh"),
                STRENGTHS[1:],
                (0, 1, 2),
            ),
            Part(
                SOURCES,
                ("caltech101", "cifar10", "scene15"),
                TRANSFER,
                ("weighted_sum", "dtnh_layer", "bounded_dtnh"),
                STRENGTHS[:1],
                (0, 1, 2),
            ),
        ]
    ),
    # What was tried before the rule was chosen; it sees no test image.
    "variants": Grid(
        [
            Part(
                ("tinyimagenet", "medmnist"),
                ("caltech101", "cifar10"),
                TRANSFER,
                ("weighted_sum", "dtnh_layer", "gate", "bounded_dtnh", *VARIANTS),
                (100.0,),
                (0, 1),
            )
        ],
        test=False,
    ),
    # Every rule, and every regularizer of features, at the strength that tells the most.
    "wide": Grid(
        [
            Part(
                ("tinyimagenet", "medmnist"),
                ("cifar10",),
                TRANSFER,
                ("weighted_sum", "dtnh_layer", "gradient_cosine", "gate", "bounded_dtnh", *RIVALS),
                (100.0,),
                (0, 1),
            ),
            Part(
                ("tinyimagenet", "medmnist"),
                ("flowers17",),
                (
                    "feature_distillation",
                    "attention_transfer",
                    "delta",
                    "batch_spectral_shrinkage",
                ),
                ("weighted_sum", "dtnh_layer", "bounded_dtnh"),
                (100.0,),
                (0, 1),
            ),
        ]
    ),
    # Real pre-trained weights at the size that they are for.
    "real": Grid(
        [
            Part(
                ("cifar10_resnet20.safetensors",),
                ("caltech101", "scene15"),
                TRANSFER,
                ("weighted_sum", "dtnh_layer", "bounded_dtnh"),
                (1.0, 100.0),
                (0, 1, 2),
            )
        ],
        learning_rates=(0.01, 0.03, 0.1),
        architecture="cifar_resnet20",
        image_size=32,
    ),
    # The four lowest settings of the preset in "small", with seeds that it has not seen.
    "again": Grid(
        [
            Part((source,), (target,), (regularizer,), PRESET_AND_SUM, (x,), AGAIN)
            for source, target, regularizer, x in (
                ("gtsrb", "scene15", "l2_sp", 0.01),
                ("gtsrb", "scene15", "distillation", 0.01),
                ("random_labels_imagenette", "cifar10", "distillation", 10.0),
                ("random_labels_imagenette", "scene15", "distillation", 100.0),
            )
        ]
    ),
    # For a GPU.
    "gpu": Grid(
        [
            Part(
                (
                    "tinyimagenet",
                    "imagenette",
                    "gtsrb",
                    "medmnist",
                    "random_labels_imagenette",
                    "random_weights",
                ),
                tuple(PER_CLASS),
                (
                    *TRANSFER,
                    "feature_distillation",
                    "attention_transfer",
                    "delta",
                    "batch_spectral_shrinkage",
                ),
                ("weighted_sum", "dtnh_layer", "gradient_cosine", "gate", "bounded_dtnh", *RIVALS),
                STRENGTHS,
                (0, 1, 2, 3, 4),
            )
        ],
        architecture="resnet18",
        image_size=64,
        steps=2000,
        batch_size=64,
        pretraining_steps=20000,
    ),
}
"""By name."""
