"""Every table and figure, from the files of results."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from examples.common import files, resnet
from examples.common.resnet import ResNetConfig
from examples.common.tables import as_latex_table, as_markdown_table
from examples.never_hurt import analysis, figures, store, tables
from examples.never_hurt.analysis import select, values
from examples.never_hurt.grids import GRIDS
from examples.never_hurt.sources import RANDOM_WEIGHTS
from examples.never_hurt.tables import Rows

REPEATED = "repeated.jsonl"
"""The file of results of cells that were run again."""

COMPARED = ("weighted_sum", "dtnh_layer", "bounded_dtnh")
"""The rules of the table of gains by pair."""

GAINS = ("gains", "gains_25", "gains_public", "gains_tiny", "gains_noise")
"""The grids of tasks with a gain to keep."""
KEEPING = (
    *("weighted_sum", "dtnh_layer", "bounded_dtnh", "held_out_global"),
    *("running_bound", "trial_runs", "trial_runs_2"),
)
"""The rules of the tables of what is kept."""


def study(folder: Path, grid: str) -> pd.DataFrame | None:
    """The results of a complete grid, compared with plain fine-tuning; None without a file.

    Raises:
        ValueError: If cells are missing.
    """
    path = store.of_grid(folder, grid)
    if path is None:
        return None
    results = store.read(path)
    cells = GRIDS[grid].cells(results)
    if missing := [cell for cell in cells if cell.key not in results]:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(cells)} cells; run the grid to its end."
        )
    found = analysis.frame(results[cell.key] for cell in cells)
    return analysis.compare(analysis.at_best_rate(found) if GRIDS[grid].tuned == "each" else found)


def make_tables(studies: Mapping[str, pd.DataFrame]) -> dict[str, Rows]:
    """Makes the tables of all grids that have results, by name."""
    made: dict[str, Rows] = {}
    if (small := studies.get("small")) is not None:
        made["plain"] = tables.plain(small)
        made["verdicts"] = tables.verdicts(small)
        for regularizer in values(small, "regularizer"):
            of_it = select(small, regularizer=regularizer)
            made[f"strength-{regularizer}"] = tables.by_strength(of_it)
        made["worst"] = tables.worst_by_pair(small)
        made["against-sum"] = tables.against_sum(small)
        made["sum-verdicts"] = tables.verdicts(small, "the sum")
        if RANDOM_WEIGHTS in values(small, "source"):
            made["scratch-verdicts"] = tables.verdicts(small, "scratch")
        made["gains"] = tables.gains(small)
        made["best"] = tables.best_by_pair(small[small["rule"].isin(COMPARED)])
    for name in ("again", "harm_again"):
        if (again := studies.get(name)) is not None:
            made[name] = tables.settings(again)
    if (variants := studies.get("variants")) is not None:
        made["variants"] = tables.by_rule(variants)
    if (gains := studies.get("gains")) is not None:
        made["gains-chosen"] = tables.best_by_pair(gains)
    of_gains = [studies[name] for name in GAINS if name in studies]
    if of_gains:
        made["gains-kept"] = tables.kept(of_gains, KEEPING)
        made["gains-kept-tenfold"] = tables.kept(of_gains, KEEPING, times=10.0)
    for name in ("references", "bounds", "held_out_choices"):
        if (choices := studies.get(name)) is not None:
            made[name] = tables.by_regularizer(choices)
    for name in (*GAINS, "harm", "harm_wide"):
        if (cells := studies.get(name)) is not None:
            made[f"{name}-baseline"] = tables.plain(cells)
            made[f"{name}-by-regularizer"] = tables.by_regularizer(cells)
            made[f"{name}-below"] = tables.verdicts(cells)
    for name in ("wide", "real"):
        if (cells := studies.get(name)) is not None:
            made[f"{name}-verdicts"] = tables.verdicts(cells)
            made[f"{name}-regularizers"] = tables.by_regularizer(cells)
            made[f"{name}-plain"] = tables.plain(cells)
    for name, cells in studies.items():
        made[f"{name}-chosen-strength"] = tables.chosen_strength(cells)
        # Results of older versions lack what follows.
        for metric in analysis.OTHER_METRICS:
            difference = f"{metric}_against_plain"
            if cells[difference].notna().any():
                table = tables.by_regularizer(cells, difference)
                made[f"{name}-{metric.replace('_', '-')}"] = table
        if cells["length_ratio"].map(len).any():
            made[f"{name}-length-ratios"] = tables.length_ratios(cells)
    return made


def repeated(folder: Path) -> dict[str, Rows]:
    """Makes the table of cells that were run again, by name; none if there are none."""
    again = store.read(folder / REPEATED)
    files_of_grids = {name: store.of_grid(folder, name) for name in GRIDS}
    kept = {name: store.read(path) for name, path in files_of_grids.items() if path}
    return {"repeated": tables.repeated(kept, again)} if again else {}


def make_figures(studies: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """Makes the figures, by name; none without results of the small grid."""
    small = studies.get("small")
    if small is None:
        return {}
    layers = resnet.layer_names(ResNetConfig(GRIDS["small"].architecture, n_classes=2))
    conflict = select(small, rule="weighted_sum", strength=1.0)
    return {
        "never-hurt-strength": figures.harm_by_strength(small),
        "never-hurt-settings": figures.every_setting(small),
        "never-hurt-conflict": figures.conflict(conflict, layers),
    }


def report(folder: Path, out: Path, page: Path | None) -> None:
    """Writes tables in Markdown and LaTeX, figures, and the tables of a page.

    Args:
        folder: Has the results of each grid, ``small.jsonl`` or ``small.jsonl.gz`` and so on.
        out: Where they are written.
        page: A Markdown page; the text between ``<!-- table NAME -->`` and ``<!-- end -->`` in
            it is replaced. The figures are also written to ``assets`` next to it.

    Raises:
        ValueError: If there are no results, a grid is incomplete, or the page names a table
            that is not made.
    """
    studies = {name: found for name in GRIDS if (found := study(folder, name)) is not None}
    if not studies:
        raise ValueError(f"There are no results in {folder}: no file like small.jsonl.")
    out.mkdir(parents=True, exist_ok=True)
    made = make_tables(studies) | repeated(folder)
    for name, rows in made.items():
        files.write(out / f"{name}.md", (as_markdown_table(rows) + "\n").encode())
        files.write(out / f"{name}.tex", as_latex_table(rows).encode())
    for name, figure in make_figures(studies).items():
        for place in [out] if page is None else [out, page.parent / "assets"]:
            figure.savefig(place / f"{name}.png", dpi=150, metadata={"Software": None})
    if page is not None:
        files.write(page, renewed(page.read_text(), made).encode())


def renewed(text: str, made: Mapping[str, Rows]) -> str:
    """Replaces the tables of a page.

    Raises:
        ValueError: If the page names a table that is not made.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise ValueError(f"The page names a table {name}; there are {', '.join(made)}.")
        return f"<!-- table {name} -->\n\n{as_markdown_table(made[name])}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)
