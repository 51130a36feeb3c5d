"""What `gradreg sweep` and `gradreg train` left on disk, read into studies.

A finished run is a line of a sweep's runs.jsonl, or a train folder. A line that cannot be read is left out and noted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradreg.lab.config import FIELDS
from gradreg.lab.folder import BadInput
from gradreg.lab.report.studies import TASK, Row, Run, Source, Study, number, share, text


def read(folder: Path) -> list[Study]:
    """The studies of a sweep folder, of a train folder, or of the folders in a folder.

    Raises:
        BadInput: the folder is neither, or no run in it has finished.
    """
    sources = list(_sources(folder))
    if not sources:
        kinds = "a folder of gradreg sweep or gradreg train, or one that holds such folders"
        its_page = folder / "report.html"  # of a study, which the command that measured it has written
        more = f", which has its page already: {str(its_page)!a}" if its_page.exists() else ""
        raise BadInput(f"DIR must be {kinds}, got {str(folder)!a}{more}.")
    if not any(source.runs for source in sources):
        raise BadInput(f"DIR must hold a finished run, got {str(folder)!a}, which holds none.")
    studies = []
    sweeps = [[source] for source in sources if source.kind == "sweep"]
    for together in (*sweeps, [source for source in sources if source.kind == "train"]):
        tasks: dict[str, list[Run]] = {}
        for run in (run for source in together for run in source.runs):
            tasks.setdefault(json.dumps({name: run.config.get(name) for name in TASK}), []).append(run)
        for key, runs in tasks.items():
            mine = [source for source in together if any(run in source.runs for run in runs)]
            name = text(mine[0].name) if len(mine) == 1 else f"{len(mine)} train runs"
            studies.append(Study(name, json.loads(key), mine, runs))
    return studies


def _sources(folder: Path) -> Iterator[Source]:
    name = folder.resolve().name
    found = _source(folder, name)
    if found is not None:
        yield found
        return
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise BadInput(f"DIR must be a folder that can be read, got {str(folder)!a}: {error.strerror}.") from error
    for path in inside:
        if (found := _source(path, path.name)) is not None:
            yield found


def _source(folder: Path, name: str) -> Source | None:
    notes: list[str] = []
    about = _json(folder / "config.json", notes)
    if about is None:
        return None
    results = _json(folder / "results.json", notes) or {}
    if isinstance(about.get("base"), Mapping) and isinstance(about.get("axes"), Mapping):
        runs = _sweep_runs(_lines(folder / "runs.jsonl", notes))
        costs = results.get("costs")
        costs = {text(k): number(v) for k, v in costs.items()} if isinstance(costs, Mapping) else {}
        if not results:
            notes.append("The sweep has not ended: there is no results.json yet.")
        return Source(name, "sweep", {**about, **_only(results, "seconds")}, runs, costs, notes)
    if isinstance(about.get("config"), Mapping):
        run = _train_run(dict(about["config"]), _lines(folder / "metrics.jsonl", notes), results)
        if not results:
            notes.append("The run has not ended; it is drawn, but not compared.")
        return Source(name, "train", about, [run] if run else [], {}, notes)
    return None


def _only(row: Mapping[str, Any], *names: str) -> Row:
    return {name: row[name] for name in names if name in row}


def _config(row: Mapping[str, Any]) -> Row:
    return {name: row.get(name) for name in FIELDS}


def _sweep_runs(lines: Sequence[Row]) -> list[Run]:
    """One run for each configuration and each part that it was scored on: the last line, where a run was repeated."""
    runs: dict[tuple[str, str], Run] = {}
    for line in lines:
        config, part = _config(line), str(line.get("scored_on"))
        numbers = {name: number(line.get(name)) for name in ("train_loss", "grad_norm", "seconds")}
        diverged = bool(line.get("diverged")) or not math.isfinite(numbers["train_loss"])
        score = 0.0 if diverged and line.get("accuracy") is None else share(line.get("accuracy"))
        runs[json.dumps(config), part] = Run(
            config,
            validation=score if part == "validation" else math.nan,
            test=score if part == "test" else math.nan,
            diverged=diverged,
            curve=_curve(line.get("trace")),
            **numbers,
        )
    return list(runs.values())


def _train_run(config: Row, epochs: Sequence[Row], results: Mapping[str, Any]) -> Run | None:
    if not epochs and not results:
        return None
    last = results or {**epochs[-1], "validation_accuracy": None}  # half a run is not compared with whole ones
    loss = number(last.get("train_loss"))
    seconds = math.fsum(s for row in epochs if math.isfinite(s := number(row.get("seconds"))))
    return Run(
        _config(config),
        validation=share(last.get("validation_accuracy")),
        test=share(results.get("test_accuracy")),
        train_loss=loss,
        grad_norm=number(last.get("grad_norm")),
        diverged=bool(results.get("diverged")) or not math.isfinite(loss),
        seconds=number(results.get("seconds", seconds)),
        curve=_curve(list(epochs)),
    )


def _curve(trace: Any) -> tuple[dict[str, float], ...]:
    if not isinstance(trace, list):
        return ()
    moments = []
    for moment in trace:
        if isinstance(moment, Mapping) and math.isfinite(step := number(moment.get("step"))):
            names = ("train_loss", "grad_norm", "validation_accuracy")
            moments.append({"step": step, **{name: number(moment.get(name)) for name in names}})
    return tuple(moments)


def _json(path: Path, notes: list[str]) -> Row | None:
    """A JSON object, or None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        notes.append(f"{path.name} cannot be read and was left out.")
        return None
    return value if isinstance(value, dict) else None


def _lines(path: Path, notes: list[str]) -> list[Row]:
    """The objects of a JSON-lines file; a line that was cut off, the last one as a rule, is left out and noted."""
    rows: list[Row] = []
    torn: list[int] = []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for k, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    rows.append(row)
                elif line.strip():
                    torn.append(k)
    except FileNotFoundError:
        pass
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    if torn:
        which = f"line {torn[0]} is" if len(torn) == 1 else f"{len(torn)} lines, line {torn[0]} the first, are"
        notes.append(f"{path.name}: {which} left out, torn or not a run; {len(rows)} are read.")
    return rows
