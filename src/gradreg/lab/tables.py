"""Tables: on the terminal, and in Markdown. What a cell says is made in words.py; page.py has the HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.console import Console
from rich.text import Text

WIDTH_IN_A_PIPE = 132
_NUMBER = re.compile(r"[\d+−–(<×*.-]|$")
_MARKUP = re.compile(r"([\\`*_\[\]#])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def console(width_in_a_pipe: int = WIDTH_IN_A_PIPE) -> Console:
    """As wide as the terminal; of a fixed width in a pipe."""
    own = Console()
    return own if own.is_terminal else Console(width=width_in_a_pipe)


def say(out: Console, *lines: str) -> None:
    """Lines as they are, wrapped by the console."""
    out.print(*lines, sep="\n", markup=False, highlight=False)


@dataclass(frozen=True)
class Table:
    """Cells as they are shown, on the terminal and on a page."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_of_words(self, column: int) -> bool:
        """To the left then; numbers go to the right."""
        return column == 0 or any(not _NUMBER.match(row[column]) for row in self.rows)

    def print(self, out: Console) -> None:
        table = table_of(self.title, self.headings)
        for k, column in enumerate(table.columns):
            column.justify = "left" if self.is_of_words(k) else "right"
        for row in self.rows:
            table.add_row(*map(Text, row))
        out.print(table)


def table_of(title: str, headings: Sequence[str]) -> rich.table.Table:
    """Left-aligned first column, numbers to the right."""
    table = rich.table.Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left", no_wrap=k == 0)
    return table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With cells that stay text."""
    lines = [["---"] * len(headings) if row is None else list(map(escaped, row)) for row in (headings, None, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text that stays text in Markdown and its HTML, on one line.

    Example:
        >>> escaped("a|b <script>")
        'a&#124;b &lt;script&gt;'
    """
    return literal(" ".join(text.split()))


def literal(text: str) -> str:
    """The same, with the spaces that it has."""
    text = _MARKUP.sub(r"\\\1", text)
    return "".join(_ENTITIES.get(character, character) for character in text)
