"""Pictures of the frontier as SVG text: retention over measured cost for each task, and each mode at its worst."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, INK, LOOKS, Look, as_svg, interval, legend, panels, rows_of
from gradreg.lab.labels import settle, write_names
from gradreg.lab.stats import Interval

_OURS, _OPPONENTS = Look(LOOKS["F-GR"].color, marker="o"), Look(LOOKS["SAM"].color, marker="D")
_REFERENCES = Look(INK, marker="s")
_TWO_LINES = 0.34  # inches, of a row
_WIDTH = 7.6  # inches; at 700 pixels a letter of 9 points is 11 pixels high
_LOWEST = -1.0  # of the axis of retention: what is lower is drawn at its edge
_ROOT = 0.05
"""Cost is drawn as its root, with this much below the lowest, so that noise at 1 is not stretched without bound."""
_TICKS = (1, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Point:
    """A mode on one task."""

    mode: str
    cost: float
    """Time of a run, by measured steps, over that of plain SGD."""
    retention: Interval
    is_opponent: bool = False
    """Somebody else's code or method, at its own best."""


@dataclass(frozen=True)
class Panel:
    """A task; plain training is at (1, 0), the full method at (`full_cost`, 1)."""

    task: str
    points: Sequence[Point]
    full_cost: float
    full_name: str = "F-GR"


def front(panel: Panel) -> list[tuple[float, float]]:
    """Cost and retention of what nothing else beats in both: with plain and full, by rising cost.

    Example:
        >>> at = lambda cost, mean: Point("", cost, Interval(mean, mean, mean))
        >>> front(Panel("", [at(1.1, 0.8), at(1.2, 0.7), at(1.5, 0.9)], full_cost=2.0))
        [(1.0, 0.0), (1.1, 0.8), (1.5, 0.9), (2.0, 1.0)]
    """
    found: list[tuple[float, float]] = []
    everything = [(1.0, 0.0), (panel.full_cost, 1.0), *((p.cost, p.retention.mean) for p in panel.points)]
    for cost, kept in sorted(everything, key=lambda pair: (pair[0], -pair[1])):
        if not found or kept > found[-1][1]:
            found.append((cost, kept))
    return found


def worst(panels: Sequence[Panel]) -> list[tuple[str, Point]]:
    """The task on which each mode retains the least, and its point there; the most trustworthy mode first.

    Raises:
        ValueError: a mode that is missing in a task, whose minimum would not compare.
    """
    names = {point.mode: None for panel in panels for point in panel.points}
    found = []
    for name in names:
        own = [(panel.task, point) for panel in panels for point in panel.points if point.mode == name]
        if len(own) != len(panels):
            raise ValueError(
                f"mode {name!a} must have one point in each of the {len(panels)} tasks, got {len(own)}: run it on all, "
                "or leave it out."
            )
        found.append(min(own, key=lambda pair: pair[1].retention.mean))
    return sorted(found, key=lambda pair: -pair[1].retention.mean)


@as_svg
def pareto_figure(tasks: Sequence[Panel]) -> Figure:
    """Retention over cost, a panel for each task, with the front: the most that can be kept at that cost or less."""
    figure, every = panels([panel.task for panel in tasks], _WIDTH, 3.7, columns=1)
    costs = [1.0, *(p.full_cost for p in tasks), *(point.cost for p in tasks for point in p.points)]
    for axes, panel in zip(every, tasks):
        axes.set_ylim(*_limits([point.retention for point in panel.points]))
        _scale_costs(axes, min(costs), max(costs))
        _draw(axes, panel)
        axes.set_ylabel("share of the gain that is kept")
    every[-1].set_xlabel("time of a run, over plain SGD's (stretched near 1)")
    front_line = _REFERENCES.handle("Pareto front (filled)", linewidth=1.1, alpha=0.55)
    legend(figure, [*_legend(), _REFERENCES.mark("plain, and the full method", linestyle=""), front_line])
    settle(figure)
    for axes, panel in zip(every, tasks):
        _write_names(axes, panel)
    return figure


