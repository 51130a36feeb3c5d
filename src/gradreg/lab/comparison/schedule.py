"""Which runs of a comparison come next, as a function of what the study holds: all workers come to the same answer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gradreg.lab.comparison.arms import Arm, center_of
from gradreg.lab.comparison.plan import Plan, Taken
from gradreg.lab.folder import BadInput, Hopeless
from gradreg.lab.metric import Metric
from gradreg.lab.runs import Job, Result
from gradreg.lab.search import Climb, Point, Scores, replayed, rounded
from gradreg.lab.study.board import Board, Entry
from gradreg.lab.study.schedule import Schedule, Status, entry_of, key_of
from gradreg.lab.tasks import metric_of

VALIDATION, TEST = "validation", "test"
ENOUGH = 5
"""Candidates of an arm, the first, after which there is no hope where all have failed."""
ALL_FAILED = "every run of"
"""So begins what is said where nothing can be compared."""


def at_rates(taken: Taken) -> Climb:
    """What was taken, and the same at a third and three times the learning rate."""
    rates = (rounded(taken.point["learning_rate"] * factor) for factor in (1, 1 / 3, 3))
    return Climb([{**taken.point, "learning_rate": rate} for rate in rates], steps=[])


def weights_name(arm: Arm, seed: int) -> str:
    """File of what an arm's model holds at the end of a test run."""
    return file_name(arm.word if arm.held else arm.name, seed)


def file_name(name: str, seed: int) -> str:
    """File of a model by what it is called."""
    return f"{re.sub('[^A-Za-z0-9.-]+', '-', name)}-{seed}.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far the search of an arm is."""

    entries: list[Entry]
    """The runs that it wants."""
    choice: Point | None
    """What it has come to."""
    tried: Sequence[tuple[Point, Sequence[Result] | None]]
    """Candidates, with their runs on the search seeds once all are in."""
    name: str = ""
    """Of the choice, in the study."""


