"""The tables of the study: functions of the rows of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradreg.lab.comparison.arms import BASELINE, LONGER
from gradreg.lab.metric import ACCURACY
from gradreg.lab.stats import BETTER, WORSE
from gradreg.lab.tables import Table
from gradreg.lab.words import BRACKETS, gap, listed, number, percent, points, ranged
from gradreg.studies.frontier.modes import ARMS, MODES
from gradreg.studies.images.controls import RATES
from gradreg.studies.images.flatness import MEASURES, SHARES

Row = Mapping[str, Any]
DAGGER = " †"
NOT_MEASURED = {"mean": None, "side": 0}
GLANCE = ("F-GR", "SAM", "cheap", LONGER)
ARROWS = {-1: "↓", 0: "", 1: "↑"}


def is_earlier(piece: Row) -> bool:
    return piece.get("is_earlier", False)


def named(piece: Row) -> str:
    return piece["name"] + DAGGER * is_earlier(piece)


def about(piece: Row) -> str:
    return piece["about"] + DAGGER * is_earlier(piece)


def as_comparison(piece: Row) -> Row:
    return {"metric": ACCURACY.as_row(), "task": about(piece), "arms": piece["arms"]}


def glance_table(pieces: Sequence[Row]) -> Table:
    """What the arms that most pieces have gain over plain training; of the pieces of one task the first."""
    rows, seen = [], []
    for piece in pieces:
        if (base := piece["plan"]["base"]) not in seen:
            seen.append(base)
            arms = {arm["name"]: arm for arm in piece["arms"]}
            gains = [_marked(arms[name]) if name in arms and arms[name]["difference"] else "–" for name in GLANCE]
            rows.append((about(piece), percent(arms[BASELINE]["test"]), *gains))
    costs = [[arm["cost"]["median"] for arm in _named(name, pieces) if arm["cost"]] for name in GLANCE]
    spans = [_span(found) for found in costs]
    return Table("", ("task", "SGD, %", *GLANCE), [*rows, ("time, over SGD's", "1.00", *spans)])


def _named(name: str, pieces: Sequence[Row]) -> list[Row]:
    """An arm, of each piece that has it."""
    return [arm for piece in pieces for arm in piece["arms"] if arm["name"] == name]


def _span(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _marked(arm: Row) -> str:
    """Its gain over SGD, with an arrow where that is beyond noise."""
    arrow = {BETTER: ARROWS[1], WORSE: ARROWS[-1]}.get(arm["verdict"], "")
    return gap(arm["difference"], ACCURACY).replace(" (", f"{arrow} (")


def claims_table(results: Row) -> Table:
    rows = [
        (
            named(piece),
            claim["key"],
            f"{claim['first']} − {claim['second']}",
            points(claim["difference"]),
            claim["verdict"],
        )
        for piece in results["pieces"]
        for claim in piece["claims"]
    ]
    return Table(
        "What is claimed, and what came out", ("piece", "claim", "measured", "points, 95 % interval", "verdict"), rows
    )


def kept_table(results: Row) -> Table:
    """Retention over measured time, where there is something to retain."""
    rows = [
        (named(piece), row["name"], ranged(row["cost"], 2), ranged(row["retention"], 2, "", BRACKETS))
        for piece in results["pieces"]
        for row in piece["kept"]
    ]
    return Table("Kept of what F-GR gains", ("piece", "arm", "cost", "share, 95 % interval"), rows)


def arms_table(pieces: Sequence[Row]) -> Table:
    """What each arm is; of the frontier's modes in its words."""
    arms = {arm["name"]: arm for piece in pieces for arm in piece["arms"]}
    told = {name: MODES[ARMS[name]].about if name in ARMS else arm["about"] for name, arm in arms.items()}
    return Table("", ("arm", "what it is"), [*told.items()])


def controls_table(results: Row) -> Table:
    """Plain training where other arms have come to."""
    rows = [
        (
            named(piece),
            row["name"],
            f"{row['learning_rate']:g}, {row['weight_decay']:g}",
            gap(next(arm for arm in piece["arms"] if arm["name"] == row["name"])["difference"], ACCURACY),
            percent(row["test"]),
            _gap(row["difference"]),
        )
        for piece in results["pieces"]
        for row in piece.get("controls", [])
    ]
    headings = ("piece", "arm", "its lr, wd", "minus SGD as tuned", "SGD there, %", "minus SGD there")
    return Table("", headings, rows)


def _gap(difference: Row | None) -> str:
    """Alone where the single seeds are lost."""
    if difference is None or difference["low"] is not None:
        return gap(difference, ACCURACY)
    return number(100 * difference["mean"], 1, "+")


def flatness_table(piece: Row) -> Table:
    def cell(name: str, found: Row) -> str:
        if found["mean"] is None:
            return "–"
        mean = found["mean"]
        value = number(100 * mean) if name in SHARES else f"{mean:.3g}" if abs(mean) < 1000 else f"{mean:,.0f}"
        return value.replace("-", "−") + ARROWS[found["side"]]

    rows = [
        (row["name"], *(cell(name, row["measures"].get(name, NOT_MEASURED)) for name in MEASURES))
        for row in piece["flatness"]
    ]
    counts = listed([str(count) for count in sorted({row["models"] for row in piece["flatness"]})])
    title = f"{about(piece)}; means over {counts} models"
    return Table(title, ("arm", *MEASURES.values()), rows)


def flatness_counts(pieces: Sequence[Row]) -> Table:
    """In how many pieces a measure is beyond noise above or below SGD's, at SGD's own learning rate and weight decay;
    of plain training for twice as long in any piece."""
    counts: dict[str, list[Row]] = {}
    for piece in pieces:
        arms = {arm["name"]: arm for arm in piece["arms"]}
        for row in piece["flatness"]:
            arm = arms.get(row["name"])
            if arm and arm["name"] != BASELINE and (arm["is_opponent"] or _rates(arm) == _rates(arms[BASELINE])):
                counts.setdefault(arm["name"], []).append(row["measures"])

    def cell(name: str, found: Sequence[Row]) -> str:
        sides = [row.get(name, NOT_MEASURED)["side"] for row in found]
        return " ".join(f"{sides.count(side)}{ARROWS[side]}" for side in (1, -1) if side in sides)

    last = sorted(counts, key=lambda name: name == LONGER)
    rows = [(name, str(len(counts[name])), *(cell(key, counts[name]) for key in MEASURES)) for name in last]
    return Table("", ("arm", "pieces", *MEASURES.values()), rows)


def _rates(arm: Row) -> list[float]:
    return [arm[name] for name in RATES]
