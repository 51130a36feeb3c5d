"""The folder of a comparison: how one begins, is found again, and ends."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from gradreg.lab.about import git_state, machine, versions
from gradreg.lab.comparison.arms import BASELINE
from gradreg.lab.comparison.plan import KIND, Plan
from gradreg.lab.comparison.result import arm_rows, verdict
from gradreg.lab.comparison.schedule import TEST, ComparisonSchedule
from gradreg.lab.cost.steps import clock_for, make_step, paired_seconds
from gradreg.lab.folder import BadInput, finite, json_line, shown, write_json, write_text
from gradreg.lab.processes import resolve
from gradreg.lab.records import read_record, read_results, sealed
from gradreg.lab.runs import record
from gradreg.lab.search import Point
from gradreg.lab.stats import median_ratio
from gradreg.lab.sweep.board import Board
from gradreg.lab.sweep.journal import locked
from gradreg.lab.sweep.schedule import Status, key_of
from gradreg.lab.sweep.storage import Place, without_password
from gradreg.lab.sweep.study import Study
from gradreg.lab.task import Loop
from gradreg.lab.tasks import metric_of, task_of

MOST_ROUNDS, LEAST_ROUNDS, SECONDS_OF_COST = 30, 6, 20.0

Row = dict[str, Any]


def begin(folder: Path, plan: Plan, place: Place, command: str, workers: int, not_afforded: list[str]) -> None:
    """Write config.json."""
    about = {
        "kind": KIND,
        "name": folder.resolve().name,
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(workers),
        "versions": versions(),
        "git": git_state(),
        "ran_in": os.getcwd(),
        "task": plan.base.task,
        "metric": task_of(plan.base).metric.as_row(),
        "plan": plan.as_row(),
        "seeds": list(plan.seeds),
        "not_afforded": not_afforded,
        "study": {
            "name": place.name,
            "storage": None if place.url is None else without_password(place.url),
            "grace": place.grace,
        },
    }
    write_json(folder / "config.json", sealed(about))


def find(folder: Path, url: str | None) -> tuple[Plan, Place, Row]:
    """What a folder says about its comparison.

    Raises:
        BadInput: it is none, its record was changed, its database needs a password.
    """
    try:
        about = read_record(folder / "config.json")
        if about.get("kind") != KIND:
            raise ValueError
        study = about["study"]
        plan = Plan.from_row(about["plan"])
        known, name, grace = study["storage"], study["name"], study["grace"]
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"--resume must be the folder of a comparison, got {shown(folder)}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f", whose config.json {error}" if str(error) else ""
        raise BadInput(f"--resume must be the folder of a comparison, got {shown(folder)}{reason}.") from None
    if known is None:
        if url is not None:
            raise BadInput(f"--storage must be left out: the comparison in {shown(folder)} has a journal.")
        if not (folder / "study.log").is_file():
            raise BadInput(f"--resume: study.log is missing from {shown(folder)}; begin again in a new folder.")
        return plan, Place(name, folder.resolve()), about
    if url is None and known.count(":***@"):
        raise BadInput(f"--storage must be given again: the password of {known} is not stored in {shown(folder)}.")
    return plan, Place(name, url=url or known, grace=grace), about


def conclude(folder: Path, place: Place, plan: Plan) -> Row:
    """Write results.json, runs.jsonl and the tracebacks of runs that failed, once; return what results.json holds."""
    (folder / ".locks").mkdir(exist_ok=True)
    with locked(folder / ".locks" / "results"):
        if (folder / "results.json").exists():
            return read_results(folder / "results.json")
        schedule = ComparisonSchedule(plan, metric_of(plan.base))
        with Study(place) as study:
            board = study.board()
        lines = _without_tracebacks(folder, schedule.rows(board))
        write_text(folder / "runs.jsonl", "".join(json_line(sealed(line)) for line in lines))
        costs, how_cost = _costs(schedule, board)
        results = {
            **read_record(folder / "config.json"),
            "training_seconds": round(math.fsum(line["seconds"] for line in lines), 1),
            "num_runs": len(lines),
            "how_cost": how_cost,
            "arms": arm_rows(schedule, board, costs),
        }
        results["verdict"] = verdict(results)
        write_json(folder / "results.json", sealed(results))
        return read_record(folder / "results.json")  # numbers as whoever reads it later finds them


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


def _without_tracebacks(folder: Path, lines: list[Row]) -> list[Row]:
    """Runs that failed with their last line; the whole of it is a file in failed/."""
    found = []
    for line in lines:
        if line.get("error"):
            place = folder / "failed"
            place.mkdir(exist_ok=True)
            count = len(list(place.iterdir()))
            write_text(place / f"{count:04d}-seed-{line['seed']}.txt", line["error"])
            line = {**line, "error": line["error"].strip().splitlines()[-1]}
        found.append(line)
    return found


def keep_tracebacks(folder: Path, place: Place, schedule: ComparisonSchedule) -> int:
    """Of the runs that failed so far, in failed/; how many there are."""
    with Study(place) as study:
        board = study.board()
    whats = {key: board.first[key].user_attrs["what"] for key in board.results}
    lines = [{**record(schedule.job(whats[key]), result)} for key, result in board.results.items()]
    _without_tracebacks(folder, lines)
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
    task, device = task_of(schedule.base), resolve(schedule.base.device)
    assert not isinstance(task, Loop)
    configs = {arm.name: arm.config(schedule.base, choices[arm.name] or {}, 0) for arm in schedule.arms}
    names = [arm.name for arm in schedule.arms if not arm.is_opponent]
    full = {name: replace(configs[name], warmup=0.0, period=1) for name in names}
    between = {f"{name}, between": replace(full[name], period=10**6) for name in names if configs[name].period > 1}
    steps: dict[str, Callable[[], object]] = {
        name: make_step(config, task, device) for name, config in {**full, **between}.items()
    }
    clock = clock_for(device, threads=1)
    started = time.perf_counter()
    paired_seconds(steps, 1, clock, warm_up=1)
    each = (time.perf_counter() - started) / 2
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, SECONDS_OF_COST / each)))
    seconds = paired_seconds(steps, rounds, clock, warm_up=1)
    plain = seconds[BASELINE]
    found: dict[str, Row] = {}
    for arm in schedule.arms:
        took = seconds[BASELINE if arm.is_opponent else arm.name]
        share = 1 / configs[arm.name].period  # of the steps, those with a penalty
        rest = seconds.get(f"{arm.name}, between", took)
        took = [share * a + (1 - share) * b for a, b in zip(took, rest)]
        ratio = median_ratio(took, plain)
        found[arm.name] = {key: value * arm.epochs for key, value in asdict(ratio).items()}
    return found


def _rough_costs(schedule: ComparisonSchedule, board: Board) -> dict[str, Row]:
    progress, results = schedule.progress(board), board.results
    seconds = {}
    for a, arm in enumerate(schedule.arms):
        points = [point for point, _ in progress[arm.name].tried]
        name = f"{a}-{points.index(progress[arm.name].choice)}"  # type: ignore[arg-type]
        seconds[arm.name] = [results[key_of(name, seed, TEST)].seconds for seed in schedule.plan.seeds]
    plain = seconds[BASELINE]
    return {
        name: {"median": median(a / b for a, b in zip(took, plain)), "low": math.nan, "high": math.nan}
        for name, took in seconds.items()
    }
