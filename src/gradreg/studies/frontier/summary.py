"""What the runs and the measured times say together: a row for each mode, and the sentences. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gradreg.lab import stats
from gradreg.lab.stats import Interval, Ratio
from gradreg.studies.frontier.figure import Panel, Point
from gradreg.studies.frontier.modes import FULL, MODES, PLAIN, Candidate
from gradreg.studies.frontier.retention import gain, retention

Row = Mapping[str, Any]
CHANCE = 10.0
"""Accuracy of guessing, in percent: all tasks have ten classes."""


def task_row(
    name: str,
    about: str,
    runs: Mapping[str, Sequence[Row]],
    costs: Mapping[str, Mapping[str, Ratio]],
    chosen: Mapping[str, Candidate],
) -> Row:
    """A task: what the full method gains, and a row for each mode.

    Args:
        name: of the task.
        about: what it is.
        runs: of each mode, by rising seed; plain training and the full method among them.
        costs: measured, by what was timed (`larger`, `batched`, `engine`) and mode.
        chosen: the hyper-parameters of each mode.
    """
    accuracies = {mode: _percent(rows) for mode, rows in runs.items()}
    plain, full = accuracies[PLAIN.name], accuracies[FULL.name]
    gained = gain(full, plain, CHANCE)
    verdict = stats.verdict(gained, _one_row(runs[FULL.name]))
    return {
        "name": name,
        "about": about,
        "gain": asdict(gained),
        "verdict": verdict,
        "modes": [
            _mode_row(mode, rows, accuracies, costs, chosen[mode], can_retain=verdict == stats.BETTER)
            for mode, rows in runs.items()
        ],
    }


def _mode_row(
    name: str,
    runs: Sequence[Row],
    accuracies: Mapping[str, Sequence[float]],
    costs: Mapping[str, Mapping[str, Ratio]],
    chosen: Candidate,
    can_retain: bool,
) -> Row:
    own, plain, full = accuracies[name], accuracies[PLAIN.name], accuracies[FULL.name]
    mode = MODES[name]
    found: dict[str, Any] = {
        "name": name,
        "about": mode.about,
        "is_opponent": mode.is_opponent,
        "accuracies": list(own),
        "accuracy": asdict(stats.mean_interval([CHANCE if math.isnan(a) else a for a in own])),
        "retention": asdict(retention(own, full, plain, CHANCE)) if can_retain else None,
        "cost": {what: asdict(_times(ratios[name], mode.epochs)) for what, ratios in costs.items() if name in ratios},
        "grad_norm": _mean([row["grad_norm"] for row in runs]),
        "hessian_trace": _mean([row.get("hessian_trace") for row in runs]),
        "diverged": sum(row["diverged"] for row in runs),
        **asdict(chosen),
    }
    if name != PLAIN.name:
        difference = gain(own, plain, CHANCE)
        found |= {"difference": asdict(difference), "verdict": stats.verdict(difference, _one_row(runs))}
    return found


def _percent(runs: Sequence[Row]) -> list[float]:
    return [math.nan if row["diverged"] else 100 * row["accuracy"] for row in runs]


def _one_row(runs: Sequence[Row]) -> float:
    return 100 * stats.one_row(row.get("num_scored") for row in runs)


def _times(ratio: Ratio, factor: float) -> Ratio:
    """Of a whole run: a mode with more steps costs as much more."""
    return Ratio(ratio.median * factor, ratio.low * factor, ratio.high * factor)


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def price(row: Row) -> float:
    """The cost by which a mode is judged: in the real engine, on a model that is large enough for arithmetic to count.

    What only stacks can do has its price in the batched engine.
    """
    return (row["cost"].get("larger") or row["cost"]["batched"])["median"]


def panels(tasks: Sequence[Row]) -> list[Panel]:
    """What is drawn: the tasks on which the full method gains."""
    found = []
    for task in tasks:
        full = next(row for row in task["modes"] if row["name"] == FULL.name)
        points = [
            Point(row["name"], price(row), Interval(**row["retention"]), row["is_opponent"])
            for row in task["modes"]
            if row["name"] not in (PLAIN.name, FULL.name) and row["retention"] is not None
        ]
        if points:
            found.append(Panel(task["name"], points, price(full)))
    return found


GOALS = (
    ("at most 1.10×, above 0.9 of the gain", 1.10, 0.9),
    ("at most 1.02×, above 0.8 of the gain", 1.02, 0.8),
    ("at most 1.10×, above the full method", 1.10, 1.0),
)
"""What a mode should reach on every task: the most that it may cost, and what its interval must lie above."""


def judging(tasks: Sequence[Row]) -> list[Row]:
    """The tasks where the full method gains beyond noise: elsewhere there is nothing to retain."""
    return [task for task in tasks if task["verdict"] == stats.BETTER]


def alike(tasks: Sequence[Row]) -> list[Row]:
    """With the modes alone that all of them have."""
    shared = set.intersection(*({row["name"] for row in task["modes"]} for task in tasks)) if tasks else set()
    return [{**task, "modes": [row for row in task["modes"] if row["name"] in shared]} for task in tasks]


def goals(tasks: Sequence[Row]) -> list[Row]:
    """For each goal the modes that reach it on every task that judges, and those whose mean does."""
    tasks = judging(tasks)
    found = []
    for text, most, least in GOALS:
        reached, nearly = [], []
        for name in dict.fromkeys(row["name"] for task in tasks for row in task["modes"]):
            if name in (PLAIN.name, FULL.name):
                continue
            rows = [row for task in tasks for row in task["modes"] if row["name"] == name]
            kept = [row["retention"] for row in rows]
            if any(k is None for k in kept) or any(price(row) > most for row in rows):
                continue
            if all(k["low"] > least for k in kept):
                reached.append(name)
            elif all(k["mean"] > least for k in kept):
                nearly.append(name)
        found.append({"goal": text, "cost": most, "retention": least, "reached": reached, "nearly": nearly})
    return found


def worst(tasks: Sequence[Row], name: str) -> Row | None:
    """The retention of a mode on the task where it is least, of those on which there is one."""
    rows = [row["retention"] for task in tasks for row in task["modes"] if row["name"] == name]
    return min((kept for kept in rows if kept is not None), key=lambda kept: kept["mean"], default=None)
