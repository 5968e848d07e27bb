"""Figures of a run: learning curves, the conflict by layer and step, and the confusion matrix."""

import io
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from sklearn.metrics import ConfusionMatrixDisplay

from examples.common.text import printable
from examples.finetune.logs import Record

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"train": "#0072B2", "validation": "#D55E00", "reg": "#009E73"}
ROW_HEIGHT, MAP_HEIGHT = 0.13, 8  # inches: of a readable label; of the largest heat map
MAX_COLUMNS = 400
NAMED_CELLS, NAMED_CLASSES = 12, 40  # most classes with numbers in the cells; most tick labels


# Text of the user's is no formula, though it have a dollar sign.
without_formulas = matplotlib.rc_context({"text.parse_math": False})


@without_formulas
def draw(
    records: Sequence[Record],
    layer_order: Sequence[str],
    *,
    title: str,
    best_step: int | None = None,
) -> Figure:
    """Draws learning curves, and below them the cosine of the two gradients by layer and step.

    Args:
        records: The records of a run, see :func:`logs.read`.
        layer_order: Names of the layers from image to logits. A group of parameters is placed at
            its first layer; a group without a layer is last.
        title: The title.
        best_step: The chosen step, which is marked.

    Returns:
        The figure. Without a regularizer there is no heat map.
    """
    train = [record for record in records if record.split == "train"]
    validation = [record for record in records if record.split == "validation"]
    steps, groups, cosine = cosines(train, layer_order)
    panels = ["loss", "reg", "accuracy"]
    if not any(record.reg for record in train):
        panels.remove("reg")
    map_height = min(max(ROW_HEIGHT * len(groups), 2), MAP_HEIGHT)
    figure = Figure(figsize=(11, 3.2 + (map_height + 0.6 if groups else 0)), layout="constrained")
    figure.suptitle(drawable(title))
    if groups:
        heights = (2.9, map_height + 0.6)
        upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        draw_cosines(lower.add_subplot(), steps, groups, cosine)
        axes = upper.subplots(1, len(panels))
    else:
        axes = figure.subplots(1, len(panels))
    for each, panel in zip(axes, panels, strict=True):
        draw_curves(each, panel, train, validation)
        if best_step is not None:
            each.axvline(best_step, color="0.6", linestyle=":", zorder=0)
    return figure


def draw_curves(
    axes: Axes, panel: str, train: Sequence[Record], validation: Sequence[Record]
) -> None:
    """Draws loss, regularizer or accuracy over the training."""
    scale = 100 if panel == "accuracy" else 1
    names = {"loss": "loss", "reg": "regularizer Ω", "accuracy": "accuracy, %"}
    for split, of_split in (("train", train), ("validation", validation)):
        points = [(each.step, getattr(each, panel)) for each in of_split]
        points = [(step, scale * value) for step, value in points if value is not None]
        if not points:
            continue
        steps, values = np.array(points).T
        colour = COLOURS["reg"] if panel == "reg" else COLOURS[split]
        if split == "train":
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            steps, values = smoothed(steps, values)
        axes.plot(
            steps,
            values,
            "o-" if split == "validation" else "-",
            color=colour,
            label=split,
            markersize=3,
        )
    axes.set_title(names[panel])
    axes.set_xlabel("training step")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if panel != "reg" and axes.lines:
        axes.legend(frameon=False)


def smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving averages over a thirtieth of the curve."""
    window = max(1, len(values) // 30)
    kernel = np.full(window, 1 / window)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def cosines(
    records: Iterable[Record], layer_order: Sequence[str]
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The cosine of each group at each record.

    Returns:
        Steps ``(n,)``; names of the groups in the order of the network; cosines ``(groups, n)``,
        NaN where a record has none.
    """
    measured = [record for record in records if record.groups]
    names = dict.fromkeys(name for record in measured for name in record.groups or ())
    groups = in_network_order(names, layer_order)
    cosine = [
        [(record.groups or {}).get(group, {}).get("cosine", np.nan) for record in measured]
        for group in groups
    ]
    return np.array([record.step for record in measured]), groups, np.array(cosine, float)


def in_network_order(groups: Iterable[str], layer_order: Sequence[str]) -> list[str]:
    """Sorts groups, which can be layers, parameters or stages, from image to logits."""

    def position(group: str) -> int:
        for index, layer in enumerate(layer_order):
            if f"{layer}/".startswith(f"{group}/") or f"{group}/".startswith(f"{layer}/"):
                return index
        return len(layer_order)

    return sorted(groups, key=position)


