"""The study: a learning rate for a faithful verifier, a number for each arm, then test seeds; each run is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gradreg.lab.about import provenance
from gradreg.lab.folder import append_line, write_json
from gradreg.lab.page import publish, tell
from gradreg.lab.player import on_processes
from gradreg.lab.progress import progress_bar
from gradreg.lab.records import kept_lines, resumed, sealed
from gradreg.studies.hacking.arms import ARMS, NONE, Arm
from gradreg.studies.hacking.game import ALIKE, MORE
from gradreg.studies.hacking.page import page, told
from gradreg.studies.hacking.summary import game_row
from gradreg.studies.hacking.training import FAITHFUL, Job, Outcome, Reading, on_test, play

KIND, PAGE, RUNS = "hacking", "hacking.md", "runs.jsonl"
DEFAULT_SEEDS, QUICK_SEEDS = 8, 2
FIRST_TUNING_SEED = 1_000_000
RATES = (3e-4, 1e-3, 3e-3)
GAMES = (MORE, ALIKE)
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    seeds: tuple[int, ...]
    is_quick: bool = False
    workers: int = 2

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        return tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + (1 if self.is_quick else 2)))

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES[1:2] if self.is_quick else RATES

    def values(self, arm: Arm) -> tuple[float, ...]:
        return arm.values[2:4] if self.is_quick and len(arm.values) > 1 else arm.values

    def job(self, game: str, arm: str, value: float, seed: int, rate: float) -> Job:
        job = Job(game, arm, value, seed, rate)
        return replace(job, steps=30, groups=8, asked=200, readings=5) if self.is_quick else job

    @property
    def command(self) -> str:
        quick = " --quick" if self.is_quick else ""
        return f"gradreg hacking{quick} --seed {self.seeds[0]} --seeds {len(self.seeds)}"

    def as_row(self) -> Row:
        return {"kind": KIND, "seeds": list(self.seeds), "is_quick": self.is_quick}


def plan_of(folder: Path, workers: int) -> Plan:
    """That of a folder to go on with."""
    about = resumed(folder, KIND)
    return Plan(tuple(about["seeds"]), about["is_quick"], workers)


class Runs:
    """Plays jobs, each once: what the folder has is not played again."""

    def __init__(self, folder: Path, workers: int, show: Any) -> None:
        self._path, self._workers, self._show = folder / RUNS, workers, show
        self._known = {_key(row["job"]): row["outcome"] for row in kept_lines(self._path)}
        self._seconds: dict[Job, float] = {}

    def play(self, what: str, jobs: Sequence[Job]) -> dict[Job, Outcome]:
        todo = [job for job in jobs if _key(_row(job)) not in self._known]
        self._show(what, 0, len(todo))
        with closing(on_processes(play, todo, self._workers)) as found:
            for done, (k, outcome) in enumerate(found, 1):
                row = sealed({"job": _row(todo[k]), "outcome": asdict(outcome)})
                append_line(self._path, row)
                self._known[_key(row["job"])] = row["outcome"]
                self._show(what, done, len(todo))
        found = {job: _outcome(self._known[_key(_row(job))]) for job in jobs}
        self._seconds |= {job: outcome.seconds for job, outcome in found.items()}
        return found

    @property
    def seconds(self) -> float:
        """Of the steps of all runs that were asked for."""
        return math.fsum(self._seconds.values())


def _row(job: Job) -> Row:
    return {**asdict(job), "value": None if math.isnan(job.value) else job.value}


def _key(job: Mapping[str, Any]) -> str:
    return repr(sorted(job.items()))


def _outcome(row: Row) -> Outcome:
    return Outcome([Reading(**reading) for reading in row["readings"]], row["seconds"], row["steps"])


def begin(plan: Plan, folder: Path) -> None:
    write_json(folder / "config.json", sealed(plan.as_row()))


def run_hacking(plan: Plan, folder: Path, write: Path | None = None) -> Row:
    """Play what is left, write the page, print the table; return what results.json holds."""
    with progress_bar() as show:
        runs = Runs(folder, plan.workers, show)
        rate = _rate(plan, runs)
        chosen = {game: _choose(plan, runs, game, rate) for game in GAMES}
        jobs = {
            (game, arm, seed): on_test(plan.job(game, arm, value, seed, rate), seed)
            for seed in plan.seeds
            for game in GAMES
            for arm, value in chosen[game].items()
        }
        found = runs.play("test", list(jobs.values()))
    by_game = {game: {arm: [found[jobs[game, arm, seed]] for seed in plan.seeds] for arm in ARMS} for game in GAMES}
    asked = next(iter(jobs.values())).asked
    results = {
        "name": folder.resolve().name,
        **provenance(plan.command, plan.workers, threads=1),
        "date": time.strftime("%Y-%m-%d"),
        "is_quick": plan.is_quick,
        "seeds": list(plan.seeds),
        "tuning_seeds": list(plan.tuning_seeds),
        "rate": rate,
        "steps": next(iter(jobs.values())).steps,
        "asked": asked,
        "training_seconds": runs.seconds,
        "games": [game_row(game, by_game[game], chosen[game], asked) for game in GAMES],
    }
    write_json(folder / "results.json", results)
    publish(page(results), folder, folder / PAGE, *([write] if write else []))
    tell(told(results), results, folder)
    return results


def _rate(plan: Plan, runs: Runs) -> float:
    """The learning rate that is best where the verifier has no flaw."""
    jobs = {rate: [plan.job(FAITHFUL, NONE.name, math.nan, s, rate) for s in plan.tuning_seeds] for rate in plan.rates}
    found = runs.play("learning rate", [job for of_rate in jobs.values() for job in of_rate])
    return max(jobs, key=lambda rate: math.fsum(found[job].last.true for job in jobs[rate]))


def _choose(plan: Plan, runs: Runs, game: str, rate: float) -> dict[str, float]:
    """Of each arm the number with the highest true reward on validation prompts; the mildest among equals."""
    make = partial(plan.job, game)
    jobs = {
        (arm.name, value): [make(arm.name, value, seed, rate) for seed in plan.tuning_seeds]
        for arm in ARMS.values()
        if len(arm.values) > 1
        for value in plan.values(arm)
    }
    found = runs.play(f"choosing, {game}", [job for of_value in jobs.values() for job in of_value])
    chosen = {NONE.name: math.nan}
    for arm in ARMS:
        if arm != NONE.name:
            mine = [key for key in jobs if key[0] == arm]
            chosen[arm] = max(mine, key=lambda key: math.fsum(found[job].last.true for job in jobs[key]))[1]
    return chosen
