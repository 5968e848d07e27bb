"""The logs of a run: JSON lines, a CSV table and TensorBoard event files."""

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter

import dtnh_jax
from examples.common.files import write
from examples.finetune.metrics import Metrics

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Record:
    """The measurements of a step on a split; ``None`` for what was not measured."""

    step: int
    """The number of steps so far, 1 after the first."""
    split: Split
    """The images."""
    loss: float | None = None
    """Mean loss."""
    reg: float | None = None
    """Value of the regularizer."""
    accuracy: float | None = None
    """Share of correct images."""
    top5: float | None = None
    """Share of the images whose class is among the five most probable."""
    balanced_accuracy: float | None = None
    """Mean recall of the classes."""
    cosine: float | None = None
    """Cosine of the loss and regularizer gradients, all groups as one vector."""
    conflict: float | None = None
    """Share of the groups whose two gradients conflict."""
    removed: float | None = None
    """Share of the regularizer gradient that the rule removed."""
    learning_rate: float | None = None
    """Learning rate of the backbone."""
    grad_norm: float | None = None
    """Norm of the loss gradient."""
    images_per_second: float | None = None
    """Training images a second since the last record."""
    waiting: float | None = None
    """Share of that time spent waiting for data."""
    groups: Mapping[str, Mapping[str, float]] | None = None
    """``cosine``, ``conflict`` and ``removed`` of each group of parameters."""


COLUMNS = tuple(field.name for field in dataclasses.fields(Record) if field.name != "groups")


def of_conflict(stats: dtnh_jax.ConflictStats) -> dict[str, Any]:
    """The fields of a :class:`Record` that describe the conflict.

    Args:
        stats: The result of :func:`dtnh_jax.conflict_stats` for one step, or the means of several.

    Returns:
        ``cosine``, ``conflict``, ``removed`` and ``groups``, of the groups that were reached; none
        of them if there was no such group.
    """
    stats = jax.device_get(stats)
    # Where a group is not reached its numbers are zero, and not measured.
    reached = stats.reached.astype(float)
    groups = {
        group: {
            name: float(column[row] / reached[row])
            for name, column in zip(stats.per_group._fields, stats.per_group, strict=True)
        }
        for row, group in enumerate(stats.groups)
        if reached[row]
    }
    if not groups:
        return {}
    return {
        "cosine": float(stats.total.cosine),
        "conflict": float(stats.per_group.conflict.sum() / reached.sum()),
        "removed": float(stats.total.removed),
        "groups": groups,
    }


def of_metrics(step: int, split: Split, metrics: Metrics) -> Record:
    """The record of an evaluation."""
    return Record(
        step,
        split,
        loss=metrics.loss,
        accuracy=metrics.accuracy,
        top5=metrics.top5,
        balanced_accuracy=metrics.balanced_accuracy,
    )


class Logs:
    """Writes ``metrics.jsonl``, ``metrics.csv`` and TensorBoard files. A context manager.

    A record is in the JSON lines and in TensorBoard when :meth:`write` returns. The table is
    derived from the JSON lines, without the groups, when the context is left; if the process is
    killed before, that happens when the run is resumed. A number that is not finite is ``null`` in
    JSON and ``nan`` in the table.

    Args:
        out: Directory of the run.
        resume_step: The step of the checkpoint that the run continues from; later records are
            removed, because the run repeats them. ``None`` for a new run, which removes all.
        tensorboard: Whether to write to ``out/tensorboard`` too.
        enabled: Whether to write at all; one of several processes does.
    """

    def __init__(
        self, out: Path, resume_step: int | None, *, tensorboard: bool = True, enabled: bool = True
    ) -> None:
        self._out, self._enabled = out, enabled
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step is not None:
            kept = [record for record in read(out) if record.step <= resume_step]
        self._written = {(record.split, record.step) for record in kept}
        write(out / "metrics.jsonl", "".join(map(json_line, kept)).encode())
        write(out / "metrics.csv", as_csv(kept).encode())
        self._lines = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = None
        if tensorboard:
            directory = out / "tensorboard"
            if resume_step is None:
                for old in directory.glob("events.out.tfevents.*"):
                    old.unlink()
            # TensorBoard hides the events of older files from the purged step on.
            purged = None if resume_step is None else resume_step + 1
            # The default name has a resolution of one second.
            suffix = f".{resume_step or 0}"
            self._tensorboard = SummaryWriter(
                str(directory), purge_step=purged, filename_suffix=suffix
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if not self._enabled:
            return
        # On a full disk, these fail too. The first error is the one to report.
        with contextlib.suppress(*([] if error is None else [OSError])):
            self._lines.close()
            write(self._out / "metrics.csv", as_csv(read(self._out)).encode())
            if self._tensorboard:
                self._tensorboard.close()

    def write(self, record: Record) -> None:
        """Writes a record, unless there is one of the same step and split."""
        if not self._enabled or (record.split, record.step) in self._written:
            return
        self._written.add((record.split, record.step))
        try:
            self._lines.write(json_line(record))
            self._lines.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._out / "metrics.jsonl")) from error
        if self._tensorboard:
            for tag, value in scalars(record).items():
                self._tensorboard.add_scalar(tag, value, record.step)
            self._tensorboard.flush()


def read(out: Path) -> list[Record]:
    """Reads the records of a run; none if there is no file.

    An incomplete last line, which a killed process leaves, is ignored.

    Raises:
        ValueError: If another line is not a record.
    """
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(Record(**with_nan(json.loads(line))))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}: line {number} is not a record of this program: {error}. Repair or "
                    "remove the line, or start a new run in another directory."
                ) from error
    return records


def json_line(record: Record) -> str:
    """Formats a record as a line of JSON."""
    values = {name: value for name, value in vars(record).items() if value is not None}
    return json.dumps(as_json(values), allow_nan=False) + "\n"


def as_csv(records: Iterable[Record]) -> str:
    """Formats records as a CSV table."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(map(vars, records))
    return text.getvalue()


def scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a record, by their TensorBoard tags."""
    measured = {f"{record.split}/{name}": getattr(record, name) for name in COLUMNS[2:]}
    measured |= {f"cosine/{group}": each["cosine"] for group, each in (record.groups or {}).items()}
    return {
        tag: value for tag, value in measured.items() if value is not None and math.isfinite(value)
    }


def as_json(value: Any) -> Any:
    """Converts a value to what JSON can represent.

    Floats get six digits, about the precision of float32; ``None`` replaces one that is not finite.

    Args:
        value: A number of Python, NumPy or JAX, a string, ``None``, or a mapping to such.
    """
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    number = float(f"{float(value):.6g}")
    return number if math.isfinite(number) else None


def with_nan(value: Any) -> Any:
    """Replaces each ``None`` by NaN, the inverse of :func:`as_json`."""
    if isinstance(value, dict):
        return {key: with_nan(each) for key, each in value.items()}
    return math.nan if value is None else value
