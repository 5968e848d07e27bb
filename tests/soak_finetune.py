"""Kills runs of the fine-tuning example at random moments, and checks what they come to.

`python tests/soak_finetune.py --kills 20` continues runs with --resume until they end. Each must
have the parameters and the logs of a run that nothing happened to. At times a second run is started
in the same directory, which must be refused.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import tiny_finetune

from examples.finetune.__main__ import main
from examples.finetune.logs import read

# Records, evaluations and checkpoints are at different steps.
MORE = ("--steps", "24", "--evaluate-every", "4", "--checkpoint-every", "5", "--log-every", "3")
MORE += ("--held-out", "0.2", "--held-out-every", "2")
PER_RUN = 7  # kills, before a run may end
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("time", "record", "save")


class Run:
    """A run in a process of its own, with --resume."""

    # The server imports everything once, and each process is a copy of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["examples.finetune.__main__", "tiny_finetune"])

    def __init__(self, directory: Path, out: Path) -> None:
        self.out = out
        self._printed = directory / f"printed{time.monotonic_ns()}"
        self._printed.touch()  # for a process that is killed before it prints
        self.process = self.context.Process(target=in_process, args=(directory, out, self._printed))
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Waits; returns the exit code and what was printed."""
        self.process.join()
        return self.process.exitcode, self._printed.read_text()

    def wait_for(self, moment: str, rng: random.Random, duration: float) -> bool:
        """Waits for a random moment; returns whether the run is still there."""
        delay, started = rng.uniform(0, duration), time.monotonic()
        n_records = self._n_records() + rng.randint(1, 4)
        while self.process.is_alive():
            if moment == "time" and time.monotonic() - started >= delay:
                return True
            if moment == "record" and self._n_records() >= n_records:
                return True
            if moment == "save" and any(self.out.glob("checkpoints/*.orbax-checkpoint-tmp*")):
                return True
            time.sleep(0.002)
        return False

    def _n_records(self) -> int:
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def in_process(directory: Path, out: Path, printed: Path) -> None:
    """The process of a run."""
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    os.environ["XLA_FLAGS"] = ""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(directory / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    sys.exit(main(tiny_finetune.arguments(directory, out, *MORE, "--resume")))


def soak(directory: Path, kills: int, seed: int) -> Counter:
    """Kills runs until there were enough kills.

    Args:
        directory: An empty directory for images, weights and runs.
        kills: How many.
        seed: Of the moments and signals.

    Returns:
        How often what happened.
    """
    tiny_finetune.make(directory)
    rng, happened = random.Random(seed), Counter()
    whole, started = directory / "whole", time.monotonic()
    code, printed = Run(directory, whole).end()
    assert code == 0, printed
    duration = time.monotonic() - started
    while happened["kills"] < kills:
        happened["runs"] += 1
        out = directory / f"out{happened['runs']}"
        until_the_end(directory, out, rng, duration, happened, kills)
        assert_same_end(directory, out, whole)
    return happened


def until_the_end(
    directory: Path, out: Path, rng: random.Random, duration: float, happened: Counter, kills: int
) -> None:
    """Starts and kills a run until it ends."""
    most = min(kills, happened["kills"] + PER_RUN)
    while True:
        runs = [Run(directory, out)]
        if rng.random() < 0.25:
            runs.append(Run(directory, out))
            runs = one_of(runs, happened)
        [run] = runs
        number, moment = rng.choice(SIGNALS), rng.choice(MOMENTS)
        killed = happened["kills"] < most and run.wait_for(moment, rng, duration)
        n_records = len(read(out))
        if killed:
            os.kill(run.process.pid, number)
        code, printed = run.end()
        if code == 0:
            return
        name = signal.Signals(number).name
        assert killed, printed
        # Before and after training there is nothing to save, and Python ends in its own way.
        in_training = n_records and not (out / "summary.json").exists()
        assert code in (-number, 128 + number) or not in_training, (name, code, printed)
        assert number == signal.SIGKILL or not in_training or "Traceback" not in printed, printed
        happened.update(("kills", f"{name} at a {moment}"))


def one_of(runs: list[Run], happened: Counter) -> list[Run]:
    """Of two runs in one directory, the one that was not refused."""
    while not any(ended := [not run.process.is_alive() for run in runs]):
        time.sleep(0.01)
    refused = runs.pop(ended.index(True))
    code, printed = refused.end()
    assert (code, "A run that has not ended uses" in printed) == (1, True), printed
    happened["refused"] += 1
    return runs


def assert_same_end(directory: Path, out: Path, whole: Path) -> None:
    """Checks parameters, chosen weights and logs against those of the undisturbed run."""
    tiny_finetune.assert_same(
        *(tiny_finetune.last_checkpoint(directory, each, *MORE) for each in (out, whole))
    )
    weights = [(each / "model.safetensors").read_bytes() for each in (out, whole)]
    assert weights[0] == weights[1]
    assert tiny_finetune.timeless(out) == tiny_finetune.timeless(whole)
    rows = [(each / "metrics.csv").read_text().count("\n") for each in (out, whole)]
    assert rows[0] == rows[1] == len(read(whole)) + 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="kept; a temporary one if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = soak(arguments.directory or Path(temporary), arguments.kills, arguments.seed)
    print(
        "All runs came to the same end.",
        *(f"{found[key]} {key}" for key in sorted(found)),
        sep="\n",
    )
