"""What a run writes down while it trains, and what a person sees of it meanwhile."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensorboardX import SummaryWriter

import dtnh_jax
from examples.common.files import write

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Record:
    """What was measured at a step on a split; what was not measured is left out."""

    step: int
    """Steps taken, 1 after the first."""
    split: Split
    """Where it was measured."""
    loss: float | None = None
    """Mean loss."""
    reg: float | None = None
    """Value of the regularizer."""
    accuracy: float | None = None
    """Share of the images that is right."""
    top5: float | None = None
    """Share of the images whose class is among the five likeliest."""
    balanced_accuracy: float | None = None
    """Mean over the classes of the share that is right."""
    cosine: float | None = None
    """Cosine of the loss and regularizer gradients, all groups as one vector."""
    conflict: float | None = None
    """Share of the groups whose two gradients conflict."""
    removed: float | None = None
    """Share of the regularizer's gradient that the rule took away."""
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
    """The fields of a :class:`Record` that tell of the conflict: ``Record(..., **these)``.

    Args:
        stats: What :func:`dtnh_jax.conflict_stats` returned, of one step.

    Returns:
        ``cosine``, ``conflict``, ``removed`` and ``groups``.
    """
    stats = jax.device_get(stats)
    columns = (column.tolist() for column in stats.per_group)
    names = type(stats.per_group)._fields
    return {
        "cosine": float(stats.total.cosine),
        "conflict": float(stats.per_group.conflict.mean()),
        "removed": float(stats.total.removed),
        "groups": {
            group: dict(zip(names, row, strict=True))
            for group, row in zip(stats.groups, zip(*columns, strict=True), strict=True)
        },
    }


