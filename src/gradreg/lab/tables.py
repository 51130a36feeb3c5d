"""Tables: on the terminal, and in Markdown. What a cell says is made in words.py."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDTH_IN_A_PIPE = 132
_MARKUP = re.compile(r"([\\`*_\[\]#])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def console(width_in_a_pipe: int = WIDTH_IN_A_PIPE) -> Console:
    """As wide as the terminal; of a fixed width in a pipe."""
    own = Console()
    return own if own.is_terminal else Console(width=width_in_a_pipe)


def say(out: Console, *lines: str) -> None:
    """Lines as they are, wrapped by the console."""
    out.print(*lines, sep="\n", markup=False, highlight=False)


def table_of(title: str, headings: Sequence[str]) -> Table:
    """Left-aligned first column, numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left", no_wrap=k == 0)
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
