"""What is run: each grid as data, from which its cells follow."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from examples.never_hurt.cell import NONE, Cell, Result

FITTING, NEUTRAL, UNFITTING = "fitting", "neutral", "unfitting"
KINDS = {
    "tinyimagenet": FITTING,
    "imagenette": FITTING,
    "cifar10": FITTING,
    "cifar10_resnet20.safetensors": FITTING,
    "cifar10_resnet56.safetensors": FITTING,
    "gtsrb": NEUTRAL,
    "medmnist": UNFITTING,
    "random_labels_imagenette": UNFITTING,
    "random_labels_medmnist": UNFITTING,
    "random_weights": UNFITTING,
}
"""How well each source is expected to suit targets of natural photographs."""

PER_CLASS: Mapping[str, int | None] = {
    "caltech101": 15,
    "scene15": 30,
    "flowers17": None,
    "dtd10": None,
    "cifar10": 50,
}
"""The targets and their number of training images per class; None: all."""

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
    held_out: int = 0
    """Training images per class that rules with a held-out reference do not train on."""
    held_out_every: int = 1
    """Steps from one held-out gradient to the next."""
    returned_at: float = 1.0
    """The share of training after which they are trained on, too."""
    trial: float = 0.0
    """The share of the steps that trial runs take; 0: none."""
    procedure: str = "plain"
    """What is done around the steps of training, see `procedures`."""


@dataclass(frozen=True)
class Grid:
    """An experiment.

    Attributes:
        parts: The cells, in addition to plain fine-tuning of the same sources, targets and seeds.
        learning_rates: The candidates for each source and target. The best for plain fine-tuning
            on validation images is used with every rule.
        tuning_seeds: The seeds of the runs that choose the learning rate.
        architecture: Of all networks.
        image_size: In pixels.
        steps: Of a cell.
        batch_size: Of a cell.
        pretraining_steps: Of a source that is trained here.
        test: Whether the accuracy on test images is computed.
        images_per_class: Training images of each target; None: all.
        tuned: What the learning rate is chosen for: plain fine-tuning alone, or each setting by
            itself, which runs every cell with every learning rate.
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
    images_per_class: Mapping[str, int | None] = field(default_factory=lambda: PER_CLASS)
    tuned: Literal["plain", "each"] = "plain"

    def tuning(self) -> list[Cell]:
        """The cells that choose the learning rates. They do not use test images."""
        if self.tuned == "each":
            return []
        return [
            replace(self._plain(*pair, seed, learning_rate), test=False)
            for pair in self._pairs()
            for learning_rate in self.learning_rates
            for seed in self.tuning_seeds
        ]

    def cells(self, results: Mapping[str, Result]) -> list[Cell]:
        """All cells, with the chosen learning rates.

        Args:
            results: By key, those of :meth:`tuning` among them.

        Raises:
            ValueError: If one of them is missing.
        """
        chosen = self.chosen_rates(results)
        cells: list[Cell] = []
        for part in self.parts:
            for source, target, seed in itertools.product(part.sources, part.targets, part.seeds):
                for rate in chosen.get((source, target), self.learning_rates):
                    plain = self._plain(source, target, seed, rate)
                    # The mean of several runs is the baseline, not one that may be lucky.
                    cells += [replace(plain, order=order) for order in range(PLAIN_RUNS)]
                    cells += [
                        replace(
                            plain,
                            regularizer=regularizer,
                            rule=rule,
                            strength=strength,
                            held_out=part.held_out,
                            held_out_every=part.held_out_every,
                            returned_at=part.returned_at,
                            trial=part.trial,
                            procedure=part.procedure,
                        )
                        for regularizer, rule, strength in itertools.product(
                            part.regularizers, part.rules, part.strengths
                        )
                    ]
        return list(dict.fromkeys(cells))

    def chosen_rates(self, results: Mapping[str, Result]) -> dict[tuple[str, str], list[float]]:
        """The learning rate with the best mean validation accuracy for each source and target."""
        accuracies: dict[tuple[str, str], dict[float, list[float]]] = {}
        for cell in self.tuning():
            if cell.key not in results:
                raise ValueError(f"The learning rate cannot be chosen: {cell} has no result.")
            of_pair = accuracies.setdefault((cell.source, cell.target), {})
            of_pair.setdefault(cell.learning_rate, []).append(results[cell.key].validation)
        return {
            pair: [max(of_pair, key=lambda rate: np.mean(of_pair[rate]))]
            for pair, of_pair in accuracies.items()
        }

    def _pairs(self) -> list[tuple[str, str]]:
        pairs = (itertools.product(part.sources, part.targets) for part in self.parts)
        return list(dict.fromkeys(itertools.chain.from_iterable(pairs)))

    def _plain(self, source: str, target: str, seed: int, learning_rate: float) -> Cell:
        return Cell(
            source=source,
            target=target,
            regularizer=NONE,
            rule=NONE,
            strength=0.0,
            seed=seed,
            learning_rate=learning_rate,
            images_per_class=self.images_per_class[target],
            test=self.test,
            architecture=self.architecture,
            image_size=self.image_size,
            steps=self.steps,
            batch_size=self.batch_size,
        )

    def smoke(self) -> "Grid":
        """A few short cells of this grid, to test that it runs."""
        part = self.parts[0]
        part = Part(
            part.sources[-1:],
            part.targets[:1],
            part.regularizers[:2],
            part.rules[:2],
            part.strengths[-1:],
            part.seeds[:1],
        )
        return replace(
            self,
            parts=[part],
            learning_rates=self.learning_rates[:1],
            tuning_seeds=self.tuning_seeds[:1],
            steps=4,
            batch_size=8,
            pretraining_steps=4,
        )


