"""The choice of hyper-parameters, on validation rows and by a rule.

Four rounds for each task, every candidate scored by its validation accuracy averaged over seeds that the demo
never uses:

1. SGD climbs a lattice of learning rates and weight decays, a factor of 3 apart: the center and its eight neighbors,
   then the neighbors of the best point so far, until the best has all of its neighbors behind it, so that the choice
   does not lie on an edge;
2. SGD again on the eight neighbors half a step away;
3. every other method over its six settings, at SGD's learning rate with its weight decay and with a third of it, since
   what regularizes may want less of another regularizer;
4. every other method, with the best of these, at a third and three times its learning rate or weight decay.

The highest average wins; among equals, the first that was tried. That is at most 16 candidates for each other method
and more for SGD, which is thus tuned at least as long. A method keeps its best point even where SGD's is higher.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from gradreg.lab.about import versions
from gradreg.lab.config import RunConfig, configure
from gradreg.lab.folder import append_line, write_json
from gradreg.lab.player import run_all
from gradreg.lab.runs import Job, record

FIRST_SEED = 1_000_000  # the demo's seeds lie below
FACTOR = 3.0
MOST_CLIMBS = 5
SHIPPED = Path(str(files("gradreg.studies"))) / "demo" / "demo.json"


Settings = dict[str, float]


def _grid(**values: tuple[float, ...]) -> tuple[Settings, ...]:
    return tuple(dict(zip(values, point)) for point in product(*values.values()))


GRIDS: dict[str, tuple[Settings, ...]] = {
    "SGD": ({},),
    "F-GR": _grid(gamma=(0.05, 0.2, 0.5), epsilon=(0.3, 1.0)),
    "B-GR": _grid(gamma=(0.05, 0.2, 0.5), epsilon=(0.3, 1.0)),
    "DB": _grid(gamma=(0.003, 0.01, 0.03, 0.1, 0.2, 0.4)),
    "SAM": _grid(rho=(0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
    "Flooding": _grid(level=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8)),
}
"""The methods of the demo, each with the settings that are tried: the same number for each but SGD."""


@dataclass(frozen=True)
class Candidate:
    """A point to try."""

    learning_rate: float
    weight_decay: float
    settings: Settings


@dataclass(frozen=True)
class Scored:
    """A point and its validation accuracy, averaged over seeds."""

    candidate: Candidate
    accuracy: float


START = Candidate(learning_rate=0.054, weight_decay=2.7e-3, settings={})  # 2·3³e-3 and 3³e-4: exact thirds
Key = tuple[str, str]  # task and method
Progress = Callable[[str, int, int], None]  # what is running, runs done, runs planned


def tune(
    tasks: Sequence[RunConfig], seeds: Sequence[int], folder: Path, workers: int, progress: Progress
) -> dict[str, Any]:
    """Run the four rounds, keep every run in trials.jsonl and the choice in demo.json; return the choice."""
    started = time.perf_counter()
    by_name = {task.task: task for task in tasks}
    scored: dict[Key, list[Scored]] = {(task, method): [] for task in by_name for method in GRIDS}

    def play(label: str, candidates: Mapping[Key, Sequence[Candidate]]) -> None:
        entries = [(key, candidate) for key, row in candidates.items() for candidate in row]
        jobs = [
            Job(configure(by_name[task], method, asdict(c), seed), "validation", num_records=0)
            for (task, method), c in entries
            for seed in seeds
        ]
        accuracies = [0.0] * len(jobs)
        with closing(run_all(jobs, workers)) as results:
            for done, (k, result) in enumerate(results, 1):
                append_line(folder / "trials.jsonl", record(jobs[k], result))
                accuracies[k] = result.score
                progress(label, done, len(jobs))
        for k, (key, candidate) in enumerate(entries):
            of_seeds = accuracies[k * len(seeds) : (k + 1) * len(seeds)]
            scored[key].append(Scored(candidate, sum(of_seeds) / len(seeds)))

    def untried(key: Key, candidates: Sequence[Candidate]) -> list[Candidate]:
        tried = [s.candidate for s in scored[key]]
        return [candidate for candidate in candidates if candidate not in tried]

    sgd = [(task, "SGD") for task in by_name]
    candidates = {key: [START, *neighbors(START, FACTOR)] for key in sgd}
    for climb in range(1, MOST_CLIMBS + 1):
        play(f"SGD, climb {climb}", candidates)
        candidates = {key: untried(key, neighbors(best(scored[key]), FACTOR)) for key in sgd}
        if not any(candidates.values()):
            break
    play("SGD, half steps", {key: neighbors(best(scored[key]), FACTOR**0.5) for key in sgd})
    others = [key for key in scored if key[1] != "SGD"]
    at = {task: best(scored[task, "SGD"]) for task in by_name}
    play(
        "other methods, settings",
        {
            (task, method): [replace(c, settings=s) for c in (at[task], less_decay(at[task])) for s in GRIDS[method]]
            for task, method in others
        },
    )
    play("other methods, neighbors", {key: untried(key, beside(best(scored[key]), FACTOR)) for key in others})

    choice = {
        "command": f"gradreg tune --seed {seeds[0] - FIRST_SEED} --seeds {len(seeds)}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - started),
        "machine": f"CPU cores: {os.cpu_count()}, processes: {workers}",
        "versions": versions(),
        "seeds": list(seeds),
        "tasks": {task: {method: _choice(scored[task, method], len(seeds)) for method in GRIDS} for task in by_name},
    }
    write_json(folder / "demo.json", choice)
    return choice


def best(scored: Sequence[Scored]) -> Candidate:
    """The highest validation accuracy; the first among equals."""
    return max(scored, key=lambda s: s.accuracy).candidate


def neighbors(center: Candidate, factor: float) -> list[Candidate]:
    """The eight points around one, learning rate and weight decay times 1 or `factor` or divided by it."""
    factors = (1 / factor, 1.0, factor)
    return [
        Candidate(_rounded(center.learning_rate * a), _rounded(center.weight_decay * b), center.settings)
        for a, b in product(factors, factors)
        if (a, b) != (1.0, 1.0)
    ]


def beside(center: Candidate, factor: float) -> list[Candidate]:
    """Of these eight, the four that differ in the learning rate alone or in the weight decay alone."""
    return [
        c
        for c in neighbors(center, factor)
        if (c.learning_rate == center.learning_rate) != (c.weight_decay == center.weight_decay)
    ]


def less_decay(center: Candidate) -> Candidate:
    return replace(center, weight_decay=_rounded(center.weight_decay / FACTOR))


def _rounded(value: float) -> float:
    """Three digits, so that a lattice point is itself again from wherever it is reached."""
    return float(f"{value:.3g}")


def _choice(scored: Sequence[Scored], num_seeds: int) -> dict[str, Any]:
    chosen = max(scored, key=lambda s: s.accuracy)
    return {
        **asdict(chosen.candidate),
        "validation_accuracy": round(chosen.accuracy, 4),
        "trials": len(scored) * num_seeds,
    }
