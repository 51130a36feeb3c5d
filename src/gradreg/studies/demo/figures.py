"""The figures of the demo, pure functions of what results.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, LOOKS, Look, as_svg, band, interval, legend, logarithmic, panels, rows_of
from gradreg.lab.stats import BETTER, UNDECIDED, WORSE

_MARKS = {
    None: ("SGD", Look(FAINT, marker="s")),
    BETTER: ("better than SGD", Look(FAINT, marker="^")),
    WORSE: ("worse", Look(FAINT, marker="v")),
    UNDECIDED: (UNDECIDED, Look(FAINT, marker="o", is_hollow=True)),
}


@as_svg
def accuracy_figure(results: Mapping[str, Any]) -> Figure:
    """Test accuracy of every method with its interval, a panel for each task."""
    figure, every = panels([task["name"] for task in results["tasks"]], 4.6, 2.5)
    for axes, task in zip(every, results["tasks"]):
        rows_of(axes, [row["name"] for row in task["methods"]])
        axes.axvline(100 * task["methods"][0]["accuracy"]["mean"], color=FAINT, linewidth=0.8, linestyle="--")
        for k, row in enumerate(task["methods"]):
            mark = _MARKS[row.get("verdict")][1]._replace(color=LOOKS[row["name"]].color)
            interval(axes, k, {key: 100 * value for key, value in row["accuracy"].items()}, mark)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("test accuracy (%)")
    legend(figure, [mark.mark(label) for label, mark in _MARKS.values()])
    return figure


@as_svg
def gradient_norm_figure(results: Mapping[str, Any]) -> Figure:
    """‖∇L‖ of the plain objective during training, a panel for each task, geometric means over seeds."""
    figure, every = panels([task["name"] for task in results["tasks"]], 4.6, 2.7)
    for axes, task in zip(every, results["tasks"]):
        for row in task["methods"]:
            band(axes, [point["step"] for point in row["trace"]], row["trace"], LOOKS[row["name"]])
        logarithmic(axes.yaxis)
        axes.set_xlabel("step")
    figure.supylabel("‖∇L‖ on all training rows", fontsize=10)
    names = [row["name"] for row in results["tasks"][0]["methods"]]
    legend(figure, [LOOKS[name].handle(name) for name in names])
    return figure