SOURCES = ("tinyimagenet", "gtsrb", "medmnist", "random_labels_imagenette", "random_weights")
TWO_SOURCES = ("tinyimagenet", "medmnist")
TARGETS = ("caltech101", "cifar10", "scene15")
TRANSFER = ("l2_sp", "distillation")
FEATURES = ("feature_distillation", "attention_transfer", "delta", "batch_spectral_shrinkage")
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)

MAIN = ("weighted_sum", "dtnh_layer", "bounded_dtnh")
USUAL = ("weighted_sum", "dtnh_layer", "gradient_cosine", "gate", "bounded_dtnh")
EVERY_RULE = (
    *(*USUAL, "dtnh_global", "orthogonal", "bloop", "pcgrad", "dynamic_barrier"),
    *("agem", "mgda", "imtl_g", "upgrad", "cagrad", "config"),
)
VARIANTS = (
    *("weighted_sum", "dtnh_layer", "gate", "bounded_dtnh"),
    *("gate_bounded", "gate_bounded_0.3", "project_bounded", "cosine_bounded"),
    *("element_bounded", "keep_bounded", "average_gate_bounded"),
    *("momenta_gate", "momenta_gate_0.3", "momenta_gate_2", "momenta_project"),
    *("momenta_cosine", "momenta_keep", "momenta_global", "momenta_element", "placebo"),
)

CONTAINED = ("l2_sp", "feature_distillation")
SUMS = ("weighted_sum", "dtnh_layer", "bounded_dtnh", "running_bound")
HELD_OUT = ("held_out_global", "held_out_project")
REFERENCES = (
    *("weighted_sum", "running_bound", "held_out_global", "held_out_layer"),
    *("held_out_current", "held_out_unbounded", "held_out_project"),
)
BOUNDS = ("weighted_sum", "running_bound", "running_bound_2", "running_bound_4")
TENFOLD = (1.0, 10.0, 100.0, 1000.0)
TRIAL = 1 / 3
"""The share of the steps that a trial run takes."""


