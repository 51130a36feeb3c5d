"""Tables: on the terminal, 80 columns wide at most, and in Markdown. What a cell says is made in words.py."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 80
"""Of every table, and of all that is printed into a pipe."""
_MARKUP = re.compile(r"([\\`*_\[\]#])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def console() -> Console:
    """As wide as the terminal; of a fixed width in a pipe."""
    own = Console()
    return own if own.is_terminal else Console(width=WIDTH, force_jupyter=False)  # text, in the order of other text


def say(out: Console, *lines: str) -> None:
    """Sentences, broken between words only: a path can be copied, however long it is."""
    for line in lines:
        whole = textwrap.wrap(line, out.width, break_long_words=False, break_on_hyphens=False)
        out.print("\n".join(whole), markup=False, highlight=False, soft_wrap=True)


def table_of(title: str | None, headings: Sequence[str], words: Sequence[str] = (), gap: int = 2) -> Table:
    """Left-aligned first column, numbers to the right; the columns named in `words` hold text, which may be wrapped."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, gap, 0, 0), pad_edge=False
    )
    for k, heading in enumerate(headings):
        is_text = heading in words
        table.add_column(heading, justify="left" if is_text or not k else "right", no_wrap=not is_text)
    return table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With cells that stay text."""
    lines = [headings, ["---"] * len(headings), *(list(map(escaped, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text that stays text in Markdown and its HTML, on one line.

    Example:
        >>> escaped("a|b <script>")
        'a&#124;b &lt;script&gt;'
    """
    text = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return "".join(_ENTITIES.get(character, character) for character in text)
