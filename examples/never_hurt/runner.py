"""Runs cells in one or more processes; finished cells are kept if a process is killed."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NamedTuple

from examples.common.progress import progress
from examples.never_hurt import images, sources, store, train
from examples.never_hurt.cell import Cell
from examples.never_hurt.sources import Pretraining, is_file


class Places(NamedTuple):
    """Paths of inputs and outputs.

    Attributes:
        data: Has a folder of images for each data set.
        weights: Has the files of weights that are sources; None if there are none.
        results: The file of results.
        sources: The folder of networks trained here.
    """

    data: Path
    weights: Path | None
    results: Path
    sources: Path


Chunk = list[Cell]
"""Cells that run at once."""
Job = Pretraining | list[Chunk]
"""Work for one process: a source to train, or all chunks of one program."""


class WorkerError(RuntimeError):
    """A worker process failed or died; finished cells are kept."""


def run_missing(
    cells: Sequence[Cell], places: Places, *, workers: int, lanes: int, pretraining_steps: int
) -> None:
    """Runs the cells that have no result yet.

    Args:
        cells: The cells that shall have a result.
        places: Paths of inputs and outputs.
        workers: The number of processes; each computes on its own core.
        lanes: Cells that each process runs at once with `jax.vmap`, for a GPU. On a CPU, 1 is
            fastest.
        pretraining_steps: Training steps of the sources that do not exist yet.

    Raises:
        ValueError: If ``workers`` or ``lanes`` is below 1.
        WorkerError: If a worker process failed or died.
    """
    for name, value in (("workers", workers), ("lanes", lanes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    done = store.read(places.results)
    missing = [cell for cell in dict.fromkeys(cells) if cell.key not in done]
    if not missing:
        return
    wanted = {_pretraining(cell, pretraining_steps): None for cell in missing}
    absent: list[Job] = [
        each
        for each in wanted
        if not is_file(each.source) and not (places.sources / each.file_name).exists()
    ]
    for title, jobs in ("Sources", absent), ("Cells", _grouped(missing, lanes)):
        if jobs:
            n = sum(sum(map(len, job)) if isinstance(job, list) else 1 for job in jobs)
            with progress(n, title) as advance:
                _run_jobs(jobs, places, workers, pretraining_steps, advance)


def _pretraining(cell: Cell, steps: int) -> Pretraining:
    return Pretraining(cell.source, cell.architecture, cell.image_size, steps)


def _grouped(cells: Sequence[Cell], lanes: int) -> list[Job]:
    """One job per program, so that only one process compiles it."""
    jobs: list[Job] = []
    for _, group in itertools.groupby(sorted(cells, key=_shapes), _shapes):
        ordered = sorted(group, key=lambda cell: (cell.source, cell.seed, cell.strength))
        jobs.append([ordered[i : i + lanes] for i in range(0, len(ordered), lanes)])
    return jobs


def _shapes(cell: Cell) -> tuple[str, ...]:
    """The settings that decide the program of a cell and the shapes of its arrays."""
    source = cell.source if train.has_head(cell.regularizer) else ""
    data = cell.target, cell.images_per_class, cell.image_size, cell.batch_size
    held_out = cell.held_out, cell.held_out_every, cell.returned_at, cell.trial
    training = cell.architecture, cell.steps, cell.procedure
    return tuple(
        map(
            str,
            (*data, *held_out, *training, cell.regularizer, cell.rule, source),
        )
    )


def _run_jobs(
    jobs: Sequence[Job],
    places: Places,
    workers: int,
    pretraining_steps: int,
    advance: Callable[..., None],
) -> None:
    if workers == 1:
        with one_core(0):
            for job in jobs:
                for _ in _do(job, places, pretraining_steps):
                    advance()
        return
    context = multiprocessing.get_context("spawn")  # JAX does not support fork
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(numbers,))
    try:
        futures = [pool.submit(_finish, job, places, pretraining_steps) for job in jobs]
        for future in as_completed(futures):
            advance(future.result())
    except BrokenProcessPool as error:
        raise WorkerError(
            "A worker process died. Finished cells are kept: start again to continue."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(numbers: SimpleQueue[int]) -> None:
    """Pins a worker to its own core, and makes it end with its parent and on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _pin(numbers.get())


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _finish(job: Job, places: Places, pretraining_steps: int) -> int:
    """Does a job in a worker; returns the number of its sources or cells."""
    try:
        return sum(1 for _ in _do(job, places, pretraining_steps))
    except Exception as error:  # not every exception can be sent to the parent
        raise WorkerError(
            f"A worker process failed: {type(error).__name__}: {error} Finished cells are kept."
        ) from error


def _do(job: Job, places: Places, pretraining_steps: int) -> Iterator[None]:
    """Does a job; yields once for a source, or after each cell."""
    if isinstance(job, Pretraining):
        sources.obtain(job, places.data, places.sources, places.weights)
        yield
        return
    for chunk in job:
        for result in train.run([prepare(cell, places, pretraining_steps) for cell in chunk]):
            store.append(places.results, result)
            yield


def prepare(cell: Cell, places: Places, pretraining_steps: int) -> train.Prepared:
    """Reads the data and the source of a cell; the source is trained first if necessary."""
    pretraining = _pretraining(cell, pretraining_steps)
    return train.Prepared(
        cell,
        sources.obtain(pretraining, places.data, places.sources, places.weights),
        images.read(places.data, cell.target, cell.image_size, cell.images_per_class, cell.seed),
    )


@contextlib.contextmanager
def one_core(number: int) -> Iterator[None]:
    """Computes on one core, where the system supports it.

    XLA divides sums among the cores that it finds when it starts. On one core, results do not
    depend on the number of workers and cores.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    _pin(number)
    try:
        yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)


def _pin(number: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
