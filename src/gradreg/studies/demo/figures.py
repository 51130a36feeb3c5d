"""The figures of the demo as SVG text, pure functions of what results.json holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from gradreg.lab.figures import COLORS, FAINT, STYLE, svg
from gradreg.lab.stats import BETTER, UNDECIDED, WORSE

_MARKERS = {BETTER: "^", WORSE: "v", UNDECIDED: "o", None: "s"}


def accuracy_figure(results: Mapping[str, Any]) -> str:
    """Test accuracy of every method with its interval, a panel for each task."""
    tasks = results["tasks"]
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(tasks, row_height=2.5)
        for axes, task in zip(panels, tasks):
            names = [row["name"] for row in task["methods"]]
            axes.axvline(100 * task["methods"][0]["accuracy"]["mean"], color=FAINT, linewidth=0.8, linestyle="--")
            for k, row in enumerate(task["methods"]):
                mean, low, high = (100 * row["accuracy"][key] for key in ("mean", "low", "high"))
                verdict = row.get("verdict")
                color = COLORS[row["name"]][0]
                axes.plot([low, high], [k, k], color=color, linewidth=2.2, solid_capstyle="butt")
                face = "white" if verdict == UNDECIDED else color
                axes.plot(mean, k, _MARKERS[verdict], color=color, markerfacecolor=face, markersize=7)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel("test accuracy (%)")
        legend = [
            Line2D([], [], color=FAINT, marker="s", linewidth=2, label="SGD"),
            Line2D([], [], color=FAINT, marker="^", linewidth=2, label="better than SGD"),
            Line2D([], [], color=FAINT, marker="v", linewidth=2, label="worse"),
            Line2D([], [], color=FAINT, marker="o", markerfacecolor="white", linewidth=2, label="no difference shown"),
        ]
        figure.legend(handles=legend, loc="outside upper center", ncols=4)
        return svg(figure)


def gradient_norm_figure(results: Mapping[str, Any]) -> str:
    """‖∇L‖ of the plain objective during training, a panel for each task, geometric means over seeds."""
    tasks = results["tasks"]
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(tasks, row_height=2.7)
        for axes, task in zip(panels, tasks):
            for row in task["methods"]:
                color, dashes = COLORS[row["name"]]
                steps = [point["step"] for point in row["trace"]]
                axes.plot(steps, [point["mean"] for point in row["trace"]], color=color, linestyle=dashes)
                axes.fill_between(
                    steps,
                    [point["low"] for point in row["trace"]],
                    [point["high"] for point in row["trace"]],
                    color=color,
                    alpha=0.1,
                    linewidth=0,
                )
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel("step")
        figure.supylabel("‖∇L‖ on all training rows", fontsize=10)
        legend = [Line2D([], [], color=c, linestyle=dashes, label=name) for name, (c, dashes) in COLORS.items()]
        figure.legend(handles=legend, loc="outside upper center", ncols=len(legend))
        return svg(figure)


def _panels(tasks: Sequence[Mapping[str, Any]], row_height: float) -> tuple[Figure, list[Any]]:
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.4 * columns + 0.4, row_height * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, task in zip(panels, tasks):
        axes.set_title(task["name"])
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    return figure, panels
