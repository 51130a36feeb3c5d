"""Which runs of a sweep come next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.runs import Job, Result
from gradreg.lab.search import propose
from gradreg.lab.study.board import Board, Entry
from gradreg.lab.study.schedule import Row, Schedule, Status, entry_of, key_of
from gradreg.lab.sweep.plan import Block, Point, Sweep, best_points, from_plan, summarize
from gradreg.lab.tasks import metric_of


class SweepSchedule(Schedule):
    """The order of the runs: validation runs seed by seed, so that an early end leaves whole comparisons; then, once
    all are in, the test runs of the best points."""

    def __init__(self, sweep: Sweep, metric: Metric = ACCURACY) -> None:
        super().__init__()
        self.sweep, self.metric = sweep, metric
        self.base = sweep.base
        self._open_points = 1

    @property
    def num_runs(self) -> int:
        return self.sweep.num_runs

    def look_ahead(self, runs: int) -> None:
        """Propose points of a search for so many runs at once, but no more than a tenth: the next ones shall know."""
        self._open_points = max(1, min(math.ceil(runs / len(self.sweep.seeds)), (self.sweep.trials or 0) // 10))

    def wanted(self, board: Board) -> list[Entry]:
        """The runs that should be in the study."""
        self.note_attempts(board)
        points = self._points(board)
        proposed = self._proposed(board, points) if self.sweep.trials is not None else {}
        together = {**points, **proposed}
        entries = [
            entry_of(name, point, seed, "validation") for seed in self.sweep.seeds for name, point in together.items()
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
                first = board.first.get(key_of(f"{b}-{k}", self.sweep.seeds[0], "validation"))
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
            new[f"{b}-{k}"] = {"method": block.method, **propose(block.axes, history, seed)}
        return new

    def _means(self, points: Mapping[str, Point], results: Mapping[str, Result]) -> dict[str, float]:
        """Of the points whose seeds are all in."""
        means = {}
        for name in points:
            found = [results.get(key_of(name, seed, "validation")) for seed in self.sweep.seeds]
            known = [self.metric.rank(result.score) for result in found if result is not None]
            if len(known) == len(found):
                means[name] = math.fsum(known) / len(known)
        return means

    def _tests(self, points: Mapping[str, Point], results: Mapping[str, Result]) -> list[Entry]:
        best = self._best(points, results)
        return [entry_of(name, points[name], seed, "test") for seed in self.sweep.seeds for name in best.values()]

    def _best(self, points: Mapping[str, Point], results: Mapping[str, Result]) -> dict[str, str]:
        names = list(points)
        seeds = self.sweep.seeds
        runs = [[results[key_of(name, seed, "validation")] for seed in seeds] for name in names]
        ranks = [[self.metric.rank(result.score) for result in of_point] for of_point in runs]
        return {method: names[k] for method, k in best_points(list(points.values()), ranks).items()}

    def job(self, what: Mapping[str, Any]) -> Job:
        return self.sweep.job(what["point"], what["seed"], what["scored_on"])

    def status(self, board: Board) -> Status:
        points, results = self._points(board), board.results
        best: dict[str, float] = {}
        for name, mean in self._means(points, results).items():
            method = points[name]["method"]
            best[method] = max(mean, best.get(method, mean))
        sign = 1 if self.metric.higher_is_better else -1
        done, planned = len(results), self.sweep.num_runs
        text = ", ".join(f"{method} {self.metric.written(sign * mean)}" for method, mean in best.items()) or "training"
        return Status(done, planned, text, is_finished=done == planned)

    def summary(self, board: Board) -> Row:
        """`points`, `best` and `test` of results.json, of a sweep that is finished."""
        points, results, seeds = self._points(board), board.results, self.sweep.seeds
        validation = [[results[key_of(name, seed, "validation")] for seed in seeds] for name in points]
        best = self._best(points, results)
        test = {m: [results[key_of(name, seed, "test")] for seed in seeds] for m, name in best.items()}
        return summarize(list(points.values()), validation, test, self.metric)


def schedule_of(plan: Mapping[str, Any]) -> SweepSchedule:
    """Of a plan as its study has it."""
    sweep = from_plan(plan)
    return SweepSchedule(sweep, metric_of(sweep.base))
