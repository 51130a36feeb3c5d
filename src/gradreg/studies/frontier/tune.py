"""The choice of hyper-parameters: on validation rows, by a rule, with as many candidates for every mode.

For each task and mode:

1. *Start*: plain training from nine pairs of learning rate and weight decay; every other mode from its settings at the
   pair that plain training ended with, and at a third of its weight decay.
2. *Climb*: the neighbors of the best point so far, one number at a time doubled or halved, until there are
   `CANDIDATES`. Where all neighbors are behind it, steps shrink to their root.
3. *Final*: the best `FINALISTS` again on `FINAL_SEEDS` seeds of their own; the highest mean over all its seeds wins.

So each mode is tried as often, learning rate and weight decay included; but the full method, to which all are held,
three times as often: it has more numbers than most, and a reference that is tuned too little would flatter every mode.
The seeds are never those of the study.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from gradreg.lab.about import provenance
from gradreg.lab.config import RunConfig
from gradreg.lab.folder import write_json
from gradreg.lab.player import play
from gradreg.lab.runs import Job
from gradreg.lab.search import Climb, Point, rounded, shrinking
from gradreg.studies.demo.tune import FIRST_SEED
from gradreg.studies.frontier.modes import FULL, PLAIN, Candidate, Mode, job
from gradreg.studies.runs import Runs

CANDIDATES, SEEDS = 18, 2
FINALISTS, FINAL_SEEDS = 3, 4
CANDIDATES_OF_FULL = 3 * CANDIDATES
STEP, DECAY = 2.0, 3.0
START = [Candidate(rate, decay, {}) for rate in (0.03, 0.1, 0.3) for decay in (7e-4, 2e-3, 6e-3)]
SHIPPED = Path(str(files("gradreg.studies"))) / "frontier" / "frontier.json"

Key = tuple[str, str]  # task and mode
Progress = Callable[[str, int, int], None]


def search_of(mode: Mode, start: Sequence[Candidate], num_candidates: int) -> Climb:
    """The candidates of one mode on one task."""

    def neighbors(point: Point, step: float) -> list[Point]:
        center = candidate(point)
        names = center.values().keys() - ({"learning_rate"} if mode.rate is not None else set())
        found = [moved(center, name, factor, mode).values() for factor in (step, 1 / step) for name in names]
        return sorted(found, key=lambda values: tuple(values.values()))

    return Climb([c.values() for c in start], num_candidates, neighbors, shrinking(STEP))


def candidate(point: Point) -> Candidate:
    settings = {name: value for name, value in point.items() if name not in ("learning_rate", "weight_decay")}
    return Candidate(point["learning_rate"], point["weight_decay"], settings)


def moved(center: Candidate, name: str, factor: float, mode: Mode) -> Candidate:
    """One number times a factor, to three digits; a split batch keeps its share, an average is at most of all steps."""
    if name in ("learning_rate", "weight_decay"):
        return replace(center, **{name: rounded(getattr(center, name) * factor)})
    settings = dict(center.settings)
    names = ("gamma", "epsilon") if mode.method == "Split" else (name,)
    for own in names:
        settings[own] = rounded(settings[own] * factor)
    if "average" in settings:
        settings["average"] = min(1.0, settings["average"])
    return replace(center, settings=settings)


def tune(
    tasks: Mapping[str, RunConfig],
    modes: Mapping[str, Mode],
    folder: Path,
    workers: int,
    progress: Progress,
    seed: int = 0,
) -> dict[str, Any]:
    """Search, keep every run in trials.jsonl and the choice in frontier.json; return the choice."""
    started = time.perf_counter()
    first = FIRST_SEED + seed
    searches = {(task, PLAIN.name): search_of(PLAIN, START, CANDIDATES) for task in tasks}

    runs = Runs(folder / "trials.jsonl", workers, progress, play)

    def job_of(key: Key, point: Point, seed: int) -> Job:
        return job(tasks[key[0]], modes[key[1]], candidate(point), seed, "validation")

    def climb(label: str, keys: Iterable[Key]) -> None:
        mine = {key: searches[key] for key in keys}
        runs.search(label, mine, job_of, range(first, first + SEEDS))
        finals = {key: search.finalists(FINALISTS) for key, search in mine.items()}
        runs.tell(f"{label}, final", mine, finals, job_of, range(first + SEEDS, first + SEEDS + FINAL_SEEDS))

    climb("plain", list(searches))
    for task in tasks:
        plain = candidate(searches[task, PLAIN.name].choice())
        for name, mode in modes.items():
            if name != PLAIN.name:
                count = CANDIDATES_OF_FULL if name == FULL.name else CANDIDATES
                searches[task, name] = search_of(mode, starts(mode, plain), count)
    climb("modes", [key for key in searches if key[1] != PLAIN.name])

    seeds = list(range(first, first + SEEDS + FINAL_SEEDS))
    choice = {
        **provenance(f"gradreg frontier --tune --seed {seed}", threads=workers),
        "seconds": round(time.perf_counter() - started),
        "seeds": seeds,
        "tasks": {task: {name: _chosen(searches[task, name]) for name in modes} for task in tasks},
    }
    write_json(folder / "frontier.json", choice)
    return choice


def starts(mode: Mode, plain: Candidate) -> list[Candidate]:
    """At plain training's learning rate, or the mode's multiple of it, with its weight decay and a third of it."""
    rate = rounded(plain.learning_rate * (mode.rate or 1.0))
    decays = (plain.weight_decay, rounded(plain.weight_decay / DECAY))
    return [Candidate(rate, decay, settings) for decay in decays for settings in mode.start]


def shipped() -> dict[str, dict[str, Candidate]]:
    """The choices that come with the package, by task and mode."""
    tasks = json.loads(SHIPPED.read_text(encoding="utf-8"))["tasks"]
    keys = ("learning_rate", "weight_decay", "settings")
    return {
        task: {mode: Candidate(**{key: chosen[key] for key in keys}) for mode, chosen in row.items()}
        for task, row in tasks.items()
    }


def _chosen(search: Climb) -> dict[str, Any]:
    point = search.choice()
    return {
        **asdict(candidate(point)),
        "validation_accuracy": round(search.mean(point), 4),
        "candidates": len(search),
        "runs": sum(len(search.of(tried)) for tried in search.finalists(len(search))),
    }
