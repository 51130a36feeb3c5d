"""The cost figure: time and memory against depth, time for larger models. A function of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, Look, as_svg, legend, logarithmic_at, look, whiskers

Row = Mapping[str, Any]
_LARGE = 0.13  # of a unit, between the methods of one model
_TIME = "time of a step, over SGD's"


@as_svg
def figure(results: Row) -> Figure:
    """As many panels as there is something to show in."""
    by_depth = [case for case in results["cases"] if case["model"] == "mlp"]
    others = [case for case in results["cases"] if case["model"] != "mlp"]
    methods = list(results["cases"][0]["methods"])
    widths = [1.0, 1.0] * bool(by_depth) + [1.3] * bool(others)
    whole = Figure(figsize=(3.6 * sum(widths), 3.9), layout="constrained")
    panels = whole.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0].tolist()
    if by_depth:
        first = by_depth[0]
        title = f"MLP, width {first['width']}, batch {first['batch_size']}"
        _against_depth(panels[0], by_depth, methods, _time, _TIME, title)
        _against_depth(panels[1], by_depth, methods, _memory, "peak memory of a step, over SGD's", "the same MLP")
        _predictions(panels[0], results["predicted"])
    if others:
        _models(panels[-1], others, methods)
        _predictions(panels[-1], results["predicted"])
    predicted = Look(FAINT, "--").handle("counting products: 2 and 3", linewidth=0.9)
    legend(whole, [*(look(name).mark(name) for name in methods), predicted])
    return whole


def _predictions(axes: Any, predicted: Row) -> None:
    for value in (predicted["F-GR"], predicted["DB"]):
        axes.axhline(value, color=FAINT, linewidth=0.9, linestyle="--", zorder=0)


def _time(row: Row) -> Row:
    return {**row["time"], "mean": row["time"]["median"]}


def _memory(row: Row) -> Row:
    """Counted: there is no interval."""
    return dict.fromkeys(("low", "mean", "high"), row["memory_ratio"])


def _against_depth(axes: Any, cases: Sequence[Row], methods: Sequence[str], of: Any, label: str, title: str) -> None:
    depths = [case["depth"] for case in cases]
    for name in methods:
        whiskers(axes, depths, [of(case["methods"][name]) for case in cases], look(name))
    logarithmic_at(axes, depths)
    _label(axes, label, title)
    axes.set_xlabel("layers")


def _models(axes: Any, cases: Sequence[Row], methods: Sequence[str]) -> None:
    for place, case in enumerate(cases):
        for k, name in enumerate(methods):
            time, color = case["methods"][name]["time"], look(name).color
            x = place + _LARGE * (k - (len(methods) - 1) / 2)
            axes.plot([x, x], [time["low"], time["high"]], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot(x, time["median"], "o", color=color, markersize=5)
    axes.set_xticks(range(len(cases)), [f"{case['name']}\nbatch {case['batch_size']}" for case in cases])
    axes.tick_params(axis="x", length=0)
    _label(axes, _TIME, "larger models")


def _label(axes: Any, quantity: str, title: str) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylim(bottom=0.9)
    axes.set_ylabel(quantity)
    axes.set_title(title)
