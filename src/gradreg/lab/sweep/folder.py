"""The folder of a sweep: how one starts, is found again, and ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradreg.lab.cost.steps import step_costs
from gradreg.lab.metric import Metric
from gradreg.lab.processes import resolve
from gradreg.lab.search import Range
from gradreg.lab.study import folder as folders
from gradreg.lab.study.board import Board
from gradreg.lab.study.storage import Place
from gradreg.lab.sweep.plan import SETTINGS, Row, Sweep, axes, from_plan
from gradreg.lab.sweep.schedule import SweepSchedule
from gradreg.lab.tables import Table, console, say
from gradreg.lab.tasks import metric_of
from gradreg.lab.words import gap, score, settings, verdict_words


def begin(folder: Path, sweep: Sweep, place: Place, command: str, workers: int, is_batched: bool) -> None:
    """Write config.json: what a report and `--resume` read."""
    varied: dict[str, list[Any]] = axes(sweep.grid)
    for block in sweep.blocks if sweep.trials is not None else ():
        for name, axis in {"method": (block.method,), **block.axes}.items():
            values = (axis.low, axis.high) if isinstance(axis, Range) else axis
            varied[name] = list(dict.fromkeys([*varied.get(name, []), *values]))
    plan = sweep.plan()
    folders.begin(
        folder,
        place,
        command,
        workers,
        base=plan["base"],
        axes=varied,
        seeds=list(sweep.seeds),
        metric=metric_of(sweep.base).as_row(),
        plan=plan,
        batched=is_batched,
    )


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
    about, place = folders.find(folder, url, "sweep", "sweep")
    is_batched = about.get("batched", about["study"].get("batched"))  # earlier versions had it with the study
    return Begun(from_plan(about["plan"]), place, bool(is_batched), about.get("command"), about.get("ran_in"))


def conclude(folder: Path, place: Place, sweep: Sweep) -> Row:
    """Write results.json and the whole of runs.jsonl from the study, once; return what results.json holds."""
    schedule = SweepSchedule(sweep, metric_of(sweep.base))

    def summary(about: Row, board: Board, lines: list[Row]) -> Row:
        found = schedule.summary(board)
        points = [_fields(point) for point in found["points"]]
        configs = {method: replace(sweep.base, **_fields(point)) for method, point in found["best"].items()}
        return {
            "axes": axes(points),
            "seconds": round(math.fsum(line["seconds"] for line in lines), 1),
            "costs": {name: cost.median for name, cost in step_costs(configs, resolve(sweep.base.device)).items()},
            **found,
        }

    return folders.conclude(folder, place, schedule, summary)


_MEASURED = {"validation_accuracy", "validation_score", "num_seeds", "diverged"}


def _fields(row: Row) -> Row:
    """The configuration in a row of a point."""
    return {name: value for name, value in row.items() if name not in _MEASURED}


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
