"""What the runs of a game say: a row for each arm, with verdicts. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from gradreg.lab import stats
from gradreg.studies.hacking.arms import ARMS, NONE
from gradreg.studies.hacking.training import Outcome, Reading

Row = dict[str, Any]
APART = 0.1
"""True and proxy reward part where the verifier pays so much more than was earned."""


def game_row(game: str, outcomes: Mapping[str, Sequence[Outcome]], chosen: Mapping[str, float], asked: int) -> Row:
    """
    Args:
        game: its name.
        outcomes: of each arm, by rising seed.
        chosen: its number.
        asked: prompts that a share is of.
    """
    plain = outcomes[NONE.name]
    return {"game": game, "arms": [_arm(name, outcomes[name], plain, chosen[name], 1 / asked) for name in ARMS]}


def _arm(name: str, mine: Sequence[Outcome], plain: Sequence[Outcome], value: float, margin: float) -> Row:
    last = [outcome.last for outcome in mine]
    true = [reading.true for reading in last]
    row: Row = {
        "name": name,
        "about": ARMS[name].about,
        "symbol": ARMS[name].symbol,
        "value": None if math.isnan(value) else value,
        "candidates": [v for v in ARMS[name].values if not math.isnan(v)],
        "scores": true,
        **{
            key: asdict(stats.mean_interval([getattr(r, key) for r in last]))
            for key in ("true", "proxy", "hacks", "kl")
        },
        "parts": [_parts(outcome.readings) for outcome in mine],
        "steps": [outcome.steps for outcome in mine],
        "cost": median((a.seconds / a.steps) / (b.seconds / b.steps) for a, b in zip(mine, plain)),
        "curve": curve([outcome.readings for outcome in mine]),
    }
    if name != NONE.name:
        difference = stats.paired_difference(true, [outcome.last.true for outcome in plain])
        row |= {"difference": asdict(difference), "verdict": stats.verdict(difference, margin)}
    return row


def _parts(readings: Sequence[Reading]) -> int | None:
    """The first step that was read at which true and proxy reward are apart."""
    return next((reading.step for reading in readings if reading.proxy - reading.true >= APART), None)


def curve(runs: Sequence[Sequence[Reading]]) -> list[Row]:
    """Mean, least and most over seeds of true and proxy reward, at the steps that all have."""
    points = []
    for moment in zip(*runs):
        if len({reading.step for reading in moment}) > 1:  # the last of runs that were stopped
            break
        point: Row = {"step": moment[0].step}
        for key in ("true", "proxy"):
            values = [getattr(reading, key) for reading in moment]
            point[key] = {"mean": math.fsum(values) / len(values), "low": min(values), "high": max(values)}
        points.append(point)
    return points


def parted(row: Mapping[str, Any]) -> str:
    """`15`, the median step; how many seeds, where they do not all part; `never`."""
    found = [step for step in row["parts"] if step is not None]
    if not found:
        return "never"
    many = "" if len(found) == len(row["parts"]) else f", {len(found)} of {len(row['parts'])}"
    return f"{median(found):.0f}{many}"
