"""The figures of a report as SVG text. Texts from outside stay out of them: headings and legends are the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, INK, LOOKS, as_svg, band, logarithmic, look
from gradreg.lab.labels import settle, write_names
from gradreg.lab.metric import ACCURACY, Metric

MAP = colormaps["viridis"]
_SHADES = 48  # of the color bar, drawn as rectangles: an image in the SVG would be a resource to load
_PER_CELL = 0.56, 0.4  # inches


@dataclass(frozen=True)
class Cell:
    """A point in a heat map."""

    mean: float
    num_diverged: int = 0


@dataclass(frozen=True)
class Grid:
    """The score of a method over its settings: γ upward, ε to the right; a method with one setting has one row."""

    method: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Cell]
    best: tuple[int, int] | None
    metric: Metric = ACCURACY

    @property
    def is_sparse(self) -> bool:
        """A search rather than a grid: nearly every point has values of its own."""
        return len(self.cells) > 6 and len(self.rows) * len(self.columns) > 4 * len(self.cells)


@dataclass(frozen=True)
class Scale:
    """The range of the colors, from the worst to the best; what is worse than `low` is drawn like it."""

    low: float
    high: float

    def color(self, mean: float) -> tuple[float, float, float]:
        span = self.high - self.low
        red, green, blue, _ = MAP(min(max((mean - self.low) / span, 0.0), 1.0) if span else 0.5)
        return float(red), float(green), float(blue)


@as_svg
def heat_map(grid: Grid, scale: Scale) -> Figure:
    """The mean score in every cell; a dashed cell was not run, the framed one is the best."""
    width, height = (n * inch for n, inch in zip((len(grid.columns), len(grid.rows)), _PER_CELL))
    left, bottom = (0.69 + 0.06 * len(grid.row_label) if grid.row_label else 0.1), 0.5
    figure = Figure(figsize=(left + width + 0.06, bottom + height + 0.06))
    full_width, full_height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height),
        xlim=(0, len(grid.columns)),
        ylim=(0, len(grid.rows)),
    )
    for row in range(len(grid.rows)):
        for column in range(len(grid.columns)):
            _draw_cell(axes, row, column, scale, grid)
    axes.set_xticks([k + 0.5 for k in range(len(grid.columns))], grid.columns)
    axes.set_yticks([k + 0.5 for k in range(len(grid.rows))], grid.rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(grid.column_label)
    axes.set_ylabel(grid.row_label, rotation=0, labelpad=8)
    return figure


def _draw_cell(axes: Any, row: int, column: int, scale: Scale, grid: Grid) -> None:
    cell, is_best = grid.cells.get((row, column)), (row, column) == grid.best
    middle = {"ha": "center", "va": "center"}
    if cell is None or not math.isfinite(cell.mean):
        frame = {"facecolor": "none", "edgecolor": FAINT, "linestyle": (0, (2, 2)), "linewidth": 0.8}
        axes.add_patch(Rectangle((column + 0.05, row + 0.06), 0.9, 0.88, **frame))
        shown = "–" if cell is None else "NaN"
        axes.text(column + 0.5, row + 0.5, shown, color=FAINT, fontsize=9, **middle)
        return
    color = scale.color(cell.mean)
    luminance = 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]
    ink = "#000001" if luminance > 0.4 else "#fffffe"  # these stay when the page recolors #ffffff
    axes.add_patch(Rectangle((column + 0.02, row + 0.03), 0.96, 0.94, facecolor=color, linewidth=0))
    if is_best:
        frame = {"facecolor": "none", "edgecolor": INK, "linewidth": 2.4, "clip_on": False, "zorder": 3}
        axes.add_patch(Rectangle((column, row), 1, 1, **frame))
    weight = "bold" if is_best else "normal"
    up, mean = 0.13 if cell.num_diverged else 0.0, grid.metric.shown(cell.mean)
    axes.text(column + 0.5, row + 0.5 + up, mean, color=ink, fontsize=9, weight=weight, **middle)
    if cell.num_diverged:
        axes.text(column + 0.5, row + 0.24, f"{cell.num_diverged} div.", color=ink, fontsize=6.5, **middle)


@as_svg
def scatter_map(grid: Grid, scale: Scale) -> Figure:
    """The points of a search in the plane of the settings, logarithmic; the ringed one is the best."""
    figure = Figure(figsize=(4.1, 3.2), layout="constrained")
    axes = figure.subplots()
    for (row, column), cell in grid.cells.items():
        x, y = float(grid.columns[column]), float(grid.rows[row])
        known = math.isfinite(cell.mean)
        color = scale.color(cell.mean) if known else "none"
        is_best = (row, column) == grid.best
        edge, width, size = (INK, 2.4, 11) if is_best else (FAINT, 0.6, 8)
        marker = "X" if cell.num_diverged else "o"
        axes.plot(x, y, marker, markerfacecolor=color, markeredgecolor=edge, markeredgewidth=width, markersize=size)
    axes.set_xscale("symlog", linthresh=_smallest(grid.columns))
    axes.set_yscale("symlog", linthresh=_smallest(grid.rows))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color=FAINT, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(grid.column_label)
    axes.set_ylabel(grid.row_label, rotation=0, labelpad=8)
    return figure


def _smallest(values: Sequence[str]) -> float:
    """Above it an axis is logarithmic; below lies at most a 0."""
    return min((float(v) for v in values if float(v) > 0), default=1.0)


@as_svg
def color_bar(scale: Scale, sgd: float | None, metric: Metric = ACCURACY) -> Figure:
    """The colors that all heat maps share, with SGD's score marked."""
    low, high = sorted((metric.scale * scale.low, metric.scale * scale.high))
    around = 1 if metric.is_share else abs(low) / 10 or 1
    figure = Figure(figsize=(4.2, 0.8))
    axes = figure.add_axes(
        (0.04, 0.42, 0.92, 0.24), xlim=(low, high) if high > low else (low - around, low + around), ylim=(0, 1)
    )
    left, right = axes.get_xlim()
    step = (right - left) / _SHADES
    for k in range(_SHADES):
        color = scale.color((left + (k + 0.5) * step) / metric.scale)
        axes.add_patch(Rectangle((left + k * step, 0), right - left - k * step, 1, facecolor=color, linewidth=0))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _as_numbers(axes.xaxis, metric)
    axes.tick_params(length=2, color=FAINT)
    if sgd is not None and left <= (at := metric.scale * sgd) <= right:
        axes.plot([at] * 2, [-0.15, 1.15], color=INK, linewidth=1.6, clip_on=False)
        axes.text(at, 1.35, "SGD", ha="center", va="bottom", fontsize=9)
    return figure


