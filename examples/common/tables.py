"""Tables as text: rows of strings, the first of which is the header."""

from collections.abc import Callable, Sequence


def _escaped_bar(cell: str) -> str:
    return cell.replace("|", r"\|")


def as_markdown_table(
    rows: Sequence[Sequence[str]], escape: Callable[[str], str] = _escaped_bar
) -> str:
    """Formats a table in Markdown.

    Args:
        rows: The header, then the rows of the body.
        escape: Escapes a cell: only ``|`` by default, so that cells can have Markdown.

    Returns:
        The table, without a newline at its end.
    """
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(map(escape, line)) + " |" for line in lines)


def as_latex_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in LaTeX, for the package booktabs.

    Args:
        rows: The header, then the rows of the body.

    Returns:
        The table, with a newline at its end.
    """
    header, *body = (" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows)
    columns = "l" + "r" * (len(rows[0]) - 1)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", header, r"\midrule", *body, r"\bottomrule", end, ""])


_LATEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "_": r"\_",
        "−": "$-$",
        "±": r"$\pm$",
        "→": r"$\to$",
        "λ": r"$\lambda$",
        "×": r"$\times$",
    }
)
