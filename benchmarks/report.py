"""Tables on the terminal and in files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from examples.common.files import write

Cell = str | float | int | bool | None
Row = dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """The results of one benchmark.

    Attributes:
        name: The name of its files.
        title: The heading.
        about: An explanation of the columns, or the reason why the table is empty.
        rows: Cells by column; a row does not need all columns.
    """

    name: str
    title: str
    about: str
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def find(self, column: str, **where: Cell) -> Any:
        """The cell of the first row that matches ``where``; ``None`` if there is none."""
        for row in self.rows:
            if all(row.get(name) == cell for name, cell in where.items()):
                return row.get(column)
        return None


def text(cell: Cell) -> str:
    """A cell as text, with three significant digits."""
    if cell is None:
        return ""
    if isinstance(cell, bool) or not isinstance(cell, float):
        return str(cell)
    if cell != cell or abs(cell) in (0.0, float("inf")) or abs(cell) >= 100:
        return f"{cell:.0f}"
    return f"{cell:.3g}"


def as_markdown(table: Table) -> str:
    """The table in Markdown, with its heading."""
    lines = [f"## {table.title}", "", table.about, ""]
    if table.rows:
        cells = [[text(row.get(column)) for column in table.columns] for row in table.rows]
        lines += [
            "| " + " | ".join(each) + " |"
            for each in (table.columns, ["---"] * len(table.columns), *cells)
        ]
        lines.append("")
    return "\n".join(lines)


def show(table: Table, console: Console) -> None:
    """Prints the table."""
    console.print(f"\n[bold]{table.title}[/bold]\n{table.about}")
    if not table.rows:
        return
    rich = RichTable(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    width = 0
    for column in table.columns:
        numeric = any(isinstance(row.get(column), int | float) for row in table.rows)
        rich.add_column(column, justify="right" if numeric else "left")
        cells = (text(row.get(column)) for row in table.rows)
        width += 1 + max(map(len, (column, *cells)))
    for row in table.rows:
        rich.add_row(*(text(row.get(column)) for column in table.columns))
    # Do not truncate numbers; long lines are acceptable.
    console.width = max(console.width, width)
    console.print(rich)


def save(tables: Sequence[Table], header: dict[str, Any], out: Path) -> list[str]:
    """Writes each table as Markdown and JSON, and one page with all tables.

    Args:
        tables: The tables, in the order of the page.
        header: The description of the machine.
        out: The output directory.

    Returns:
        The names of the files.
    """
    lines = ["# Benchmarks", "", *(f"- {name}: {value}" for name, value in header.items()), ""]
    files = {"benchmarks.md": "\n".join([*lines, *map(as_markdown, tables)])}
    for table in tables:
        files[f"{table.name}.md"] = "\n".join([*lines, as_markdown(table)])
        content = {"header": header, "title": table.title, "about": table.about, "rows": table.rows}
        files[f"{table.name}.json"] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(out / name, content.encode())
    return list(files)
