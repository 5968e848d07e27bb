"""The live display of a run: a progress bar and the newest numbers."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Self

import jax
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from examples.common.data import Dataset
from examples.common.text import plain_console
from examples.finetune.logs import Record


def in_words(record: Record) -> str:
    """Formats loss, accuracy and conflict rate."""
    shares = {"accuracy": record.accuracy, "conflict": record.conflict}
    parts = [] if record.loss is None else [f"loss {record.loss:.3f}"]
    parts += [f"{name} {100 * share:.1f} %" for name, share in shares.items() if share is not None]
    return ", ".join(parts)


def introduce(dataset: Dataset, console: Console | None = None) -> None:
    """Prints what was read, and on which devices the run is."""
    devices = jax.devices()
    used = f"devices: {len(devices)} × {devices[0].device_kind} ({devices[0].platform})"
    announce("\n".join([*dataset.summary, used]), console)


def announce(text: str, console: Console | None = None) -> None:
    """Prints lines."""
    (console or plain_console()).print(text, soft_wrap=True)


class Bar(Progress):
    """A progress bar with a text below it."""

    text = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, then the text."""
        yield from super().get_renderables()
        yield Text(self.text, overflow="ellipsis", no_wrap=True)


class Display:
    """Shows a progress bar on a terminal, and prints lines elsewhere. A context manager.

    Args:
        total: Steps of the run.
        images_per_step: Images in a step, over all devices and processes.
        start: Steps before a resume.
        enabled: Whether to show anything; one of several processes does.
        console: The console; standard output if ``None``.
    """

    LINES = 20  # of a whole run, without a terminal

    def __init__(
        self,
        total: int,
        images_per_step: int,
        *,
        start: int = 0,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self._images_per_step = images_per_step
        self._console = console or plain_console()
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
        """Counts a step."""
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
        """Shows the numbers of a record; those of a held-out split have a separate line."""
        words = in_words(record)
        if record.split == "train":
            self._of_training = words
        else:
            self._of_validation = f"{record.split} {words}"
            if self._plain:
                self.message(f"step {record.step}: {self._of_validation}")
        self._bar.text = "\n".join(filter(None, (self._of_training, self._of_validation)))

    def message(self, text: str) -> None:
        """Prints a message; on a terminal, above the bar."""
        if self._enabled:
            self._console.print(text, markup=False, emoji=False, soft_wrap=True)
