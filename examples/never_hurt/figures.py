"""The figures: harm by strength, every setting by itself, where and when the gradients conflict."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.never_hurt import analysis
from examples.never_hurt.analysis import Setting, Study
from examples.never_hurt.grids import FITTING, KINDS, NEUTRAL, UNFITTING
from examples.never_hurt.tables import label

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "weighted_sum": "#999999",
    "dtnh_layer": "#D55E00",
    "gradient_cosine": "#CC79A7",
    "gate": "#E69F00",
    "bounded_dtnh": "#0072B2",
}
MARKERS = {
    "weighted_sum": "s",
    "dtnh_layer": "v",
    "gradient_cosine": "D",
    "gate": "^",
    "bounded_dtnh": "o",
}
LINEAR = 2.0  # points within which the axis is linear


def harm_by_strength(study: Study) -> Figure:
    """Accuracy minus plain by strength: flat lines do not hurt, falling lines do.

    A panel for each regularizer and kind of source, a line for each rule: the mean over sources,
    targets and seeds with its 95 % bootstrap interval.
    """
    kinds = [
        kind
        for kind in (FITTING, NEUTRAL, UNFITTING)
        if any(KINDS[pair.source] == kind for pair in study.plain)
    ]
    regularizers = study.regularizers
    figure = Figure(figsize=(3.3 * len(kinds) + 0.6, 2.9 * len(regularizers) + 0.5))
    axes = figure.subplots(len(regularizers), len(kinds), sharex=True, sharey=True, squeeze=False)
    for row, regularizer in zip(axes, regularizers, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            _draw_lines(axis, study, regularizer, kind)
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.set_title(f"{kind} source" + ("s" if kind == UNFITTING else ""))
    for row, regularizer in zip(axes, regularizers, strict=True):
        row[0].set_ylabel(f"{label(regularizer)}\npoints against plain")
    for axis in axes[-1]:
        axis.set_xlabel("λ, as a multiple of the usual weight")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncol=len(labels), frameon=False, fontsize="small"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _draw_lines(axis: Axes, study: Study, regularizer: str, kind: str) -> None:
    axis.axhline(0, color="black", linewidth=0.8, zorder=1)
    for rule in study.rules:
        strengths, means, lows, highs = [], [], [], []
        for strength in study.strengths:
            settings = [
                each
                for each in study.settings(regularizer=regularizer, rule=rule, strength=strength)
                if KINDS[each.source] == kind
            ]
            if settings:
                of_pairs = analysis.by_pair(settings, study.against_plain)
                mean, low, high = analysis.bootstrap_mean(of_pairs)
                strengths.append(strength)
                means.append(mean)
                lows.append(low)
                highs.append(high)
        colour = COLOURS.get(rule)
        axis.fill_between(strengths, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axis.plot(
            strengths,
            means,
            color=colour,
            marker=MARKERS.get(rule, "."),
            markersize=4,
            linewidth=2 if rule == "bounded_dtnh" else 1.2,
            label=label(rule),
            zorder=3 if rule == "bounded_dtnh" else 2,
        )
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=LINEAR, linscale=1.2)
    axis.set_yticks([-50, -20, -10, -5, -2, -1, 0, 1, 2], minor=False)
    axis.set_yticklabels(["−50", "−20", "−10", "−5", "−2", "−1", "0", "1", "2"])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def every_setting(study: Study) -> Figure:
    """Each setting as a point: its mean difference from plain, a row for each rule."""
    rules = study.rules
    figure = Figure(figsize=(9, 0.55 * len(rules) + 1.3), layout="constrained")
    axis = figure.subplots()
    rng = np.random.default_rng(0)
    axis.axvline(0, color="black", linewidth=0.8, zorder=1)
    fills = {FITTING: "#009E73", NEUTRAL: "#56B4E9", UNFITTING: "#D55E00"}
    for height, rule in enumerate(reversed(rules)):
        for kind, colour in fills.items():
            settings = [each for each in study.settings(rule=rule) if KINDS[each.source] == kind]
            means = [study.against_plain(each).mean() for each in settings]
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
    axis.set_yticks(range(len(rules)), [label(rule) for rule in reversed(rules)])
    axis.set_xscale("symlog", linthresh=LINEAR, linscale=1.2)
    axis.set_xticks([-50, -20, -10, -5, -2, -1, 0, 1, 2, 5])
    axis.set_xticklabels(["−50", "−20", "−10", "−5", "−2", "−1", "0", "1", "2", "5"])
    axis.minorticks_off()
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    axis.set_xlabel("test accuracy minus that of plain fine-tuning, points (mean over seeds)")
    figure.legend(loc="outside upper center", ncol=3, frameon=False)
    return figure


def conflict(study: Study, rule: str, strength: float, layers: Sequence[str]) -> Figure:
    """Where in the network, and when in training, the gradients of a batch are in conflict.

    Args:
        study: The results.
        rule: Whose cells are looked at.
        strength: Likewise.
        layers: From the image to the logits.
    """
    kinds = [kind for kind in (FITTING, UNFITTING) if any(v == kind for v in KINDS.values())]
    panels = [
        (regularizer, kind, settings)
        for regularizer in study.regularizers
        for kind in kinds
        if (settings := _of_kind(study, regularizer, rule, strength, kind))
    ]
    figure = Figure(figsize=(2.1 * len(panels) + 2.2, 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    image = None
    for axis, (regularizer, kind, settings) in zip(axes, panels, strict=True):
        names, shares = analysis.conflict_by_layer(study, settings)
        order = [names.index(layer) for layer in layers if layer in names]
        image = axis.imshow(shares[order], vmin=0, vmax=1, cmap="RdBu_r", aspect="auto")
        sources = f"{kind} source" + ("s" if kind == UNFITTING else "")
        axis.set_title(f"{label(regularizer)},\n{sources}", fontsize="medium")
        axis.set_xticks(range(shares.shape[1]), ["1st", "2nd", "3rd", "4th"])
        axis.set_yticks(range(len(order)), [names[i] for i in order], fontsize="small")
        for y, row in enumerate(shares[order]):
            for x, share in enumerate(row):
                dark = abs(share - 0.5) > 0.3
                axis.text(
                    x,
                    y,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if dark else "black",
                )
    figure.supxlabel("quarter of training", fontsize="medium")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("steps in conflict")
    return figure


def _of_kind(
    study: Study, regularizer: str, rule: str, strength: float, kind: str
) -> list[Setting]:
    return [
        each
        for each in study.settings(regularizer=regularizer, rule=rule, strength=strength)
        if KINDS[each.source] == kind
    ]
