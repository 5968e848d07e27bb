"""The figure: accuracy over training, from each source, a line for each rule."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.digits.config import Config
from examples.digits.results import SOURCES, Results

# Label, colour and style of each method, in the order in which they are drawn: what would hide
# others comes first. The colours of Okabe and Ito, which colour-blind readers can distinguish.
LINES = {
    "trial_runs": ("trial_runs, L2-SP only if they favour it", "#009E73", "-", 6),
    "weighted_sum": ("weighted_sum", "#D55E00", "-", 2),
    "dtnh": ("dtnh, the paper's rule", "#0072B2", "--", 2),
    "dtnh_sgd": ("dtnh_sgd, the preset", "#E69F00", "-", 2),
    "plain": ("plain, without L2-SP", "black", "--", 2),
}


def draw(results: Results, cfg: Config) -> Figure:
    """Draws a panel for each source."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(1, len(SOURCES))
    for axes, source in zip(panels, SOURCES, strict=True):
        curve(axes, results.accuracies("scratch"), cfg, "from scratch", "0.5", ":", 2)
        for method, line in LINES.items():
            curve(axes, results.accuracies(source, method), cfg, *line)
        axes.set_title(title(results, source))
        axes.set_xlabel("training step")
        axes.set_ylabel(f"{cfg.evaluate_on} accuracy, %")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title=f"mean and standard deviation over {cfg.seeds} seeds",
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def title(results: Results, source: str) -> str:
    """Says what to see."""
    plain = results.accuracies(source)[:, -1].mean()
    of_sum, of_trials = (
        in_points(results.accuracies(source, method)[:, -1].mean() - plain)
        for method in ("weighted_sum", "trial_runs")
    )
    return (
        f"{source.capitalize()} source, against plain fine-tuning:\n"
        f"weighted_sum {of_sum} points, trial_runs {of_trials}"
    )


def in_points(difference: float) -> str:
    """A difference with its sign. Adding 0 makes a 0 of −0."""
    return f"{round(difference, 1) + 0:+.1f}".replace("-", "−")


def curve(
    axes: Axes,
    accuracies: np.ndarray,
    cfg: Config,
    label: str,
    colour: str,
    style: str,
    width: float,
) -> None:
    """One line and its band. Before the first step every accuracy is at chance: not drawn."""
    steps = np.arange(1, cfg.evaluations + 1) * cfg.steps // cfg.evaluations
    mean, deviation = accuracies.mean(axis=0)[1:], accuracies.std(axis=0, ddof=1)[1:]
    axes.plot(steps, mean, style, color=colour, label=label, linewidth=width)
    axes.fill_between(
        steps, mean - deviation, mean + deviation, color=colour, alpha=0.1, linewidth=0
    )
