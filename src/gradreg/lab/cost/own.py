"""`gradreg cost TASK`: what a step of each method costs on a task, of the user's own or built-in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gradreg.lab import stats, tasks
from gradreg.lab.about import provenance
from gradreg.lab.config import RunConfig
from gradreg.lab.cost import steps as costs
from gradreg.lab.cost.measure import COMPARED
from gradreg.lab.folder import BadInput, write_json
from gradreg.lab.methods import CHEAP
from gradreg.lab.page import Block, Items, Page, made, plain, publish, tell
from gradreg.lab.progress import progress_bar
from gradreg.lab.rows import count
from gradreg.lab.tables import Table
from gradreg.lab.task import Task
from gradreg.lab.words import ranged

METHODS = {
    **COMPARED,
    "cheap": {"method": "F-GR", **COMPARED["F-GR"], **CHEAP},
    "Split": {"ascent": "momentum", "gamma": 0.05, "epsilon": 0.1},
}
SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 40.0, 60, 6

Row = dict[str, Any]
Way = Callable[[costs.Step], costs.Step]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    config: RunConfig
    rounds: int | None = None
    threads: int = 1
    budget: float = SECONDS
    """Seconds, which decide the rounds."""

    @property
    def command(self) -> str:
        config = self.config
        word = config.data if config.file is None else tasks.word_of(config.file)
        rounds = f" --rounds {self.rounds}" if self.rounds else ""
        return f"gradreg cost {word}{rounds} --threads {self.threads} --device {config.device}"


def run_own(plan: Plan, folder: Callable[[], Path]) -> Row:
    """Measure, then make the folder, print and write; return what results.json holds.

    Raises:
        BadInput: a task that does not run; no folder is made.
    """
    started = time.perf_counter()
    if plan.config.file is not None:
        tasks.check(plan.config)
    found = measured(plan)
    place = folder()
    results: Row = {"name": place.name, **provenance(plan.command), "kind": "cost", **found}
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(place / "results.json", results)
    publish(Page(f"What a step costs on {results['task']}", [*_told(results), made(results)], "gradreg cost"), place)
    tell(_told(results), results, place)
    return results


def measured(plan: Plan, way: Way = lambda step: step, has_memory: bool = True) -> Row:
    """A step of each method on the task, in paired rounds.

    Args:
        plan: what is measured.
        way: makes of a step what is timed in its place, such as a captured one.
        has_memory: whether the peak is measured too, on steps as they are.

    Raises:
        BadInput: a step of SGD that does not run.
    """
    torch.set_num_threads(plan.threads)
    task, device = tasks.trained(plan.config), costs_device(plan.config)
    made_steps, refused = _steps(plan.config, task, device, way)
    clock = costs.clock_for(device, plan.threads)
    with progress_bar() as show:
        rounds = plan.rounds or _rounds(made_steps, clock, plan.budget)
        done = 0

        def one_more() -> None:
            nonlocal done
            done += 1
            show("cost of a step", done, rounds + 1)

        took = costs.paired_seconds(made_steps, rounds, clock, warm_up=1, progress=one_more)
    configs = {name: own for name, own in _configs(plan.config).items() if name not in refused}
    seconds = costs.means(configs, took)
    return {
        "task": plan.config.task,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "clock": "processor time" if costs.is_processor_time(device, plan.threads) else "wall-clock time",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "rounds": rounds,
        "batch_size": count(next(iter(task.train.chunks(plan.config.batch_size, 0)))[0]),
        "parameters": sum(p.numel() for p in task.build(0).parameters()),
        "sgd_seconds": median(seconds["SGD"]),
        "methods": _rows(seconds, _peaks(plan.config, task, device, seconds) if has_memory else {}, refused),
    }


def costs_device(config: RunConfig) -> torch.device:
    from gradreg.lab.processes import resolve

    return resolve(config.device)


def _configs(config: RunConfig) -> dict[str, RunConfig]:
    base = replace(config, warmup=0.0)
    return {name: replace(base, **{"method": name, **settings}) for name, settings in METHODS.items()}


def _steps(
    config: RunConfig, task: Task, device: torch.device, way: Way
) -> tuple[dict[Hashable, costs.Step], dict[str, str]]:
    """The kinds of steps of each method that the model bears, and why the others are not there."""
    found: dict[Hashable, costs.Step] = {}
    refused: dict[str, str] = {}
    for name, own in _configs(config).items():
        try:
            steps = {key: way(costs.make_step(kind, task, device)) for key, kind in costs.kinds({name: own}).items()}
            for step in steps.values():
                step()
            found |= steps
        except Exception as error:  # a model that cannot be differentiated twice, rows that cannot be divided
            if name == "SGD":
                raise BadInput(f"a step of SGD must run, and raised {type(error).__name__}: {error}") from error
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return found, refused


def _rounds(steps: Mapping[Hashable, costs.Step], clock: costs.Clock, budget: float) -> int:
    started = time.perf_counter()
    costs.paired_seconds(steps, 1, clock, warm_up=0)
    return int(min(MOST_ROUNDS, max(LEAST_ROUNDS, budget / (time.perf_counter() - started))))


def _peaks(config: RunConfig, task: Task, device: torch.device, measured: Iterable[str]) -> dict[str, int]:
    """Bytes, weights and optimizer included."""
    model = task.build(0)
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    configs = costs.kinds(_configs(config))  # with its penalty
    return {
        name: own + costs.peak_bytes(lambda name=name: costs.make_step(configs[name], task, device), device)
        for name in measured
    }


def _rows(seconds: Mapping[str, list[float]], peaks: Mapping[str, int], refused: Mapping[str, str]) -> list[Row]:
    rows: list[Row] = []
    for name in METHODS:
        if why := refused.get(name):
            rows.append({"name": name, "time": None, "refused": why})
            continue
        found: Row = {"name": name, "time": asdict(stats.median_ratio(seconds[name], seconds["SGD"])), "refused": ""}
        if peaks:
            found |= {"memory_ratio": peaks[name] / peaks["SGD"], "peak_bytes": peaks[name]}
        rows.append(found)
    return rows


def _told(results: Row) -> list[Block]:
    rows = []
    for row in results["methods"]:
        time_ = row["time"]
        cells = ("–", "–")
        if time_ is not None:
            cells = (ranged(time_, 2), f"{row['memory_ratio']:.2f}")
        rows.append((row["name"], *cells))
    table = Table("", ("method", "time, over SGD's", "peak memory"), rows)
    load = f", load {results['load']:g} at the start" if results["load"] is not None else ""
    notes = [
        f"SGD: {1e3 * results['sgd_seconds']:.3g} ms a step, batches of {results['batch_size']}, "
        f"{results['parameters']:,} parameters; {results['device']}{load}.",
        f"Median over {results['rounds']} rounds of the ratio to the SGD step of the same round, in "
        f"{results['clock']}, with its 95% interval by bootstrap. Reading of data is not counted. Memory: the "
        "most that a step holds, weights and optimizer included.",
        "F-GR, B-GR and SAM are two gradients, the centered difference and double backpropagation about three; cheap "
        "is F-GR on a quarter of the batch in every fourth step, the mean of four; Split is one, a half of the batch "
        "displaced along the momentum.",
        *(f"{row['name']} was not measured: {row['refused']}." for row in results["methods"] if row["refused"]),
    ]
    return [f"A step on {plain(results['task'])}, over that of SGD:", table, Items([plain(note) for note in notes])]
