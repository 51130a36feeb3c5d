"""The folder of a sweep: how one starts, is found again, and ends."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from gradreg.lab.about import git_state, machine, versions
from gradreg.lab.cost.steps import clock_for, make_step, paired_seconds
from gradreg.lab.folder import BadInput, json_line, shown, write_json, write_text
from gradreg.lab.metric import Metric
from gradreg.lab.processes import resolve
from gradreg.lab.records import Damaged, read_record, sealed
from gradreg.lab.search import Range
from gradreg.lab.sweep.journal import locked
from gradreg.lab.sweep.plan import SETTINGS, Row, Sweep, axes, from_plan
from gradreg.lab.sweep.schedule import SweepSchedule
from gradreg.lab.sweep.storage import Place, without_password
from gradreg.lab.sweep.study import Study
from gradreg.lab.tables import Table, console, say
from gradreg.lab.tasks import metric_of, trained
from gradreg.lab.words import gap, score, settings, verdict_words

COST_ROUNDS = 30


def begin(folder: Path, sweep: Sweep, place: Place, command: str, workers: int, is_batched: bool) -> None:
    """Write config.json: what a report and `--resume` read."""
    varied: dict[str, list[Any]] = axes(sweep.grid)
    for block in sweep.blocks if sweep.trials is not None else ():
        for name, axis in {"method": (block.method,), **block.axes}.items():
            values = (axis.low, axis.high) if isinstance(axis, Range) else axis
            varied[name] = list(dict.fromkeys([*varied.get(name, []), *values]))
    plan = sweep.plan()
    about = {
        "name": folder.resolve().name,
        "command": command,
        "ran_in": os.getcwd(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(workers),
        "versions": versions(),
        "git": git_state(),
        "base": plan["base"],
        "axes": varied,
        "seeds": list(sweep.seeds),
        "metric": metric_of(sweep.base).as_row(),
        "plan": plan,
        "study": {
            "name": place.name,
            "storage": None if place.url is None else without_password(place.url),
            "grace": place.grace,
            "batched": is_batched,
        },
    }
    write_json(folder / "config.json", sealed(about))


@dataclass(frozen=True)
class Begun:
    """What a folder says about its sweep."""

    sweep: Sweep
    place: Place
    is_batched: bool
    command: str | None
    ran_in: str | None


def find(folder: Path, url: str | None) -> Begun:
    """Raises BadInput where it is not the folder of a sweep, or was changed, or its database needs a password."""
    name_of_it = shown(folder)
    try:
        about = read_record(folder / "config.json")
        plan, study = about["plan"], about["study"]
        name, known, grace, is_batched = (study[key] for key in ("name", "storage", "grace", "batched"))
        if not (isinstance(plan, Mapping) and isinstance(name, str) and isinstance(grace, int)):
            raise TypeError
    except Damaged as error:
        raise BadInput(
            f"{shown(folder / 'config.json')} {error}; put it right, or begin another sweep in a new folder. After a "
            'change of your own, take out its line "check".'
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--resume must be the folder of a sweep, got {name_of_it}.") from None
    begun = Begun(from_plan(plan), Place(name, folder), bool(is_batched), about.get("command"), about.get("ran_in"))
    if known is None:
        if url is not None:
            raise BadInput(f"--storage must be left out: the sweep in {name_of_it} has a journal.")
        if not (folder / "study.log").is_file():
            raise BadInput(f"--resume must be the folder of a sweep, got {name_of_it}: study.log is missing.")
        return begun
    if url is None and known.count(":***@"):
        raise BadInput(f"--storage must be given again: the password of {known} is not stored in {name_of_it}.")
    return replace(begun, place=Place(name, url=url or known, grace=grace))


def conclude(folder: Path, place: Place) -> Row:
    """Write results.json and the whole of runs.jsonl from the study, once; return what results.json holds."""
    (folder / ".locks").mkdir(exist_ok=True)
    with locked(folder / ".locks" / "results"):
        if (folder / "results.json").exists():
            return _read(folder / "results.json", "remove it, and it is made again from the study")
        with Study(place) as study:
            sweep = from_plan(study.plan)
            schedule = SweepSchedule(sweep, metric_of(sweep.base))
            board = study.board()
        rows, summary = schedule.rows(board), schedule.summary(board)
        write_text(folder / "runs.jsonl", "".join(json_line(sealed(row)) for row in rows))
        config = _read(folder / "config.json", "put it right; the runs are kept in the study")
        names = {name for point in summary["points"] for name in point} - _MEASURED
        points = [{name: point[name] for name in point if name in names} for point in summary["points"]]
        results = {
            **config,
            "axes": axes(points),
            "seconds": round(math.fsum(row["seconds"] for row in rows), 1),
            "costs": _costs(schedule.sweep, summary["best"]),
            **summary,
        }
        write_json(folder / "results.json", sealed(results))
        return results


def _read(path: Path, way_out: str) -> Row:
    try:
        return read_record(path)
    except ValueError as error:
        raise BadInput(f"{shown(path)} {error}; {way_out}") from None


_MEASURED = {"validation_accuracy", "validation_score", "num_seeds", "diverged"}


def _costs(sweep: Sweep, best: Mapping[str, Row]) -> dict[str, float]:
    """A step of each method at its best point, relative to SGD's at its own: the median over paired rounds."""
    task, device = trained(sweep.base), resolve(sweep.base.device)
    points = {method: {name: row[name] for name in row if name not in _MEASURED} for method, row in best.items()}
    steps = {method: make_step(replace(sweep.base, **point), task, device) for method, point in points.items()}
    seconds = paired_seconds(steps, COST_ROUNDS, clock_for(device, threads=1))
    return {name: median(a / b for a, b in zip(seconds[name], seconds["SGD"])) for name in steps}


def print_table(results: Row, folder: Path) -> None:
    """The best point of each method, and where to read on."""
    out, chosen, tested = console(), [], []
    metric = Metric.from_row(results.get("metric"))
    unit = f", {metric.unit}" if metric.unit else ""
    for method, point in results["best"].items():
        row, found = results["test"][method], point[f"validation_{metric.key}"]
        chosen.append((method, metric.shown(found["mean"]) if found else "–", _settings(point)))
        cells = (score(row[metric.key], metric).rstrip("%"), gap(row.get("difference"), metric), verdict_words(row))
        tested.append((method, *cells, f"{results['costs'][method]:.2f}×"))
    for table in (
        Table("", ("method", f"validation{unit}", "best settings"), chosen),
        Table("", ("method", f"test{unit}", f"minus SGD, {metric.gap_unit}", "difference", "cost"), tested),
    ):
        table.print(out)
        say(out, "")
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