def with_trial_runs(part: Part, held_out: int, rule: str = "trial_runs") -> Part:
    """The same settings, each with trial runs that decide whether it has its regularizer."""
    return replace(part, rules=(rule,), held_out=held_out, trial=TRIAL)


def rivals(of: Part, held_out: int) -> tuple[Part, ...]:
    """What users would take instead, for the tasks of a part."""
    plain = replace(of, regularizers=(NONE,), rules=(NONE,), strengths=(0.0,))
    l2_sp = replace(of, regularizers=("l2_sp",))
    return (
        *(replace(plain, procedure=each) for each in ("lp_ft", "wise_ft_half")),
        *(
            replace(plain, procedure=each, held_out=held_out)
            for each in ("wise_ft", "early_stopping")
        ),
        replace(l2_sp, rules=("spd",), strengths=(1.0, 100.0)),
        replace(l2_sp, rules=("ftp",), strengths=(1.0,)),
        replace(of, rules=("auto_lambda",), strengths=(1.0, 100.0), held_out=held_out),
        # One run for each weight, from which the best on held-out images is chosen.
        replace(of, rules=("weighted_sum",), strengths=(0.0, *of.strengths), held_out=held_out),
    )


GAINS = (
    Part(("cifar10",), ("cifar10",), CONTAINED, SUMS, TENFOLD, range(5)),
    Part(
        *(("cifar10",), ("cifar10",), ("distillation", "attention_transfer", "delta")),
        *((SUMS[0], *SUMS[2:]), (0.1, 1.0, 10.0), range(3)),
    ),
)
GAINS_25 = Part(("cifar10",), ("cifar10",), CONTAINED[:1], SUMS, TENFOLD[2:], range(3))
GAINS_PUBLIC = Part(
    *(("cifar10_resnet20.safetensors",), ("cifar10",), CONTAINED[:1]),
    *(SUMS, (10.0, 100.0), range(2)),
)
GAINS_TINY = Part(
    *(("tinyimagenet",), ("tinyimagenet:40",), CONTAINED[:1], SUMS, TENFOLD[2:], range(2))
)
GAINS_NOISE = Part(
    *(("tinyimagenet",), ("flowers17~0.4",), CONTAINED[:1]),
    *((SUMS[0], *SUMS[2:]), TENFOLD[1:], range(2)),
)
PUBLIC_56 = Part(
    *(("cifar10_resnet56.safetensors",), ("cifar10",), CONTAINED[:1]),
    *((SUMS[0], SUMS[3]), (10.0, 100.0), range(2)),
)
CHOICES = Part(
    ("cifar10",), ("cifar10",), CONTAINED[:1], HELD_OUT[:1], (100.0,), range(3), held_out=5
)
HARM = Part(SOURCES, TARGETS, TRANSFER, (), (1.0, 100.0, 1000.0), range(3))

