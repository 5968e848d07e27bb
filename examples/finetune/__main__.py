"""The command line: `python -m examples.finetune --help`."""

import argparse
import sys
from typing import get_args

import tyro

from examples.common.command import INTERRUPTED, ended
from examples.finetune import train
from examples.finetune.checkpoint import CheckpointError
from examples.finetune.config import Config, PresetName, preset
from examples.finetune.directory import DirectoryError
from examples.finetune.divergence import DivergedError
from examples.finetune.preemption import StoppedError

PROGRAM = "python -m examples.finetune"
EXPECTED = (ValueError, OSError, ImportError, CheckpointError, DirectoryError, DivergedError)


def parse(arguments: list[str]) -> Config:
    """Parses a command line; its preset gives the defaults."""
    parser = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=get_args(PresetName), default="standard")
    name = parser.parse_known_args(arguments)[0].preset
    return tyro.cli(
        Config,
        prog=PROGRAM,
        args=arguments,
        default=preset(name, tyro.MISSING),
        # --dataset, not --data.dataset.
        config=(tyro.conf.OmitArgPrefixes,),
    )


def main(arguments: list[str]) -> int:
    """Fine-tunes and reports the results; returns the exit code."""

    def run() -> int:
        try:
            train.run(parse(arguments))
        except StoppedError as stopped:
            print(stopped, file=sys.stderr)
            return stopped.exit_code
        return 0

    interrupted = f"{INTERRUPTED} If there is a checkpoint, continue with --resume."
    return ended(PROGRAM, run, EXPECTED, interrupted=interrupted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
