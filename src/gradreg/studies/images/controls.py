"""Plain training at the learning rate and weight decay of the other arms.

Validation rows may prefer for an arm another learning rate or weight decay than for the baseline: what it gains may be
the method's, or theirs. Here the baseline has them, on the seeds of the test; its models
are kept too, since with a norm layer the weight decay alone sets the length of weights, and by it all derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from gradreg.lab import stats
from gradreg.lab.comparison.arms import BASELINE
from gradreg.lab.config import RunConfig
from gradreg.lab.runs import Job

Row = dict[str, Any]
RATES = ("learning_rate", "weight_decay")


def moved(arms: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The arms that came to another learning rate or weight decay than the baseline, the first one; no opponents."""
    return [arm for arm in arms[1:] if not arm["is_opponent"] and _rates(arm) != _rates(arms[0])]


def controls(base: RunConfig, arms: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Job]:
    """The runs of plain training that are wanted, each once."""
    points = dict.fromkeys(_rates(arm) for arm in moved(arms))
    return [
        Job(replace(base, **dict(zip(RATES, point)), seed=seed), "test", num_records=0)
        for point in points
        for seed in seeds
    ]


def control_name(row: Mapping[str, Any]) -> str:
    """As the table has it: `SGD, lr 0.1, wd 0.0135`."""
    rate, decay = _rates(row)
    return f"{BASELINE}, lr {rate:g}, wd {decay:g}"


def line(job: Job, score: float | None) -> Row:
    """What is kept of a run."""
    return {**{name: getattr(job.config, name) for name in RATES}, "seed": job.config.seed, "score": score}


def control_rows(
    arms: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[Row]:
    """For each arm that moved: how plain training does there, and the arm minus that, paired by seed if it can be."""
    found = []
    for arm in moved(arms):
        of_seed = {row["seed"]: row["score"] for row in lines if _rates(row) == _rates(arm)}
        scores = [of_seed.get(seed) for seed in seeds]
        if not scores or None in scores:
            continue
        there = [score for score in scores if score is not None]
        row: Row = {"name": arm["name"], **dict(zip(RATES, _rates(arm))), "test": asdict(stats.mean_interval(there))}
        ours = arm.get("scores")
        if ours is not None and None not in ours:
            row["difference"] = asdict(stats.paired_difference(ours, there))
        elif arm["test"] is not None:
            row["difference"] = {"mean": arm["test"]["mean"] - row["test"]["mean"], "low": math.nan, "high": math.nan}
        else:
            row["difference"] = None
        found.append(row)
    return found


def _rates(row: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(row[name] for name in RATES)
