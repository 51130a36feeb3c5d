"""The study: runs with the shipped choices, times, mechanism; then the folder, the page and the table."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradreg.lab.about import provenance
from gradreg.lab.config import RunConfig
from gradreg.lab.folder import write_json
from gradreg.lab.page import publish, tell
from gradreg.lab.player import play
from gradreg.lab.progress import progress_bar
from gradreg.lab.runs import Job
from gradreg.studies.frontier import cost, mechanism
from gradreg.studies.frontier.modes import ABOUT_TASKS, FULL, MODES, PLAIN, TASKS, Candidate, Mode, job
from gradreg.studies.frontier.page import page, told
from gradreg.studies.frontier.summary import alike, goals, judging, task_row
from gradreg.studies.frontier.tune import shipped
from gradreg.studies.runs import Runs

DEFAULT_SEEDS, QUICK_SEEDS = 16, 6
QUICK_TASKS = ("tiny noisy data", "small noisy data")
PAGE = "frontier.md"
Choices = Mapping[str, Mapping[str, Candidate]]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    seeds: tuple[int, ...]
    is_quick: bool = False
    workers: int = 1

    @property
    def tasks(self) -> dict[str, RunConfig]:
        return {name: TASKS[name] for name in (QUICK_TASKS if self.is_quick else TASKS)}

    @property
    def rounds(self) -> int:
        """Of the times of a step, on the models of the tasks."""
        return 40 if self.is_quick else 100

    @property
    def rounds_larger(self) -> int:
        return 8 if self.is_quick else 31

    @property
    def seeds_mechanism(self) -> tuple[int, ...]:
        return self.seeds[: 2 if self.is_quick else 4]

    @property
    def command(self) -> str:
        quick = " --quick" if self.is_quick else ""
        return f"gradreg frontier{quick} --seed {self.seeds[0]} --seeds {len(self.seeds)}"


def run_frontier(
    plan: Plan, folder: Path, write: Path | None = None, real: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Measure, write the folder and the page, print the tables; return what results.json holds.

    Args:
        plan: how much is run.
        folder: takes it.
        write: takes the page too.
        real: tasks that were played elsewhere, with the rows of their modes.
    """
    started = time.perf_counter()
    choices, modes = shipped(), MODES
    about = {
        "name": folder.name,
        **provenance(plan.command, plan.workers),
        "is_quick": plan.is_quick,
        "seeds": list(plan.seeds),
    }
    write_json(folder / "config.json", about)
    with progress_bar() as progress:
        runs = _runs(plan, choices, modes, folder, progress)
        seconds = {"runs": time.perf_counter() - started}
        costs = _costs(plan, choices, modes, progress)
        seconds["costs"] = time.perf_counter() - started - sum(seconds.values())
        aligned = {name: _mechanism(plan, task, choices[name]) for name, task in plan.tasks.items()}
        seconds["mechanism"] = time.perf_counter() - started - sum(seconds.values())
    tasks = [task_row(name, ABOUT_TASKS[name], runs[name], costs[name], choices[name]) for name in plan.tasks]
    results = {
        **about,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_of": {name: round(value, 1) for name, value in seconds.items()},
        "tasks": tasks,
        "mechanism": aligned,
    }
    return show(results, folder, write, real)


def show(
    measured: Mapping[str, Any], folder: Path, write: Path | None, real: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The page and the tables of what was measured, with tasks that were played elsewhere."""
    tasks = [*measured["tasks"], *real]
    results = {**measured, "real": list(real), "goals": goals(alike(judging(tasks)))}
    write_json(folder / "results.json", results)
    publish(page(results), folder, folder / PAGE, *([write] if write else []))
    tell(told(results), results, folder)
    return results


def _runs(
    plan: Plan, choices: Choices, modes: Mapping[str, Mode], folder: Path, progress: Any
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Of each task and mode, by rising seed."""
    keys: list[tuple[str, str]] = []
    jobs: list[Job] = []
    for name, task in plan.tasks.items():
        for mode in modes.values():
            for k, seed in enumerate(plan.seeds):
                probes = 8 if k < 4 else 0
                keys.append((name, mode.name))
                jobs.append(replace(job(task, mode, choices[name][mode.name], seed, "test"), num_probes=probes))
    rows = Runs(folder / "runs.jsonl", plan.workers, progress, play).play("training", jobs)
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for (name, mode), row in zip(keys, rows):
        found[name][mode].append(row)
    return found


def _costs(plan: Plan, choices: Choices, modes: Mapping[str, Mode], progress: Any) -> dict[str, Any]:
    """Of each task, by what is timed; one thread, with nothing beside it."""
    found: dict[str, Any] = {}
    planned = len(plan.tasks) + 1
    progress("times of a step", 0, planned)
    larger = cost.seconds_larger(modes, plan.rounds_larger)
    for done, (name, task) in enumerate(plan.tasks.items(), 1):
        progress("times of a step", done, planned)
        active = cost.shares(task, choices[name], modes)
        batched, engine = cost.on_task(task, choices[name], modes, active, plan.rounds)
        found[name] = {"larger": cost.ratios(larger, active), "batched": batched, "engine": engine}
    return found


def _mechanism(plan: Plan, task: RunConfig, chosen: Mapping[str, Candidate]) -> list[dict[str, Any]]:
    """At the start, middle and end of plain runs; γ and ε of the full method, ρ of MSAM."""
    full, rho = chosen[FULL.name].settings, chosen["MSAM"].settings["rho"]
    modes = mechanism.modes(full["gamma"], full["epsilon"], rho)
    by_point: list[list[Sequence[mechanism.Alignment]]] = [[] for _ in mechanism.SHARES]
    steps: list[int] = []
    for seed in plan.seeds_mechanism:
        config = job(task, PLAIN, chosen[PLAIN.name], seed, "test").config
        points, train = mechanism.frozen_points(config)
        steps = [point.step for point in points]
        for rows, point in zip(by_point, points):
            rows.append(mechanism.alignments(point, modes, train, task.batch_size, full["epsilon"], seed))
    return [
        {"step": step, "rows": [asdict(summary) for summary in mechanism.over_seeds(rows)]}
        for step, rows in zip(steps, by_point)
    ]


def prepare() -> None:
    """One thread in each place, and a heap that keeps what it has: as the times of a step are taken."""
    from gradreg.lab.cost.steps import keep_heap

    torch.set_num_threads(1)
    keep_heap()
