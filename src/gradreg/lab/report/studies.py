"""Studies: finished runs of one task, which can be compared. Runs that differ in their seed alone are a *point*.

Nothing that was read is trusted: what is not a number is NaN, what is not a name is cut and escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradreg.lab import stats
from gradreg.lab.config import BUILT_IN, FIELDS, SETTINGS
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import ACCURACY, Metric

TASK = ("file", *BUILT_IN, "epochs")
"""Fields that say what is learned; runs that differ in one of them are not compared."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One finished run; NaN where nothing was measured, an infinite score where it was to be and is no number."""

    config: Row
    validation: float
    test: float
    train_loss: float
    grad_norm: float
    diverged: bool
    seconds: float
    curve: tuple[dict[str, float], ...]
    """`step` with `train_loss`, `grad_norm` and, in train runs, `validation_accuracy` or `validation_score`."""
    num_scored: float = math.nan
    """Labels of which the accuracy on test rows is a share."""

    @property
    def seed(self) -> Any:
        return self.config.get("seed")


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seed alone."""

    method: str
    config: Row
    runs: Sequence[Run]

    @cached_property
    def validation(self) -> stats.Interval | None:
        return estimate([run.validation for run in self.runs])

    @cached_property
    def test(self) -> stats.Interval | None:
        return estimate([run.test for run in self.runs])

    @property
    def is_tested(self) -> bool:
        return not all(math.isnan(run.test) for run in self.runs)

    @property
    def seeds(self) -> list[Any]:
        return sorted({json.dumps(run.seed): run.seed for run in self.runs}.values(), key=rank)

    @property
    def num_diverged(self) -> int:
        return len({json.dumps(run.seed) for run in self.runs if run.diverged})

    def mean(self, name: str) -> float:
        """Of a measurement, over the runs that have it."""
        values = [value for run in self.runs if math.isfinite(value := getattr(run, name))]
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Source:
    """A folder: its runs, and where they come from."""

    name: str
    kind: str
    about: Row
    """config.json."""
    runs: list[Run]
    costs: dict[str, float] = field(default_factory=dict)
    """Step cost of each method relative to SGD."""
    notes: list[str] = field(default_factory=list)
    metric: Metric = ACCURACY


@dataclass(frozen=True)
class Study:
    """Runs of one task, from one sweep or from any number of train folders."""

    name: str
    task: Row
    sources: Sequence[Source]
    runs: Sequence[Run]

    @property
    def metric(self) -> Metric:
        return self.sources[0].metric

    @cached_property
    def points(self) -> list[Point]:
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            key = {name: value for name, value in run.config.items() if name != "seed"}
            groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
        points = [Point(method_of(runs[0]), runs[0].config, runs) for runs in groups.values()]
        return sorted(points, key=lambda point: method_rank(point.method))

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(point.method for point in self.points))

    @cached_property
    def best(self) -> dict[str, Point]:
        """The point of every method that was read on test rows, or else is best on validation rows."""
        chosen: dict[str, Point] = {}
        for method in self.methods:
            points = [point for point in self.points if point.method == method]
            final = [point for point in points if point.is_tested]
            chosen[method] = max(final or points, key=self.worth)
        return chosen

    @property
    def winner(self) -> Point:
        """Of these, the best on validation rows (on test rows where there are no others); the first among equals."""
        return max(self.best.values(), key=self.worth)

    def worth(self, point: Point) -> float:
        """By which points are ordered: the larger the better."""
        found = point.validation or point.test
        return self.metric.worth(found.mean) if found else -math.inf

    @cached_property
    def columns(self) -> list[str]:
        """The fields in which points differ, and the settings that any of them has."""
        values = {name: {json.dumps(run.config.get(name)) for run in self.runs} for name in FIELDS}
        hidden = {"seed", "method", "device", *TASK}
        return [
            name
            for name in sorted(FIELDS, key=lambda name: name not in SETTINGS)
            if name not in hidden and (len(values[name]) > 1 or (name in SETTINGS and values[name] != {"null"}))
        ]

    @property
    def costs(self) -> dict[str, float]:
        return {method: cost for source in self.sources for method, cost in source.costs.items()}


def estimate(values: Sequence[float]) -> stats.Interval | None:
    """The mean with its interval; one value has a mean alone, none nothing, and so has one that is infinite."""
    if any(map(math.isinf, values)):
        return None
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) > 1:
        return stats.mean_interval(finite)
    return stats.Interval(finite[0], math.nan, math.nan) if finite else None


def method_of(run: Run) -> str:
    return text(run.config.get("method"), most=60) or "no method"


def method_rank(method: str) -> int:
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def rank(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then texts."""
    return (not math.isfinite(number(value)), number(value) if math.isfinite(number(value)) else 0.0, text(value))


def number(value: Any) -> float:
    """NaN for what is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def share(value: Any) -> float:
    """NaN for what does not lie from 0 to 1."""
    return found if 0 <= (found := number(value)) <= 1 else math.nan


def text(value: Any, most: int = 200) -> str:
    """For the page: a number in short, nothing for null, a long text cut, what cannot be printed as its escape."""
    if value is None:
        return ""
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    shown = shown if len(shown) <= most else f"{shown[:most]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
