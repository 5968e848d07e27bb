"""`python -m examples.finetune.predict --weights FILE IMAGE_OR_FOLDER...`: classifies images."""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import numpy as np
import tyro

from examples.common.command import ended
from examples.common.data import (
    CorruptImageError,
    DataConfig,
    centre_crop,
    decode,
    find_images,
    listing,
    read_bytes,
)
from examples.common.text import printable
from examples.finetune.evaluate import Classifier, load_classifier, logits

PROGRAM = "python -m examples.finetune.predict"


@dataclass(frozen=True)
class Config:
    """Classify images with fine-tuned weights."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders with images."""
    weights: str
    """The model.safetensors of a run. It contains how images are resized and standardised."""
    top: int = 5
    """How many classes are printed, the most probable first."""
    json: bool = False
    """Print a JSON object per line."""
    batch_size: int = 64
    """Images in a batch."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not self.images:
            raise ValueError("Give image files or folders; got none.")


class Prediction(NamedTuple):
    """The prediction for a file.

    Attributes:
        file: The file.
        classes: Names and probabilities of the most probable classes, in descending order.
        error: Why the file was skipped, or ``None``.
    """

    file: Path
    classes: list[tuple[str, float]]
    error: str | None = None


def predict(
    classifier: Classifier, files: Sequence[Path], *, top: int, batch_size: int
) -> Iterator[Prediction]:
    """Classifies files; one that cannot be read yields a prediction with its error."""
    model, network, class_names, *_, mean, std = classifier
    network = jax.device_put(network)
    config = DataConfig(dataset="files", image_size=classifier.image_size, resize=classifier.resize)
    # All batches have the same size, so that the network is compiled once.
    batch_size = min(batch_size, len(files))
    images = np.zeros((batch_size, config.image_size, config.image_size, 3), np.uint8)
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            views = list(threads.map(lambda file: read(file, config), batch))
            for row, view in enumerate(views):
                images[row] = 0 if isinstance(view, str) else view
            of_batch = jax.nn.softmax(logits(model, network, images, mean, std))
            for file, view, probabilities in zip(batch, views, np.asarray(of_batch), strict=False):
                if isinstance(view, str):
                    yield Prediction(file, [], view)
                elif not np.isfinite(probabilities).all():
                    yield Prediction(file, [], "the network's logits are not finite")
                else:
                    best = np.argsort(-probabilities, kind="stable")[:top]
                    likeliest = [(class_names[i], float(probabilities[i])) for i in best]
                    yield Prediction(file, likeliest)


def read(file: Path, config: DataConfig) -> np.ndarray | str:
    """Reads an image as evaluation does; returns the error message if that fails."""
    try:
        return centre_crop(decode(read_bytes(file, str(file)), str(file)), config)
    except CorruptImageError as error:
        return error.reason
    except MemoryError:
        return "it is too large for the memory"


def find(places: Sequence[Path]) -> list[Path]:
    """Finds the images in folders, as in training; files are returned as they are.

    Raises:
        ValueError: If a folder has no image.
    """
    files = []
    for place in places:
        if not place.is_dir():
            files.append(place)
            continue
        found = find_images(place)
        for line in listing(found.left_out, place):
            print(f"Left out of {place}: {line}", file=sys.stderr)
        if not found.images:
            raise ValueError(f"There is no image in the folder {place}.")
        files += found.images
    return files


def as_text(prediction: Prediction) -> str:
    """Formats a prediction as text."""
    classes = (
        f"{printable(name)} {100 * probability:.1f} %" for name, probability in prediction.classes
    )
    return f"{printable(str(prediction.file))}: {', '.join(classes)}"


def as_json(prediction: Prediction) -> str:
    """Formats a prediction as JSON."""
    classes = [
        {"class": name, "probability": probability} for name, probability in prediction.classes
    ]
    return json.dumps({"file": str(prediction.file), "classes": classes}, allow_nan=False)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code, which is 1 if a file was skipped."""

    def run() -> int:
        return print_predictions(tyro.cli(Config, prog=PROGRAM, args=arguments))

    return ended(PROGRAM, run, (ValueError, OSError, ImportError))


def print_predictions(config: Config) -> int:
    """Classifies and prints; returns the exit code."""
    files = find(config.images)
    classifier = load_classifier(config.weights)
    skipped = 0
    for prediction in predict(classifier, files, top=config.top, batch_size=config.batch_size):
        if prediction.error is not None:
            skipped += 1
            print(
                f"Skipped {printable(str(prediction.file))}: {prediction.error}.", file=sys.stderr
            )
        else:
            print(as_json(prediction) if config.json else as_text(prediction))
    if skipped:
        print(f"{skipped} of {len(files)} files were skipped.", file=sys.stderr)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
