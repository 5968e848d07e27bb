"""The report of a run: tables, sentences and figures, printed and written to files."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from examples.common.files import write
from examples.common.tables import as_markdown_table
from examples.common.text import markdown, plain_console, printable
from examples.finetune import logs
from examples.finetune.checkpoint import as_dict
from examples.finetune.config import Config
from examples.finetune.figure import as_png, draw, draw_confusion, in_network_order
from examples.finetune.logs import Record
from examples.finetune.meter import Throughput
from examples.finetune.metrics import Metrics
from examples.finetune.trials import Trial

PACKAGES = ("dtnh_jax", "jax", "optax", "flax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True)
class Outcome:
    """The results of a run."""

    config: Config
    """The settings."""
    architecture: str
    """The network."""
    throughput: Throughput
    """The speed."""
    best_step: int
    """The step whose weights were chosen on validation images."""
    validation: Metrics
    """Metrics of the chosen weights on validation images."""
    test: Metrics
    """Metrics of the chosen weights on test images."""
    class_names: Sequence[str]
    """Names of the classes."""
    records: Sequence[Record]
    """The logs, see :func:`logs.read`."""
    layer_order: Sequence[str]
    """Names of the layers from image to logits."""
    trial: Trial | None = None
    """The result of trial runs, if there were any."""


def report(outcome: Outcome, out: Path, console: Console | None = None) -> None:
    """Writes tables, sentences, numbers and figures to ``out``, and then prints them."""
    console = console or plain_console()
    settings, scores, sentences = setting_rows(outcome), score_rows(outcome), summary(outcome)
    out.mkdir(parents=True, exist_ok=True)
    # Each file is written before the next is made: what fails costs only what comes after it.
    write(out / "summary.json", json.dumps(as_json(outcome), indent=1, allow_nan=False).encode())
    write(out / "summary.md", as_markdown(settings, scores, sentences).encode())
    chosen = [value for name, value in settings if name in ("regularizer", "rule")]
    title = ", ".join([settings[0][1], outcome.architecture, *chosen])
    curves = draw(outcome.records, outcome.layer_order, title=title, best_step=outcome.best_step)
    write(out / "curves.png", as_png(curves))
    confusion = draw_confusion(
        outcome.test.confusion,
        outcome.class_names,
        title=f"test images, {percent(outcome.test.accuracy)} correct",
    )
    write(out / "confusion.png", as_png(confusion))

    console.print(as_rich(settings))
    console.print()
    console.print(as_rich(scores, numbers=True))
    console.print()
    for sentence in sentences:
        console.print(sentence)
    console.print(
        f"Written to {printable(str(out))}: summary.md, summary.json, curves.png, confusion.png."
    )


def setting_rows(outcome: Outcome) -> list[list[str]]:
    """The settings, as pairs of a name and a value."""
    config, transfer = outcome.config, outcome.config.transfer
    name = printable(Path(config.data.dataset).name)
    source = config.model.init or "random weights"
    source = printable(Path(source).name if Path(source).exists() else source)
    rows = [
        ["data set", f"{name}, {len(outcome.class_names)} classes"],
        ["network", f"{outcome.architecture} from {source}"],
    ]
    if transfer.regularizer == "none":
        rows.append(["regularizer", "none"])
    else:
        rows.append(["regularizer", f"{transfer.regularizer}, λ = {transfer.weight:g}"])
        rows.append(["rule", f"{transfer.rule}, scope {transfer.groups}"])
    if (trial := outcome.trial) is not None:
        losses = (
            f"calibrated loss {trial.loss_with:.3f} with the regularizer, "
            f"{trial.loss_without:.3f} without"
        )
        rows.append(["trial runs", losses])
    time = timedelta(seconds=round(outcome.throughput.seconds))
    return [
        *rows,
        ["chosen", f"step {outcome.best_step} of {config.training.steps}, on validation images"],
        ["time", f"{time} at {outcome.throughput.images_per_second:.0f} images/s"],
        ["waiting", f"{percent(outcome.throughput.waiting)} of the time, for data"],
    ]


def score_rows(outcome: Outcome) -> list[list[str]]:
    """The metrics of the chosen weights: a header, then a row for each metric."""
    columns = (outcome.validation, outcome.test)
    rows = [["", "validation", "test"], ["images", *(str(each.n) for each in columns)]]
    shares = {"accuracy": "accuracy", "top5": "top-5", "balanced_accuracy": "balanced accuracy"}
    if len(outcome.class_names) <= 5:
        del shares["top5"]  # always 100 %
    rows += [
        [label, *(percent(getattr(each, name)) for each in columns)]
        for name, label in shares.items()
    ]
    return [*rows, ["loss", *(f"{each.loss:.3f}" for each in columns)]]


def summary(outcome: Outcome) -> list[str]:
    """The results in sentences."""
    test, waiting = outcome.test, outcome.throughput.waiting
    low, high = interval(test.accuracy, test.n)
    sentences = [
        f"Test accuracy is {percent(test.accuracy)} of {test.n} images (95 % confidence interval "
        f"over the sampling of the images: {100 * low:.1f} to {percent(high)}). Always predicting "
        f"the most frequent class would give {percent(test.images.max() / test.n)}."
    ]
    of_class = test.recalls.tolist()
    order = np.argsort(of_class, kind="stable").tolist()
    worst = [index for index in order if of_class[index] < 1][:3]
    if worst:
        named = (
            f"{printable(str(outcome.class_names[index]))} {percent(of_class[index])}"
            for index in worst
        )
        sentences.append(f"The hardest classes: {', '.join(named)}.")
    if outcome.trial is not None:
        sentences.append(str(outcome.trial))
    sentences += conflict_sentences(outcome)
    if outcome.best_step == outcome.config.training.steps:
        sentences.append("The last step was the best: a longer training may be better.")
    if waiting > 0.1:
        sentences.append(
            f"The devices waited for data for {percent(waiting)} of the time: more workers, or "
            "images stored at a smaller size, would make the run faster."
        )
    return sentences


def conflict_sentences(outcome: Outcome) -> list[str]:
    """How often the gradients conflicted, and in which groups; empty without a regularizer."""
    rates = conflict_rates(outcome)
    if rates["conflict"] is None:
        return []
    sentence = (
        f"The gradients of loss and regularizer conflicted in {percent(rates['conflict'])} of "
        "steps and groups"
    )
    by_group = rates["conflict_of_group"]
    if len(by_group) > 1:
        most, least = (choose(by_group, key=by_group.__getitem__) for choose in (max, min))
        sentence += (
            f", most often in {most} ({percent(by_group[most])}), least often in {least} "
            f"({percent(by_group[least])})"
        )
    return [
        f"{sentence}. The rule removed {percent(rates['removed'])} of the regularizer gradient, "
        "averaged over the steps."
    ]


def conflict_rates(outcome: Outcome) -> dict[str, Any]:
    """Averages over the training of the conflict and of the removed share; ``None`` if unknown."""
    train = [record for record in outcome.records if record.split == "train"]
    rates: dict[str, Any] = {}
    for name in ("conflict", "removed"):
        values = [getattr(record, name) for record in train]
        finite = [value for value in values if value is not None and np.isfinite(value)]
        rates[name] = float(np.mean(finite)) if finite else None
    of_group: dict[str, list[float]] = {}
    for record in train:
        for group, measured in (record.groups or {}).items():
            of_group.setdefault(group, []).append(measured["conflict"])
    rates["conflict_of_group"] = {
        group: float(np.nanmean(of_group[group]))
        for group in in_network_order(of_group, outcome.layer_order)
    }
    return rates


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share of ``n`` independent draws."""
    z = 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return float(max(centre - half, 0)), float(min(centre + half, 1))


