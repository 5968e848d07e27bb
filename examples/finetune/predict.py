"""`python -m examples.finetune.predict --weights FILE IMAGE_OR_FOLDER...`: what is on images."""

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
from PIL import Image

from examples.common.data import CorruptImageError, DataConfig, centre_crop, decode
from examples.finetune.evaluate import Classifier, load_classifier, logits

PROGRAM = "python -m examples.finetune.predict"


@dataclass(frozen=True)
class Config:
    """Say what is on images, with fine-tuned weights."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders to look for images in."""
    weights: str
    """The model.safetensors of a run. It says how images are resized and standardised."""
    top: int = 5
    """How many classes are named, the likeliest first."""
    json: bool = False
    """Print a JSON object a line."""
    batch_size: int = 64
    """Images that are looked at together."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not self.images:
            raise ValueError("Give image files or folders; got none.")


class Prediction(NamedTuple):
    """What is said of a file.

    Attributes:
        file: The file.
        classes: Names and probabilities of the likeliest classes, the likeliest first.
        error: Why there is none; ``None`` if there is.
    """

    file: Path
    classes: list[tuple[str, float]]
    error: str | None = None


def predict(
    classifier: Classifier, files: Sequence[Path], *, top: int, batch_size: int
) -> Iterator[Prediction]:
    """Says of each file what is on it; a file that cannot be read is told with its error."""
    model, network, class_names, *_, mean, std = classifier
    network = jax.device_put(network)
    config = DataConfig(dataset="files", image_size=classifier.image_size, resize=classifier.resize)
    # All batches are of one size, so that there is one compilation.
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
    """The view of evaluation of an image file, or why there is none."""
    try:
        return centre_crop(decode(file.read_bytes(), str(file)), config)
    except OSError as error:
        return error.strerror or str(error)
    except CorruptImageError as error:
        return error.reason


def find(places: Sequence[Path]) -> list[Path]:
    """Files as they are, and all images in folders and their subfolders, by name.

    Raises:
        ValueError: If a folder has none.
    """
    known = Image.registered_extensions()
    readable = {extension for extension, name in known.items() if name in Image.OPEN}
    files = []
    for place in places:
        if not place.is_dir():
            files.append(place)
            continue
        found = sorted(
            file
            for file in place.rglob("*")
            if file.suffix.lower() in readable and not file.name.startswith(".")
        )
        if not found:
            raise ValueError(f"There is no image in the folder {place}.")
        files += found
    return files


def as_text(prediction: Prediction) -> str:
    """A prediction for a person."""
    classes = (f"{name} {100 * probability:.1f} %" for name, probability in prediction.classes)
    return f"{prediction.file}: {', '.join(classes)}"


def as_json(prediction: Prediction) -> str:
    """A prediction for a program."""
    classes = [
        {"class": name, "probability": probability} for name, probability in prediction.classes
    ]
    return json.dumps({"file": str(prediction.file), "classes": classes}, allow_nan=False)


def main(arguments: Sequence[str]) -> int:
    """Predicts what the command line asks for; returns the exit code, 1 if a file was skipped."""
    try:
        config = tyro.cli(Config, prog=PROGRAM, args=arguments)
        files = find(config.images)
        classifier = load_classifier(config.weights)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    skipped = 0
    for prediction in predict(classifier, files, top=config.top, batch_size=config.batch_size):
        if prediction.error is not None:
            skipped += 1
            print(f"Skipped {prediction.file}: {prediction.error}.", file=sys.stderr)
        else:
            print(as_json(prediction) if config.json else as_text(prediction))
    if skipped:
        print(f"{skipped} of {len(files)} files were skipped.", file=sys.stderr)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
