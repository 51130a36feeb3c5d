"""The record beside a page: all that the page shows of each piece, as JSON.

A page stands on hours of runs, and folders of runs get lost. A piece that the folder in hand does not have stays on the
page from here, so that pieces can be played on other machines, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradreg.lab.comparison.plan import Plan
from gradreg.lab.folder import BadInput, shown, write_json
from gradreg.lab.records import read_record, sealed
from gradreg.studies.images.pieces import PIECES, Piece

Row = dict[str, Any]


def place_of(page: Path) -> Path:
    """`docs/images.json` of docs/images.md."""
    return page.with_suffix(".json")


def recorded(page: Path, is_quick: bool, plan_of: Callable[[Piece], Plan]) -> list[Row]:
    """The rows of the pieces that lie beside a page, as `current` has them; none where there is no record.

    Raises:
        BadInput: another file, or the record of a full study, which a quick one would replace, or the other way round.
    """
    path = place_of(page)
    try:
        record = read_record(path)
        if not str(record.get("command")).startswith("gradreg images"):
            raise ValueError("is of something else")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"{shown(path)}, beside the page of --write, must be its record, and {why}.") from None
    if record["is_quick"] != is_quick:
        held = "quick" if record["is_quick"] else "full"
        raise BadInput(f"--write must be another page: {shown(path)} beside it is the record of a {held} study.")
    return current(record["pieces"], plan_of)


def current(rows: Sequence[Row], plan_of: Callable[[Piece], Plan]) -> list[Row]:
    """Without pieces of another task than this version's; one that was searched for by another plan `is_earlier`, and
    of one that has not all of its arms yet it is told what it `lacks`."""
    found = []
    for row in rows:
        if row["name"] in PIECES:
            own, plan = Plan.from_row(row["plan"]), plan_of(PIECES[row["name"]])
            lacks = [method for method in plan.methods if method not in own.methods]
            own = replace(own, base=replace(own.base, path=plan.base.path), taken=plan.taken)
            own = replace(own, methods=(*own.methods, *lacks))
            if (own.base, own.first_seed) == (plan.base, plan.first_seed):
                found.append({**row, "is_earlier": own != plan, "lacks": lacks})
    return found


def write_record(page: Path, results: Mapping[str, Any]) -> None:
    """Every piece of a page."""
    write_json(place_of(page), sealed(results))


def merged(planned: Sequence[str], *sources: Sequence[Row]) -> list[Row]:
    """A row for each piece that is there, in the order of the plan: from the first source that has it by this version's
    plan, with most of its arms, or else by an earlier one."""
    found: dict[str, Row] = {}
    rows = [row for source in sources for row in source]
    for row in sorted(rows, key=lambda row: (row["is_earlier"], len(row["lacks"]))):
        found.setdefault(row["name"], row)
    return [found[name] for name in planned if name in found]
