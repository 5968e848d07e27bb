"""Tables as text: rows of strings, the first of which is the header."""

from collections.abc import Sequence


def as_markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in Markdown.

    Args:
        rows: The header, then the rows of the body.

    Returns:
        The table, without a newline at its end.
    """
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )
