"""MkDocs hooks: insert the tables of the tests, and convert formulas to MathML.

MathML that is generated at build time needs no JavaScript library.
"""

import html
import pathlib
import re
import runpy
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


COMPOSITION = "<!-- the tables of tests/composition.py -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replaces the marker by the tables that the tests check; called by MkDocs."""
    del kwargs
    if COMPOSITION not in markdown:
        return markdown
    tested = pathlib.Path(__file__).parents[1] / "tests" / "composition.py"
    return markdown.replace(COMPOSITION, runpy.run_path(str(tested))["as_markdown"]())


def on_page_content(output: str, **kwargs: Any) -> str:
    """Replaces each formula of a page by MathML; called by MkDocs."""
    del kwargs

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        return convert(html.unescape(match["latex"]).strip(), display=display)

    return FORMULA.sub(mathml, output)
