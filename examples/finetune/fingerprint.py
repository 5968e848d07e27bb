"""Which images and weights a run is made from, whatever their paths are."""

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import jax
import numpy as np

from examples.common.data import Dataset, Source
from examples.common.resnet import Network

SPLITS = ("train", "held_out", "validation", "test")
MOST = 5  # differences that are named


def fingerprint(dataset: Dataset, network: Network | None) -> dict[str, Any]:
    """Describes images and weights, as JSON.

    Args:
        dataset: The images. Their names within the data set count, and the sizes of their files.
        network: The pre-trained network; ``None`` in training from scratch.

    Returns:
        The names of the classes; of each split the number and a hash of the images in each folder,
        and the size of the files; a hash of the weights.
    """
    splits = {name: getattr(dataset, name) for name in SPLITS}
    splits = {name: images for name, images in splits.items() if images is not None}
    return {
        "classes": list(dataset.class_names),
        "images": {name: _by_folder(images) for name, images in splits.items()},
        "bytes": {name: images.n_bytes() for name, images in splits.items()},
        "weights": None if network is None else _of_arrays(jax.tree.leaves(network)),
    }


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Names what was changed between two fingerprints, but for the sizes of files.

    Args:
        theirs: The earlier one.
        ours: The present one.

    Returns:
        Sentences without a full stop.
    """
    if theirs["classes"] != ours["classes"]:
        gone, new = (
            [name for name in these if name not in those]
            for these, those in (
                (theirs["classes"], ours["classes"]),
                (ours["classes"], theirs["classes"]),
            )
        )
        changed = [f"the class {name} is gone" for name in gone]
        changed += [f"the class {name} is new" for name in new]
        changed = changed or ["the classes are in another order"]
    else:
        changed = []
        for split in SPLITS:
            before, now = (each["images"].get(split, {}) for each in (theirs, ours))
            for folder in sorted(before.keys() | now.keys()):
                then, today = (each.get(folder, [0, ""]) for each in (before, now))
                if then[0] != today[0]:
                    changed.append(f"{folder} had {then[0]} {split} images and has {today[0]}")
                elif then != today:
                    changed.append(f"{folder} has other {split} images")
    if len(changed) > MOST:
        changed = [*changed[:MOST], f"{len(changed) - MOST} more differences in images"]
    if theirs["weights"] != ours["weights"]:
        changed.append("the weights of the pre-trained network are other ones")
    return changed


def _by_folder(images: Source) -> dict[str, list[Any]]:
    folders: dict[str, list[str]] = {}
    for name in images.names:
        folders.setdefault(str(PurePosixPath(name).parent), []).append(name)
    return {folder: [len(names), _of_names(names)] for folder, names in folders.items()}


def _of_names(names: Iterable[str]) -> str:
    # Names of files need not be valid text.
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


def _of_arrays(arrays: Iterable[Any]) -> str:
    sha256 = hashlib.sha256()
    for array in map(np.asarray, arrays):
        sha256.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return sha256.hexdigest()[:16]
