"""Which images does a folder have, and of which split and class is each?

One rule holds for training, evaluation and prediction: an image is a file that Pillow can open, by
its extension or, with another extension or none, by its first bytes. Folders are read with all
subfolders, but not what is hidden or made by a system for itself.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from examples.common.data.sources import FolderImages, Source
from examples.common.text import normalized, printable

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
# A name that says split, such as train_images, val2017 or TestSet.
_LIKE_SPLIT = re.compile(rf"({'|'.join(_SPLIT_OF)})(set|data|[^a-z]|$)")
# Forks of macOS, thumbnails of network drives, what was deleted, and the like.
_OF_SYSTEMS = (
    "__MACOSX",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__pycache__",
)
_LISTED = 3


class Found(NamedTuple):
    """The content of a folder.

    Attributes:
        images: The images, sorted by name.
        left_out: Other files and folders, each with the reason.
    """

    images: list[Path]
    left_out: list[tuple[Path, str]]


def find_images(folder: Path, *, subfolders: bool = True) -> Found:
    """Finds the images of a folder.

    Args:
        folder: The folder.
        subfolders: Whether to look into its subfolders; without, they are passed over.

    Returns:
        The images and what is left out. A link that leads nowhere is an image if its extension is
        that of one, so that reading it is an error with its name.
    """
    found = Found([], [])
    seen = {_identity(parent) for parent in folder.resolve().parents}

    def visit(place: Path) -> None:
        if (identity := _identity(place)) in seen:
            found.left_out.append((place, "links to folders that are read already"))
            return
        seen.add(identity)
        with os.scandir(place) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            path = place / entry.name
            if _is_hidden(entry.name):
                found.left_out.append((path, "hidden files or folders"))
            elif _is(entry.is_dir):
                if subfolders:
                    visit(path)
            elif reason := _why_no_image(path, is_file=_is(entry.is_file)):
                found.left_out.append((path, reason))
            else:
                found.images.append(path)

    visit(folder)
    return found


def listing(left_out: Sequence[tuple[Path, str]], root: Path) -> list[str]:
    """What is left out, in a line for each reason with a few of the names, relative to ``root``."""
    lines = []
    for reason in dict.fromkeys(reason for _, reason in left_out):
        paths = [path for path, why in left_out if why == reason]
        names = [printable(path.relative_to(root).as_posix()) for path in paths[:_LISTED]]
        more = ", ..." if paths[_LISTED:] else ""
        lines.append(f"{len(paths)} {reason}: {', '.join(names)}{more}")
    return lines


def open_folder(root: Path) -> tuple[dict[str, Source], tuple[str, ...], list[str]]:
    """Finds the images of a data set.

    Args:
        root: Contains a folder for each class, ``<class>/...``; or a folder for each split, with
            one of the names in ``SPLITS`` in upper or lower case, such as ``train/<class>/...``.

    Returns:
        The splits; the class names in the order of their labels (alphabetical); and, in words, what
        is left out and what may not be as it was meant.

    Raises:
        ValueError: If a class is empty, unknown to ``train`` or the only one; or if it is not
            certain what is a split and what a class.
    """
    folders, left_out = _splits(root)
    classes = {split: _classes(folder) for split, folder in folders.items()}
    class_names = tuple(sorted(classes["train"]))
    if len(class_names) < 2:
        inner = [each for each in classes["train"].values() if len(_subfolders(each)) > 1]
        loose = len(find_images(folders["train"], subfolders=False).images)
        raise ValueError(
            f"{folders['train']} must have a folder of images for each of two or more classes; "
            f"it has {len(class_names)}: {', '.join(class_names) or 'none'}"
            + (f", and {loose} images in no folder." if loose else ".")
            + "".join(f" To read the folders in it, give {each}." for each in inner)
        )
    notes = _nested(classes["train"])
    sources = {}
    for split, folder in folders.items():
        files, labels, not_taken = _class_images(folder, classes[split], class_names)
        sources[split] = Source(FolderImages(root, tuple(files), np.array(labels, np.int32)))
        left_out += not_taken
    notes += [f"left out: {each}" for each in listing(left_out, root)]
    return sources, class_names, notes


def _splits(root: Path) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """The folder of each split, and what is left out beside them; without splits, ``root``."""
    folders: dict[str, Path] = {}
    others = []
    for folder in _subfolders(root):
        split = _SPLIT_OF.get(folder.name.casefold())
        if split is None:
            others.append(folder)
        elif split in folders:
            raise ValueError(
                f"{root} has {folders[split].name} and {folder.name}, which are both names of the "
                f"{split} split. Join or rename them."
            )
        else:
            folders[split] = folder
    if not folders:
        for folder in others:
            if _LIKE_SPLIT.match(folder.name.casefold()) and not _has_images(folder):
                raise ValueError(
                    f"{folder} has folders and no images of its own. If it is a split, rename it: "
                    f"{_names_of_splits()}. If it is a class, {_remedy(root)}"
                )
        return {"train": root}, []

    for folder in folders.values():
        if not _subfolders(folder):
            beside = "".join(f", beside {names}" for names in [_few(others)] if names)
            raise ValueError(
                f"{folder} is taken as a split by its name, and must have a folder of images for "
                f"each of two or more classes; it has none{beside}. If it is a class, "
                f"{_remedy(root)}"
            )
    if "train" not in folders:
        raise ValueError(
            f"{root} has {_few(folders.values())} but no train. If it is a class and not a split, "
            f"{_remedy(root)}"
        )
    return folders, _beside(root, folders, others)


def _beside(
    root: Path, folders: Mapping[str, Path], others: Sequence[Path]
) -> list[tuple[Path, str]]:
    """The images beside the splits, which are left out.

    Raises:
        ValueError: If they could well be of a split or a class.
    """
    with_images = {folder: found for folder in others if (found := find_images(folder)).images}
    trained = _classes(folders["train"])
    for folder in with_images:
        if trained.keys() & _classes(folder).keys():
            raise ValueError(
                f"{folder} has folders of the same classes as {folders['train']}, and its name is "
                f"not that of a split. Rename it to one of {_names_of_splits()}, or move it away."
            )
    if len(folders) == 1 and len(with_images) > 1:
        raise ValueError(
            f"{root} has train, which is the name of a split, beside {_few(with_images)}. Move "
            f"these away; or, if train is a class, {_remedy(root)}"
        )
    beside = find_images(root, subfolders=False)
    images = [*beside.images, *(path for found in with_images.values() for path in found.images)]
    return [*beside.left_out, *((path, "images outside of the splits") for path in images)]


def _classes(folder: Path) -> dict[str, Path]:
    """The class folders in a folder, by their names.

    Raises:
        ValueError: If two names cannot be told apart.
    """
    classes: dict[str, Path] = {}
    for each in _subfolders(folder):
        name = normalized(each.name)
        if name in classes:
            raise ValueError(
                f"{folder} has two folders named {name}, which differ in their Unicode form alone "
                f"({classes[name].name!a} and {each.name!a}). Join or rename them."
            )
        classes[name] = each
    return classes


def _nested(classes: Mapping[str, Path]) -> list[str]:
    """In words, that the classes could as well be the folders within those that are taken as such.

    Raises:
        ValueError: If a class folder has other classes or splits in it, and no images of its own.
    """
    inner = {}
    for name, folder in classes.items():
        names = {normalized(each.name) for each in _subfolders(folder)}
        if not names or _has_images(folder):
            continue
        inner[name] = names
        if found := sorted(names & classes.keys()):
            raise ValueError(
                f"{folder} is taken as a class, and has no images but folders with the names of "
                f"other classes: {', '.join(found[:_LISTED])}. If it is a split, rename it to one "
                f"of {_names_of_splits()}, beside folders of the other splits."
            )
        splits = [each for each in sorted(names) if each.casefold() in _SPLIT_OF]
        if len({_SPLIT_OF[each.casefold()] for each in splits}) > 1:
            raise ValueError(
                f"{folder} is taken as a class, and has no images but the splits "
                f"{', '.join(splits)}. Put the splits outside, and in each of them a folder for "
                f"each class, such as {splits[0]}/{folder.name}."
            )
    same = sorted(set.intersection(*inner.values())) if len(inner) == len(classes) else []
    if len(same) < 2:
        return []
    return [
        f"The classes have no images of their own, and all have folders of the same names, "
        f"{', '.join(same[:_LISTED])}. If these are the classes, put them outside."
    ]


def _class_images(
    folder: Path, classes: Mapping[str, Path], class_names: Sequence[str]
) -> tuple[list[Path], list[int], list[tuple[Path, str]]]:
    """The images of a split with their labels, and what is left out."""
    if unknown := sorted(classes.keys() - set(class_names)):
        raise ValueError(
            f"{folder} has classes that there are no training images of: {', '.join(unknown)}."
        )
    if missing := [name for name in class_names if name not in classes]:
        warnings.warn(f"{folder} has no images of {', '.join(missing)}.", stacklevel=5)
    files, labels = [], []
    beside = find_images(folder, subfolders=False)
    left_out = [*beside.left_out, *((path, "images without a class") for path in beside.images)]
    for label, name in enumerate(class_names):
        if name not in classes:
            continue
        found = find_images(classes[name])
        if not found.images:
            has = sorted({path.suffix or path.name for path, _ in found.left_out})
            raise ValueError(
                f"{classes[name]} has no image that Pillow can open; it has "
                f"{', '.join(map(printable, has[:5])) or 'nothing'}."
            )
        files += found.images
        labels += [label] * len(found.images)
        left_out += found.left_out
    return files, labels, left_out


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(
            folder / entry.name
            for entry in entries
            if not _is_hidden(entry.name) and _is(entry.is_dir)
        )


def _is(question: Callable[[], bool]) -> bool:
    """The answer of an entry of a folder; no for a link that leads to itself, which is an error."""
    try:
        return question()
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _has_images(folder: Path) -> bool:
    return bool(find_images(folder, subfolders=False).images)


def _few(folders: Iterable[Path]) -> str:
    names = [printable(folder.name) for folder in folders]
    return ", ".join(names[:_LISTED]) + (", ..." if names[_LISTED:] else "")


def _names_of_splits() -> str:
    return ", ".join(SPLITS)


def _remedy(root: Path) -> str:
    return f"put all class folders into {root / 'train'}."


def _why_no_image(path: Path, *, is_file: bool) -> str | None:
    """Why a file is left out; ``None`` for an image."""
    extensions, formats = _known()
    if path.suffix.lower() in extensions and (is_file or path.is_symlink()):
        return None
    if not is_file:
        return "broken links or special files"
    try:
        with Image.open(path, formats=formats):
            return None
    except UnidentifiedImageError:
        return "not images that Pillow can open"
    except OSError as error:
        return f"not readable ({error.strerror})"
    except Exception as error:  # the readers of Pillow raise many types
        return f"not images that Pillow can open ({type(error).__name__})"


@functools.cache
def _known() -> tuple[frozenset[str], tuple[str, ...]]:
    """The extensions of images, and the formats that the first bytes of a file tell."""
    extensions = Image.registered_extensions()  # which also loads all formats
    formats = {
        name: accept
        for name, (factory, accept) in Image.OPEN.items()
        # Pillow recognises these, but has no decoder.
        if name != "MPEG"
        and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    }
    return (
        frozenset(extension for extension, name in extensions.items() if name in formats),
        tuple(name for name, accept in formats.items() if accept is not None),
    )
