"""Which settings are tried next. One interface: `ask` for points, `tell` their scores, larger is better.

A point is a mapping of fields of a run's configuration to values. `Grid` tries all it has; `Climb` goes from the best
so far to its neighbors, each number times a factor; `Estimator` is Optuna's tree-structured Parzen estimator. What each
asks depends on what it was told alone, in that order: a study that holds the answers can be gone on with by anybody
(`replayed`).

References:
    Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011 (the estimator).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass
from typing import Any, Protocol

from gradreg.lab.config import checked
from gradreg.lab.folder import BadInput
from gradreg.lab.names import suggestion

Point = Mapping[str, Any]
Neighbors = Callable[[Point, float], Sequence[Point]]
NUM_RANDOM = 10
"""Points before the estimator has something to go by (Optuna's default)."""


class Search(Protocol):
    """A way through the settings of one method."""

    def ask(self) -> list[Point]:
        """What to try next: nothing at the end."""
        ...

    def tell(self, point: Point, scores: Sequence[float]) -> None:
        """Scores of a point that was asked, one for each seed; more of them may be told later."""
        ...


class Scores:
    """What was tried, and how it did."""

    def __init__(self) -> None:
        self._points: dict[tuple[Any, ...], Point] = {}
        self._scores: dict[tuple[Any, ...], list[float]] = {}

    def __contains__(self, point: Point) -> bool:
        return _key(point) in self._points

    def __len__(self) -> int:
        return len(self._points)

    def tell(self, point: Point, scores: Sequence[float]) -> None:
        self._points.setdefault(_key(point), point)
        self._scores.setdefault(_key(point), []).extend(scores)

    def of(self, point: Point) -> list[float]:
        return self._scores[_key(point)]

    def mean(self, point: Point) -> float:
        return _mean(self._scores[_key(point)])

    @property
    def best(self) -> Point:
        """The highest mean; the first among equals."""
        return self._points[max(self._scores, key=lambda key: _mean(self._scores[key]))]

    def finalists(self, count: int) -> list[Point]:
        """The best so many, the best first."""
        keys = sorted(self._scores, key=lambda key: _mean(self._scores[key]), reverse=True)
        return [self._points[key] for key in keys[:count]]

    def choice(self) -> Point:
        """The best of those with the most scores."""
        most = max(map(len, self._scores.values()))
        keys = [key for key, scores in self._scores.items() if len(scores) == most]
        return self._points[max(keys, key=lambda key: _mean(self._scores[key]))]


def _key(point: Point) -> tuple[Any, ...]:
    return tuple(sorted(point.items()))


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores) if all(map(math.isfinite, scores)) else -math.inf


class Grid(Scores):
    """Points as they are given."""

    def __init__(self, points: Iterable[Point]) -> None:
        super().__init__()
        self._left = list(points)

    def ask(self) -> list[Point]:
        found, self._left = self._left, []
        return found


class Climb(Scores):
    """From a start to the neighbors of the best so far, in rounds, until all of these are behind it or the count is
    full; then with a smaller step.

    Args:
        start: points of the first round.
        most: points in all.
        neighbors: of a point, at a step; by default one number at a time times or divided by it (`beside`).
        steps: factors with the rounds that are made with each at most; by default 2, √2, ∜2, … down to 1.05.
        reserve: further points, for as long as the first step still leads to better ones.
    """

    def __init__(
        self,
        start: Sequence[Point],
        most: float = math.inf,
        neighbors: Neighbors | None = None,
        steps: Iterable[tuple[float, float]] | None = None,
        reserve: int = 0,
    ) -> None:
        super().__init__()
        self._start = list(start)
        self._left, self._reserve = most, reserve
        self._neighbors = neighbors or beside
        self._steps = iter(shrinking() if steps is None else steps)
        self._step, self._rounds = next(self._steps, (1.0, 0))

    def ask(self) -> list[Point]:
        found, self._start = self._start, []
        while not found and self._left + self._reserve > 0 and self._rounds > 0:
            found = [point for point in self._neighbors(self.best, self._step) if point not in self]
            self._rounds -= 1
            if not found or self._rounds <= 0:
                self._step, self._rounds = next(self._steps, (1.0, 0))
                self._reserve = 0
        unique = list({_key(point): point for point in found}.values())
        found = unique[: int(min(max(self._left + self._reserve, 0), len(unique)))]
        self._left -= len(found)
        return found


