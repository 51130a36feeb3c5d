"""Tables: on the terminal, in its width, and in Markdown. What a cell says is in words.py; page.py has the HTML."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import rich.table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

WIDTH = 80
"""Of all that is printed into a pipe."""
_SOME = 20
"""Letters in a line of text that is pleasant to read."""
_NUMBER = re.compile(r"[\d+−–(<×*.-]|$")
_SURE = re.compile(r"(\S+) ([(\[±].*)", re.DOTALL)
"""A number, and how sure it is."""
_MARKUP = re.compile(r"([\\`*_\[\]#])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def console() -> Console:
    """As wide as the terminal; of a fixed width in a pipe."""
    own = Console()
    return own if own.is_terminal else Console(width=WIDTH, force_jupyter=False)  # text, in the order of other text


def say(out: Console, *lines: str) -> None:
    """Sentences, broken between words only: a path can be copied, however long it is."""
    for line in lines:
        out.print("\n".join(_wrapped(line, out.width)), markup=False, highlight=False, emoji=False, soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


@dataclass(frozen=True)
class Table:
    """Cells as they are shown, on the terminal and on a page."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_of_words(self, column: int) -> bool:
        """To the left then, and in lines where there is little room; numbers go to the right, and are never broken."""
        return column == 0 or any(not _NUMBER.match(row[column]) for row in self.rows)

    def print(self, out: Console) -> None:
        """The first of these that fits: as it is, headings in lines, intervals below their number, columns close; else
        half of the columns, and then the others."""
        stacked = self._stacked()._in_lines()
        layouts = [(self, 2), (self._in_lines(), 2), (stacked, 2), (stacked, 1)]
        table, gap = next((of for of in layouts if of[0]._width(of[1]) <= out.width), layouts[-1])
        if table._width(gap) <= out.width or len(self.headings) < 3:
            out.print(table._drawn(gap))
            return
        middle = (len(self.headings) + 1) // 2
        self._of(range(middle), self.title).print(out)
        out.print()
        self._of([0, *range(middle, len(self.headings))], "").print(out)

    def _of(self, columns: Sequence[int], title: str) -> Table:
        return Table(title, [self.headings[k] for k in columns], [[row[k] for k in columns] for row in self.rows])

    def _columns(self) -> Iterator[tuple[str, list[str], bool]]:
        for k, heading in enumerate(self.headings):
            yield heading, [line for row in self.rows for line in row[k].split("\n")], self.is_of_words(k)

    def _width(self, gap: int) -> int:
        """With text in lines that can be read."""
        widths = []
        for heading, lines, is_text in self._columns():
            least = _longest(" ".join([heading, *lines]).split()) if is_text else _longest(heading.split("\n"))
            widths.append(max(least, min(_longest(lines), _SOME) if is_text else _longest(lines)))
        return sum(widths) + gap * (len(widths) - 1)

    def _in_lines(self) -> Table:
        """Each heading as narrow as the numbers below it, as far as its words are."""
        headings = []
        for heading, lines, is_text in self._columns():
            room = max(_longest(lines), _longest(heading.split()))
            headings.append(heading if is_text else "\n".join(_wrapped(heading, room)))
        return replace(self, headings=headings)

    def _stacked(self) -> Table:
        """Below each number how sure it is."""
        are_words = [self.is_of_words(k) for k in range(len(self.headings))]
        rows = [[cell if words else _below(cell) for cell, words in zip(row, are_words)] for row in self.rows]
        return replace(self, rows=rows)

    def _drawn(self, gap: int) -> rich.table.Table:
        title = Text(self.title, "bold")
        drawn = rich.table.Table(title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), pad_edge=False)
        for k, heading in enumerate(self.headings):
            is_text = self.is_of_words(k)
            drawn.add_column(Text(heading), justify="left" if is_text else "right", no_wrap=not is_text)
        for row in self.rows:
            drawn.add_row(*map(Text, row))
        return drawn


def _below(cell: str) -> str:
    found = _SURE.fullmatch(cell)
    return f"{found[1]}\n{found[2].strip('()[]')}" if found else cell


def _longest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=0)


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
