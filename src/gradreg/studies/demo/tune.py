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

import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from gradreg.lab.about import provenance
from gradreg.lab.config import RunConfig, configure
from gradreg.lab.folder import write_json
from gradreg.lab.runs import Job
from gradreg.lab.search import Climb, Point, rounded
from gradreg.studies.runs import Runs

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


START: Point = {"learning_rate": 0.054, "weight_decay": 2.7e-3}  # 2·3³e-3 and 3³e-4: exact thirds
Key = tuple[str, str]  # task and method
Progress = Callable[[str, int, int], None]  # what is running, runs done, runs planned


def tune(
    tasks: Sequence[RunConfig], seeds: Sequence[int], folder: Path, workers: int, progress: Progress
) -> dict[str, Any]:
    """Run the four rounds, keep every run in trials.jsonl and the choice in demo.json; return the choice."""
    started = time.perf_counter()
    by_name = {task.task: task for task in tasks}
    runs = Runs(folder / "trials.jsonl", workers, progress)

    def job(key: Key, point: Point, seed: int) -> Job:
        task, method = key
        return Job(configure(by_name[task], method, _chosen(point), seed), "validation", num_records=0)

    plain = {(task, "SGD"): of_sgd() for task in by_name}
    runs.search("SGD", plain, job, seeds)
    others = {
        (task, method): of_method(method, plain[task, "SGD"].best)
        for task in by_name
        for method in GRIDS
        if method != "SGD"
    }
    runs.search("other methods", others, job, seeds)
    found = {**plain, **others}
    choice = {
        **provenance(f"gradreg tune --seed {seeds[0] - FIRST_SEED} --seeds {len(seeds)}", workers, threads=1),
        "seconds": round(time.perf_counter() - started),
        "seeds": list(seeds),
        "tasks": {task: {method: _choice(found[task, method], len(seeds)) for method in GRIDS} for task in by_name},
    }
    write_json(folder / "demo.json", choice)
    return choice


def of_sgd() -> Climb:
    """Rounds 1 and 2: a lattice, and half a step around what it comes to."""
    return Climb([START, *around(START, FACTOR)], neighbors=around, steps=[(FACTOR, MOST_CLIMBS - 1), (FACTOR**0.5, 1)])


def of_method(method: str, plain: Point) -> Climb:
    """Rounds 3 and 4: its settings at SGD's point and at a third of its weight decay, then beside the best of these."""
    less_decay = {**plain, "weight_decay": rounded(plain["weight_decay"] / FACTOR)}
    start = [{**point, **settings} for point in (plain, less_decay) for settings in GRIDS[method]]
    return Climb(start, neighbors=beside, steps=[(FACTOR, 1)])


def around(point: Point, factor: float) -> list[Point]:
    """The eight points around one, learning rate and weight decay times 1 or `factor` or divided by it."""
    factors = (1 / factor, 1.0, factor)
    rate, decay = point["learning_rate"], point["weight_decay"]
    return [
        {**point, "learning_rate": rounded(rate * a), "weight_decay": rounded(decay * b)}
        for a, b in product(factors, factors)
        if (a, b) != (1.0, 1.0)
    ]


def beside(point: Point, factor: float) -> list[Point]:
    """Of these eight, the four that differ in the learning rate alone or in the weight decay alone."""
    return [
        other
        for other in around(point, factor)
        if (other["learning_rate"] == point["learning_rate"]) != (other["weight_decay"] == point["weight_decay"])
    ]


def _chosen(point: Point) -> dict[str, Any]:
    """As `configure` takes it."""
    settings = {name: value for name, value in point.items() if name not in START}
    return {**{name: point[name] for name in START}, "settings": settings}


def _choice(search: Climb, num_seeds: int) -> dict[str, Any]:
    return {
        **_chosen(search.best),
        "validation_accuracy": round(search.mean(search.best), 4),
        "trials": len(search) * num_seeds,
    }
