"""Runs cells in as many processes as asked for; what has been run stays, whoever is killed."""

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

from examples.common.progress import progress
from examples.never_hurt import images, sources, store, train
from examples.never_hurt.cell import Cell
from examples.never_hurt.sources import Pretraining, is_file


class Places(NamedTuple):
    """Where things are.

    Attributes:
        data: Has a folder of images for each data set.
        weights: Has the files of weights that are sources; None if there are none.
        results: The file of results.
        sources: Where networks trained here are kept.
    """

    data: Path
    weights: Path | None
    results: Path
    sources: Path


Chunk = list[Cell]
"""Cells that run at once."""
Job = Pretraining | list[Chunk]
"""What one process does: trains a source, or runs all chunks of one program."""


class WorkerError(RuntimeError):
    """A process of the runner died or failed; what others had done is kept."""


def run_missing(
    cells: Sequence[Cell], places: Places, *, workers: int, lanes: int, pretraining_steps: int
) -> None:
    """Runs the cells that have no result yet.

    Args:
        cells: All that shall have a result.
        places: Where things are.
        workers: Processes; each computes on one core of its own.
        lanes: Cells that run at once in each, by `jax.vmap`: for a GPU. On a CPU one is fastest.
        pretraining_steps: How long sources that are not there are trained.

    Raises:
        ValueError: If there is no worker, or no lane.
        WorkerError: If a process failed.
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
    """A job for each program, so that it is compiled by one process alone."""
    jobs: list[Job] = []
    for _, group in itertools.groupby(sorted(cells, key=_shapes), _shapes):
        ordered = sorted(group, key=lambda cell: (cell.source, cell.seed, cell.strength))
        jobs.append([ordered[i : i + lanes] for i in range(0, len(ordered), lanes)])
    return jobs


def _shapes(cell: Cell) -> tuple[str, ...]:
    """Cells that differ here differ in their programs, or in the shapes of their arrays."""
    source = cell.source if train.has_head(cell.regularizer) else ""
    data = cell.target, cell.images_per_class, cell.image_size, cell.batch_size
    return tuple(
        map(str, (*data, cell.architecture, cell.steps, cell.regularizer, cell.rule, source))
    )


def _run_jobs(
    jobs: Sequence[Job],
    places: Places,
    workers: int,
    pretraining_steps: int,
    advance: Callable[[], None],
) -> None:
    if workers == 1:
        with one_core(0):
            for job in jobs:
                for _ in _do(job, places, pretraining_steps):
                    advance()
        return
    context = multiprocessing.get_context("spawn")
    to_do, done = context.Queue(), context.Queue()
    for job in jobs:
        to_do.put(job)
    for _ in range(workers):
        to_do.put(None)
    processes = [
        context.Process(
            target=_work, args=(number, to_do, done, places, pretraining_steps), daemon=True
        )
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        _follow(processes, done, advance)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _follow(processes: Sequence[Any], done: Queue, advance: Callable[[], None]) -> None:
    finished = 0
    while finished < len(processes):
        try:
            message = done.get(timeout=1)
        except queue.Empty:
            # One that ended well has said so, so the queue has that message, or had it.
            dead = [each for each in processes if each.exitcode not in (None, 0)]
            if dead:
                raise WorkerError(
                    f"A process died with exit code {dead[0].exitcode}. What was run is kept: "
                    "start again to go on."
                ) from None
            continue
        if message is None:
            finished += 1
        elif isinstance(message, str):
            raise WorkerError(f"A process failed: {message} What was run is kept.")
        else:
            advance()


def _work(number: int, to_do: Queue, done: Queue, places: Places, pretraining_steps: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the processes
    parent = os.getppid()
    try:
        with one_core(number):
            while (job := to_do.get()) is not None:
                for _ in _do(job, places, pretraining_steps):
                    done.put(True)
                    if os.getppid() != parent:
                        return
    except Exception as error:
        done.put(f"{type(error).__name__}: {error}")
        return
    done.put(None)


def _do(job: Job, places: Places, pretraining_steps: int) -> Iterator[None]:
    """Does a job; yields once for the source, or for each cell."""
    if isinstance(job, Pretraining):
        sources.obtain(job, places.data, places.sources, places.weights)
        yield
        return
    for chunk in job:
        for result in train.run([prepare(cell, places, pretraining_steps) for cell in chunk]):
            store.append(places.results, result)
            yield


def prepare(cell: Cell, places: Places, pretraining_steps: int) -> train.Prepared:
    """Reads what a cell needs; its source is trained first if it is not there."""
    pretraining = _pretraining(cell, pretraining_steps)
    return train.Prepared(
        cell,
        sources.obtain(pretraining, places.data, places.sources, places.weights),
        images.read(places.data, cell.target, cell.image_size, cell.images_per_class, cell.seed),
    )


@contextlib.contextmanager
def one_core(number: int) -> Iterator[None]:
    """Computes on one core, where the system can be asked to.

    XLA divides sums among the cores that it finds when it begins, so a cell would come out
    otherwise by the number of workers and of cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
