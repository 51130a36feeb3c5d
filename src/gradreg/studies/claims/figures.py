"""Figures of the claims, pure functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from gradreg.lab.figures import (
    FAINT,
    LINE_HEIGHT,
    LOOKS,
    Look,
    as_svg,
    interval,
    legend,
    logarithmic_at,
    panels,
    rows_of,
    whiskers,
)
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED

Row = Mapping[str, Any]
_MARKS = {
    HOLDS: Look(LOOKS["F-GR"].color, marker=">"),
    FAILS: Look(LOOKS["SAM"].color, marker="<"),
    UNDECIDED: Look(LOOKS["SGD"].color, marker="o", is_hollow=True),
}


@as_svg
def forest_figure(rows: Sequence[Row]) -> Figure:
    """The interval of every sub-claim, in units of its own far end; rows of results.json that have one."""
    figure, (axes,) = panels([""], 8.6, LINE_HEIGHT * max(len(rows), 3) + 0.6)
    rows_of(axes, [row["key"] for row in rows])
    axes.axvline(0, color=FAINT, linewidth=1)
    for k, row in enumerate(rows):
        low, mean, high = (row[key] - row["reference"] for key in ("low", "number", "high"))
        unit = max(abs(low), abs(high)) or 1.0
        ends = {"low": low / unit, "mean": mean / unit, "high": high / unit}
        interval(axes, k, ends, _MARKS[row["verdict"]])
        axes.text(1.08, k, row["shown"], va="center", fontsize=8.5)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xticks([-1, 0, 1], ["opposite", "no difference", "as claimed"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("number less its reference, over the far end of its 95 % interval")
    legend(figure, [mark.mark(verdict) for verdict, mark in _MARKS.items()])
    return figure


@as_svg
def epsilon_figure(data: Row) -> Figure:
    """Test accuracy over ε at one γ, a panel for each task; DB and B-GR as dashed lines."""
    figure, every = panels([f"{label}, γ = {task['gamma']:g}" for label, task in data.items()], 4.3, 2.7)
    own = LOOKS["F-GR"]
    for axes, task in zip(every, data.values()):
        steps = [point["epsilon"] for point in task["points"]]
        whiskers(axes, steps, task["points"], own)
        for name in ("DB", "B-GR"):
            axes.axhline(task[name]["mean"], color=LOOKS[name].color, linestyle="--", linewidth=1.4)
        logarithmic_at(axes, steps)
        axes.set_xlabel("ascent step ε")
    every[0].set_ylabel("test accuracy (%)")
    tuned = [LOOKS[name].handle(f"{name}, tuned", linestyle="--") for name in ("DB", "B-GR")]
    legend(figure, [own.mark("F-GR at this γ"), *tuned])
    return figure
