"""Every table and figure, from the files of results by one command."""

import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from examples.common import files, resnet
from examples.common.resnet import ResNetConfig
from examples.common.tables import as_markdown_table
from examples.never_hurt import figures, store, tables
from examples.never_hurt.analysis import Study
from examples.never_hurt.grids import GRIDS
from examples.never_hurt.sources import RANDOM_WEIGHTS
from examples.never_hurt.tables import Rows

SUFFIXES = (".jsonl", ".jsonl.gz")
PREFERRED = "bounded_dtnh"
PAPER = "dtnh_layer"


def find(folder: Path, grid: str) -> Path | None:
    """The file of results of a grid."""
    for suffix in SUFFIXES:
        if (path := folder / f"{grid}{suffix}").exists():
            return path
    return None


def study(folder: Path, grid: str) -> Study | None:
    """The results of a grid that has been run to its end.

    Raises:
        ValueError: If cells are missing.
    """
    path = find(folder, grid)
    if path is None:
        return None
    results = store.read(path)
    cells = GRIDS[grid].cells(results)
    if missing := [cell for cell in cells if cell.key not in results]:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(cells)} cells; run the grid to its end."
        )
    return Study(results[cell.key] for cell in cells)


def make_tables(studies: Mapping[str, Study]) -> dict[str, Rows]:
    """All tables that the results at hand allow, by name."""
    made: dict[str, Rows] = {}
    if small := studies.get("small"):
        compared = [rule for rule in ("weighted_sum", PAPER, PREFERRED) if rule in small.rules]
        made["plain"] = tables.plain(small)
        made["verdicts"] = tables.verdicts(small)
        for regularizer in small.regularizers:
            made[f"strength-{regularizer}"] = tables.by_strength(small, regularizer=regularizer)
        made["worst"] = tables.worst_by_pair(small, small.rules)
        made["against-sum"] = tables.against_sum(small)
        made["sum-verdicts"] = tables.verdicts(small, "the sum")
        if any(pair.source == RANDOM_WEIGHTS for pair in small.plain):
            made["scratch-verdicts"] = tables.verdicts(small, "scratch")
        made["gains"] = tables.gains(small)
        made["best"] = tables.best_by_pair(small, compared)
    if again := studies.get("again"):
        made["again"] = tables.settings(again)
    if variants := studies.get("variants"):
        made["variants"] = tables.by_rule(variants)
    for name in ("wide", "real"):
        if each := studies.get(name):
            made[f"{name}-verdicts"] = tables.verdicts(each)
            made[f"{name}-regularizers"] = tables.by_regularizer(each)
            made[f"{name}-plain"] = tables.plain(each)
    return made


def make_figures(studies: Mapping[str, Study]) -> dict[str, Figure]:
    """All figures that the results at hand allow, by name."""
    small = studies.get("small")
    if small is None:
        return {}
    layers = resnet.layer_names(ResNetConfig(GRIDS["small"].architecture, n_classes=2))
    return {
        "never-hurt-strength": figures.harm_by_strength(small),
        "never-hurt-settings": figures.every_setting(small),
        "never-hurt-conflict": figures.conflict(small, "weighted_sum", 1.0, layers),
    }


def report(folder: Path, out: Path, page: Path | None) -> None:
    """Writes tables in Markdown and LaTeX, figures, and the tables of a page.

    Args:
        folder: Has the results of each grid, ``small.jsonl`` or ``small.jsonl.gz`` and so on.
        out: Where they go.
        page: A Markdown page; what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` in
            it is replaced. Figures go to ``assets`` beside it, too.

    Raises:
        ValueError: If there are no results, a grid is not finished, or the page wants a table
            that there is none of.
    """
    studies = {name: found for name in GRIDS if (found := study(folder, name)) is not None}
    if not studies:
        raise ValueError(f"There are no results in {folder}: no file like small.jsonl.")
    out.mkdir(parents=True, exist_ok=True)
    made = make_tables(studies)
    for name, rows in made.items():
        files.write(out / f"{name}.md", (as_markdown_table(rows) + "\n").encode())
        files.write(out / f"{name}.tex", tables.as_latex(rows).encode())
    for name, figure in make_figures(studies).items():
        for place in [out] if page is None else [out, page.parent / "assets"]:
            figure.savefig(place / f"{name}.png", dpi=150, metadata={"Software": None})
    if page is not None:
        files.write(page, renewed(page.read_text(), made).encode())


def renewed(text: str, made: Mapping[str, Rows]) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: If it wants a table that there is none of.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise ValueError(f"The page wants a table {name}; there are {', '.join(made)}.")
        return f"<!-- table {name} -->\n\n{as_markdown_table(made[name])}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)
