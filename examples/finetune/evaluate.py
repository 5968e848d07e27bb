"""`python -m examples.finetune.evaluate --weights FILE --dataset PATH`: how good it is."""

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
from examples.common.data import Batch, DataConfig, Dataset, Source
from examples.common.files import write
from examples.common.resnet import Network, ResNetConfig
from examples.finetune import metrics
from examples.finetune.figure import draw_confusion, most_confused
from examples.finetune.logs import plain
from examples.finetune.metrics import Counts
from examples.finetune.objective import standardise
from examples.finetune.report import as_png, as_rich, percent

PROGRAM = "python -m examples.finetune.evaluate"
LISTED_CLASSES = 20


@dataclass(frozen=True)
class Config:
    """Evaluate fine-tuned weights on a data set with the same classes."""

    weights: str
    """The model.safetensors of a run. It says how images are resized and standardised."""
    dataset: str
    """A folder of images or a name of tensorflow-datasets, as in training."""
    split: Literal["test", "validation", "train"] = "test"
    """Which images."""
    out: Path | None = None
    """Directory for evaluation.json and confusion.png; nothing is written without it."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps prepared sets."""
    images_per_class: int | None = None
    """As in training; it changes the train split."""
    validation: float = 0.1
    """As in training, where no validation split is published."""
    test: float = 0.2
    """As in training, where no test split is published."""
    split_seed: int = 0
    """As in training."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """An image that cannot be decoded is an error, or is left out."""
    batch_size: int = 64
    """Images that are looked at together."""
    workers: int = 8
    """Threads that read images."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")


class Classifier(NamedTuple):
    """A network and all that is needed to show it images.

    Attributes:
        model: The network without its weights.
        network: Its weights.
        class_names: The name of each logit.
        image_size: Height and width of an image.
        resize: The short side before the centre crop; ``None``: the usual one for the size.
        mean: Of the channels, from 0 to 1, ``(1, 1, 1, 3)``.
        std: Likewise.
    """

    model: ResNetConfig
    network: Network
    class_names: tuple[str, ...]
    image_size: int
    resize: int | None
    mean: np.ndarray
    std: np.ndarray


def load_classifier(weights: str) -> Classifier:
    """Loads weights that say themselves how they are to be used.

    Args:
        weights: A file that a fine-tuning has exported, or any other with the same header.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If they are not readable, or do not say enough.
    """
    loaded = pretrained.load(weights)
    wanted = ("class_names", "image_size", "mean", "std")
    if missing := [name for name in wanted if name not in loaded.metadata]:
        raise ValueError(
            f"{weights} does not say its {', '.join(missing)}, which is needed to show it images. "
            "Take the model.safetensors of a run of python -m examples.finetune."
        )
    names, size, mean, std = (json.loads(loaded.metadata[name]) for name in wanted)
    if len(names) != loaded.config.n_classes:
        raise ValueError(
            f"{weights} has {loaded.config.n_classes} logits, but names {len(names)} classes."
        )
    return Classifier(
        model=loaded.config,
        network=loaded.network,
        class_names=tuple(names),
        image_size=size,
        resize=json.loads(loaded.metadata.get("resize", "null")),
        mean=np.array(mean, np.float32).reshape(1, 1, 1, 3),
        std=np.array(std, np.float32).reshape(1, 1, 1, 3),
    )


@functools.partial(jax.jit, static_argnames="model")
def logits(
    model: ResNetConfig, network: Network, images: jax.Array, mean: jax.Array, std: jax.Array
) -> jax.Array:
    """What a network says of images, uint8 ``(n, size, size, 3)``."""
    return resnet.apply(model, network, standardise(images, mean, std), train=False).logits


def evaluate(
    classifier: Classifier, source: Source, labels: np.ndarray, config: DataConfig, batch_size: int
) -> Counts:
    """Counts what a classifier gets right of all images of a source.

    Args:
        classifier: The network.
        source: The images.
        labels: The classifier's label for each of the source's, see :func:`matched`.
        config: Image size, corrupt images and workers.
        batch_size: Images that are looked at together.
    """
    model, network, *_, mean, std = classifier
    network = jax.device_put(network)
    count = jax.jit(metrics.count)
    counts = metrics.zeros(model.n_classes)
    batch: Batch
    for batch in data.evaluation_batches(source, config, batch_size=batch_size):
        of_batch = logits(model, network, batch.images, mean, std)
        counts = metrics.add(counts, count(of_batch, labels[batch.labels], batch.valid))
    return jax.device_get(counts)