class ComparisonSchedule(Schedule):
    """The baseline's search, those of the others at once, each where the other ended, the test of what each came to."""

    def __init__(self, plan: Plan, metric: Metric) -> None:
        super().__init__()
        self.plan, self.metric = plan, metric
        self.base = plan.base

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        return self.plan.arms

    @property
    def num_runs(self) -> int:
        return len(self.arms) * self.plan.effort.runs

    def wanted(self, board: Board) -> list[Entry]:
        self.note_attempts(board)
        progress = self.progress(board)
        entries = [entry for p in progress.values() for entry in p.entries]
        return entries + (self._tests(progress) if self._are_chosen(progress) else [])

    def _are_chosen(self, progress: Mapping[str, Progress]) -> bool:
        return len(progress) == len(self.arms) and all(p.choice is not None for p in progress.values())

    def progress(self, board: Board) -> dict[str, Progress]:
        """Of each arm that may begin."""
        results = board.results
        first = self._progress(0, center_of(self.base), board, results)
        found = {self.arms[0].name: first}
        if first.choice is not None:
            for a, arm in enumerate(self.arms[1:], 1):
                found[arm.name] = self._progress(a, first.choice, board, results)
            others = [found[arm.name].choice for arm in self.arms[1:]]
            if self.plan.is_thorough and self.plan.searched and None not in others:
                found |= self._again(found, results)
        return found

    def _again(self, found: Mapping[str, Progress], results: Mapping[str, Result]) -> dict[str, Progress]:
        """The baseline where the others have come to; then these where it has."""
        plain, *others = self.arms
        points = [found[arm.name].choice or {} for arm in others]
        first = self._retried(0, found[plain.name], points, results)
        again = {plain.name: first}
        if first.choice is not None:
            for a, arm in enumerate(others, 1):
                if arm in self.plan.searched:
                    again[arm.name] = self._retried(a, found[arm.name], [first.choice], results)
        return again

    def _retried(self, a: int, found: Progress, others: Sequence[Point], results: Mapping[str, Result]) -> Progress:
        """An arm's own choice beside the same at the learning rates and weight decays of others, on the same seeds.

        Also where its search has been and was not a finalist: it may have left too early.
        """
        plan, own, center = self.plan, found.choice or {}, center_of(self.base)
        finals = plan.final_seeds if plan.effort.finalists else ()
        seeds = finals if plan.effort.search_epochs else (*plan.search_seeds, *finals)
        tried = [point for point, _ in found.tried]
        candidates = {found.name: own}
        free = [name for name in center if name not in self.arms[a].fixed]
        for other in others:
            point = {**own, **{name: other[name] for name in free}}
            if point in tried:
                candidates[f"{a}-{tried.index(point)}"] = point
            elif point not in candidates.values():
                candidates[f"{a}-again-{len(candidates)}"] = point
        if len(candidates) == 1:
            return found
        known = {entry.key for entry in found.entries}
        asked = [entry_of(n, point, seed, VALIDATION, arm=a) for n, point in candidates.items() for seed in seeds]
        entries = [*found.entries, *(entry for entry in asked if entry.key not in known)]
        runs = {name: self._runs(name, seeds, results) for name in candidates}
        more = [(point, runs[name]) for name, point in candidates.items() if point not in tried]
        means = {name: self._mean(of_it) for name, of_it in runs.items() if of_it is not None}
        if len(means) < len(candidates):
            return Progress(entries, None, [*found.tried, *more])
        best = max(means, key=lambda name: means[name])  # its own choice among equals
        return Progress(entries, candidates[best], [*found.tried, *more], best)

    def _progress(self, a: int, center: Point, board: Board, results: Mapping[str, Result]) -> Progress:
        plan = self.plan
        taken = plan.taken.get(self.arms[a].name)
        if taken and not plan.tries_rates:
            choice = dict(taken.point)
            return Progress([], choice, [(choice, None)], f"{a}-0")
        points = self._entered(a, board)
        runs = [self._runs(f"{a}-{k}", plan.search_seeds, results) for k in range(len(points))]
        tried = list(zip(points, runs))
        reserve = 2 * plan.effort.trials if a == 0 and plan.is_thorough else 0
        search = self.arms[a].search(plan.base, center, plan.effort.trials, reserve) if not taken else at_rates(taken)
        asked = replayed(search, [(p, None if r is None else self._worths(r)) for p, r in tried])
        everything = [*points, *asked]
        entries = [
            entry_of(f"{a}-{k}", point, seed, VALIDATION, arm=a, epochs=plan.effort.search_epochs)
            for seed in plan.search_seeds
            for k, point in enumerate(everything)
        ]
        if runs and all(r is not None and all(run.error for run in r) for r in runs[:ENOUGH]):
            last = (runs[:ENOUGH][-1] or [])[-1].error.strip().splitlines()[-1]
            raise BadInput(f"{ALL_FAILED} {self.arms[a].name} has failed, the last with {last[:200]}")
        found = Progress(entries, None, tried)
        if asked or any(r is None for r in runs) or not points:
            return found
        return self._final(a, search, found, results)

    def _final(self, a: int, search: Climb, found: Progress, results: Mapping[str, Result]) -> Progress:
        """The best again on other seeds, since the best of many was also lucky; on these alone, if they are longer."""
        scores = Scores() if self.plan.effort.search_epochs else search
        points, seeds, is_over = [point for point, _ in found.tried], self.plan.final_seeds, True
        entries = list(found.entries)
        for point in search.finalists(self.plan.effort.finalists) if seeds else ():
            name = f"{a}-{points.index(point)}"
            entries += [entry_of(name, point, seed, VALIDATION, arm=a) for seed in seeds]
            runs = self._runs(name, seeds, results)
            is_over = is_over and runs is not None
            if runs is not None:
                scores.tell(point, self._worths(runs))
        if not is_over:
            return Progress(entries, None, found.tried)
        choice = scores.choice()
        return Progress(entries, choice, found.tried, f"{a}-{points.index(choice)}")

    def _entered(self, a: int, board: Board) -> list[Point]:
        """The points of an arm that are in the study, in order."""
        points: list[Point] = []
        seed = self.plan.search_seeds[0]
        while (first := board.first.get(key_of(f"{a}-{len(points)}", seed, VALIDATION))) is not None:
            points.append(first.user_attrs["what"]["point"])
        return points

    def _runs(self, name: str, seeds: Sequence[int], results: Mapping[str, Result]) -> list[Result] | None:
        found = [results.get(key_of(name, seed, VALIDATION)) for seed in seeds]
        return None if None in found else [r for r in found if r is not None]

    def _worths(self, runs: Sequence[Result]) -> list[float]:
        return [self.metric.worth(run.score) for run in runs]

    def _tests(self, progress: Mapping[str, Progress]) -> list[Entry]:
        return [
            entry_of(progress[arm.name].name, progress[arm.name].choice or {}, seed, TEST, arm=a)
            for seed in self.plan.seeds
            for a, arm in enumerate(self.arms)
        ]

    def job(self, what: Mapping[str, Any]) -> Job:
        """Curves are recorded in the test runs alone."""
        arm = self.arms[what["arm"]]
        if strange := {*what["point"]} - {*center_of(self.base), *arm.settings[0]}:
            own = ", ".join(sorted(strange))
            raise Hopeless(f"{arm.name} of an earlier version, with {own}, does not go on in this one: begin anew.")
        epochs = what.get("epochs") or self.base.epochs
        config = arm.config(replace(self.base, epochs=epochs), what["point"], what["seed"])
        return Job(config, what["scored_on"], self.plan.num_records if what["scored_on"] == TEST else 0)

    def weights(self, what: Mapping[str, Any]) -> str:
        if not self.plan.keeps_models or what["scored_on"] != TEST:
            return ""
        return weights_name(self.arms[what["arm"]], what["seed"])

    def line(self, what: Mapping[str, Any]) -> dict[str, Any]:
        return {"arm": self.arms[what["arm"]].name}

    def tested(self, board: Board) -> int:
        """How many seeds of the test, the first ones, are there of every arm."""
        progress, results = self.progress(board), board.results
        if not self._are_chosen(progress):
            return 0
        missing = {e.what["seed"] for e in self._tests(progress) if e.key not in results}
        return next((k for k, seed in enumerate(self.plan.seeds) if seed in missing), len(self.plan.seeds))

    def status(self, board: Board) -> Status:
        progress, results = self.progress(board), board.results
        best: dict[str, float] = {}
        for name, found in progress.items():
            worths = [self._mean(runs) for _, runs in found.tried if runs is not None]
            if worths:
                best[name] = max(worths)
        is_finished = self._are_chosen(progress) and all(e.key in results for e in self._tests(progress))
        sign = 1 if self.metric.higher_is_better else -1
        text = ", ".join(f"{name} {self.metric.written(sign * worth)}" for name, worth in best.items())
        done = len(results)
        planned = max(done, self._planned(progress))
        return Status(done, planned, text or "training", is_finished)

    def _planned(self, progress: Mapping[str, Progress]) -> int:
        """What a search may ask is counted until it has ended."""
        effort, total = self.plan.effort, 0
        for arm in self.arms:
            found = progress.get(arm.name)
            entered = 0 if found is None else len(found.entries) + effort.seeds
            total += entered if found and found.choice is not None else max(effort.runs, entered)
        return total

    def _mean(self, runs: Sequence[Result]) -> float:
        worths = self._worths(runs)
        return math.fsum(worths) / len(worths) if all(map(math.isfinite, worths)) else -math.inf


def schedule_of(plan: Mapping[str, Any]) -> ComparisonSchedule:
    """Of a plan as its study has it."""
    own = Plan.from_row(plan)
    return ComparisonSchedule(own, metric_of(own.base))
