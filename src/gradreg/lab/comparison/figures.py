"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, LINE_HEIGHT, LOOKS, Look, as_svg, interval, look, rows_of
from gradreg.lab.labels import settle, write_names
from gradreg.lab.metric import Metric
from gradreg.lab.stats import UNDECIDED

Row = Mapping[str, Any]


def _look(row: Row) -> Look:
    own = look(row["name"]) if row["name"] in LOOKS else look(row["method"])
    if row["is_opponent"]:
        own = LOOKS["SGD"]._replace(marker="D")
    return own._replace(is_hollow=row.get("verdict") == UNDECIDED)


def _label(metric: Metric) -> str:
    way = "higher is better" if metric.higher_is_better else "lower is better"
    return f"test {metric.name}{f' ({metric.unit})' if metric.unit else ''}, {way}"


@as_svg
def score_figure(rows: Sequence[Row], metric: Metric) -> Figure:
    """Mean and interval of each arm, the baseline as a dashed line."""
    scale = 100 if metric.is_share else 1
    figure = Figure(figsize=(7.0, 2 * LINE_HEIGHT * max(len(rows), 3) * 0.75 + 0.8), layout="constrained")
    axes = figure.subplots()
    axes.axvline(scale * rows[0]["test"]["mean"], color=FAINT, linewidth=0.9, linestyle="--")
    for k, row in enumerate(rows):
        interval(axes, k, {key: scale * row["test"][key] for key in ("mean", "low", "high")}, _look(row))
    rows_of(axes, [row["name"] for row in rows])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(_label(metric))
    return figure


@as_svg
def cost_figure(rows: Sequence[Row], metric: Metric) -> Figure:
    """Score with its interval over the cost of a step."""
    scale = 100 if metric.is_share else 1
    drawn = [row for row in rows if row.get("cost")]
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    named = []
    lines = []
    for row in drawn:
        at, own = row["cost"]["median"], _look(row)
        mean, low, high = (scale * row["test"][key] for key in ("mean", "low", "high"))
        axes.plot([at, at], [low, high], color=own.color, linewidth=2)
        axes.plot(at, mean, own.marker, color=own.color, markerfacecolor=own.face, markersize=8, zorder=3)
        named.append((row["name"], (at, mean), own.color))
        lines.append(((at, low), (at, high)))
    axes.margins(x=0.15, y=0.12)
    axes.set_xlabel("cost, over that of plain training")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylabel(_label(metric))
    axes.grid(color=FAINT, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    settle(figure)
    write_names(axes, named, lines)
    return figure
