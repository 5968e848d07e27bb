"""A progress bar on a terminal; elsewhere a line after each tenth."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(total: int, title: str = "Training steps") -> Iterator[Callable[..., None]]:
    """Shows progress; yields a function that counts one more item as done, or ``n`` more."""
    console = Console()
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance(n: int = 1) -> None:
            bar.advance(task, n)
            done = int(bar.tasks[0].completed)
            if not console.is_terminal and done * 10 // total > (done - n) * 10 // total:
                console.print(f"{title}: {done} of {total}")

        yield advance
