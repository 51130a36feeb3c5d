"""The cost figure as SVG: time and memory against depth, time for larger models. A function of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from gradreg.lab.cost.report import sentence
from gradreg.lab.figures import COLORS, FAINT, PRINTED, svg

Row = Mapping[str, Any]
LINES = {**COLORS, "Central": ("#c88a00", ":")}
_LARGE = 0.13  # of a unit, between the methods of one model


def figure(results: Row) -> str:
    """As many panels as there is something to show in."""
    by_depth = [case for case in results["cases"] if case["model"] == "mlp"]
    others = [case for case in results["cases"] if case["model"] != "mlp"]
    methods = list(results["cases"][0]["methods"])
    with matplotlib.rc_context(PRINTED):
        widths = [1.0, 1.0] * bool(by_depth) + [1.3] * bool(others)
        whole = Figure(figsize=(3.6 * sum(widths), 4.2), layout="constrained")
        panels = whole.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0].tolist()
        if by_depth:
            _against_depth(panels[0], by_depth, methods, results["predicted"])
            _memory(panels[1], by_depth, methods)
        if others:
            _models(panels[-1], others, methods, results["predicted"])
        legend = [Line2D([], [], color=LINES[m][0], linestyle=LINES[m][1], marker="o", label=m) for m in methods]
        legend.append(Line2D([], [], color=FAINT, linewidth=0.9, linestyle="--", label="counting products: 2 and 3"))
        whole.legend(handles=legend, loc="outside upper center", ncols=len(legend))
        whole.supxlabel(_wrapped(f"{sentence(results)} {results['device']}, {results['machine']}."), fontsize=8.5)
        return svg(whole)


def _predictions(axes: Any, predicted: Row) -> None:
    for value in (predicted["F-GR"], predicted["DB"]):
        axes.axhline(value, color=FAINT, linewidth=0.9, linestyle="--", zorder=0)


def _against_depth(axes: Any, cases: list[Row], methods: list[str], predicted: Row) -> None:
    _predictions(axes, predicted)
    depths = [case["depth"] for case in cases]
    for name in methods:
        color, dashes = LINES[name]
        times = [case["methods"][name]["time"] for case in cases]
        middle = [t["median"] for t in times]
        errors = [[m - t["low"] for m, t in zip(middle, times)], [t["high"] - m for m, t in zip(middle, times)]]
        axes.errorbar(depths, middle, errors, color=color, linestyle=dashes, marker="o", markersize=4, capsize=2)
    _label(
        axes, "time of a step, over SGD's", f"MLP, width {cases[0]['width']}, batch {cases[0]['batch_size']}", depths
    )


def _memory(axes: Any, cases: list[Row], methods: list[str]) -> None:
    depths = [case["depth"] for case in cases]
    for name in methods:
        color, dashes = LINES[name]
        ratios = [case["methods"][name]["memory_ratio"] for case in cases]
        axes.plot(depths, ratios, color=color, linestyle=dashes, marker="o", markersize=4)
    _label(axes, "peak memory of a step, over SGD's", "the same MLP", depths)


def _label(axes: Any, quantity: str, title: str, depths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylim(bottom=0.9)
    axes.set_xlabel("layers")
    axes.set_ylabel(quantity)
    axes.set_title(title)


def _models(axes: Any, cases: list[Row], methods: list[str], predicted: Row) -> None:
    _predictions(axes, predicted)
    for place, case in enumerate(cases):
        for k, name in enumerate(methods):
            time, color = case["methods"][name]["time"], LINES[name][0]
            x = place + _LARGE * (k - (len(methods) - 1) / 2)
            axes.plot([x, x], [time["low"], time["high"]], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot(x, time["median"], "o", color=color, markersize=5)
    axes.set_xticks(range(len(cases)), [f"{case['name']}\nbatch {case['batch_size']}" for case in cases])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylim(bottom=0.9)
    axes.set_ylabel("time of a step, over SGD's")
    axes.set_title("larger models")


def _wrapped(text: str, width: int = 150) -> str:
    from textwrap import fill

    return fill(text, width)
