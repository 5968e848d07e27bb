"""Checkpoints that are whole or not there, and a run that goes on from them bit for bit."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Self

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from examples.finetune.config import Config

# What may be another when a run goes on: none of it changes what is computed, but for the order
# of sums over other devices.
MAY_CHANGE = (
    "devices",
    "output",
    "data.workers",
    "data.data_dir",
    "training.evaluation_batch_size",
)


class CheckpointError(Exception):
    """A checkpoint could not be written or read, or is not one of this run."""


class Progress(NamedTuple):
    """How far a run has come, beside the state of its training.

    Attributes:
        step: Steps that were made.
        data: Where the batches are.
        best: The step that was best on validation images, and its value; ``None`` before any.
        seconds: What the steps took, in all processes that made them one after another.
    """

    step: int
    data: dict[str, Any]
    best: tuple[int, float] | None
    seconds: float


class Checkpoints:
    """The checkpoints of a run: the best one, and the last ones."""

    def __init__(self, directory: Path, config: Config):
        """Opens the directory of a run.

        Args:
            directory: Made if it is not there.
            config: What the run was told.
        """
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
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of."""
        return sorted(self._manager.all_steps())

    def save(self, progress: Progress, state: Any) -> None:
        """Writes a checkpoint, unless there is one of this step.

        Raises:
            CheckpointError: If it cannot be written, for want of space say. Older ones are kept.
        """
        step = progress.step
        if step in self._manager.all_steps():
            return
        self._remember(progress)
        run = progress._asdict() | {"config": self._config}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=_json(run))
            )
            self._manager.wait_until_finished()
        except Exception as error:
            kept = [each for each in self.steps if each < step]
            last = f"the last good one is of step {kept[-1]}" if kept else "there is none before it"
            raise CheckpointError(
                f"Could not write the checkpoint of step {step} to {self._directory}: {error} "
                f"({last}). Make room or mend the directory, then go on with --resume."
            ) from error

    def restore_last(self, like: Any) -> tuple[Progress, Any] | None:
        """Reads the last checkpoint that is whole.

        Args:
            like: The state's shapes, dtypes and shardings, which may be for other devices than
                the checkpoint was written on.

        Returns:
            How far the run had come and the state, or ``None`` if there is no checkpoint.

        Raises:
            CheckpointError: If there are checkpoints and none can be read, or they are of a run
                with other settings.
        """
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
                    f"The checkpoint of step {step} in {self._directory} cannot be read, an "
                    f"earlier one is taken: {error}",
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
            f"{name}: {theirs.get(name)!r} then, {ours.get(name)!r} now"
            for name in names
            if not name.startswith(MAY_CHANGE)
        ]
        if changed:
            raise CheckpointError(
                f"The checkpoints in {self._directory} are of a run with other settings: "
                f"{'; '.join(changed)}. Give the same ones to go on, or another --out."
            )


def as_dict(config: Config) -> dict[str, Any]:
    """The settings by their names, such as ``"training.steps"``, as JSON would have them."""
    flat = {}
    for part, settings in dataclasses.asdict(config).items():
        if isinstance(settings, dict):
            flat |= {f"{part}.{name}": value for name, value in settings.items()}
    return json.loads(json.dumps(flat, default=str))


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the best step, which later checkpoints remember."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        return [each.step == self._checkpoints._best for each in checkpoints]


def _json(content: dict[str, Any]) -> Any:
    return ocp.args.JsonSave(content)
