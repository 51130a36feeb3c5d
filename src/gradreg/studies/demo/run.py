"""The demo: every method on every task over several seeds, then a table, two figures and a page."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradreg.lab import stats
from gradreg.lab.about import provenance
from gradreg.lab.config import RunConfig, configure
from gradreg.lab.cost.steps import step_costs
from gradreg.lab.folder import write_json
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import ACCURACY
from gradreg.lab.page import publish, tell
from gradreg.lab.progress import progress_bar
from gradreg.lab.runs import Job
from gradreg.lab.words import sentence
from gradreg.studies.demo.report import page, told
from gradreg.studies.demo.tasks import TASKS
from gradreg.studies.demo.tune import GRIDS, SHIPPED
from gradreg.studies.runs import Runs

DEFAULT_SEEDS = 6
QUICK_SEEDS = 3
QUICK_TASKS = tuple(task.task for task in TASKS.values() if task.model == "mlp" and task.random_labels)

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a demo runs."""

    tasks: tuple[RunConfig, ...]
    """Each with every method."""
    seeds: tuple[int, ...]
    """At least two, none of the tuning's."""
    is_quick: bool = False
    """Fewer tasks and seeds; a run itself is the same."""


def run_demo(plan: Plan, folder: Path, workers: int) -> Row:
    """Measure, write the folder, print the table; return what results.json holds."""
    started = time.perf_counter()
    tuned = json.loads(SHIPPED.read_text(encoding="utf-8"))
    chosen = {task.task: tuned["tasks"][task.task] for task in plan.tasks}
    about = {
        "name": folder.name,
        **provenance(_command(plan), workers),
        "is_quick": plan.is_quick,
        "seeds": list(plan.seeds),
        "workers": workers,
        "tuned": {key: value for key, value in tuned.items() if key != "tasks"},
        "hyper_parameters": chosen,
    }
    write_json(folder / "config.json", about)

    jobs = [
        Job(configure(task, method, h, seed))
        for seed in plan.seeds  # seed by seed, so that an early end leaves whole comparisons
        for task in plan.tasks
        for method, h in chosen[task.task].items()
    ]
    with progress_bar() as progress:
        progress("cost of a step", 0, len(jobs))
        costs = _costs(plan.tasks, chosen)
        runs = Runs(folder / "runs.jsonl", workers, progress).play("training", jobs)

    results = {
        **about,
        "seconds": round(time.perf_counter() - started, 1),
        "tasks": [summarize(task, runs, costs[task.task]) for task in plan.tasks],
        "runs": runs,
    }
    write_json(folder / "results.json", results)
    publish(page(results), folder)
    tell(told(results), results, folder)
    return results


def _command(plan: Plan) -> str:
    quick = " --quick" if plan.is_quick else ""
    return f"gradreg demo{quick} --seed {plan.seeds[0]} --seeds {len(plan.seeds)}"


def _costs(tasks: Sequence[RunConfig], chosen: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Measured once for each data set and model: what the labels are does not change the work."""
    measured: dict[tuple[str, str], dict[str, float]] = {}
    for task in tasks:
        if (task.data, task.model) not in measured:
            configs = {name: configure(task, name, values, seed=0) for name, values in chosen[task.task].items()}
            ratios = step_costs(configs, rounds=60)
            measured[task.data, task.model] = {name: ratio.median for name, ratio in ratios.items()}
    return {task.task: measured[task.data, task.model] for task in tasks}


def summarize(task: RunConfig, runs: Sequence[Row], costs: Mapping[str, float]) -> Row:
    """One task: a row for each method, and one sentence made from the verdicts."""
    by_method = {
        method: sorted((r for r in runs if (r["task"], r["method"]) == (task.task, method)), key=lambda r: r["seed"])
        for method in GRIDS
    }
    baseline = [r["accuracy"] for r in by_method["SGD"]]
    rows = [_summary(method, by_method[method], baseline, costs[method]) for method in GRIDS]
    return {"name": task.task, **asdict(task), "methods": rows, "sentence": sentence(rows)}


def _summary(method: str, runs: Sequence[Row], baseline: Sequence[float], cost: float) -> Row:
    accuracies = [r["accuracy"] for r in runs]
    row: Row = {
        "name": method,
        "about": METHODS[method].about,
        **{key: runs[0][key] for key in ("learning_rate", "weight_decay")},
        "settings": {key: runs[0][key] for key in METHODS[method].needs},
        "accuracy": asdict(stats.mean_interval(accuracies)),
        "train_loss": _mean([r["train_loss"] for r in runs]),
        "grad_norm": _mean([r["grad_norm"] for r in runs]),
        "cost": cost,
        "diverged": sum(r["diverged"] for r in runs),
        "trace": _mean_trace([r["trace"] for r in runs if not r["diverged"]]),
    }
    if method != "SGD":
        row |= ACCURACY.against(accuracies, baseline, (r.get("num_scored") for r in runs))
    return row


def _mean(values: Sequence[float]) -> float:
    """Over the seeds that did not diverge."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _mean_trace(traces: Sequence[Sequence[Row]]) -> list[Row]:
    """‖∇L‖ along the run: the geometric mean over seeds, as it is drawn on a logarithmic axis, and the extremes."""
    points = []
    for moment in zip(*traces):
        norms = [max(point["grad_norm"], 1e-12) for point in moment]
        mean = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
        points.append({"step": moment[0]["step"], "mean": mean, "low": min(norms), "high": max(norms)})
    return points
