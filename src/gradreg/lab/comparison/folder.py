"""The folder of a comparison: how one begins, is found again, and ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from gradreg.lab.comparison.arms import BASELINE
from gradreg.lab.comparison.plan import KIND, Plan
from gradreg.lab.comparison.result import arm_rows, verdict
from gradreg.lab.comparison.schedule import TEST, ComparisonSchedule
from gradreg.lab.cost.steps import step_costs
from gradreg.lab.folder import finite
from gradreg.lab.processes import resolve
from gradreg.lab.records import read_record
from gradreg.lab.runs import record
from gradreg.lab.search import Point
from gradreg.lab.study import folder as folders
from gradreg.lab.study.board import Board
from gradreg.lab.study.schedule import Status, key_of
from gradreg.lab.study.storage import Place
from gradreg.lab.study.study import Study
from gradreg.lab.task import Loop
from gradreg.lab.tasks import metric_of, task_of

Row = dict[str, Any]


def begin(folder: Path, plan: Plan, place: Place, command: str, workers: int, not_afforded: list[str]) -> None:
    """Write config.json."""
    folders.begin(
        folder,
        place,
        command,
        workers,
        kind=KIND,
        task=plan.base.task,
        metric=task_of(plan.base).metric.as_row(),
        plan=plan.as_row(),
        seeds=list(plan.seeds),
        not_afforded=not_afforded,
    )


def find(folder: Path, url: str | None) -> tuple[Plan, Place, Row]:
    """What a folder says about its comparison.

    Raises:
        BadInput: it is none, its record was changed, its database needs a password.
    """
    about, place = folders.find(folder, url, KIND, "comparison")
    return Plan.from_row(about["plan"]), place, about


def conclude(folder: Path, place: Place, plan: Plan) -> Row:
    """Write results.json, runs.jsonl and the tracebacks of runs that failed; return what results.json holds."""
    schedule = ComparisonSchedule(plan, metric_of(plan.base))

    def summary(about: Row, board: Board, lines: list[Row]) -> Row:
        costs, how_cost = _costs(schedule, board)
        found = {
            **about,
            "training_seconds": round(math.fsum(line["seconds"] for line in lines), 1),
            "num_runs": len(lines),
            "how_cost": how_cost,
            "arms": arm_rows(schedule, board, costs),
        }
        return {**found, "verdict": verdict(found)}

    return folders.conclude(folder, place, schedule, summary)


def so_far(folder: Path, place: Place, plan: Plan) -> tuple[Row | None, Status]:
    """Of a comparison that has not ended: as results.json would be with the seeds that every arm has been tested on.

    No cost is measured. None with less than two such seeds, which make no interval.
    """
    schedule = ComparisonSchedule(plan, metric_of(plan.base))
    with Study(place) as study:
        board = study.board()
    count, status = schedule.tested(board), schedule.status(board)
    if count < 2:
        return None, status
    fewer = ComparisonSchedule(replace(plan, effort=replace(plan.effort, seeds=count)), schedule.metric)
    about = read_record(folder / "config.json")
    seconds = math.fsum(result.seconds for result in board.results.values())
    results = {**about, "seeds": list(fewer.plan.seeds), "training_seconds": round(seconds, 1), "num_runs": status.done}
    results["arms"] = arm_rows(fewer, board, {})
    results["verdict"] = verdict(results)
    return json.loads(json.dumps(finite(results))), status


def keep_tracebacks(folder: Path, place: Place, schedule: ComparisonSchedule) -> int:
    """Of the runs that failed so far, in failed/; how many there are."""
    with Study(place) as study:
        board = study.board()
    whats = {key: board.first[key].user_attrs["what"] for key in board.results}
    lines = [{**record(schedule.job(whats[key]), result)} for key, result in board.results.items()]
    folders.without_tracebacks(folder, lines)
    return sum(bool(line.get("error")) for line in lines)


def _costs(schedule: ComparisonSchedule, board: Board) -> tuple[dict[str, Row], str]:
    """A step of each arm over the baseline's, times what more it trains; and how that was measured."""
    choices = {name: p.choice for name, p in schedule.progress(board).items()}
    if isinstance(task_of(schedule.base), Loop):
        return _rough_costs(schedule, board), (
            "Cost: the median over seeds of the time of a whole run over the baseline's with the same seed; rough, as "
            "other work may have run beside it."
        )
    try:
        return _step_costs(schedule, choices), (
            "Cost: a step's time over the baseline's, the median of paired rounds with its 95 % interval, times the "
            "epochs of an arm over those of the others."
        )
    except Exception as error:  # the user's code, or no memory for all arms at once
        return {}, f"Cost was not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}."


def _step_costs(schedule: ComparisonSchedule, choices: Mapping[str, Point | None]) -> dict[str, Row]:
    arms = {arm.name: arm for arm in schedule.arms if not arm.is_opponent}
    configs = {name: arm.config(schedule.base, choices[name] or {}, 0) for name, arm in arms.items()}
    found = step_costs(configs, resolve(schedule.base.device))
    return {
        arm.name: {key: value * arm.epochs for key, value in asdict(found.get(arm.name, found[BASELINE])).items()}
        for arm in schedule.arms
    }


def _rough_costs(schedule: ComparisonSchedule, board: Board) -> dict[str, Row]:
    progress, results = schedule.progress(board), board.results
    seconds = {}
    for arm in schedule.arms:
        name = progress[arm.name].name
        seconds[arm.name] = [results[key_of(name, seed, TEST)].seconds for seed in schedule.plan.seeds]
    plain = seconds[BASELINE]
    return {
        name: {"median": median(a / b for a, b in zip(took, plain)), "low": math.nan, "high": math.nan}
        for name, took in seconds.items()
    }
