"""The figure: accuracy over training, and the cosine of the two gradients by layer."""

import dataclasses

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from examples.digits import models
from examples.digits.config import Config
from examples.digits.results import PLAIN, SOURCES, FineTuning, Method, Results

NAMES = {"l2_sp": "L2-SP", "distillation": "distillation"}
# The colours of Okabe and Ito, which colour-blind readers can distinguish.
COLOURS = {
    "weighted_sum": "#D55E00",
    "dtnh": "#0072B2",
    "gate": "#009E73",
    "decoupled": "#CC79A7",
    "momentum_first": "#E69F00",
    "decoupled_sum": "#56B4E9",
    "bounded_dtnh": "#999999",
    "same_length": "#F0E442",
}


def draw(results: Results, cfg: Config) -> Figure:
    """Draws a column for each regularizer, at its largest weight, and each source."""
    columns = [
        (source, strongest(results, regularizer)) for regularizer in NAMES for source in SOURCES
    ]
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", height_ratios=(1, 1.15))
    images = []
    for (source, method), curves, heat_map in zip(columns, *axes, strict=True):
        curves.set_title(f"{NAMES[method.regularizer]}, λ = {method.reg_weight:g}\n{source} source")
        draw_curves(curves, results, source, method, cfg)
        images.append(draw_cosine(heat_map, results.of(source, method), cfg))
        heat_map.set_xlabel("training step")
    axes[0, 0].set_ylabel(f"{cfg.evaluate_on} accuracy, %")
    # Before the first step every accuracy is at chance, which would take most of the height.
    lines = [line for curves in axes[0] for line in curves.lines]
    axes[0, 0].set_ylim(bottom=min(np.min(line.get_ydata()[1:]) for line in lines) - 10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        title=f"mean and standard deviation over {cfg.seeds} seeds",
        loc="outside upper center",
        ncols=9,
        frameon=False,
    )
    figure.colorbar(
        images[0],
        ax=axes[1],
        label="cosine of loss and regularizer gradient, dtnh\n← conflict          agreement →",
        pad=0.01,
    )
    return figure


def strongest(results: Results, regularizer: str) -> Method:
    """The regularizer at its largest weight, with dtnh."""
    methods = [method for _, method in results.settings() if method != PLAIN]
    return max(
        (each for each in methods if each.regularizer == regularizer and each.rule == "dtnh"),
        key=lambda method: method.reg_weight,
    )


def draw_curves(axes: Axes, results: Results, source: str, method: Method, cfg: Config) -> None:
    """Accuracy over training: mean and standard deviation over the seeds."""
    curve(axes, results.of("scratch", PLAIN), cfg, "from scratch", "0.45", ":")
    for rule in ("weighted_sum", "dtnh", *cfg.variants):
        runs = results.of(source, dataclasses.replace(method, rule=rule))
        curve(axes, runs, cfg, rule, COLOURS[rule], "-")
    # Drawn last, so that it stays visible where other curves coincide with it.
    curve(axes, results.of(source, PLAIN), cfg, "plain fine-tuning", "black", "--")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def curve(
    axes: Axes, runs: list[FineTuning], cfg: Config, label: str, colour: str, style: str
) -> None:
    """One line and its band."""
    steps = np.linspace(0, cfg.steps, cfg.evaluations + 1)
    accuracy = 100 * np.stack([run.accuracy for run in runs])
    mean, deviation = accuracy.mean(axis=0), accuracy.std(axis=0, ddof=1)
    axes.plot(steps, mean, style, color=colour, label=label, linewidth=2)
    axes.fill_between(
        steps, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0
    )


def draw_cosine(axes: Axes, runs: list[FineTuning], cfg: Config) -> AxesImage:
    """The cosine of each group at each step, mean over the seeds."""
    groups = list(runs[0].groups)
    in_order = models.in_network_order(groups, cfg.widths)
    cosine = np.mean([run.cosine for run in runs], axis=0).T
    image = axes.imshow(
        cosine[[groups.index(group) for group in in_order]],
        aspect="auto",
        cmap="RdBu",
        vmin=-1,
        vmax=1,
        interpolation="nearest",
        extent=(0, cfg.steps, len(groups), 0),
    )
    axes.set_yticks(np.arange(len(groups)) + 0.5, in_order)
    axes.tick_params(axis="y", length=0)
    return image