@as_svg
def worst_figure(tasks: Sequence[Panel]) -> Figure:
    """Each mode on its worst task, the most trustworthy on top; its other tasks as faint dots."""
    rows = worst(tasks)
    figure, (axes,) = panels([""], _WIDTH, _TWO_LINES * max(len(rows), 3) + 0.7)
    shown = {point.mode for _, point in rows}
    means = [point.retention.mean for panel in tasks for point in panel.points if point.mode in shown]
    low, high = _limits([*(point.retention for _, point in rows), *(Interval(mean, mean, mean) for mean in means)])
    axes.set_xlim(low, high)
    for value in (0, 1):
        axes.axvline(value, color=FAINT, linewidth=0.9, linestyle="--", zorder=0)
    rows_of(axes, [p.mode + _beyond(p.retention.mean, low, high) for _, p in rows])
    for k, (task, point) in enumerate(rows):
        others = [p.retention.mean for panel in tasks for p in panel.points if p.mode == point.mode]
        axes.plot(others, [k] * len(others), "|", color=FAINT, markersize=9)
        kept = point.retention
        interval(axes, k, {key: _within(value, low, high) for key, value in asdict(kept).items()}, _look(point))
        where = {"transform": axes.get_yaxis_transform(), "va": "center", "size": 8}
        axes.text(1.01, k, textwrap.fill(f"{task}, {point.cost:.2f}×", 26), **where)
    axes.set_xlabel("share of the gain that is kept on the worst task, which is named with its cost (0 plain, 1 full)")
    legend(figure, [*_legend(), Look(FAINT, marker="|").mark("the other tasks", linestyle="")])
    return figure


def _look(point: Point) -> Look:
    return _OPPONENTS if point.is_opponent else _OURS


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _beyond(value: float, low: float, high: float) -> str:
    return "" if low <= value <= high else f" ({value:.1f})".replace("-", "−")


def _limits(intervals: Sequence[Interval]) -> tuple[float, float]:
    """All means, and intervals as far as one gain beyond them; nothing below `_LOWEST`."""
    means = [0.0, 1.0, *(i.mean for i in intervals)]
    low = max(_LOWEST, min([0.0, *(max(i.low, min(means) - 1) for i in intervals)]))
    high = max([1.0, *(min(i.high, max(means) + 1) for i in intervals)])
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _scale_costs(axes: Any, low: float, high: float) -> None:
    """The square root of cost: cheap modes crowd near 1, and differ by hundredths there."""
    zero = low - _ROOT

    def root(cost: Any) -> Any:
        return np.sqrt(np.maximum(np.asarray(cost) - zero, 0))

    def square(place: Any) -> Any:
        return np.square(place) + zero

    margin = 0.1 * (root(high) - root(low))
    axes.set_xscale("function", functions=(root, square))
    axes.set_xlim(square(root(low) - margin), square(root(high) + margin))
    ticks: list[float] = []
    for tick in _TICKS:
        if tick <= square(root(high) + margin) and (not ticks or root(tick) - root(ticks[-1]) > margin / 2):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _draw(axes: Any, panel: Panel) -> None:
    low, high = axes.get_ylim()
    for value in (0, 1):
        axes.axhline(value, color=FAINT, linewidth=0.9, linestyle="--", zorder=0)
    axes.axvline(panel.full_cost, color=FAINT, linewidth=0.9, linestyle="--", zorder=0)
    best = front(panel)
    axes.step(
        [*(cost for cost, _ in best), axes.get_xlim()[1]],
        [*(kept for _, kept in best), best[-1][1]],
        where="post",
        color=INK,
        linewidth=1.1,
        alpha=0.55,
        zorder=1,
    )
    for cost, kept in ((1.0, 0.0), (panel.full_cost, 1.0)):
        axes.plot(cost, kept, _REFERENCES.marker, color=INK, markersize=6.5, zorder=3)
    for point in panel.points:
        kept = point.retention
        ends = [_within(end, low, high) for end in (kept.low, kept.high)]
        look = _look(point)._replace(is_hollow=(point.cost, kept.mean) not in best)
        axes.vlines(point.cost, *ends, color=look.color, linewidth=1.3, alpha=0.45, zorder=2)
        mark = {"color": look.color, "markerfacecolor": look.face, "markersize": 6.5, "zorder": 3}
        axes.plot(point.cost, _within(kept.mean, low, high), look.marker, **mark)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _write_names(axes: Any, panel: Panel) -> None:
    low, high = axes.get_ylim()
    named = [("plain", (1.0, 0.0), INK), (panel.full_name, (panel.full_cost, 1.0), INK)]
    lines = []
    for p in panel.points:
        kept = p.retention
        name = p.mode + _beyond(kept.mean, low, high)
        named.append((name, (p.cost, _within(kept.mean, low, high)), _look(p).color))
        lines.append(((p.cost, _within(kept.low, low, high)), (p.cost, _within(kept.high, low, high))))
    best = front(panel)
    for here, there in pairwise([*best, (axes.get_xlim()[1], best[-1][1])]):
        lines.append((here, (there[0], here[1])))
    write_names(axes, named, lines)


def _legend() -> list[Any]:
    return [_OURS.mark("modes of gradreg", linestyle=""), _OPPONENTS.mark("opponents", linestyle="")]
