"""Figures of the claims as SVG text, pure functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from gradreg.lab.figures import COLORS, FAINT, INK, PRINTED, svg
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED

Row = Mapping[str, Any]
_MARKS = {HOLDS: ("#0072b2", ">"), FAILS: ("#d55e00", "<"), UNDECIDED: ("#7b8087", "o")}
_LINE_HEIGHT = 0.27


def forest_figure(rows: Sequence[Row]) -> str:
    """The interval of every sub-claim, in units of its own far end; rows of results.json that have one."""
    with matplotlib.rc_context(PRINTED):
        figure = Figure(figsize=(8.6, _LINE_HEIGHT * max(len(rows), 3) + 1.1), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=FAINT, linewidth=1)
        for k, row in enumerate(rows):
            low, mean, high = (row[key] - row["reference"] for key in ("low", "number", "high"))
            unit = max(abs(low), abs(high)) or 1.0
            color, marker = _MARKS[row["verdict"]]
            axes.plot([low / unit, high / unit], [k, k], color=color, linewidth=2, solid_capstyle="butt")
            face = "white" if row["verdict"] == UNDECIDED else color
            axes.plot(mean / unit, k, marker, color=color, markerfacecolor=face, markersize=7)
            axes.text(1.08, k, row["shown"], va="center", fontsize=8.5, color=INK)
        axes.set_yticks(range(len(rows)), [row["key"] for row in rows])
        axes.set_ylim(max(len(rows), 3) - 0.4, -0.6)
        axes.set_xlim(-1.05, 1.05)
        axes.set_xticks([-1, 0, 1], ["opposite", "no difference", "as claimed"])
        axes.tick_params(axis="both", length=0)
        axes.set_xlabel("number less its reference, over the far end of its 95 % interval")
        handles = [
            Line2D([], [], color=c, marker=m, linewidth=2, label=v, markerfacecolor="white" if v == UNDECIDED else c)
            for v, (c, m) in _MARKS.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        return svg(figure)


def epsilon_figure(data: Row) -> str:
    """Test accuracy over ε at one γ, a panel for each task; DB and B-GR as dashed lines."""
    with matplotlib.rc_context(PRINTED):
        figure = Figure(figsize=(4.3 * len(data) + 0.3, 3.2), layout="constrained")
        panels = figure.subplots(1, len(data), squeeze=False)[0]
        for axes, (label, task) in zip(panels, data.items()):
            steps = [point["epsilon"] for point in task["points"]]
            mean, low, high = ([point[key] for point in task["points"]] for key in ("mean", "low", "high"))
            color = COLORS["F-GR"][0]
            axes.plot(steps, mean, color=color, marker="o", markersize=5)
            axes.vlines(steps, low, high, color=color, linewidth=2)
            for name in ("DB", "B-GR"):
                axes.axhline(task[name]["mean"], color=COLORS[name][0], linestyle="--", linewidth=1.4)
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(steps, [f"{step:g}" for step in steps])
            axes.set_title(f"{label}, γ = {task['gamma']:g}")
            axes.set_xlabel("ascent step ε")
        panels[0].set_ylabel("test accuracy (%)")
        handles = [Line2D([], [], color=COLORS["F-GR"][0], marker="o", label="F-GR at this γ")]
        handles += [Line2D([], [], color=COLORS[n][0], linestyle="--", label=f"{n}, tuned") for n in ("DB", "B-GR")]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        return svg(figure)
