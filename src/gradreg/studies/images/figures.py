"""The figure of the study: what each arm gains over plain training, a panel for each piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, LINE_HEIGHT, LOOKS, Look, as_svg, interval, legend, look, panels, rows_of
from gradreg.lab.stats import BETTER, UNDECIDED, WORSE

_MARKS = {
    BETTER: ("better than SGD", Look(FAINT, marker="^")),
    WORSE: ("worse", Look(FAINT, marker="v")),
    UNDECIDED: (UNDECIDED, Look(FAINT, marker="o", is_hollow=True)),
}


@as_svg
def gains_figure(pieces: Sequence[Mapping[str, Any]]) -> Figure:
    """Difference of test accuracy to plain training, in points, with its interval."""
    shown = [[row for row in piece["arms"] if row.get("difference")] for piece in pieces]
    most = max(map(len, shown))
    figure, every = panels([piece["about"] for piece in pieces], 5.4, LINE_HEIGHT * max(most, 3) + 0.9)
    for axes, rows in zip(every, shown):
        rows_of(axes, [row["name"] for row in rows])
        axes.axvline(0, color=FAINT, linewidth=0.9, linestyle="--")
        for k, row in enumerate(rows):
            color = "SGD" if row["is_opponent"] else row["method"]
            mark = _MARKS[row["verdict"]][1]._replace(color=(LOOKS.get(color) or look(color)).color)
            interval(axes, k, {key: 100 * value for key, value in row["difference"].items()}, mark)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("test accuracy minus that of SGD (points)")
    legend(figure, [mark.mark(label) for label, mark in _MARKS.values()])
    return figure