class Logs:
    """``metrics.jsonl``, ``metrics.csv`` and TensorBoard's files of a run.

    JSON lines hold everything, the table all but the groups. A number that is not finite is
    ``null`` in the one, as JSON has no other, and ``nan`` or ``inf`` in the other. A process that
    is killed loses no record that it has written. To be used as a context manager.

    Args:
        out: Directory of the run.
        resume_step: The step of the checkpoint that the run goes on from: later records are
            dropped, they will be made again. ``None`` for a new run: all are dropped.
        tensorboard: Whether to write for TensorBoard too, to ``out/tensorboard``.
        enabled: Whether to write at all; of many processes one does.
    """

    def __init__(
        self, out: Path, *, resume_step: int | None, tensorboard: bool = True, enabled: bool = True
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step is not None:
            kept = [record for record in read(out) if record.step <= resume_step]
        self._written = {(record.split, record.step) for record in kept}
        lines, table = out / "metrics.jsonl", out / "metrics.csv"
        write(lines, "".join(map(json_line, kept)).encode())
        write(table, as_csv(kept, header=True).encode())
        self._lines = lines.open("a", encoding="utf-8")
        self._table = table.open("a", encoding="utf-8", newline="")
        self._tensorboard = None
        if tensorboard:
            directory = out / "tensorboard"
            if resume_step is None:
                for of_older_run in directory.glob("events.out.tfevents.*"):
                    of_older_run.unlink()
            # TensorBoard hides what older files hold from the purged step on.
            purged = None if resume_step is None else resume_step + 1
            # Names of its files tell runs apart by the second at most.
            suffix = f".{resume_step or 0}"
            self._tensorboard = SummaryWriter(
                str(directory), purge_step=purged, filename_suffix=suffix
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._lines.close()
            self._table.close()
            if self._tensorboard:
                self._tensorboard.close()

    def write(self, record: Record) -> None:
        """Writes a record; one of a step and split that is there already is left as it is."""
        if not self._enabled or (record.split, record.step) in self._written:
            return
        self._written.add((record.split, record.step))
        for file, text in ((self._lines, json_line(record)), (self._table, as_csv([record]))):
            file.write(text)
            file.flush()
        if self._tensorboard:
            for tag, value in scalars(record).items():
                self._tensorboard.add_scalar(tag, value, record.step)
            self._tensorboard.flush()


def read(out: Path) -> list[Record]:
    """The records of a run, in the order in which they were written; none if there is no file.

    The last line may be cut short, as a killed run leaves it, and is passed over then.

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
                    f"{path}: line {number} is not a record of this program: {error}. Mend or "
                    "remove the line, or start the run anew in another directory."
                ) from error
    return records


def json_line(record: Record) -> str:
    """A record as a line of JSON."""
    values = {name: value for name, value in vars(record).items() if value is not None}
    return json.dumps(plain(values, finite=True), allow_nan=False) + "\n"


def as_csv(records: Iterable[Record], *, header: bool = False) -> str:
    """Records as rows of a table."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        table.writeheader()
    table.writerows({name: plain(getattr(record, name)) for name in COLUMNS} for record in records)
    return text.getvalue()


def scalars(record: Record) -> dict[str, float]:
    """What TensorBoard shows of a record, by its tags: the numbers that are finite."""
    measured = {f"{record.split}/{name}": getattr(record, name) for name in COLUMNS[2:]}
    measured |= {f"cosine/{group}": each["cosine"] for group, each in (record.groups or {}).items()}
    return {
        tag: value for tag, value in measured.items() if value is not None and math.isfinite(value)
    }


def plain(value: Any, *, finite: bool = False) -> Any:
    """A value in Python's own types, floats to six digits: a float32 has hardly more.

    Args:
        value: A number of Python, NumPy or JAX, a string, ``None``, or a mapping to such.
        finite: Whether to put ``None`` where a number is not finite.
    """
    if isinstance(value, Mapping):
        return {key: plain(each, finite=finite) for key, each in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    number = float(f"{float(value):.6g}")
    return None if finite and not math.isfinite(number) else number


def with_nan(value: Any) -> Any:
    """NaN for each ``None``, which is what JSON has in its place."""
    if isinstance(value, dict):
        return {key: with_nan(each) for key, each in value.items()}
    return math.nan if value is None else value


def in_words(record: Record) -> str:
    """The numbers of a record that a person looks at while it trains."""
    shares = {"accuracy": record.accuracy, "conflict": record.conflict}
    parts = [] if record.loss is None else [f"loss {record.loss:.3f}"]
    parts += [f"{name} {100 * share:.1f} %" for name, share in shares.items() if share is not None]
    return ", ".join(parts)


class Bar(Progress):
    """A progress bar with text below."""

    text = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, then the text."""
        yield from super().get_renderables()
        yield Text(self.text, overflow="ellipsis", no_wrap=True)


class Display:
    """A progress bar and the newest numbers; where there is no terminal, a line now and then.

    To be used as a context manager.

    Args:
        total: Steps of the run.
        start: Steps that are done already.
        images_per_step: Images in a step, over all devices and processes.
        enabled: Whether to show anything; of many processes one does.
        console: Where to; standard output if ``None``.
    """

    LINES = 20  # over a whole run, where there is no terminal

    def __init__(
        self,
        total: int,
        *,
        images_per_step: int,
        start: int = 0,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self._images_per_step = images_per_step
        self._console = console or Console(highlight=False)
        self._enabled = enabled
        self._plain = enabled and not self._console.is_terminal
        self._of_training = self._of_validation = ""
        self._bar = Bar(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            expand=True,
            disable=self._plain or not enabled,
        )
        self._task_id = self._bar.add_task("", total=total, completed=start, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """Another step is done."""
        self._bar.advance(self._task_id)
        task = self._bar.tasks[0]
        rate = f"{task.speed * self._images_per_step:.0f} images/s" if task.speed else ""
        self._bar.update(self._task_id, rate=rate)
        done, total = int(task.completed), int(task.total or 0)
        if self._plain and done * self.LINES // total > (done - 1) * self.LINES // total:
            left = task.time_remaining
            time_left = f"{timedelta(seconds=round(left))} left" if left else ""
            parts = (f"step {done} of {total}", self._of_training, rate, time_left)
            self.message(", ".join(part for part in parts if part))

    def show(self, record: Record) -> None:
        """Takes up the numbers of a record; those of a held-out split have a line of their own."""
        words = in_words(record)
        if record.split == "train":
            self._of_training = words
        else:
            self._of_validation = f"{record.split} {words}"
            if self._plain:
                self.message(f"step {record.step}: {self._of_validation}")
        parts = (self._of_training, self._of_validation)
        self._bar.text = "\n".join(part for part in parts if part)

    def message(self, text: str) -> None:
        """Says something; on a terminal, above the bar."""
        if self._enabled:
            self._console.print(text, markup=False, soft_wrap=True)
