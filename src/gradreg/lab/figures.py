"""What all figures share: colors, style, and SVG text."""

from __future__ import annotations

from io import StringIO
from typing import Any, Literal

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

LineStyle = Literal["-", "--", "-.", ":"]
INK = "#1d1f21"  # the page replaces it by its own text color
FAINT = "#8a8f98"
# Okabe and Ito's palette, told apart by color-blind readers; the dashes tell them apart in print.
COLORS: dict[str, tuple[str, LineStyle]] = {
    "SGD": ("#7b8087", "-"),
    "F-GR": ("#0072b2", "-"),
    "B-GR": ("#56a5d9", "--"),
    "DB": ("#009e73", "-."),
    "SAM": ("#d55e00", "-"),
    "Flooding": ("#b4629a", ":"),
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the font of the page
    "svg.hashsalt": "gradreg",
}
PRINTED: dict[Any, Any] = {**STYLE, "figure.facecolor": "white"}
"""For files of their own, readable on a dark page too."""


def svg(figure: Figure) -> str:
    text = StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()
