"""Atomic checkpoints, from which a run continues bit for bit."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Self

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from examples.finetune.config import Config

# Settings that may change on --resume. They do not change what is computed, except for the order
# of sums over devices.
MAY_CHANGE = (
    "devices",
    "output",
    "data.workers",
    "data.data_dir",
    "training.evaluation_batch_size",
)


class CheckpointError(Exception):
    """A checkpoint cannot be written or read, or is of another run."""


class Progress(NamedTuple):
    """The progress of a run, beside the training state.

    Attributes:
        step: The number of steps so far.
        data: The position in the training data.
        best: The step that is best on validation images, and its score; ``None`` before the
            first evaluation.
        seconds: The duration so far, over all resumes.
    """

    step: int
    data: dict[str, Any]
    best: tuple[int, float] | None
    seconds: float


class Checkpoints:
    """The checkpoints of a run: the best and the last. A context manager.

    Args:
        directory: The directory, which is created if necessary.
        config: The settings of the run.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        self._directory = directory.absolute()
        self._config = as_dict(config)
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
        return self

    def __exit__(self, *_: object) -> None:
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
        run = ocp.args.JsonSave(progress._asdict() | {"config": self._config})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=run)
        try:
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
        except Exception as error:
            kept = [each for each in self.steps if each < step]
            last = f"the last good one is of step {kept[-1]}" if kept else "there is none before it"
            raise CheckpointError(
                f"Could not write the checkpoint of step {step} to {self._directory}: {error} "
                f"({last}). Free space or repair the directory, then continue with --resume."
            ) from error

    def restore_last(self, like: Any, *, resume: bool = True) -> tuple[Progress, Any] | None:
        """Reads the last checkpoint that is intact.

        Args:
            like: The shapes, dtypes and shardings of the state. The devices may differ from those
                that the checkpoint was written on.
            resume: Whether checkpoints may exist.

        Returns:
            The progress and the state, or ``None`` if there is no checkpoint.

        Raises:
            CheckpointError: If no checkpoint can be read, if they are of a run with other settings,
                or if they exist and ``resume`` is false.
        """
        if self.steps and not resume:
            raise CheckpointError(
                f"{self._directory} has the checkpoints of an earlier run. Continue it with "
                "--resume, or choose another --out."
            )
        failures = []
        for step in reversed(self.steps):
            try:
                run = self._manager.restore(
                    step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
                )["run"]
                self._check_config(run["config"])
                state = self._read_state(step, like)
            except CheckpointError:
                raise
            except Exception as error:
                failures.append(f"step {step}: {error}")
                warnings.warn(
                    f"The checkpoint of step {step} in {self._directory} cannot be read. "
                    f"Trying an earlier one. {error}",
                    stacklevel=2,
                )
                continue
            for broken in [each for each in self.steps if each > step]:
                self._manager.delete(broken)
            progress = Progress(
                step, run["data"], run["best"] and tuple(run["best"]), run["seconds"]
            )
            self._remember(progress)
            return progress, state
        if failures:
            raise CheckpointError(
                f"No checkpoint in {self._directory} can be read. " + "; ".join(failures)
            )
        return None

    def restore(self, step: int, like: Any) -> Any:
        """Reads the state of one step.

        Raises:
            CheckpointError: If it cannot be read.
        """
        try:
            return self._read_state(step, like)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._directory} cannot be read: {error}"
            ) from error

    def _read_state(self, step: int, like: Any) -> Any:
        return self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
        )["state"]

    def _remember(self, progress: Progress) -> None:
        self._best = None if progress.best is None else progress.best[0]

    def _check_config(self, theirs: dict[str, Any]) -> None:
        ours = self._config
        names = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
        changed = [
            f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
            for name in names
            if not name.startswith(MAY_CHANGE)
        ]
        if changed:
            raise CheckpointError(
                f"The checkpoints in {self._directory} are of a run with other settings: "
                f"{'; '.join(changed)}. Give the same settings to continue, or "
                "choose another --out."
            )


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
