"""Which runs of a sweep come next, as a function of what the study holds: every worker comes to the same answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradreg.lab.runs import Job, Result
from gradreg.lab.sweep.board import Board, Entry
from gradreg.lab.sweep.plan import Block, Point, Row, Sweep, best_points, score, summarize
from gradreg.lab.sweep.search import propose

MOST_ATTEMPTS = 3
"""Of a run, from when a worker starts: one that kills its workers must not do so for ever."""


@dataclass(frozen=True)
class Status:
    """How far a sweep is."""

    done: int
    planned: int
    best: Mapping[str, float]
    """Of each method, the highest mean validation accuracy of the points whose seeds are all in."""
    is_finished: bool

    @property
    def text(self) -> str:
        return ", ".join(f"{method} {100 * mean:.1f}%" for method, mean in self.best.items()) or "training"


class Schedule:
    """The order of the runs: validation runs seed by seed, so that an early end leaves whole comparisons; then, once
    all are in, the test runs of the best points."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._open_points = 1
        self._before: Mapping[str, int] | None = None

    def look_ahead(self, runs: int) -> None:
        """Propose points of a search for so many runs at once, but no more than a tenth: the next ones shall know."""
        self._open_points = max(1, min(math.ceil(runs / len(self.sweep.seeds)), (self.sweep.trials or 0) // 10))

    def wanted(self, board: Board) -> list[Entry]:
        """The runs that should be in the study."""
        if self._before is None:
            self._before = dict(board.attempts)
        points = self._points(board)
        proposed = self._proposed(board, points) if self.sweep.trials is not None else {}
        together = {**points, **proposed}
        entries = [
            _entry(name, point, seed, "validation") for seed in self.sweep.seeds for name, point in together.items()
        ]
        if len(points) < self.sweep.num_points or not all(board.is_finished(entry.key) for entry in entries):
            return entries
        return entries + self._tests(points, board.results)

    def _points(self, board: Board) -> dict[str, Point]:
        """The points by name; of a search, those that were proposed."""
        if self.sweep.trials is None:
            return {str(k): point for k, point in enumerate(self.sweep.grid)}
        found = {}
        for b, block in enumerate(self.sweep.blocks):
            for k in range(self._most(block)):
                first = board.first.get(_key(f"{b}-{k}", self.sweep.seeds[0], "validation"))
                if first is None:
                    break
                found[f"{b}-{k}"] = first.user_attrs["what"]["point"]
        return found

    def _most(self, block: Block) -> int:
        assert self.sweep.trials is not None
        return 1 if block.is_a_point else self.sweep.trials

    def _proposed(self, board: Board, points: Mapping[str, Point]) -> dict[str, Point]:
        """The next points of a search, where the workers are about to run out of them."""
        new: dict[str, Point] = {}
        means = self._means(points, board.results)
        seeds = self.sweep.seeds
        for _ in range(self._open_points - math.ceil(len(board.waiting) / len(seeds))):
            tried = {**points, **new}
            counts = {b: sum(name.startswith(f"{b}-") for name in tried) for b in range(len(self.sweep.blocks))}
            left = [b for b, block in enumerate(self.sweep.blocks) if counts[b] < self._most(block)]
            if not left:
                break
            b = min(left, key=lambda b: counts[b])
            block, k = self.sweep.blocks[b], counts[b]
            history = [(point, means.get(name)) for name, point in tried.items() if name.startswith(f"{b}-")]
            seed = (seeds[0] * 1_000_003 + b * 10_007 + k) % 2**32
            new[f"{b}-{k}"] = propose(block.method, block.axes, history, seed)
        return new

    def _means(self, points: Mapping[str, Point], results: Mapping[str, Result]) -> dict[str, float]:
        """Of the points whose seeds are all in."""
        means = {}
        for name in points:
            found = [results.get(_key(name, seed, "validation")) for seed in self.sweep.seeds]
            known = [score(result) for result in found if result is not None]
            if len(known) == len(found):
                means[name] = math.fsum(known) / len(known)
        return means

    def _tests(self, points: Mapping[str, Point], results: Mapping[str, Result]) -> list[Entry]:
        best = self._best(points, results)
        return [_entry(name, points[name], seed, "test") for seed in self.sweep.seeds for name in best.values()]

    def _best(self, points: Mapping[str, Point], results: Mapping[str, Result]) -> dict[str, str]:
        names = list(points)
        scores = [[score(results[_key(name, seed, "validation")]) for seed in self.sweep.seeds] for name in names]
        return {method: names[k] for method, k in best_points(list(points.values()), scores).items()}

    def attempts(self, key: str) -> int:
        """How many failures a run may have before it is given up."""
        return (self._before or {}).get(key, 0) + MOST_ATTEMPTS

    def job(self, what: Mapping[str, Any]) -> Job:
        return self.sweep.job(what["point"], what["seed"], what["scored_on"])

    def status(self, board: Board) -> Status:
        points, results = self._points(board), board.results
        best: dict[str, float] = {}
        for name, mean in self._means(points, results).items():
            method = points[name]["method"]
            best[method] = max(mean, best.get(method, 0.0))
        done, planned = len(results), self.sweep.num_runs
        return Status(done, planned, best, is_finished=done == planned)

    def given_up(self, board: Board) -> str:
        """One line on what has failed too often."""
        key, error = next((key, error) for key, error in board.errors.items() if key not in board.current)
        what = board.first[key].user_attrs["what"]
        fields = ", ".join(f"{name} {value}" for name, value in {**what["point"], "seed": what["seed"]}.items())
        return f"a run has failed {board.attempts[key]} times and was given up ({fields}): {error}."

    def rows(self, board: Board) -> list[Row]:
        """The lines of runs.jsonl, in the order of the plan."""
        from gradreg.lab.runs import record

        results = board.results
        return [record(self.job(entry.what), results[entry.key]) for entry in self.wanted(board)]

    def summary(self, board: Board) -> Row:
        """`points`, `best` and `test` of results.json, of a sweep that is finished."""
        points, results, seeds = self._points(board), board.results, self.sweep.seeds
        validation = [[results[_key(name, seed, "validation")] for seed in seeds] for name in points]
        best = self._best(points, results)
        test = {m: [results[_key(name, seed, "test")] for seed in seeds] for m, name in best.items()}
        return summarize(list(points.values()), validation, test)


def _key(name: str, seed: int, scored_on: str) -> str:
    return f"{name}:{seed}:{scored_on}"


def _entry(name: str, point: Point, seed: int, scored_on: str) -> Entry:
    return Entry(_key(name, seed, scored_on), {"point": dict(point), "seed": seed, "scored_on": scored_on})
