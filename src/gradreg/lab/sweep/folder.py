"""The folder of a sweep: how one starts, is found again, and ends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from gradreg.lab.about import git_state, machine, versions
from gradreg.lab.cost.steps import clock_for, make_step, paired_seconds
from gradreg.lab.data import load
from gradreg.lab.folder import BadInput, write_json, write_text
from gradreg.lab.sweep.journal import locked
from gradreg.lab.sweep.plan import SETTINGS, Row, Sweep, axes, from_plan
from gradreg.lab.sweep.schedule import Schedule
from gradreg.lab.sweep.search import Range
from gradreg.lab.sweep.storage import Place, without_password
from gradreg.lab.sweep.study import Study
from gradreg.lab.tables import console, say, table_of
from gradreg.lab.train.processes import resolve
from gradreg.lab.words import accuracy, difference, settings, shown

COST_ROUNDS = 30


def begin(folder: Path, sweep: Sweep, place: Place, command: str, workers: int, is_batched: bool) -> None:
    """Write config.json: what a report and `--resume` read."""
    varied: dict[str, list[Any]] = axes(sweep.grid)
    for block in sweep.blocks if sweep.trials is not None else ():
        for name, axis in {"method": (block.method,), **block.axes}.items():
            values = (axis.low, axis.high) if isinstance(axis, Range) else axis
            varied[name] = list(dict.fromkeys([*varied.get(name, []), *values]))
    plan = sweep.plan()
    write_json(
        folder / "config.json",
        {
            "name": folder.resolve().name,
            "command": command,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": machine(workers),
            "versions": versions(),
            "git": git_state(),
            "base": plan["base"],
            "axes": varied,
            "seeds": list(sweep.seeds),
            "plan": plan,
            "study": {
                "name": place.name,
                "storage": None if place.url is None else without_password(place.url),
                "grace": place.grace,
                "batched": is_batched,
            },
        },
    )


def find(folder: Path, url: str | None) -> tuple[Sweep, Place, bool]:
    """What a folder says about its sweep: the sweep, where its study is, and whether it runs in batches.

    Raises:
        BadInput: it is not the folder of a sweep, or its database needs a password.
    """
    shown = ascii(str(folder))
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        plan, study = about["plan"], about["study"]
        name, known, grace, is_batched = (study[key] for key in ("name", "storage", "grace", "batched"))
        if not (isinstance(plan, Mapping) and isinstance(name, str) and isinstance(grace, int)):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--resume must be the folder of a sweep, got {shown}.") from None
    sweep = from_plan(plan)
    if known is None:
        if url is not None:
            raise BadInput(f"--storage must be left out: the sweep in {shown} has a journal.")
        if not (folder / "study.log").is_file():
            raise BadInput(f"--resume must be the folder of a sweep, got {shown}, from which study.log is missing.")
        return sweep, Place(name, folder), bool(is_batched)
    if url is None and known.count(":***@"):
        raise BadInput(f"--storage must be given again: the password of {known} is not stored in {shown}.")
    return sweep, Place(name, url=url or known, grace=grace), bool(is_batched)


def conclude(folder: Path, place: Place) -> Row:
    """Write results.json and the whole of runs.jsonl from the study, once; return what results.json holds."""
    (folder / ".locks").mkdir(exist_ok=True)
    with locked(folder / ".locks" / "results"):
        if (folder / "results.json").exists():
            return json.loads((folder / "results.json").read_text(encoding="utf-8"))
        with Study(place) as study:
            schedule = Schedule(from_plan(study.plan))
            board = study.board()
        rows, summary = schedule.rows(board), schedule.summary(board)
        write_text(folder / "runs.jsonl", "".join(_line(row) for row in rows))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {name for point in summary["points"] for name in point} - _MEASURED
        points = [{name: point[name] for name in point if name in names} for point in summary["points"]]
        results = {
            **config,
            "axes": axes(points),
            "seconds": round(math.fsum(row["seconds"] for row in rows), 1),
            "costs": _costs(schedule.sweep, summary["best"]),
            **summary,
        }
        write_json(folder / "results.json", results)
        return results


_MEASURED = {"validation_accuracy", "num_seeds", "diverged"}


def _line(row: Row) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _costs(sweep: Sweep, best: Mapping[str, Row]) -> dict[str, float]:
    """A step of each method at its best point, relative to SGD's at its own: the median over paired rounds."""
    data, device = load(sweep.base), resolve(sweep.base.device)
    points = {method: {name: row[name] for name in row if name not in _MEASURED} for method, row in best.items()}
    steps = {method: make_step(replace(sweep.base, **point), data, device) for method, point in points.items()}
    seconds = paired_seconds(steps, COST_ROUNDS, clock_for(device, threads=1))
    return {name: median(a / b for a, b in zip(seconds[name], seconds["SGD"])) for name in steps}


def print_table(results: Row, folder: Path) -> None:
    """The best point of each method, and where to read on."""
    out = console()
    chosen = table_of(None, ["method", "validation, %", "best settings"], words=["best settings"])
    table = table_of(None, ["method", "test, %", "minus SGD, points", "difference", "cost"], words=["difference"])
    for method, point in results["best"].items():
        tested = results["test"][method]
        chosen.add_row(method, f"{100 * point['validation_accuracy']['mean']:.1f}", _settings(point))
        table.add_row(method, accuracy(tested), difference(tested), shown(tested), f"{results['costs'][method]:.2f}×")
    for part in (chosen, "", table, ""):
        out.print(part)
    runs = (len(results["points"]) + len(results["best"])) * len(results["seeds"])
    say(
        out,
        f"{len(results['points'])} points, {len(results['seeds'])} seeds, {runs} runs, {results['seconds']:.0f} s of "
        "training. The best point of each method was chosen on validation rows; test rows were read once.",
    )
    print(f"Page: gradreg report {folder}")


def _settings(point: Row) -> str:
    own = settings({"settings": {name: point[name] for name in SETTINGS if name in point}})
    short = {"learning_rate": "lr", "weight_decay": "wd"}
    rest = [
        f"{short.get(name, name)} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in point.items()
        if name not in (*SETTINGS, *_MEASURED, "method")
    ]
    return ", ".join([*([own] if own else []), *rest])