def shrinking(step: float = 2.0, least: float = 1.05) -> Iterator[tuple[float, float]]:
    """A step and its roots, each for as many rounds as lead on."""
    while step > least:
        yield step, math.inf
        step **= 0.5


def beside(point: Point, step: float) -> list[Point]:
    """One number of a point at a time times or divided by the step, to three digits."""
    found = [
        {**point, name: rounded(value * factor)}
        for factor in (step, 1 / step)
        for name, value in point.items()
        if isinstance(value, float) and value
    ]
    return sorted(found, key=lambda p: tuple(v for v in p.values() if isinstance(v, float)))


def rounded(value: float) -> float:
    """Three digits, so that a point is itself again from wherever it is reached."""
    return float(f"{value:.3g}")


def replayed(search: Search, told: Sequence[tuple[Point, Sequence[float] | None]]) -> list[Point]:
    """What a fresh search asks after all of this, in the order in which it asked; None has no scores yet.

    Nothing while answers of a round are out, and at the end.
    """
    while True:
        asked = search.ask()
        if not asked or len(told) < len(asked):
            return asked[len(told) :]
        answers, told = told[: len(asked)], told[len(asked) :]
        if any(scores is None for _, scores in answers):
            return []
        for (_, scores), point in zip(answers, asked):
            search.tell(point, scores or [])


# Ranges, and the estimator.


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included."""

    low: float
    high: float
    scale: str = "linear"


def range_from(spec: Field[Any], content: Mapping[Any, Any]) -> Range:
    """`{low: 1e-3, high: 1, scale: log}`, for a field that is a number."""
    name = spec.name
    if spec.metadata.get("type") is not float:
        raise BadInput(f"{name} must be a value or a list of values; it has no range.")
    unknown = [key for key in content if key not in ("low", "high", "scale")]
    if unknown:
        hint = suggestion(unknown[0], ("low", "high", "scale"))
        raise BadInput(f"{name} has the unknown key {str(unknown[0])!a}; a range has low, high and scale.{hint}")
    if content.get("low") is None or content.get("high") is None:
        raise BadInput(f"{name} must have low and high as a range.")
    low, high = (checked(spec, content[end]) for end in ("low", "high"))
    scale = content.get("scale", "linear")
    if scale not in ("linear", "log"):
        raise BadInput(f"{name} must have the scale linear or log, got {str(scale)!a}.")
    if low >= high or (scale == "log" and low <= 0):
        above = "above 0 and " if scale == "log" else ""
        raise BadInput(f"{name} must have low {above}below high, got {low:g} and {high:g}.")
    return Range(low, high, scale)


def propose(
    axes: Mapping[str, tuple[Any, ...] | Range], tried: Sequence[tuple[Point, float | None]], seed: int
) -> dict[str, Any]:
    """The next point of the estimator, a function of what is known and of the seed: nothing of a sampler is kept.

    Args:
        axes: of each field the values or the range.
        tried: earlier points with their mean score, None while they run.
        seed: of the sampler, another one for each point.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(axis.low, axis.high, log=axis.scale == "log")
        if isinstance(axis, Range)
        else CategoricalDistribution(axis)
        for name, axis in axes.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=NUM_RANDOM, seed=seed, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point, score in tried:
        params = {name: point[name] for name in axes}
        state = TrialState.RUNNING if score is None else TrialState.COMPLETE
        study.add_trial(optuna.create_trial(state=state, value=score, params=params, distributions=space))
    chosen = study.ask(space).params
    return {name: _short(chosen[name], axis) for name, axis in axes.items()}


def _short(value: Any, axis: tuple[Any, ...] | Range) -> Any:
    """Three digits are enough, and can be read."""
    return min(max(rounded(value), axis.low), axis.high) if isinstance(axis, Range) else value
