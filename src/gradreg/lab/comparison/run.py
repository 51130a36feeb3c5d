"""A comparison from its beginning to its page: the same for the command line and for Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradreg.lab import tasks
from gradreg.lab.batched import is_worthwhile
from gradreg.lab.comparison import folder as folders
from gradreg.lab.comparison.plan import LADDER, Effort, Plan, example
from gradreg.lab.comparison.schedule import ALL_FAILED, ComparisonSchedule, schedule_of
from gradreg.lab.folder import BadInput, Hopeless
from gradreg.lab.runs import Job, run
from gradreg.lab.study.complete import check_complete
from gradreg.lab.study.storage import Place
from gradreg.lab.study.study import Study
from gradreg.lab.study.workers import Worker, work_together
from gradreg.lab.task import Loop

PASSES = {"SGD": 1.0, "Flooding": 1.0, "Central": 3.0, "DB": 3.0, "cheap": 1.1, "ahead": 1.2, "MSAM": 1.1, "Split": 1.1}
"""Gradients in a step, about; two for all others."""


@dataclass(frozen=True)
class Afforded:
    """What a budget buys."""

    effort: Effort
    not_afforded: list[str]


def check(plan: Plan) -> None:
    """That there can be a run of each arm, before anything is made.

    Raises:
        BadInput: a task that does not run, a method that the task does not bear.
    """
    task = tasks.task_of(plan.base)
    if plan.effort.search_epochs >= plan.base.epochs:
        most = f"from 1 to {plan.base.epochs - 1}, less than the epochs of a run"
        raise BadInput(f"--search-epochs must be {most}, got '{plan.effort.search_epochs}'.")
    for arm in plan.arms:
        example(plan, arm)
    if isinstance(task, Loop):
        return
    if plan.base.file is not None:
        tasks.check(plan.base)
    else:
        task.build(plan.base.seed)


def afforded(plan: Plan, seconds: float, workers: int) -> Afforded:
    """The most that a budget pays for, by the time of a first epoch, or of a first run where the loop is the user's.

    Raises:
        BadInput: it does not pay for the least.
    """
    torch.set_num_threads(1)  # as the workers have it
    of_a_run = seconds_of_a_run(plan)
    passes = sum(PASSES.get(arm.name, PASSES.get(arm.method, 2.0)) * arm.epochs for arm in plan.arms)

    def needed(effort: Effort) -> float:
        # The baseline's search goes on while it finds better; then each arm is tried where another ended.
        retried = effort.search_seeds + effort.final_seeds
        more = 2 * effort.trials * effort.search_seeds + (len(plan.arms) + passes) * retried
        # The last runs leave workers idle, and test runs record their curves; workers take a while to start.
        return (effort.runs * passes + more) * of_a_run / workers * 1.3 + 8

    fitting = [effort for effort in LADDER if needed(effort) <= seconds]
    if not fitting:
        raise BadInput(
            f"--budget must be at least {duration(needed(LADDER[-1]))} for {len(plan.arms)} arms of this task with "
            f"{workers} worker{'s' * (workers > 1)} (a run takes about {duration(of_a_run)}): fewer --methods or "
            "--epochs need less."
        )
    best = fitting[0]
    buys = f"{best.trials} candidates and {best.seeds} seeds of each arm"
    said = [f"The budget of {duration(seconds)} pays for {buys}: about {duration(needed(best))}."]
    if best != LADDER[0]:
        more = LADDER[LADDER.index(best) - 1]
        said[0] += f" Not afforded: {more.trials} and {more.seeds}, about {duration(needed(more))}."
    return Afforded(best, said)


def seconds_of_a_run(plan: Plan) -> float:
    """Of plain training, by one epoch and by three, after one that is not counted; of a user's loop by a whole run.

    Raises:
        BadInput: it raised something.
    """

    def took(epochs: int) -> float:
        config = replace(plan.base, epochs=epochs, seed=plan.search_seeds[0])
        found = run(Job(config, "validation", 0))
        if found.error:
            raise BadInput(f"the task must run, and raised {found.error.strip().splitlines()[-1][:200]}.")
        return found.seconds

    epochs = plan.base.epochs
    if isinstance(tasks.task_of(plan.base), Loop):
        first = took(epochs)
        return took(epochs) if first < 20 else first  # the first one imports
    first = took(1)
    if first > 20 or epochs <= 3:
        return first * epochs
    one, three = took(1), took(3)
    of_an_epoch = max((three - one) / 2, 0.1 * one)
    return max(one - of_an_epoch, 0) + epochs * of_an_epoch


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seconds_of(text: str) -> float:
    """
    Raises:
        BadInput: no duration such as 90s, 30m, 2h.
    """
    units = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
    number = text.strip().lower().rstrip("smindh")
    unit = text.strip().lower()[len(number) :]
    try:
        value = float(number) * units[unit]
        if not 0 < value <= 90 * 86400:
            raise ValueError
    except (ValueError, KeyError):
        raise BadInput(f"--budget must be a time with its unit, such as 90s, 30m or 2h, got {text!a}.") from None
    return value


def begin(plan: Plan, folder: Path, place: Place, command: str, workers: int, not_afforded: Sequence[str]) -> None:
    """Enter the plan in its study, and write the folder's config.json."""
    open_study(place, plan)
    folders.begin(folder, plan, place, command, workers, list(not_afforded))


def known(folder: Path, url: str | None = None) -> tuple[Plan, Place]:
    """The comparison of a folder, to go on with.

    Raises:
        BadInput: it is none, its record was changed, or its study has lost runs that had finished.
    """
    plan, place, about = folders.find(folder, url)
    check_complete(folder, place, ComparisonSchedule(plan, tasks.metric_of(plan.base)), about.get("command"))
    return plan, place


def open_study(place: Place, plan: Plan) -> None:
    """
    Raises:
        BadInput: the study is another's, or of another plan.
    """
    with Study(place, plan.as_row()):
        pass


def carry_out(
    plan: Plan, folder: Path, place: Place, workers: int, data: tuple[str | None, str | None] = (None, None)
) -> dict[str, Any]:
    """Play all runs that are left, with others if there are; what results.json holds.

    Args:
        plan: what is compared.
        folder: of the comparison.
        place: of its study.
        workers: processes.
        data: the path of the plan's data, and the place that it stands for now.

    Raises:
        Hopeless: a task that has changed since, or whose every run fails.
    """
    if plan.digest and plan.digest != tasks.digest_of(plan.base.file):  # of an object in hand there is none
        raise Hopeless(f"TASK must be as it was when all began, and {plan.base.file} has changed: begin anew.")
    task = tasks.task_of(plan.base)
    stacks = (
        not isinstance(task, Loop)
        and not plan.keeps_models
        and all(is_worthwhile(example(plan, arm)) for arm in plan.arms)
    )
    schedule = ComparisonSchedule(plan, task.metric)
    try:
        work_together(Worker(folder.resolve(), place, schedule_of, stacks, workers, tasks.sources(), data), schedule)
    except BadInput as error:
        if ALL_FAILED not in str(error):
            raise
        count = folders.keep_tracebacks(folder, place, schedule)
        kept = f"; {count} tracebacks are in {folder / 'failed'}" if count else ""
        raise Hopeless(f"{str(error).rstrip('.')}{kept}.") from error
    return folders.conclude(folder, place, plan)
