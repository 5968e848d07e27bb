"""Reads the command line and fine-tunes: `python -m examples.finetune --help`."""

import argparse
import sys
from typing import get_args

import jax
import tyro

from examples.finetune import train
from examples.finetune.checkpoint import CheckpointError
from examples.finetune.config import Config, PresetName, preset
from examples.finetune.report import report

PROGRAM = "python -m examples.finetune"


def parse(arguments: list[str]) -> Config:
    """Reads a command line, over the settings of its preset."""
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
    """Fine-tunes and reports what came out; returns the exit code."""
    try:
        config = parse(arguments)
        outcome = train.run(config)
        if jax.process_index() == 0:
            report(outcome, config.output.out)
    except train.StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return 128 + 15  # as a shell has it for SIGTERM
    except (ValueError, OSError, ImportError, CheckpointError, train.DivergedError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