def _as_numbers(axis: Any, metric: Metric) -> None:
    """Ticks of a score that may be of any size are whole numbers, with no offset or power beside the axis."""
    if not metric.is_share:
        axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


@dataclass(frozen=True)
class Line:
    """A measurement along training: the mean over seeds, and the smallest and largest."""

    method: str
    steps: Sequence[float]
    intervals: Sequence[Mapping[str, float]]
    """`mean`, `low` and `high` at each step."""


@as_svg
def curves(lines: Sequence[Line], is_log: bool, metric: Metric = ACCURACY) -> Figure:
    """A line with its range for every method."""
    figure = Figure(figsize=(4.1, 2.9), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        of = look(line.method)
        single = {"marker": of.marker, "markersize": 5} if len(line.steps) == 1 else {}
        band(axes, line.steps, line.intervals, of, **single)
    if is_log:
        logarithmic(axes.yaxis)
    else:
        _as_numbers(axes.yaxis, metric)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("step")
    return figure


@dataclass(frozen=True)
class Offer:
    """What a method costs and reaches; the ends are NaN with one seed."""

    method: str
    cost: float
    mean: float
    low: float
    high: float


def front(offers: Sequence[Offer], metric: Metric = ACCURACY) -> list[Offer]:
    """The offers that no other one beats at the same cost or less, cheapest first.

    Example:
        >>> a, b, c = Offer("a", 1, 70, 70, 70), Offer("b", 2, 75, 75, 75), Offer("c", 3, 74, 74, 74)
        >>> [offer.method for offer in front([c, b, a])]
        ['a', 'b']
    """
    found: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.cost, -metric.worth(o.mean))):
        if not found or metric.worth(offer.mean) > metric.worth(found[-1].mean):
            found.append(offer)
    return found


@as_svg
def cost_figure(offers: Sequence[Offer], label: str, metric: Metric = ACCURACY) -> Figure:
    """The score with its interval against the cost of a step; the front is the stepped line."""
    figure = Figure(figsize=(5.0, 3.3), layout="constrained")
    axes = figure.subplots()
    offers = [Offer(o.method, o.cost, *(metric.scale * v for v in (o.mean, o.low, o.high))) for o in offers]
    best = front(offers, metric)
    rightmost = max(offer.cost for offer in offers)
    corners = [(best[0].cost, best[0].mean)]
    for offer in best[1:]:
        corners += [(offer.cost, corners[-1][1]), (offer.cost, offer.mean)]
    corners.append((1.06 * rightmost, best[-1].mean))
    axes.plot(*zip(*corners), color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for offer in offers:
        color, _, marker, _ = look(offer.method)
        if math.isfinite(offer.low):
            axes.plot([offer.cost] * 2, [offer.low, offer.high], color=color, linewidth=2, zorder=2)
        face = color if offer in best else "#ffffff"
        axes.plot(offer.cost, offer.mean, marker, color=color, markerfacecolor=face, markersize=8, zorder=3)
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel("cost of a step relative to SGD")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _as_numbers(axes.yaxis, metric)
    axes.grid(color=FAINT, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    settle(figure)
    (left, _), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    intervals = [((o.cost, o.low), (o.cost, o.high)) for o in offers if math.isfinite(o.low)]
    named = [(o.method, (o.cost, o.mean), INK) for o in offers if o.method in LOOKS]
    write_names(axes, named, [*intervals, *pairwise(corners), ((left, bottom), (left, top))])
    return figure
