"""The command line: `python -m examples.digits --help`."""

import tyro

from examples.digits import report, train
from examples.digits.config import Config


def main(cfg: Config) -> None:
    """Runs the experiment and reports its results."""
    report.report(train.run(cfg), cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m examples.digits"))
