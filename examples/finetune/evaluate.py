"""`python -m examples.finetune.evaluate --weights FILE --dataset PATH`: evaluates weights."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from examples.common import data, pretrained, resnet
from examples.common.command import ended
from examples.common.data import DataConfig, Source
from examples.common.files import write
from examples.common.resnet import Network, ResNetConfig
from examples.common.standardisation import channel_statistics, standardise
from examples.common.text import normalized, plain_console, printable
from examples.finetune import metrics
from examples.finetune.display import introduce
from examples.finetune.figure import as_png, draw_confusion, most_confused
from examples.finetune.logs import as_json
from examples.finetune.metrics import Metrics
from examples.finetune.report import as_rich, percent

PROGRAM = "python -m examples.finetune.evaluate"
LISTED_CLASSES = 20
RESULTS = ("evaluation.json", "confusion.png")


@dataclass(frozen=True)
class Config:
    """Evaluate fine-tuned weights on a data set with the same classes."""

    weights: str
    """The model.safetensors of a run. It contains how images are resized and standardised."""
    dataset: str
    """A folder of images or a name of tensorflow-datasets, as in training."""
    split: Literal["test", "validation", "train"] = "test"
    """The images."""
    out: Path | None = None
    """Directory for evaluation.json and confusion.png; nothing is written without it."""
    overwrite: bool = False
    """Replace these files of an earlier evaluation or run."""
    data_dir: str | None = None
    """The directory of the data sets that tensorflow-datasets has prepared."""
    images_per_class: int | None = None
    """As in training; changes the train split."""
    validation: float = 0.1
    """As in training, if no validation split is published."""
    test: float = 0.2
    """As in training, if no test split is published."""
    split_seed: int = 0
    """As in training."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Whether an image that cannot be decoded is an error or is skipped."""
    batch_size: int = 64
    """Images in a batch."""
    workers: int = 8
    """Threads that read images."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")


class Classifier(NamedTuple):
    """A network, and how its input images are made.

    Attributes:
        model: The network without its weights.
        network: Its weights.
        class_names: The name of each logit.
        image_size: Height and width of an image.
        resize: The short side before the centre crop; ``None`` for the default of the size.
        mean: Mean of the channels, from 0 to 1, ``(1, 1, 1, 3)``.
        std: Standard deviation of the channels.
    """

    model: ResNetConfig
    network: Network
    class_names: tuple[str, ...]
    image_size: int
    resize: int | None
    mean: np.ndarray
    std: np.ndarray


def load_classifier(weights: str) -> Classifier:
    """Loads weights with the metadata that a fine-tuning writes.

    Args:
        weights: The file of a fine-tuning, or any other with the same header.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If they cannot be read, or the header is incomplete.
    """
    loaded = pretrained.load(weights)
    wanted = ("class_names", "image_size", "mean", "std")
    if missing := [name for name in wanted if name not in loaded.metadata]:
        raise ValueError(
            f"The header of {weights} lacks {', '.join(missing)}. Use the model.safetensors of a "
            "run of python -m examples.finetune."
        )
    try:
        names, size, resize = (
            json.loads(loaded.metadata.get(name, "null"))
            for name in ("class_names", "image_size", "resize")
        )
        names = [str(name) for name in names]
        DataConfig("images", image_size=size, resize=resize)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The header of {weights} is not that of a fine-tuning: {error}"
        ) from error
    mean, std = channel_statistics(loaded.metadata)
    if len(names) != loaded.config.n_classes:
        raise ValueError(
            f"{weights} has {loaded.config.n_classes} logits, but names {len(names)} classes."
        )
    return Classifier(
        model=loaded.config,
        network=loaded.network,
        class_names=tuple(names),
        image_size=size,
        resize=resize,
        mean=mean,
        std=std,
    )


@functools.partial(jax.jit, static_argnames="model")
def logits(
    model: ResNetConfig, network: Network, images: jax.Array, mean: jax.Array, std: jax.Array
) -> jax.Array:
    """The logits of a network for uint8 images ``(n, size, size, 3)``."""
    return resnet.apply(model, network, standardise(images, mean, std), train=False).logits


def evaluate(
    classifier: Classifier, source: Source, labels: np.ndarray, config: DataConfig, batch_size: int
) -> Metrics:
    """Computes the metrics of a classifier on all images of a source.

    Args:
        classifier: The network.
        source: The images.
        labels: The classifier's label for each label of the source, see :func:`matched`.
        config: Image size, corrupt images and workers.
        batch_size: Images in a batch.
    """
    model, network, *_, mean, std = classifier
    network = jax.device_put(network)
    predict = jax.jit(metrics.predict)
    batches = data.evaluation_batches(source, config, batch_size=batch_size)
    predictions = (
        predict(logits(model, network, x.images, mean, std), labels[x.labels], x.valid)
        for x in batches
    )
    return metrics.summarise(predictions, model.n_classes)


def matched(of_data: Sequence[str], of_weights: Sequence[str]) -> np.ndarray:
    """The label in the weights of each class of the data, by its name in the same Unicode form.

    Raises:
        ValueError: If the names differ.
    """
    of_data, of_weights = ([normalized(name) for name in names] for names in (of_data, of_weights))
    unknown, absent = sorted({*of_data} - {*of_weights}), sorted({*of_weights} - {*of_data})
    if unknown or absent:
        differences = [
            f"{len(names)} {where}: {', '.join(names[:10])}{', ...' if names[10:] else ''}"
            for names, where in ((unknown, "only in the data"), (absent, "only in the weights"))
            if names
        ]
        raise ValueError(
            "The classes of the data and of the weights must have the same names; there are "
            f"{'; '.join(differences)}. Rename the folders, or use the data that the weights "
            "were fine-tuned on."
        )
    return np.array([of_weights.index(name) for name in of_data], np.int32)


def class_rows(found: Metrics, class_names: Sequence[str]) -> list[list[str]]:
    """A header, then the classes by accuracy, with the most frequent wrong prediction of each."""
    rows = [["class", "images", "accuracy", "most often confused with"]]
    for index in np.argsort(found.recalls, kind="stable").tolist():
        wrong = np.where(np.arange(len(class_names)) == index, 0, found.confusion[index])
        confused = class_names[int(np.argmax(wrong))] if wrong.any() else ""
        accuracy = percent(float(found.recalls[index])) if found.images[index] else ""
        rows.append([str(class_names[index]), str(found.images[index]), accuracy, str(confused)])
    return rows


def report(found: Metrics, class_names: Sequence[str], out: Path | None, console: Console) -> None:
    """Writes numbers and figure if ``out`` is given; then prints the metrics and the classes."""
    if out is not None:
        of_class = dict(zip(class_names, found.recalls.tolist(), strict=True))
        confused = [
            {"class": class_names[true], "taken_for": class_names[predicted], "images": n_images}
            for true, predicted, n_images in most_confused(found.confusion, 100)
        ]
        content = as_json(found.scalars | {"accuracy_of_class": of_class})
        content |= {"most_confused": confused}
        title = f"{found.n} images, {percent(found.accuracy)} correct"
        out.mkdir(parents=True, exist_ok=True)
        write(out / "evaluation.json", json.dumps(content, indent=1, allow_nan=False).encode())
        figure = draw_confusion(found.confusion, class_names, title=title)
        write(out / "confusion.png", as_png(figure))
    rows = [
        ["images", str(found.n)],
        ["accuracy", percent(found.accuracy)],
        ["top-5", percent(found.top5)],
        ["balanced accuracy", percent(found.balanced_accuracy)],
        ["loss", f"{found.loss:.3f}"],
    ]
    console.print(as_rich(rows))
    console.print()
    of_classes = class_rows(found, class_names)
    console.print(as_rich(of_classes[: LISTED_CLASSES + 1], numbers=True))
    if len(class_names) > LISTED_CLASSES:
        console.print(f"... and {len(class_names) - LISTED_CLASSES} classes with higher accuracy.")
    if out is not None:
        console.print(f"Written to {printable(str(out))}: evaluation.json, confusion.png.")


def run(config: Config) -> tuple[Metrics, tuple[str, ...]]:
    """Loads weights and data; returns the metrics and the names of the classes.

    Raises:
        ValueError: If they do not fit together, or results would be overwritten.
    """
    if config.out is not None and not config.overwrite:
        earlier = [name for name in RESULTS if (config.out / name).exists()]
        if earlier:
            raise ValueError(
                f"{config.out} has {', '.join(earlier)} of an earlier evaluation or run. Choose "
                "another --out, or replace them with --overwrite."
            )
    classifier = load_classifier(config.weights)
    shared = {field.name for field in dataclasses.fields(DataConfig)} & vars(config).keys()
    data_config = DataConfig(
        image_size=classifier.image_size,
        resize=classifier.resize,
        **{name: getattr(config, name) for name in shared},
    )
    dataset = data.load(data_config)
    introduce(dataset)
    labels = matched(dataset.class_names, classifier.class_names)
    source = getattr(dataset, config.split)
    found = evaluate(classifier, source, labels, data_config, config.batch_size)
    return found, classifier.class_names


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""

    def evaluate_and_report() -> None:
        config = tyro.cli(Config, prog=PROGRAM, args=arguments)
        found, class_names = run(config)
        report(found, class_names, config.out, plain_console())

    return ended(PROGRAM, evaluate_and_report, (ValueError, OSError, ImportError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