def percent(share: float) -> str:
    """Formats a share."""
    return f"{100 * share:.1f} %"


def as_rich(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> Table:
    """Formats rows for a terminal; if they are numbers, the first row is their header."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=numbers)
    head, body = (rows[0], rows[1:]) if numbers else ([""] * len(rows[0]), rows)
    for index, name in enumerate(head):
        justify = "right" if numbers and index else "left"
        # Long names are broken into lines: what is cut off may be what tells them apart.
        table.add_column(name, justify=justify, overflow="fold")
    for row in body:
        table.add_row(*map(printable, row))
    return table


def as_markdown(
    settings: Sequence[Sequence[str]], scores: Sequence[Sequence[str]], sentences: Sequence[str]
) -> str:
    """Formats the tables and the sentences in Markdown."""
    tables = [as_markdown_table(rows, markdown) for rows in ([["", ""], *settings], scores)]
    return "\n\n".join([*tables, "\n".join(map(markdown, sentences))]) + "\n"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Settings, versions, devices and numbers; ``None`` replaces numbers that are not finite."""
    devices = jax.devices()
    of_class = dict(zip(outcome.class_names, outcome.test.recalls.tolist(), strict=True))
    numbers = {
        **outcome.throughput._asdict(),
        "best_step": outcome.best_step,
        "validation": outcome.validation.scalars,
        "test": outcome.test.scalars | {"accuracy_of_class": of_class},
        **conflict_rates(outcome),
    }
    if outcome.trial is not None:
        numbers["trial"] = outcome.trial._asdict()
    return {
        "config": as_dict(outcome.config),
        "architecture": outcome.architecture,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        **logs.as_json(numbers),
    }
