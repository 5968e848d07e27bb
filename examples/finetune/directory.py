"""The output directory: one run at a time, and no earlier run is overwritten unasked."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from examples.finetune.config import Config
from examples.finetune.trials import FOLDER

RESULTS = ("model.safetensors", "summary.md", "summary.json", "curves.png", "confusion.png")
LOGS = ("metrics.jsonl", "metrics.csv", "tensorboard")


class DirectoryError(Exception):
    """The output directory cannot be used."""


@contextlib.contextmanager
def claim(config: Config) -> Iterator[None]:
    """Keeps other runs out of the output directory within the context.

    The first of several processes holds the lock. The operating system releases it when the process
    ends, however it ends.

    Args:
        config: The settings.

    Raises:
        DirectoryError: If another run is in the directory, if an earlier run would be overwritten,
            or if the directory is a part of the data set.
    """
    out = config.output.out
    _check_apart(config)
    if jax.process_index() > 0:
        yield
        return
    if out.exists() and not out.is_dir():
        raise DirectoryError(f"--out must be a directory; {out} is a file.")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DirectoryError(
            f"A run that has not ended uses {out}. Wait until it ends, or choose another --out."
        ) from error
    try:
        if not config.output.overwrite:
            _check_earlier_run(out, resume=config.output.resume)
        yield
    finally:
        lock.release()


def clear(out: Path) -> None:
    """Deletes the files of an earlier run, and nothing else."""
    for name in (*RESULTS, *LOGS, "checkpoints", FOLDER):
        if name == "tensorboard":
            for events in (out / name).glob("events.out.tfevents.*"):
                events.unlink()
        elif (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


def _check_apart(config: Config) -> None:
    """Checks that no input is a part of the output, nor the other way round."""
    out, folder = config.output.out.resolve(), Path(config.data.dataset).expanduser().resolve()
    if folder.is_dir() and out.is_relative_to(folder):
        raise DirectoryError(
            f"--out, {config.output.out}, lies in the data set, and its folders would be read as "
            "classes. Choose an --out that is not in the folder of the images."
        )
    inputs = [folder] if config.model.init is None else [folder, Path(config.model.init).resolve()]
    for path in inputs:
        if config.output.overwrite and path != out and path.is_relative_to(out) and path.exists():
            raise DirectoryError(
                f"--overwrite deletes the earlier results in {config.output.out}, and {path} is "
                "read from there. Choose another --out."
            )


def _check_earlier_run(out: Path, *, resume: bool) -> None:
    results = [name for name in RESULTS if (out / name).exists()]
    metrics = out / "metrics.jsonl"
    # A run that failed before its first record has left an empty file.
    if metrics.exists():
        logs = ["metrics.jsonl"] if metrics.stat().st_size else []
    else:
        events = any((out / "tensorboard").glob("events.out.tfevents.*"))
        logs = ["tensorboard"] if events else []
    if any(path.name.isdecimal() for path in (out / "checkpoints").glob("*")):
        if not resume:
            raise DirectoryError(
                f"{out} has the checkpoints of an earlier run. Continue it with --resume, choose "
                "another --out, or delete it with --overwrite."
            )
    elif results or (logs and not resume):
        raise DirectoryError(
            f"{out} has files of an earlier run, {', '.join(results + logs)}, and no checkpoint to "
            "continue from. Choose another --out, or delete them with --overwrite."
        )
