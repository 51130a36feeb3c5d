"""The figures of a study, each with the sentence that says what to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from markupsafe import Markup

from gradreg.lab.config import SETTINGS
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.page import inline
from gradreg.lab.report.plots import (
    Cell,
    Grid,
    Line,
    Offer,
    Scale,
    color_bar,
    cost_figure,
    curves,
    heat_map,
    scatter_map,
)
from gradreg.lab.report.studies import Point, Run, Study, number, text
from gradreg.lab.report.text import Comparison, cost_sentence, curve_sentence, heat_sentence, short, words

_LOGARITHMIC = {"train_loss": "Training loss", "grad_norm": "‖∇L‖ on training rows"}
_READING = {
    False: "A cell is the mean over seeds, {scored}; the best of each method is framed, a dashed cell was not run, "
    "and div. counts runs that diverged.",
    True: "Where nearly every point has settings of its own, each is a dot in the color of its mean; the best of each "
    "method is ringed, a cross has runs that diverged.",
}


@dataclass(frozen=True)
class Drawing:
    """A figure on the page."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Maps:
    """The heat maps of a study, the bar of the colors that they share, and what the darkest of these says."""

    drawings: list[Drawing]
    bar: Markup
    floor: str
    reading: str
    """What the marks say."""


def heat_maps(study: Study, prefix: str) -> Maps | None:
    """One for each method whose settings were varied."""
    grids = [grid for method in study.methods if (grid := grid_of(study, method)) and len(grid.cells) > 1]
    metric = study.metric
    sgd = study.best["SGD"].validation if "SGD" in study.best else None
    means = [cell.mean for grid in grids for cell in grid.cells.values() if math.isfinite(cell.mean)]
    if not means:
        return None
    scale = scale_of(means, sgd.mean if sgd else max(means, key=metric.worth), metric)
    drawings = []
    for k, grid in enumerate(grids):
        draw = scatter_map if grid.is_sparse else heat_map
        svg = inline(f"{prefix}-map{k}", draw(grid, scale))
        drawings.append(Drawing(grid.method, svg, heat_sentence(grid, sgd.mean if sgd else None)))
    bar = inline(f"{prefix}-bar", color_bar(scale, sgd.mean if sgd else None, metric))
    kinds = {grid.is_sparse for grid in grids}
    scored = "in percent" if metric.is_share else f"{_way(metric)}, brighter too"
    reading = " ".join(said.format(scored=scored) for is_sparse, said in _READING.items() if is_sparse in kinds)
    beyond = any(metric.worth(mean) < metric.worth(scale.low) for mean in means)
    floor = f"{metric.written(scale.low)} or {'less' if metric.higher_is_better else 'more'}" if beyond else ""
    return Maps(drawings, bar, floor, reading)


def _way(metric: Metric) -> str:
    return f"{'higher' if metric.higher_is_better else 'lower'} is better"