GRIDS: Mapping[str, Grid] = {
    # The main question.
    "small": Grid(
        [
            Part(SOURCES, TARGETS, TRANSFER, USUAL, STRENGTHS[1:], (0, 1, 2)),
            Part(SOURCES, TARGETS, TRANSFER, MAIN, STRENGTHS[:1], (0, 1, 2)),
        ]
    ),
    # The search that led to the preset; it uses no test images.
    "variants": Grid(
        [Part(TWO_SOURCES, TARGETS[:2], TRANSFER, VARIANTS, (100.0,), (0, 1))], test=False
    ),
    # Every rule, and every regularizer of features, at the strength that shows the most harm.
    "wide": Grid(
        [
            Part(TWO_SOURCES, ("cifar10",), TRANSFER, EVERY_RULE, (100.0,), (0, 1)),
            Part(TWO_SOURCES, ("flowers17",), FEATURES, MAIN, (100.0,), (0, 1)),
        ]
    ),
    # Public pre-trained weights at the image size that they were trained on.
    "real": Grid(
        [
            Part(
                ("cifar10_resnet20.safetensors",),
                ("caltech101", "scene15"),
                TRANSFER,
                MAIN,
                (1.0, 100.0),
                (0, 1, 2),
            )
        ],
        learning_rates=(0.01, 0.03, 0.1),
        architecture="cifar_resnet20",
        image_size=32,
    ),
    # The four lowest settings of the preset in "small", with new seeds.
    "again": Grid(
        [
            Part((source,), (target,), (regularizer,), (MAIN[0], MAIN[-1]), (x,), range(3, 11))
            for source, target, regularizer, x in (
                ("gtsrb", "scene15", "l2_sp", 0.01),
                ("gtsrb", "scene15", "distillation", 0.01),
                ("random_labels_imagenette", "cifar10", "distillation", 10.0),
                ("random_labels_imagenette", "scene15", "distillation", 100.0),
            )
        ]
    ),
    # Gains to keep: a source that contains the target, few images, and learning rates chosen for
    # each setting. Rules with a held-out reference train on one image per class less.
    "gains": Grid(
        [
            *GAINS,
            *(with_trial_runs(part, held_out=1) for part in GAINS),
            # With twice the bound, at the weighted sum's best weight and at ten times that.
            *(
                with_trial_runs(
                    replace(part, regularizers=(regularizer,), strengths=strengths),
                    held_out=1,
                    rule="trial_runs_2",
                )
                for part, regularizer, strengths in (
                    (GAINS[0], "l2_sp", (1000.0,)),
                    (GAINS[0], "feature_distillation", (10.0, 100.0)),
                    (GAINS[1], "distillation", (10.0,)),
                    (GAINS[1], "attention_transfer", (1.0, 10.0)),
                    (GAINS[1], "delta", (0.1, 1.0)),
                )
            ),
            *rivals(replace(GAINS[0], seeds=range(3)), held_out=1),
            Part(("cifar10",), ("cifar10",), CONTAINED, HELD_OUT, TENFOLD, range(3), held_out=1),
            Part(
                *(("cifar10",), ("cifar10",), CONTAINED[:1], ("held_out_returned",)),
                *(TENFOLD, range(3)),
                held_out=1,
                returned_at=0.5,
            ),
        ],
        learning_rates=(0.01, 0.03),
        tuned="each",
        steps=300,
        images_per_class={"cifar10": 5},
    ),
    # The same with more images.
    "gains_25": Grid(
        [GAINS_25, with_trial_runs(GAINS_25, held_out=5)],
        learning_rates=(0.01, 0.03),
        tuned="each",
        steps=300,
        images_per_class={"cifar10": 25},
    ),
    # 40 of the source's own classes, images that it has not seen.
    "gains_tiny": Grid(
        [GAINS_TINY, with_trial_runs(GAINS_TINY, held_out=1)],
        learning_rates=(0.01, 0.03),
        tuned="each",
        steps=300,
        images_per_class={"tinyimagenet:40": 5},
    ),
    # Two of five labels are wrong.
    "gains_noise": Grid(
        [GAINS_NOISE, with_trial_runs(GAINS_NOISE, held_out=5)],
        learning_rates=(0.01, 0.03),
        tuned="each",
        steps=300,
        images_per_class={"flowers17~0.4": None},
    ),
    # The same with a public network of 32 px. Of 0.01 and 0.03, the smaller rate was better in a
    # pilot for plain fine-tuning and for the sum.
    "gains_public": Grid(
        [GAINS_PUBLIC, with_trial_runs(GAINS_PUBLIC, held_out=1)],
        learning_rates=(0.01,),
        tuned="each",
        architecture="cifar_resnet20",
        image_size=32,
        images_per_class={"cifar10": 5},
    ),
    "gains_public_56": Grid(
        [PUBLIC_56, with_trial_runs(PUBLIC_56, held_out=1)],
        learning_rates=(0.01,),
        tuned="each",
        architecture="cifar_resnet56",
        image_size=32,
        images_per_class={"cifar10": 5},
    ),
    # Harm to avoid: sources that do not suit the target, up to a thousand times the usual weight.
    "harm": Grid(
        [
            replace(part, sources=(source,), targets=(target,))
            for source, target in (
                ("gtsrb", "scene15"),
                ("random_labels_imagenette", "cifar10"),
            )
            for part in (
                Part((), (), TRANSFER, (SUMS[0], *SUMS[2:]), (1.0, 100.0, 1000.0), range(3)),
                Part((), (), TRANSFER, HELD_OUT, (1.0, 100.0, 1000.0), range(3), held_out=3),
                with_trial_runs(HARM, held_out=3),
                with_trial_runs(HARM, held_out=3, rule="trial_runs_2"),
                *rivals(HARM, held_out=3),
            )
        ],
        learning_rates=(0.01, 0.03, 0.1),
    ),
    # Other pairs of the main question, with trial runs.
    "harm_wide": Grid(
        [
            with_trial_runs(
                replace(HARM, sources=(source,), targets=(target,), strengths=(1.0, 1000.0)), 3
            )
            for source, target in (
                ("tinyimagenet", "caltech101"),
                ("medmnist", "cifar10"),
                ("random_weights", "scene15"),
                ("medmnist", "caltech101"),
                ("gtsrb", "cifar10"),
            )
        ],
    ),
    # The lowest settings with trial runs, with new seeds.
    "harm_again": Grid(
        [
            each
            for source, target, regularizer in (
                ("tinyimagenet", "caltech101", "l2_sp"),
                ("gtsrb", "scene15", "distillation"),
            )
            for part in [
                Part((source,), (target,), (regularizer,), SUMS[:1], (1000.0,), range(3, 11))
            ]
            for each in (part, with_trial_runs(part, held_out=3))
        ],
    ),
    # How many images are held out, how often their gradient is computed, and over how many steps
    # it is averaged; how long trial runs are. On validation images alone.
    "held_out_choices": Grid(
        [
            replace(CHOICES, rules=SUMS[:1], held_out=0),
            *(replace(CHOICES, held_out_every=every) for every in (4, 16)),
            *(replace(CHOICES, held_out=n) for n in (1, 2, 5)),
            replace(CHOICES, rules=("held_out_0.5", "held_out_0.99")),
            *(
                replace(with_trial_runs(CHOICES, held_out=n), trial=trial)
                for n in (1, 2, 5)
                for trial in (1 / 6, TRIAL, 1 / 2)
            ),
        ],
        learning_rates=(0.01, 0.03),
        tuned="each",
        steps=300,
        test=False,
        images_per_class={"cifar10": 25},
    ),
    # How tight the bound is, on validation images alone.
    "bounds": Grid(
        [
            Part(("cifar10",), ("cifar10",), (regularizer,), BOUNDS, strengths, range(3))
            for regularizer, strengths in (
                ("feature_distillation", (10.0, 100.0)),
                ("attention_transfer", (1.0, 10.0)),
            )
        ],
        learning_rates=(0.01, 0.03),
        tuned="each",
        steps=300,
        test=False,
        images_per_class={"cifar10": 5},
    ),
    # What the parts of the held-out preset do, on validation images alone.
    "references": Grid(
        [
            Part(("cifar10",), ("cifar10",), CONTAINED, REFERENCES, TENFOLD[1:3], range(3), 1),
        ],
        learning_rates=(0.03,),
        tuned="each",
        steps=300,
        test=False,
        images_per_class={"cifar10": 5},
    ),
    # Larger networks and images, for a GPU.
    "gpu": Grid(
        [
            Part(
                (SOURCES[0], "imagenette", *SOURCES[1:]),
                tuple(PER_CLASS),
                (*TRANSFER, *FEATURES),
                EVERY_RULE,
                STRENGTHS,
                range(5),
            )
        ],
        architecture="resnet18",
        image_size=64,
        steps=2000,
        batch_size=64,
        pretraining_steps=20000,
    ),
}
