"""A progress bar on a terminal, a line now and then elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(total: int, title: str = "Training steps") -> Iterator[Callable[[], None]]:
    """Shows how many of ``total`` things are done; yields what to call after each."""
    console = Console()
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance() -> None:
            bar.advance(task)
            done = int(bar.tasks[0].completed)
            if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                console.print(f"{title}: {done} of {total}")

        yield advance