def scale_of(means: Sequence[float], sgd: float, metric: Metric = ACCURACY) -> Scale:
    """From the worst to the best, SGD among them; where a tenth or less lies far behind the others, as what diverged
    does, from the worst of the others.

    Example:
        >>> scale_of([0.125, 0.7, 0.71, 0.72, 0.73, 0.74, 0.75, 0.76, 0.77, 0.78], sgd=0.72)
        Scale(low=0.7, high=0.78)
    """
    if not metric.higher_is_better:
        opposite = scale_of([-mean for mean in means], -sgd)
        return Scale(-opposite.low, -opposite.high)
    ordered = sorted(means)
    high = max(ordered[-1], sgd)
    others = min(ordered[len(ordered) // 10], sgd)
    return Scale(others if others - ordered[0] > high - others > 0 else min(ordered[0], sgd), high)


def grid_of(study: Study, method: str) -> Grid | None:
    """The heat map of a method: each cell the best mean over whatever else varies; None without settings."""
    needs = settings_of_map(study, method)
    if not needs:
        return None
    row_name, column_name = (needs[0], needs[1]) if len(needs) == 2 else ("", needs[0])
    alike = [m for m in study.methods if settings_of_map(study, m) == needs]
    rows, columns = _values(study, alike, row_name), _values(study, alike, column_name)
    found: dict[tuple[int, int], Point] = {}
    for point in study.points:
        row, column = (text(number(point.config.get(name))) if name else "" for name in (row_name, column_name))
        if point.method == method and row in rows and column in columns:
            place = (rows.index(row), columns.index(column))
            if place not in found or _validated(study, point) > _validated(study, found[place]):
                found[place] = point
    cells = {at: Cell(_mean(point), point.num_diverged) for at, point in found.items()}
    scored = [at for at, cell in cells.items() if math.isfinite(cell.mean)]
    best = max(scored, key=lambda at: study.metric.worth(cells[at].mean)) if scored else None
    return Grid(method, words(row_name), words(column_name), rows, columns, cells, best, study.metric)


def settings_of_map(study: Study, method: str) -> tuple[str, ...]:
    """The settings of its map: those that it needs, with the ratio in the place of γ where γ followed it; of a method
    of the user's those that it was given, if there are one or two.
    """
    mine = [point.config for point in study.points if point.method == method]
    given = {name: sum(config.get(name) is not None for config in mine) for name in SETTINGS}
    if method not in METHODS:
        found = tuple(name for name in SETTINGS if given[name])
        return found if len(found) <= 2 else ()
    follows = METHODS[method].follows_ratio and given["ratio"] > given["gamma"]
    return tuple("ratio" if follows and name == "gamma" else name for name in METHODS[method].needs)


def _values(study: Study, methods: Sequence[str], name: str) -> list[str]:
    """What was tried; in a grid all that was planned."""
    if not name:
        return [""]
    tried = _numbers([point.config.get(name) for point in study.points if point.method in methods])
    for source in study.sources:
        axes = source.about.get("axes")
        planned = _numbers(axes.get(name) if isinstance(axes, dict) else None)
        tried = planned if set(tried) < set(planned) else tried  # the axes of a search are the ends of its ranges
    return [text(value) for value in tried]


def _numbers(values: Any) -> list[float]:
    found = {number(value) for value in values} if isinstance(values, list) else set()
    return sorted(value for value in found if math.isfinite(value))


def _mean(point: Point) -> float:
    return point.validation.mean if point.validation else math.nan


def _validated(study: Study, point: Point) -> float:
    return study.metric.worth(_mean(point))


def curve_figures(study: Study, prefix: str) -> list[Drawing]:
    """Training loss, ‖∇L‖ and the validation score of the best point of each method, as far as they were recorded."""
    drawings, metric = [], study.metric
    score, unit = f"validation_{metric.key}", f", {metric.unit}" if metric.unit else ""
    for name, title in {**_LOGARITHMIC, score: f"Validation {metric.name}{unit}"}.items():
        lines = [line for method, point in study.best.items() if (line := line_of(method, point, name, metric))]
        if any(len(line.steps) > 1 for line in lines):
            svg = inline(f"{prefix}-{name.replace('_', '-')}", curves(lines, name in _LOGARITHMIC, metric))
            scale = metric.scale if name == score else 1
            ends = {line.method: line.intervals[-1]["mean"] / scale for line in lines}
            drawings.append(Drawing(title, svg, curve_sentence(ends, metric.written if name == score else short)))
    return drawings


def line_of(method: str, point: Point, name: str, metric: Metric = ACCURACY) -> Line | None:
    """Mean, smallest and largest over the runs that did not diverge, at the steps that all of them recorded.

    The mean is geometric for what is drawn on a logarithmic axis.
    """
    is_log = name in _LOGARITHMIC
    scale = 1 if is_log else metric.scale
    tables = [table for run in _recorded(point) if (table := _at_steps(run, name, scale, is_log))]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    if not steps:
        return None
    columns = [[table[step] for table in tables] for step in steps]
    if is_log:
        mean = [math.exp(math.fsum(map(math.log, column)) / len(column)) for column in columns]
    else:
        mean = [math.fsum(column) / len(column) for column in columns]
    ends = [{"mean": middle, "low": min(column), "high": max(column)} for middle, column in zip(mean, columns)]
    return Line(method, steps, ends)


def _recorded(point: Point) -> list[Run]:
    """The runs that did not diverge, of the search or of the final reading: those whose curves are longest."""
    runs = [run for run in point.runs if not run.diverged and run.curve]
    longest = max((len(run.curve) for run in runs), default=0)
    return [run for run in runs if len(run.curve) == longest]


def _at_steps(run: Run, name: str, scale: float, is_log: bool) -> dict[float, float]:
    values = {moment["step"]: scale * moment[name] for moment in run.curve if math.isfinite(moment[name])}
    return {step: value for step, value in values.items() if value > 0} if is_log else values


def costs_of(study: Study) -> tuple[dict[str, float], str]:
    """Step costs relative to SGD, and how they were measured; none where they were not."""
    if study.costs:
        return study.costs, "Cost is the time of a step relative to SGD's, as the sweep measured it."
    seconds = {
        method: median(values)
        for method, point in study.best.items()
        if (values := [run.seconds for run in point.runs if run.seconds > 0])
    }
    if study.sources[0].kind == "train" and "SGD" in seconds:
        how = (
            "Cost is rough here: the wall-clock time of whole runs relative to SGD's, on a machine that may have "
            "been busy; gradreg cost measures steps."
        )
        return {method: value / seconds["SGD"] for method, value in seconds.items()}, how
    return {}, ""


def cost_drawing(rows: Sequence[Comparison], prefix: str, metric: Metric) -> Drawing | None:
    """The score of each method's best point on test rows, or on validation rows where no test rows were read."""
    part = "test" if any(row.point.test for row in rows) else "validation"
    offers = []
    for row in rows:
        found = row.point.test if part == "test" else row.point.validation
        if found and row.cost > 0:
            offers.append(Offer(row.method, row.cost, found.mean, found.low, found.high))
    if not offers:
        return None
    unit = f" ({metric.unit})" if metric.unit else f", {_way(metric)}"
    svg = inline(f"{prefix}-cost", cost_figure(offers, f"{part} {metric.name}{unit}", metric))
    return Drawing(f"{part} {metric.name}", svg, cost_sentence(offers, metric))
