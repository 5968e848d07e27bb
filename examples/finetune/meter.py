"""Averages of what the steps measure, and throughput."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import dtnh_jax
from examples.finetune.batches import TrainingBatches
from examples.finetune.config import TrainingConfig
from examples.finetune.logs import Record, of_conflict
from examples.finetune.optimizer import learning_rate


class Measured(NamedTuple):
    """Measurements of one micro-batch.

    Attributes:
        loss: A scalar, as are the next three.
        reg: The value of the regularizer.
        accuracy: The fraction of correct images before the step.
        grad_norm: The norm of the loss gradient.
        conflict: The conflict of the two gradients in the last step; ``None`` without a
            regularizer.
    """

    loss: jax.Array
    reg: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array
    conflict: dtnh_jax.ConflictStats | None


class Throughput(NamedTuple):
    """The speed of a whole run.

    Attributes:
        seconds: Duration of the training, with compilation, evaluations, and the time before a
            resume.
        images_per_second: Over the training steps, without the first record, which compiles.
        waiting: The fraction of that time spent waiting for images.
    """

    seconds: float
    images_per_second: float
    waiting: float


class Meter:
    """Averages measurements between two records.

    Args:
        training: Batch size, micro-batches and learning rate.
        batches: The training batches, which measure how long they were waited for.
        state: The state of the meter before the run was resumed, from :meth:`get_state`.
    """

    def __init__(
        self,
        training: TrainingConfig,
        batches: TrainingBatches,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._accumulate, self._batch_size = training.accumulate, training.batch_size
        self._learning_rate = learning_rate(training)
        self._batches = batches
        state = state or {"seconds": 0, "pending": [], "since": [0, 0], "total": [0, 0, 0]}
        self._restored: list[list[Any]] = state["pending"]
        self._pending: list[Measured] = []
        seconds, waited = state["since"]  # the last record
        self._start = time.perf_counter() - seconds
        self._waited = batches.waited_seconds - waited
        self._run_start = time.perf_counter() - state["seconds"]
        # Images, seconds and seconds of waiting: of the records that did not compile, and of that
        # which did.
        self._total, self._first = np.array(state["total"], float), None

    @property
    def seconds(self) -> float:
        """The duration of the run until now."""
        return time.perf_counter() - self._run_start

    def add(self, measured: Measured) -> None:
        """Adds a micro-batch; waits for the one before it, so that one is always queued."""
        if self._pending:
            jax.block_until_ready(self._pending[-1])
        self._pending.append(measured)

    def read(self, step: int) -> Record:
        """Waits for the devices, and returns the averages since the last record."""
        measured = jax.device_get(self._pending)
        like, form = jax.tree.flatten(measured[-1])
        measured = [
            form.unflatten(np.asarray(x, leaf.dtype) for x, leaf in zip(leaves, like, strict=True))
            for leaves in self._restored
        ] + measured
        averages = {
            name: float(np.mean([getattr(each, name) for each in measured]))
            for name in ("loss", "reg", "accuracy", "grad_norm")
        }
        # The rule acts on the last micro-batch of a step.
        conflicts = [each.conflict for each in measured[self._accumulate - 1 :: self._accumulate]]
        conflict = jax.tree.map(lambda *steps: np.mean(steps, axis=0), *conflicts)
        seconds = time.perf_counter() - self._start
        waited = self._batches.waited_seconds - self._waited
        n_images = len(measured) * self._batch_size // self._accumulate
        of_record = np.array([n_images, seconds, waited])
        if self._first is None:
            self._first = of_record
        else:
            self._total += of_record
        self._pending, self._restored = [], []
        self._start, self._waited = time.perf_counter(), self._batches.waited_seconds
        return Record(
            step,
            "train",
            **averages,
            learning_rate=float(np.asarray(self._learning_rate(step - 1))),
            images_per_second=n_images / seconds,
            waiting=waited / seconds,
            **({} if conflict is None else of_conflict(conflict)),
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time within the context from the throughput."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def throughput(self) -> Throughput:
        """The speed of the run until now."""
        n_images, seconds, waited = self._counted()
        seconds = max(seconds, 1e-9)
        return Throughput(self.seconds, float(n_images / seconds), float(waited / seconds))

    def get_state(self) -> dict[str, Any]:
        """What a resumed run needs for the same records, as JSON."""
        pending = [
            [np.asarray(x).tolist() for x in jax.tree.leaves(measured)]
            for measured in jax.device_get(self._pending)
        ]
        return {
            "seconds": self.seconds,
            "pending": self._restored + pending,
            "since": [
                time.perf_counter() - self._start,
                self._batches.waited_seconds - self._waited,
            ],
            "total": self._counted().tolist(),
        }

    def _counted(self) -> np.ndarray:
        """Images, seconds and waiting of the throughput."""
        return self._total if self._total[0] or self._first is None else self._first