def matched(of_data: Sequence[str], of_weights: Sequence[str]) -> np.ndarray:
    """The weights' label for each label of the data, by the names of the classes.

    Raises:
        ValueError: If the names are not the same.
    """
    unknown, absent = sorted({*of_data} - {*of_weights}), sorted({*of_weights} - {*of_data})
    if unknown or absent:
        differences = [
            f"{len(names)} {where}: {', '.join(names[:10])}{', ...' if names[10:] else ''}"
            for names, where in ((unknown, "in the data alone"), (absent, "in the weights alone"))
            if names
        ]
        raise ValueError(
            "The classes of the data and of the weights must have the same names; there are "
            f"{'; '.join(differences)}. Rename the folders, or take the data that the weights "
            "were fine-tuned on."
        )
    return np.array([of_weights.index(name) for name in of_data], np.int32)


def class_rows(counts: Counts, class_names: Sequence[str]) -> list[list[str]]:
    """A head, then the classes, the worst first, with what they are mostly taken for."""
    of_class = metrics.recalls(counts).tolist()
    rows = [["class", "images", "accuracy", "mostly taken for"]]
    for index in map(int, np.argsort(of_class, kind="stable")):
        wrong = np.where(np.arange(len(class_names)) == index, 0, counts.confusion[index])
        taken_for = class_names[int(np.argmax(wrong))] if wrong.any() else ""
        n_images = int(counts.images[index])
        accuracy = percent(of_class[index]) if n_images else ""
        rows.append([class_names[index], str(n_images), accuracy, taken_for])
    return rows


def report(counts: Counts, class_names: Sequence[str], out: Path | None, console: Console) -> None:
    """Prints the metrics and the classes; writes numbers and figure if ``out`` is given."""
    found = metrics.summarise(counts)
    rows = [
        ["images", str(found.n)],
        ["accuracy", percent(found.accuracy)],
        ["top-5", percent(found.top5)],
        ["balanced accuracy", percent(found.balanced_accuracy)],
        ["loss", f"{found.loss:.3f}"],
    ]
    console.print(as_rich(rows))
    console.print()
    of_classes = class_rows(counts, class_names)
    console.print(as_rich(of_classes[: LISTED_CLASSES + 1], numbers=True))
    if len(class_names) > LISTED_CLASSES:
        console.print(f"... and {len(class_names) - LISTED_CLASSES} classes that are no worse.")
    if out is None:
        return
    of_class = metrics.recalls(counts).tolist()
    numbers = dataclasses.asdict(found) | {
        "accuracy_of_class": dict(zip(class_names, of_class, strict=True))
    }
    confusion = np.asarray(counts.confusion)
    confused = [
        {"class": class_names[true], "taken_for": class_names[predicted], "images": n_images}
        for true, predicted, n_images in most_confused(confusion, 100)
    ]
    content = {**plain(numbers, finite=True), "most_confused": confused}
    title = f"{found.n} images, {percent(found.accuracy)} right"
    out.mkdir(parents=True, exist_ok=True)
    write(out / "evaluation.json", json.dumps(content, indent=1, allow_nan=False).encode())
    figure = draw_confusion(confusion, class_names, title=title)
    write(out / "confusion.png", as_png(figure))
    console.print(f"Written to {out}: evaluation.json, confusion.png.")


def run(config: Config) -> tuple[Counts, tuple[str, ...]]:
    """Loads weights and data, and counts; returns the counts and the names of the classes."""
    classifier = load_classifier(config.weights)
    data_config = DataConfig(
        dataset=config.dataset,
        data_dir=config.data_dir,
        images_per_class=config.images_per_class,
        validation=config.validation,
        test=config.test,
        split_seed=config.split_seed,
        image_size=classifier.image_size,
        resize=classifier.resize,
        on_corrupt=config.on_corrupt,
        workers=config.workers,
    )
    dataset: Dataset = data.load(data_config)
    labels = matched(dataset.class_names, classifier.class_names)
    source: Source = getattr(dataset, config.split)
    counts = evaluate(classifier, source, labels, data_config, config.batch_size)
    return counts, classifier.class_names


def main(arguments: Sequence[str]) -> int:
    """Evaluates what the command line asks for; returns the exit code."""
    try:
        config = tyro.cli(Config, prog=PROGRAM, args=arguments)
        counts, class_names = run(config)
        report(counts, class_names, config.out, Console(highlight=False, markup=False))
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
