"""What `gradreg sweep` and `gradreg train` left on disk, read into studies.

A finished run is a line of a sweep's runs.jsonl, or a train folder. What cannot be read, or was changed after it was
written, is left out and noted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradreg.lab.config import FIELDS
from gradreg.lab.folder import BadInput, shown
from gradreg.lab.metric import Metric
from gradreg.lab.records import opened, read_record
from gradreg.lab.report.studies import TASK, Row, Run, Source, Study, number, share, text

_TOO_LARGE = 1e100
"""A score whose square is no number any more counts as none."""


def read(folder: Path) -> list[Study]:
    """The studies of a sweep folder, of a train folder, or of the folders in a folder.

    Raises:
        BadInput: the folder is neither, or no run in it has finished.
    """
    sources = list(_sources(folder))
    if not sources:
        kinds = "a folder of gradreg sweep, train or compare, or one that holds sweeps and train runs"
        its_page = folder / "report.html"  # of a study, which the command that measured it has written
        more = f", which has its page already: {shown(its_page)}" if os.path.exists(its_page) else ""
        raise BadInput(f"DIR must be {kinds}, got {shown(folder)}{more}.")
    if not any(source.runs for source in sources):
        why = " ".join(note for source in sources for note in source.notes)
        raise BadInput(f"DIR must hold a finished run, got {shown(folder)}, which holds none. {why}".strip())
    studies = []
    sweeps = [[source] for source in sources if source.kind == "sweep"]
    for together in (*sweeps, [source for source in sources if source.kind == "train"]):
        tasks: dict[tuple[str, Metric], list[tuple[Source, Run]]] = {}
        for source in together:
            for run in source.runs:
                task = json.dumps({name: run.config.get(name) for name in TASK})
                tasks.setdefault((task, source.metric), []).append((source, run))
        for (task, _), found in tasks.items():
            mine = list({id(source): source for source, _ in found}.values())
            name = text(mine[0].name) if len(mine) == 1 else f"{len(mine)} train runs"
            studies.append(Study(name, json.loads(task), mine, [run for _, run in found]))
    unread = [source for source in sources if not source.about and not source.runs]
    return [replace(studies[0], sources=[*studies[0].sources, *unread]), *studies[1:]]


def _sources(folder: Path) -> Iterator[Source]:
    name = folder.resolve().name
    found = _source(folder, name)
    if found is not None:
        yield found
        return
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise BadInput(f"DIR must be a folder that can be read, got {shown(folder)}: {error.strerror}.") from error
    for path in inside:
        if (found := _source(path, path.name)) is not None:
            yield found


def _source(folder: Path, name: str) -> Source | None:
    notes: list[str] = []
    config, results = (_record(folder / name, notes) for name in ("config.json", "results.json"))
    has_ended = results is not None or os.path.exists(folder / "results.json")
    about, results = config or results or {}, results or {}  # results.json says again what config.json says
    is_changed = not about and bool(notes)
    metric = _metric(results.get("metric", about.get("metric")))
    if _has_mappings(about, "base", "axes") or (is_changed and os.path.exists(folder / "runs.jsonl")):
        runs = _sweep_runs(_lines(folder / "runs.jsonl", notes), metric)
        costs = results.get("costs")
        costs = {text(k): number(v) for k, v in costs.items()} if isinstance(costs, Mapping) else {}
        if not has_ended:
            notes.append("The sweep has not ended: there is no results.json yet.")
        return Source(name, "sweep", {**about, **_only(results, "seconds")}, runs, costs, notes, metric)
    if _has_mappings(about, "config"):
        run = _train_run(dict(about["config"]), _lines(folder / "metrics.jsonl", notes), results, metric)
        if not has_ended:
            notes.append("The run has not ended; it is drawn, but not compared.")
        return Source(name, "train", about, [run] if run else [], {}, notes, metric)
    if is_changed and os.path.exists(folder / "metrics.jsonl"):
        return Source(name, "train", {}, [], {}, notes)
    return None


def _has_mappings(about: Row, *names: str) -> bool:
    return all(isinstance(about.get(name), Mapping) for name in names)


def _only(row: Mapping[str, Any], *names: str) -> Row:
    return {name: row[name] for name in names if name in row}


def _config(row: Mapping[str, Any]) -> Row:
    return {name: row.get(name) for name in FIELDS}


def _metric(row: Any) -> Metric:
    """Of the files, with a name that is short enough for the heading of a column."""
    found = Metric.from_row(row)
    return replace(found, name=text(found.name, most=40) or "score")


def _score(row: Mapping[str, Any], part: str, metric: Metric, missing: float = math.nan) -> float:
    """Under either of its names; a share is refused where it does not lie from 0 to 1."""
    named = (row.get(f"{part}{name}") for name in ("score", "accuracy"))
    value = next((value for value in named if value is not None), None)
    if value is None:
        return missing
    if metric.is_share:
        return share(value)
    found = number(value)
    return found if abs(found) < _TOO_LARGE else missing


def _sweep_runs(lines: Sequence[Row], metric: Metric) -> list[Run]:
    """One run for each configuration and each part that it was scored on: the last line, where a run was repeated."""
    runs: dict[tuple[str, str], Run] = {}
    for line in lines:
        config, part = _config(line), str(line.get("scored_on"))
        numbers = {name: number(line.get(name)) for name in ("train_loss", "grad_norm", "seconds")}
        diverged = bool(line.get("diverged")) or not math.isfinite(numbers["train_loss"])
        missing = math.inf if not metric.is_share else 0.0 if diverged else math.nan
        score = _score(line, "", metric, missing)
        runs[json.dumps(config), part] = Run(
            config,
            validation=score if part == "validation" else math.nan,
            test=score if part == "test" else math.nan,
            diverged=diverged,
            curve=_curve(line.get("trace"), metric),
            num_scored=number(line.get("num_scored")),
            **numbers,
        )
    return list(runs.values())


def _train_run(config: Row, epochs: Sequence[Row], results: Mapping[str, Any], metric: Metric) -> Run | None:
    """Its scores are those of its end alone: half a run is not compared with whole ones."""
    if not epochs and not results:
        return None
    last = results or epochs[-1]
    missing = math.inf if results and not metric.is_share else math.nan
    loss = number(last.get("train_loss"))
    seconds = math.fsum(s for row in epochs if math.isfinite(s := number(row.get("seconds"))))
    return Run(
        _config(config),
        validation=_score(results, "validation_", metric, missing),
        test=_score(results, "test_", metric, missing),
        train_loss=loss,
        grad_norm=number(last.get("grad_norm")),
        diverged=bool(results.get("diverged")) or not math.isfinite(loss),
        seconds=number(results.get("seconds", seconds)),
        curve=_curve(list(epochs), metric),
        num_scored=number(results.get("num_scored")),
    )


def _curve(trace: Any, metric: Metric) -> tuple[dict[str, float], ...]:
    if not isinstance(trace, list):
        return ()
    moments = []
    for moment in trace:
        if isinstance(moment, Mapping) and math.isfinite(step := number(moment.get("step"))):
            measured = {name: number(moment.get(name)) for name in ("train_loss", "grad_norm")}
            score = number(moment.get(f"validation_{metric.key}"))
            moments.append({"step": step, **measured, f"validation_{metric.key}": score})
    return tuple(moments)


def _record(path: Path, notes: list[str]) -> Row | None:
    """A JSON object that is what was written, or None; noted where there is another thing."""
    try:
        return read_record(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        notes.append(f"{path.name} {error}; it is left out.")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    return None


def _lines(path: Path, notes: list[str]) -> list[Row]:
    """The records of a JSON-lines file; one that was cut off, the last as a rule, or changed is left out and noted."""
    rows: list[Row] = []
    spoiled: list[int] = []
    try:
        with path.open("rb") as file:
            for k, line in enumerate(file, 1):
                try:
                    rows.append(opened(line))
                except ValueError:
                    spoiled += [k] if line.strip() else []
    except FileNotFoundError:
        pass
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    if spoiled:
        which = (
            f"line {spoiled[0]} is" if len(spoiled) == 1 else f"{len(spoiled)} lines, line {spoiled[0]} the first, are"
        )
        notes.append(f"{path.name}: {which} left out, torn, changed or not a run; {len(rows)} are read.")
    return rows
