"""The figures: harm by strength, every setting as a point, conflict by layer and quarter."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.never_hurt import analysis
from examples.never_hurt.analysis import SETTING, Interval, select, values
from examples.never_hurt.grids import FITTING, NEUTRAL, UNFITTING
from examples.never_hurt.labels import label

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
LINE = {"marker": ".", "markersize": 4, "linewidth": 1.2, "zorder": 2}
LINES = {
    "weighted_sum": {"color": "#999999", "marker": "s"},
    "dtnh_layer": {"color": "#D55E00", "marker": "v"},
    "gradient_cosine": {"color": "#CC79A7", "marker": "D"},
    "gate": {"color": "#E69F00", "marker": "^"},
    "bounded_dtnh": {"color": "#0072B2", "marker": "o", "linewidth": 2, "zorder": 3},
}
KIND_COLOURS = {FITTING: "#009E73", NEUTRAL: "#56B4E9", UNFITTING: "#D55E00"}
TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5)
LABELS = [str(tick).replace("-", "−") for tick in TICKS]
LINEAR = 2.0  # points within which the axis is linear


def harm_by_strength(cells: pd.DataFrame) -> Figure:
    """Accuracy minus plain by strength: a flat line does no harm, a falling line does.

    A panel for each regularizer and kind of source, a line for each rule: the mean over sources,
    targets and seeds with its 95 % bootstrap interval.
    """
    kinds = [kind for kind in KIND_COLOURS if kind in values(cells, "kind")]
    regularizers = values(cells, "regularizer")
    figure = Figure(figsize=(3.3 * len(kinds) + 0.6, 2.9 * len(regularizers) + 0.5))
    axes = figure.subplots(len(regularizers), len(kinds), sharex=True, sharey=True, squeeze=False)
    for row, regularizer in zip(axes, regularizers, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            _draw_lines(axis, select(cells, regularizer=regularizer, kind=kind))
        row[0].set_ylabel(f"{label(regularizer)}\npoints against plain")
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.set_title(_sources(kind))
    for axis in axes[-1]:
        axis.set_xlabel("λ, as a multiple of the usual weight")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncol=len(labels), frameon=False, fontsize="small"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _draw_lines(axis: Axes, cells: pd.DataFrame) -> None:
    axis.axhline(0, color="black", linewidth=0.8, zorder=1)
    for rule in values(cells, "rule"):
        of_rule = select(cells, rule=rule)
        strengths = values(of_rule, "strength")
        parts = [select(of_rule, strength=strength) for strength in strengths]
        means = [analysis.bootstrap_mean(part, "against_plain") for part in parts]
        line = pd.DataFrame(means, columns=Interval._fields)
        style = LINE | LINES.get(rule, {})
        colour = style.get("color")
        axis.fill_between(
            strengths, line["low"], line["high"], color=colour, alpha=0.15, linewidth=0
        )
        axis.plot(strengths, line["mean"], label=label(rule), **style)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=LINEAR, linscale=1.2)
    axis.set_yticks(TICKS[:-1], LABELS[:-1])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def every_setting(cells: pd.DataFrame) -> Figure:
    """Each setting as a point: its mean difference from plain, a row for each rule."""
    rules = values(cells, "rule")[::-1]
    figure = Figure(figsize=(9, 0.55 * len(rules) + 1.3), layout="constrained")
    axis = figure.subplots()
    rng = np.random.default_rng(0)
    axis.axvline(0, color="black", linewidth=0.8, zorder=1)
    for height, rule in enumerate(rules):
        for kind, colour in KIND_COLOURS.items():
            points = select(cells, rule=rule, kind=kind).groupby(SETTING, sort=False)
            means = points["against_plain"].mean()
            axis.scatter(
                means,
                height + rng.uniform(-0.3, 0.3, len(means)),
                s=9,
                color=colour,
                alpha=0.7,
                linewidths=0,
                label=f"{kind} source" if not height else None,
                zorder=2,
            )
    axis.set_yticks(range(len(rules)), [label(rule) for rule in rules])
    axis.set_xscale("symlog", linthresh=LINEAR, linscale=1.2)
    axis.set_xticks(TICKS, LABELS)
    axis.minorticks_off()
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    axis.set_xlabel("test accuracy minus that of plain fine-tuning, points (mean over seeds)")
    figure.legend(loc="outside upper center", ncol=3, frameon=False)
    return figure


def conflict(cells: pd.DataFrame, layers: Sequence[str]) -> Figure:
    """The share of steps in which the gradients of a batch conflict, by layer and quarter.

    Args:
        cells: The cells, for example those of one rule and strength. There is a panel for each
            regularizer and kind of source; neutral sources are left out.
        layers: The names of the layers from the image to the logits.
    """
    panels = [
        (regularizer, kind, part)
        for regularizer in values(cells, "regularizer")
        for kind in (FITTING, UNFITTING)
        if len(part := select(cells, regularizer=regularizer, kind=kind))
    ]
    figure = Figure(figsize=(2.1 * len(panels) + 2.2, 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    image = None
    for axis, (regularizer, kind, part) in zip(axes, panels, strict=True):
        of_layers = analysis.conflict_by_layer(part)
        shares = of_layers.loc[[layer for layer in layers if layer in of_layers.index]]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdBu_r", aspect="auto")
        axis.set_title(f"{label(regularizer)},\n{_sources(kind)}", fontsize="medium")
        axis.set_xticks(range(shares.shape[1]), ["1st", "2nd", "3rd", "4th"])
        axis.set_yticks(range(len(shares)), list(shares.index), fontsize="small")
        for (y, x), share in np.ndenumerate(shares.to_numpy()):
            colour = "white" if abs(share - 0.5) > 0.3 else "black"
            text = f"{100 * share:.0f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=6.5, color=colour)
    figure.supxlabel("quarter of training", fontsize="medium")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("steps in conflict")
    return figure


def _sources(kind: str) -> str:
    return f"{kind} source" + ("s" if kind == UNFITTING else "")
