"""Atomic checkpoints, from which a run continues bit for bit."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

import dtnh_jax
from examples.common.version import digest
from examples.finetune.config import Config, preset
from examples.finetune.fingerprint import differences

# Settings that may change on --resume. They do not change what is computed, except for the order
# of sums over devices. Instead of the paths, the images and weights are compared.
MAY_CHANGE = (
    "devices",
    "output",
    "data.dataset",
    "data.data_dir",
    "data.on_corrupt",
    "data.workers",
    "model.init",
    "training.evaluation_batch_size",
)
OVERHEAD = 2**20  # bytes of a checkpoint beside the arrays, and more
EXAMPLES = Path(__file__).parents[1]
SOURCES = (Path(dtnh_jax.__file__).parent, EXAMPLES / "common", EXAMPLES / "finetune")


class CheckpointError(Exception):
    """A checkpoint cannot be written or read, or is of another run."""


class Progress(NamedTuple):
    """The progress of a run, beside the training state.

    Attributes:
        step: The number of steps so far.
        data: The position in the images.
        best: The step that is best on validation images, and its score; ``None`` before the
            first evaluation.
        meter: The state of the :class:`Meter`, with the duration so far over all resumes.
        evaluated: Whether the evaluation of the step, if there is to be one, has been made. A run
            that is told to stop saves first.
    """

    step: int
    data: dict[str, Any]
    best: tuple[int, float] | None
    meter: dict[str, Any]
    evaluated: bool = True


class Checkpoints:
    """The checkpoints of a run: the best and the last. A context manager.

    Args:
        directory: The directory, which is created if necessary.
        config: The settings of the run.
        made_from: What it is made from, see :func:`fingerprint`.
    """

    def __init__(self, directory: Path, config: Config, made_from: dict[str, Any]) -> None:
        self._directory = directory.absolute()
        self._config, self._made_from = as_dict(config), made_from
        self._keep_last = config.output.keep_last
        self._best: int | None = None
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [preservation_policy.LatestN(self._keep_last), _Best(self)]
                ),
                # The next step overwrites the state's memory, and on a CPU that is all there is.
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "run"),
        )

    def __enter__(self) -> Self:
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())
        return self

    def __exit__(self, *_: object) -> None:
        with self._quiet:
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        return sorted(self._manager.all_steps())

    def save(self, progress: Progress, state: Any) -> None:
        """Writes a checkpoint, unless this step has one.

        Raises:
            CheckpointError: If it cannot be written, for example on a full disk. Older ones are
                kept.
        """
        step = progress.step
        if step in self._manager.all_steps():
            return
        self._remember(progress)
        run = progress._asdict() | {
            "config": self._config,
            "made_from": self._made_from,
            "version": version(),
            "structure": _structure(state),
        }
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        failure = None
        try:
            self._check_space(state)
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
        except Exception as error:
            failure = str(error)
        if failure is not None:
            gc.collect()  # of the error, whose other parts would be printed later
            kept = [each for each in self.steps if each < step]
            last = f"the last good one is of step {kept[-1]}" if kept else "there is none before it"
            raise CheckpointError(
                f"Could not write the checkpoint of step {step} to {self._directory}: {failure} "
                f"({last}). Free space or repair the directory, then continue with --resume."
            )

    def _check_space(self, state: Any) -> None:
        # Orbax would end in hundreds of tracebacks, some of them when Python ends.
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + OVERHEAD
        free = shutil.disk_usage(self._directory).free
        if free < size:
            raise OSError(
                f"it takes up to {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free on the disk"
            )

    def restore_last(self, like: Any) -> tuple[Progress, Any] | None:
        """Reads the last checkpoint that is intact.

        Args:
            like: The shapes, dtypes and shardings of the state. The devices may differ from those
                that the checkpoint was written on.

        Returns:
            The progress and the state, or ``None`` if there is no checkpoint. The progress has no
            best step if the checkpoint of that step is missing.

        Raises:
            CheckpointError: If no checkpoint can be read, or they are of a run with other settings,
                images or weights, or of another version of the code.
        """

        def read(step: int) -> tuple[dict[str, Any], Any]:
            run = self._read(step, "run", ocp.args.JsonRestore())
            self._check(run, like)
            return run, self._read(step, "state", ocp.args.StandardRestore(like))

        if not self.steps:
            return None
        step, (run, state) = self._first_readable(self.steps[::-1], read)
        for broken in [each for each in self.steps if each > step]:
            self._manager.delete(broken)
        best = run["best"] and tuple(run["best"])
        if best and best[0] not in self.steps:
            warnings.warn(
                f"The checkpoint of step {best[0]}, the best so far, is missing in "
                f"{self._directory}. The best step is chosen from step {step} on.",
                stacklevel=2,
            )
            best = None
        progress = Progress(step, run["data"], best, run["meter"], run.get("evaluated", True))
        self._remember(progress)
        return progress, state

    def restore_best(self, step: int, like: Any) -> tuple[int, Any]:
        """Reads the state of the best step or, if it cannot be read, of the last one that can.

        Args:
            step: The best step.
            like: The shapes, dtypes and shardings of the state.

        Returns:
            The step of the state, and the state.

        Raises:
            CheckpointError: If no state can be read.
        """
        others = [each for each in self.steps[::-1] if each != step]
        return self._first_readable(
            [step, *others], lambda each: self._read(each, "state", ocp.args.StandardRestore(like))
        )

    def _first_readable(self, steps: Sequence[int], read: Callable[[int], Any]) -> tuple[int, Any]:
        """The first of the steps that can be read, and what was read; warns of those before it."""
        failures = []
        for step in steps:
            try:
                found = read(step)
            except CheckpointError:
                raise
            except Exception as error:
                failures.append((step, error))
                continue
            for broken, error in failures:
                warnings.warn(
                    f"The checkpoint of step {broken} in {self._directory} cannot be read, and "
                    f"that of step {step} is used. {error}",
                    stacklevel=3,
                )
            return step, found
        reasons = "; ".join(f"step {step}: {error}" for step, error in failures)
        raise CheckpointError(f"No checkpoint in {self._directory} can be read. {reasons}")

    def _read(self, step: int, item: str, how: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]

    def _remember(self, progress: Progress) -> None:
        self._best = None if progress.best is None else progress.best[0]

    def _check(self, run: dict[str, Any], like: Any) -> None:
        """Checks that a checkpoint is of this run, and warns of what may matter."""
        theirs = run.get("version", "a version that did not save its name")
        versions = f"They are of another version of the code, {theirs}; this is {version()}."
        is_other = theirs != version()
        changed = self._changed(run)
        if changed:
            raise CheckpointError(
                f"The checkpoints in {self._directory} are of a run with other settings, images or "
                f"weights: {'; '.join(changed)}. Give the same ones to continue, or choose "
                f"another --out.{self._longer(run)}{f' {versions}' if is_other else ''}"
            )
        if run.get("structure") != _structure(like):
            raise CheckpointError(
                f"The checkpoints in {self._directory} cannot be used. {versions} Continue with "
                "the version that wrote them, or start a new run in another --out."
            )
        if is_other:
            warnings.warn(
                f"The checkpoints in {self._directory} are used. {versions} The rest of the run "
                "may differ from that of a run without an interruption.",
                stacklevel=3,
            )
        if run["made_from"]["bytes"] != self._made_from["bytes"]:
            warnings.warn(
                "The images have the same names as before, and their files have other sizes. The "
                "run continues with the present ones.",
                stacklevel=3,
            )

    def _changed(self, run: dict[str, Any]) -> list[str]:
        """What differs from the run of a checkpoint."""
        ours = self._config
        # A setting that is new in the code was at its default.
        theirs = as_dict(preset("standard", "-")) | run["config"]
        names = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
        if theirs["training.schedule"] == "constant" and ours["training.steps"] >= run["step"]:
            names = [name for name in names if name != "training.steps"]
        changed = [
            f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
            for name in names
            if not name.startswith(MAY_CHANGE)
        ]
        made_from = run.get("made_from")
        return changed + (differences(made_from, self._made_from) if made_from else [])

    def _longer(self, run: dict[str, Any]) -> str:
        """How to make a run longer, if that was wanted."""
        if self._config["training.steps"] <= run["config"].get("training.steps", 0):
            return ""
        return (
            " Only a run with --schedule constant can be made longer: other schedules depend on "
            "the number of steps. To train further from the result, start a new run with another "
            f"--out and --init {self._directory.parent / 'model.safetensors'}; its head is new."
        )


@functools.cache
def version() -> str:
    """The versions of the code and of what computes."""
    of_packages = (
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")
    )
    return f"dtnh_jax {dtnh_jax.__version__}+{digest(SOURCES)} with {', '.join(of_packages)}"


def _structure(state: Any) -> str:
    """A hash of the paths, shapes and dtypes of a tree."""
    leaves = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}"
        for path, leaf in jax.tree.leaves_with_path(state)
    ]
    return hashlib.sha256("\n".join(leaves).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from printing the errors that it raises too, with hundreds of tracebacks."""

    def print_others(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if str(error) != "Event loop is closed":  # of writes after the first that failed
            before[1](kind, error, traceback)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers], sys.excepthook
    for logger in loggers:
        logger.disabled = True
    sys.excepthook = print_others
    try:
        yield
    finally:
        sys.excepthook = before[1]
        for logger, disabled in zip(loggers, before[0], strict=True):
            logger.disabled = disabled


def as_dict(config: Config) -> dict[str, Any]:
    """The settings by name, such as ``"training.steps"``, with values of JSON."""
    flat = {}
    for part, settings in dataclasses.asdict(config).items():
        if isinstance(settings, dict):
            flat |= {f"{part}.{name}": value for name, value in settings.items()}
    return json.loads(json.dumps(flat, default=str))


class _Best(preservation_policy.PreservationPolicy):
    """Preserves the checkpoint of the best step."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        return [each.step == self._checkpoints._best for each in checkpoints]