def draw_cosines(axes: Axes, steps: np.ndarray, groups: Sequence[str], cosine: np.ndarray) -> None:
    """Draws the heat map: a row for each group, white where the gradients are orthogonal."""
    # Averages of neighbouring columns: leaving columns out would cause aliasing.
    bins = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
    finite = np.ma.masked_invalid(cosine)
    shown = np.ma.stack([finite[:, each].mean(axis=1) for each in bins], axis=1)
    edges = np.array([2 * steps[0] - steps[min(1, len(steps) - 1)], *(steps[b[-1]] for b in bins)])
    limit = max(np.quantile(np.abs(shown.compressed()), 0.99), 0.01) if shown.count() else 1
    image = axes.pcolormesh(
        np.maximum(edges, 0),
        np.arange(len(groups) + 1),
        shown,
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
    )
    axes.set_facecolor("0.8")
    axes.invert_yaxis()
    rows, labels, borders = row_labels(groups, room=int(MAP_HEIGHT / ROW_HEIGHT))
    axes.set_yticks(rows, labels, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.hlines(borders, 0, 1, transform=axes.get_yaxis_transform(), color="0.5", linewidth=0.3)
    axes.set_xlabel("training step")
    axes.set_title("cosine of loss and regularizer gradient")
    axes.figure.colorbar(
        image,
        ax=axes,
        extend="both" if limit < 1 else "neither",
        label="← conflict          agreement →",
        fraction=0.03,
        aspect=40,
        pad=0.01,
    )


def row_labels(groups: Sequence[str], room: int) -> tuple[list[float], list[str], list[int]]:
    """The name of each row or, if there are too many, the common prefix of neighbouring rows.

    Args:
        groups: Names of the rows, such as ``layer1/0/conv1``.
        room: The largest number of labels.

    Returns:
        Positions of the labels, the labels, and positions of the lines between runs of rows.
    """
    runs = []
    for depth in range(max(name.count("/") for name in groups) + 1, 0, -1):
        beginnings = ["/".join(name.split("/")[:depth]) for name in groups]
        runs = [(name, len(list(rows))) for name, rows in itertools.groupby(beginnings)]
        if len(runs) <= room:
            break
    ends = list(itertools.accumulate(length for _, length in runs))
    rows, labels = [], []
    for (name, length), end in zip(runs, ends, strict=True):
        centre = end - length / 2
        if not rows or centre - rows[-1] >= len(groups) / room:
            rows.append(centre)
            labels.append(name)
    return rows, labels, ends[:-1] if len(runs) < len(groups) else []


@without_formulas
def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], *, title: str = "") -> Figure:
    """Draws a confusion matrix, coloured by the share of the true class.

    Args:
        matrix: Images by true class (row) and predicted class (column), ``(n_classes, n_classes)``.
        class_names: Names of the classes.
        title: The title.

    Returns:
        The figure. A few classes have numbers in the cells; with many, a list beside the matrix
        names the pairs that are most often confused.
    """
    n_classes = len(class_names)
    names = short_names(class_names)
    images = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, images, out=np.full(matrix.shape, np.nan), where=images > 0)
    listed = n_classes > NAMED_CELLS
    side = min(max(0.5 * n_classes, 3.5), 6.5)
    figure = Figure(figsize=(side + 2.5 + 4 * listed, side + 1.5), layout="compressed")
    axes = figure.add_subplot(title=drawable(title), facecolor="0.8")
    display = ConfusionMatrixDisplay(100 * share, display_labels=names)
    display.plot(
        ax=axes,
        cmap="Blues",
        include_values=not listed,
        im_kw={"vmin": 0, "vmax": 100},
        colorbar=False,
    )
    if display.text_ is not None:
        for cell, count in zip(display.text_.flat, matrix.flat, strict=True):
            cell.set_text(str(count) if count else "")
    named = range(0, n_classes, -(-n_classes // NAMED_CLASSES))
    axes.set_xticks(named, [names[index] for index in named], rotation=90)
    axes.set_yticks(named, [names[index] for index in named])
    axes.tick_params(length=0, labelsize=9 if n_classes <= 20 else 7)
    bar = figure.colorbar(
        display.im_, ax=axes, label="% of the true class", fraction=0.04, pad=0.02
    )
    if listed:
        pairs = [
            f"{count:4d}  {names[true]} → {names[predicted]}"
            for true, predicted, count in most_confused(matrix, 25)
        ]
        bar.ax.annotate(
            "\n".join(["most often confused", "", *pairs]),
            xy=(1, 1),
            xycoords="axes fraction",
            xytext=(55, 0),
            textcoords="offset points",
            va="top",
            fontsize=8,
        )
    return figure


def most_confused(matrix: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The most frequent pairs of a true class and a wrong prediction, most images first.

    Returns:
        At most ``most`` triples of true class, predicted class, and number of images.
    """
    wrong = np.array(matrix)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


@without_formulas
def as_png(figure: Figure) -> bytes:
    """Encodes a figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, bbox_inches="tight")
    return content.getvalue()


def short_names(class_names: Sequence[str]) -> list[str]:
    """Names for labels, with the number of the class where two would be the same."""
    names = [shortened(name) for name in class_names]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def shortened(name: str, length: int = 20) -> str:
    """A name for a label. A long one loses its middle, as beginnings are often the same."""
    name = drawable(name)
    half = length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[len(name) - half :]}"


def drawable(text: str) -> str:
    r"""Replaces what the font does not have by escapes such as ``\u82b1``."""
    font = get_font(findfont(FontProperties()))
    return "".join(
        each if font.get_char_index(ord(each)) else ascii(each)[1:-1] for each in printable(text)
    )
