"""What a piece says: the claims with their verdicts, what cheaper modes keep, what flatness buys. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gradreg.lab import stats
from gradreg.lab.comparison.arms import BASELINE, LONGER, arm_of
from gradreg.lab.comparison.plan import Taken
from gradreg.lab.comparison.result import verdict
from gradreg.lab.config import RunConfig
from gradreg.lab.metric import ACCURACY
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED
from gradreg.studies.frontier.modes import ARMS, FULL, PLAIN
from gradreg.studies.frontier.retention import retention
from gradreg.studies.images.controls import control_name, control_rows, moved
from gradreg.studies.images.flatness import MEASURES
from gradreg.studies.images.pieces import LARGE, MODES, SMALL, Piece

Row = dict[str, Any]
VERDICTS = {stats.BETTER: HOLDS, stats.WORSE: FAILS, stats.UNDECIDED: UNDECIDED}
_SMALL, _LARGE = (arm_of(word, "ratio").name for word in (SMALL, LARGE))
CLAIMS = (
    ("gain", "F-GR generalizes better than SGD.", "F-GR", BASELINE),
    ("equal time", "F-GR generalizes better than SGD for twice as long.", "F-GR", LONGER),
    ("b1", "F-GR generalizes better than DB.", "F-GR", "DB"),
    ("b2", "F-GR generalizes better than B-GR.", "F-GR", "B-GR"),
    ("b4", "A large ε generalizes better, each with the γ that is best for it.", _LARGE, _SMALL),
)
"""Key, what is claimed, and the two arms of which the first should be better."""
CHANCE = 10.0
"""Accuracy of guessing among ten classes, in percent."""


def piece_row(
    piece: Piece,
    results: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]] = (),
    plainly: Sequence[Mapping[str, Any]] = (),
) -> Row:
    """Of results.json of its comparison, a line for each of its models, and one for each run of its controls."""
    arms = {row["name"]: row for row in results["arms"]}
    return {
        "name": piece.name,
        "about": piece.about,
        "seeds": results["seeds"],
        "seconds": results["training_seconds"],
        "num_runs": results["num_runs"],
        "plan": results["plan"],
        "is_earlier": False,
        "made": {name: results[name] for name in ("date", "machine", "versions")},
        "verdict": verdict({**results, "task": piece.about}),
        "arms": list(arms.values()),
        "claims": [
            _claim(*claim, arms) for claim in CLAIMS if claim[0] in piece.claims and {claim[2], claim[3]} <= set(arms)
        ],
        "kept": _kept(arms),
        "controls": control_rows(results["arms"], plainly, results["seeds"]),
        "flatness": flatness_rows(models, [*arms, *dict.fromkeys(map(control_name, moved(results["arms"])))]),
    }


def taken_from(row: Row) -> dict[str, Taken]:
    """What the arms of a piece came to, for one that searches for nothing."""
    return {
        arm["name"]: Taken(
            {name: arm[name] for name in ("learning_rate", "weight_decay")} | arm["settings"], arm["validation"]
        )
        for arm in row["arms"]
    }


def _claim(key: str, says: str, first: str, second: str, arms: Mapping[str, Row]) -> Row:
    ours, theirs = arms[first]["scores"], arms[second]["scores"]
    pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]
    row: Row = {"key": key, "says": says, "first": first, "second": second, "seeds": len(pairs)}
    if len(pairs) < 2:
        return {**row, "difference": None, "verdict": UNDECIDED}
    difference = stats.paired_difference(*map(list, zip(*pairs)))
    return {**row, "difference": asdict(difference), "verdict": VERDICTS[ACCURACY.verdict(difference)]}


def _kept(arms: Mapping[str, Row]) -> list[Row]:
    """Where F-GR gains beyond noise, the share of it that each other arm keeps, and its cost in the same run."""
    if arms["F-GR"].get("verdict") != stats.BETTER:
        return []
    percent = {name: [math.nan if s is None else 100 * s for s in row["scores"]] for name, row in arms.items()}
    return [
        {
            "name": name,
            "retention": asdict(retention(percent[name], percent["F-GR"], percent[BASELINE], CHANCE)),
            "cost": row["cost"],
        }
        for name, row in arms.items()
        if name not in (BASELINE, "F-GR")
    ]


def as_tasks(pieces: Sequence[Row]) -> list[Row]:
    """Where there is something to keep, as tasks of the frontier, with the costs measured there; pieces of one task as
    one."""
    found: list[Row] = []
    for piece in pieces:
        if not (kept := [row for row in piece["kept"] if row["cost"]]):
            continue
        base = {**asdict(RunConfig()), **piece["plan"]["base"]}  # that of an earlier version lacks what came later
        is_earlier = piece.get("is_earlier", False)
        task = next((t for t in found if (t["base"], t["is_earlier"]) == (base, is_earlier)), None)
        if task is None:
            found.append(task := {**_as_task(piece), "base": base, "is_earlier": is_earlier})
        task["methods"].update(piece["plan"]["methods"])
        known = {row["name"] for row in task["modes"]}
        task["modes"] += [
            {**row, "cost": {"larger": row["cost"]}, "is_opponent": row["name"] == LONGER}
            for row in kept
            if row["name"] not in known
        ]
    return found


def _as_task(piece: Row) -> Row:
    """What plain training and the full method cost, by the names that the frontier has for them."""
    arms = {row["name"]: row for row in piece["arms"]}
    ends = {PLAIN.name: arms[BASELINE], FULL.name: arms["F-GR"]}
    return {
        "name": piece["about"],
        "verdict": arms["F-GR"]["verdict"],
        "gain": {key: 100 * value for key, value in arms["F-GR"]["difference"].items()},
        "methods": {*piece["plan"]["methods"]},
        "modes": [
            {"name": name, "retention": None, "cost": {"larger": row["cost"]}, "is_opponent": False}
            for name, row in ends.items()
        ],
    }


def real_tasks(results: Row) -> list[Row]:
    """For the frontier: the tasks on which all its modes were played, first those where there is something to keep."""
    others = [
        {**_as_task(piece), "is_earlier": piece.get("is_earlier", False)}
        for piece in results["pieces"]
        if not piece["kept"] and next(arm for arm in piece["arms"] if arm["name"] == "F-GR").get("difference")
    ]
    return [
        {
            "name": task["name"],
            "verdict": task["verdict"],
            "gain": task["gain"],
            "is_earlier": task["is_earlier"],
            "modes": [
                {**row, "name": ARMS.get(row["name"], row["name"])}
                for row in task["modes"]
                if row["name"] in (PLAIN.name, FULL.name, *ARMS)
            ],
        }
        for task in (*as_tasks(results["pieces"]), *others)
        if task["methods"] >= set(MODES)
    ]


def flatness_rows(models: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[Row]:
    """The mean of each measure over the seeds of each arm, and on which side of SGD its paired interval lies."""
    by_arm = {arm: {row["seed"]: row for row in models if row["arm"] == arm} for arm in arms}
    found = []
    for arm, rows in by_arm.items():
        if len(rows) < 2:
            continue
        cells = {}
        for name in MEASURES:
            # Lines of an earlier version lack what came later.
            finite = {seed: row[name] for seed, row in rows.items() if row.get(name) is not None}
            plain = {seed: row[name] for seed, row in by_arm[BASELINE].items() if row.get(name) is not None}
            shared = [seed for seed in finite if seed in plain]
            side = 0
            if arm != BASELINE and len(shared) > 1:
                difference = stats.paired_difference([finite[s] for s in shared], [plain[s] for s in shared])
                side = (difference.low > 0) - (difference.high < 0)
            cells[name] = {"mean": math.fsum(finite.values()) / len(finite) if finite else None, "side": side}
        found.append({"name": arm, "models": len(rows), "measures": cells})
    return found
