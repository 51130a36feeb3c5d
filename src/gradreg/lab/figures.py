"""What all figures share: the look of each method, the style, and the pieces that most of them are made of.

A figure is a function that draws one, `as_svg`: SVG text that is a file of its own, readable on a dark page too, and a
part of a page, which puts its own colors in the place of ink and white.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import StringIO
from textwrap import fill
from typing import Any, Literal, NamedTuple, ParamSpec

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

P = ParamSpec("P")
Row = Mapping[str, Any]
INK = "#1d1f21"  # the page replaces it by its own text color
FAINT = "#8a8f98"
LINE_HEIGHT = 0.27  # inches, of a row of `rows_of`
LETTERS = 8  # of a title, for an inch of its panel, whose labels take a part of it


class Look(NamedTuple):
    """How something is drawn, wherever it is."""

    color: str
    dashes: Literal["-", "--", "-.", ":"] = "-"
    marker: str = "o"
    is_hollow: bool = False

    @property
    def face(self) -> str:
        return "white" if self.is_hollow else self.color

    def handle(self, label: str, **more: Any) -> Line2D:
        """For a legend: the line alone."""
        return Line2D([], [], **{"color": self.color, "linestyle": self.dashes, "label": label, **more})

    def mark(self, label: str, **more: Any) -> Line2D:
        """For a legend: the marker, on a line unless that has another style."""
        return self.handle(label, marker=self.marker, markerfacecolor=self.face, **{"linewidth": 2, **more})


# Okabe and Ito's palette, told apart by color-blind readers, the blue light enough for a dark page; dashes and markers
# tell them apart in print.
LOOKS = {
    "SGD": Look("#7b8087", "-", "o"),
    "F-GR": Look("#1b82c8", "-", "s"),
    "B-GR": Look("#56a5d9", "--", "<"),
    "Central": Look("#b38600", ":", "P"),
    "DB": Look("#009e73", "-.", "D"),
    "SAM": Look("#d55e00", "-", "v"),
    "ASAM": Look("#e58f5a", "--", "X"),
    "Flooding": Look("#b4629a", ":", "p"),
}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the font of the page
    "svg.hashsalt": "gradreg",
}


def look(method: str) -> Look:
    """That of a method; what is not known by name is faint."""
    return LOOKS.get(method, Look(FAINT, ":", "*"))


def as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """What draws a figure, as what gives its SVG."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # one that matplotlib's font lacks is there in the page's
            text = StringIO()
            FigureCanvasSVG(draw(*args, **kwargs)).print_svg(text, metadata={"Date": None})
        return text.getvalue()

    return drawn


def panels(titles: Sequence[str], width: float, height: float, columns: int = 2) -> tuple[Figure, list[Any]]:
    """A panel for each title, in rows of `columns`; `width` and `height` of one, in inches."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, title in zip(every, titles):
        axes.set_title("\n".join(fill(line, int(LETTERS * width)) for line in title.split("\n")))
    for axes in every[len(titles) :]:
        axes.set_visible(False)
    return figure, every[: len(titles)]


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Above the panels, in as few lines as fit."""
    widths = [0.75 + 0.085 * len(str(handle.get_label())) for handle in handles]  # in inches, a little too wide
    lines, room = 1, figure.get_figwidth()
    while lines < len(widths) and sum(max(widths[k : k + lines]) for k in range(0, len(widths), lines)) > room:
        lines += 1
    figure.legend(handles=list(handles), loc="outside upper center", ncols=-(-len(handles) // lines))


def band(axes: Any, xs: Sequence[float], intervals: Sequence[Row], of: Look, **more: Any) -> None:
    """A line through the means of rows with `mean`, `low` and `high`, and its interval as a shade."""
    mean, low, high = _ends(intervals)
    axes.plot(xs, mean, color=of.color, linestyle=of.dashes, **more)
    axes.fill_between(xs, low, high, color=of.color, alpha=0.12, linewidth=0)


def whiskers(axes: Any, xs: Sequence[float], intervals: Sequence[Row], of: Look) -> None:
    """The same for few points: markers with their intervals."""
    mean, low, high = _ends(intervals)
    axes.plot(xs, mean, color=of.color, linestyle=of.dashes, marker=of.marker, markersize=5)
    axes.vlines(xs, low, high, color=of.color, linewidth=2)


def _ends(intervals: Sequence[Row]) -> list[list[float]]:
    return [[row[key] for row in intervals] for key in ("mean", "low", "high")]


def rows_of(axes: Any, names: Sequence[str]) -> None:
    """A line for each name, the first on top: for intervals."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 3) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def interval(axes: Any, k: int, row: Row, of: Look) -> None:
    """In the k-th line of `rows_of`."""
    axes.plot([row["low"], row["high"]], [k, k], color=of.color, linewidth=2, solid_capstyle="butt")
    axes.plot(row["mean"], k, of.marker, color=of.color, markerfacecolor=of.face, markersize=7)


def logarithmic(axis: Any) -> None:
    """Of what is drawn already: a few ticks, as plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def logarithmic_at(axes: Any, values: Sequence[float]) -> None:
    """The horizontal axis, with a tick at each value that was tried and none else."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
