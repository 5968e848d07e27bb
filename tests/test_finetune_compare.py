# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import json

import needs
import numpy as np
import pytest

needs.examples()

from examples.finetune.compare import main

ACCURACIES = {"sum": (50.0, 54.0), "dtnh": (51.0, 57.0)}


@pytest.fixture
def runs(tmp_path):
    """Two runs of each of two rules, as far as the comparison looks at them."""
    for rule, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            directory = tmp_path / f"{rule}{seed}"
            directory.mkdir()
            config = {
                "data.split_seed": 0,
                "data.workers": seed,
                "output.out": str(directory),
                "training.seed": seed,
                "training.steps": 10,
                "transfer.rule": rule,
            }
            shares = {split: {"accuracy": accuracy / 100} for split in ("validation", "test")}
            (directory / "summary.json").write_text(json.dumps({"config": config, **shares}))
    return tmp_path


def words(runs, *names, more=()):
    return [str(runs / name) for name in names] + list(more)


def test_seeds_are_one_row_and_what_differs_is_a_column(runs, capsys):
    all_runs = ("sum0", "sum1", "dtnh0", "dtnh1")
    more = ("--markdown", "--baseline", str(runs / "sum0"))
    assert main(words(runs, *all_runs, more=more)) == 0
    lines = capsys.readouterr().out.splitlines()
    deviation = np.std([50, 54], ddof=1)
    assert lines == [
        "| rule | runs | validation | test | − baseline |",
        "| --- | --- | --- | --- | --- |",
        f"| sum | 2 | 52.0 ± {deviation:.1f} | 52.0 ± {deviation:.1f} |  |",
        "| dtnh | 2 | 54.0 ± 4.2 | 54.0 ± 4.2 | +2.0 ± 1.4 |",
    ]


def test_a_single_run_has_no_spread(runs, capsys):
    assert main(words(runs, "sum0", "dtnh0")) == 0
    assert "±" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (("sum0", "none"), (), "has no summary.json"),
        (("sum0", "sum0"), (), "Two runs are the same"),
        (("sum0", "dtnh0", "dtnh1"), ("sum0",), "The baseline lacks"),
    ],
)
def test_what_cannot_be_compared(runs, capsys, names, more, message):
    baseline = [word for name in more for word in ("--baseline", str(runs / name))]
    assert main(words(runs, *names, more=baseline)) == 1
    assert message in capsys.readouterr().err
