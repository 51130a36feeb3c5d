"""Tables as a reader sees them: how wide they must be for no word and no number to be broken."""

from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from gradreg.lab import tables


def least_width(table):
    """Of the longest word where a column may be wrapped, of the longest line where not."""
    gaps = table.padding[1] * (len(table.columns) - 1)
    return gaps + sum(max(map(cell_len, pieces(column))) for column in table.columns)


def pieces(column):
    for cell in (column.header, *column.cells):
        yield from str(cell).splitlines() if column.no_wrap else str(cell).split()


@contextmanager
def tables_fit(width=80):
    """Every table that is printed meanwhile, and at least one, fits without breaking a word or a number."""
    narrowest = {}

    class Watching(Console):
        def print(self, *objects, **options):
            for table in objects:
                if isinstance(table, Table):
                    narrowest[str(table.title)] = least_width(table)
            super().print(*objects, **options)

    before, tables.Console = tables.Console, Watching
    try:
        yield
    finally:
        tables.Console = before
    assert narrowest
    assert {title: wide for title, wide in narrowest.items() if wide > width} == {}
