"""Draws the figure of the method: `python docs/half_space.py`."""

import pathlib

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#808080"


def arrow(ax, start, end, color, **kwargs):
    """Draws a vector from ``start`` to ``end``."""
    style = {"arrowstyle": "-|>", "mutation_scale": 16, "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops={**style, "color": color, **kwargs})


def panel(ax, a, b, title):
    """Draws one pair of gradients and the direction that the paper's rule computes."""
    c = min(0.0, a @ b / (a @ a))
    kept = b - c * a
    ax.fill_betweenx([-3, 4], a[0], 4, color=BLUE, alpha=0.08, lw=0)
    ax.axvline(a[0], color=BLUE, lw=1, ls=":")
    ax.axvline(0, color=GREY, lw=0.8, ls=":")
    arrow(ax, (0, 0), a, BLUE)
    arrow(ax, (0, 0), b, ORANGE)
    ax.text(*(a / 2 + [0, -0.26]), "$a$", color=BLUE, ha="center", fontsize=15)
    ax.text(*(b * 0.45 + [-0.22 if c < 0 else 0.14, -0.05]), "$b$", color=ORANGE, fontsize=15)
    if c < 0:
        arrow(ax, b, kept, GREY, linestyle="--", lw=1.4)
        ax.text(
            *((b + kept) / 2 + [0, 0.12]),
            r"$-c^{\mathrm{–}}a$",
            color=GREY,
            ha="center",
            fontsize=13,
        )
        arrow(ax, (0, 0), kept, ORANGE, alpha=0.55)
        ax.text(
            -0.06, kept[1] * 0.68, r"$b-c^{\mathrm{–}}a$", color=ORANGE, ha="right", fontsize=13
        )
        arrow(ax, (0, 0), a + b, GREY, lw=1.6)
        ax.text(*(a + b + [0.06, 0.1]), r"$a+\lambda b$", color=GREY, fontsize=13)
    d = a + kept
    arrow(ax, (0, 0), d, GREEN, lw=3)
    label = "$d$" if c < 0 else r"$d=a+\lambda b$"
    ax.text(d[0] + 0.12, d[1] + 0.04, label, color=GREEN, fontsize=16)
    ax.set(xlim=(-1.9, 3.1), ylim=(-0.6, 2.3), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=13)
    ax.spines[:].set_visible(False)


def main() -> None:
    """Writes ``assets/half-space.svg`` beside this file."""
    plt.rcParams |= {"svg.hashsalt": "dtnh_jax", "mathtext.fontset": "cm"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    panel(axes[0], np.array([1.4, 0.0]), np.array([-1.2, 1.4]), "Conflict: ⟨a, b⟩ < 0")
    panel(axes[1], np.array([1.4, 0.0]), np.array([0.6, 1.3]), "No conflict: the weighted sum")
    axes[0].text(1.46, -0.52, "⟨d, a⟩ ≥ ‖a‖²", color=BLUE, fontsize=12)
    axes[1].text(1.46, -0.52, "⟨d, a⟩ ≥ ‖a‖²", color=BLUE, fontsize=12)
    path = pathlib.Path(__file__).parent / "assets" / "half-space.svg"
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
