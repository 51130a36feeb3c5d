"""The page of `gradreg report`: one HTML file made from the folders of sweeps and train runs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

import gradreg
from gradreg.lab.config import SETTINGS
from gradreg.lab.figures import look
from gradreg.lab.folder import BadInput
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import Metric
from gradreg.lab.page import render, source
from gradreg.lab.report.figures import cost_drawing, costs_of, curve_figures, heat_maps, settings_of_map
from gradreg.lab.report.folders import read
from gradreg.lab.report.snippets import as_python, as_yaml, configuration, train_command
from gradreg.lab.report.studies import Point, Run, Source, Study, number, text
from gradreg.lab.report.text import compare, findings, headline, in_column, settings, short, shown, task_words, words
from gradreg.lab.words import gap, listed, plural

GENERATOR = "gradreg report"
MOST_POINTS, MOST_RUNS = 2_000, 2_000
"""Written out on a page; the files hold the rest."""
_MOST_SOURCES = 12
_ABOUT = ("command", "date", "seconds", "machine", "workers", "engine", "versions", "git", "seeds")


@dataclass(frozen=True)
class Cell:
    """A cell of the table of runs: what is shown, and what is sorted by."""

    shown: str
    value: float | None = None


@dataclass(frozen=True)
class Entry:
    """A point in the table, with its runs."""

    method: str
    cells: list[Cell]
    runs: list[str]


def page(folder: Path) -> str:
    """The page for a folder.

    Raises:
        BadInput: as `read`.
    """
    sections = [_section(study, f"s{k}") for k, study in enumerate(read(folder), 1)]
    script = re.sub(r"\s*</?script>\s*", "\n", source("gradreg.lab.report", "script.html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filters = {"shown": shown, "gap": gap, "in_column": in_column}
    return render(
        "gradreg.lab.report",
        "page.html",
        filters,
        name=text(folder.resolve().name),
        sections=sections,
        generator=GENERATOR,
        script=Markup(script),
        digest=digest,
        look=look,
        settings=settings,
        task_words=task_words,
        version=gradreg.__version__,
        today=time.strftime("%Y-%m-%d"),
    )


def is_ours(path: Path, html: str) -> bool:
    """Whether an earlier `gradreg report` wrote this file, or the command that writes such a page as `html`."""
    marks = [f'<meta name="generator" content="{GENERATOR}">', _generator_of(html)]
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(2_000)
        return any(mark and mark in head for mark in marks)
    except OSError:
        return False


def _generator_of(html: str) -> str:
    found = re.search(r'<meta name="generator" content="[^"]*">', html[:2_000])
    return found.group() if found else ""


def _section(study: Study, prefix: str) -> dict[str, Any]:
    """A study as the template shows it."""
    costs, how_cost = costs_of(study)
    rows = compare(study, costs)
    columns, entries, left_out = _table(study)
    yaml, python, trained, refused = "", "", "", ""
    try:
        config = configuration(study.winner)
        yaml, python, trained = as_yaml(config), as_python(config), train_command(config)
    except BadInput as error:
        refused = text(str(error))
    return {
        "id": prefix,
        "study": study,
        "headline": headline(study, rows),
        "findings": findings(study, rows),
        "rows": rows,
        "methods": [(method, METHODS[method].about) for method in study.methods if method in METHODS],
        "rest": _rest(study),  # what varied besides the settings of the methods with a map
        "maps": heat_maps(study, prefix),
        "curves": curve_figures(study, prefix),
        "cost": cost_drawing(rows, prefix, study.metric),
        "how_cost": how_cost,
        "columns": columns,
        "entries": entries,
        "summary": _summary(study),
        "left_out": left_out,
        "best": study.winner,
        "yaml": yaml,
        "python": python,
        "train": trained,
        "refused": refused,
        "about": [_about(source) for source in study.sources[:_MOST_SOURCES]],
        "notes": [f"{text(source.name)}: {text(note)}" for source in study.sources for note in source.notes],
    }


def _rest(study: Study) -> str:
    mapped = [point for point in study.points if settings_of_map(study, point.method)]
    names = [name for name in study.columns if name not in SETTINGS]
    varied = [words(n) for n in names if len({json.dumps(point.config.get(n)) for point in mapped}) > 1]
    return listed(varied) if varied else ""


def _summary(study: Study) -> str:
    """What the table holds."""
    count, metric = len(study.points), study.metric
    first = "highest" if metric.higher_is_better else "lowest"
    means = [point.validation.mean for point in study.points if point.validation]
    said = f"{count} point{plural(count)} in {len(study.runs)} run{plural(len(study.runs))}, the {first} "
    said += "first; a point is the runs that differ in their seed alone, and opens to show them."
    if means:
        ends = metric.written(min(means)), metric.written(max(means))
        said += f" Validation {metric.name} goes from {ends[0]} to {ends[1]}."
    diverged = sum(point.num_diverged > 0 for point in study.points)
    return said + (f" In {diverged} point{plural(diverged)} some run diverged." if diverged else "")


def _table(study: Study) -> tuple[list[str], list[Entry], str]:
    has_test = any(point.test for point in study.points)
    parts = ("validation", "test") if has_test else ("validation",)
    columns = [*(in_column(part, study.metric) for part in parts), *(words(name) for name in study.columns)]
    columns += ["train loss", "‖∇L‖", "seeds", "diverged", "seconds"]
    ordered = sorted(study.points, key=lambda point: -study.worth(point))
    entries, budget = [], MOST_RUNS
    for point in ordered[:MOST_POINTS]:
        runs = sorted(point.runs, key=lambda run: json.dumps(run.seed))[:budget]
        budget -= len(runs)
        entries.append(Entry(point.method, _cells(study, point, has_test), [_line(run, study.metric) for run in runs]))
    left = len(ordered) - len(entries), len(study.runs) - (MOST_RUNS - budget)
    said = f"{left[0]} points and {left[1]} runs more are in the files of the folder." if any(left) else ""
    return columns, entries, said


def _cells(study: Study, point: Point, has_test: bool) -> list[Cell]:
    scores = (point.validation, point.test) if has_test else (point.validation,)
    loss, norm, seconds = (point.mean(name) for name in ("train_loss", "grad_norm", "seconds"))
    return [
        *(_cell(found.mean if found else None, shown(found, study.metric)) for found in scores),
        *(_cell(point.config.get(name), text(point.config.get(name))) for name in study.columns),
        _cell(loss, short(loss)),
        _cell(norm, short(norm)),
        _cell(len(point.seeds)),
        _cell(point.num_diverged, str(point.num_diverged or "")),
        _cell(seconds, f"{seconds:.1f}" if math.isfinite(seconds) else ""),
    ]


def _cell(value: Any, written: str | None = None) -> Cell:
    found = number(value)
    return Cell(str(value) if written is None else written, float(f"{found:.6g}") if math.isfinite(found) else None)


def _line(run: Run, metric: Metric) -> str:
    """A single run in a line."""
    parts = [f"seed {text(run.seed)}" if run.seed is not None else "no seed"]
    for name, value in (("validation", run.validation), ("test", run.test)):
        parts += [f"{name} {metric.written(value)}"] if math.isfinite(value) else []
    parts += [f"loss {short(run.train_loss)}"] if math.isfinite(run.train_loss) else []
    parts += [f"‖∇L‖ {short(run.grad_norm)}"] if math.isfinite(run.grad_norm) else []
    parts += [f"{run.seconds:.1f} s"] if math.isfinite(run.seconds) else []
    return " · ".join([*parts, *(["diverged"] if run.diverged else [])])


def _about(source: Source) -> tuple[str, list[tuple[str, str]]]:
    """Where the numbers of a folder come from."""
    said = [(name, _flat(source.about[name])) for name in _ABOUT if source.about.get(name) not in (None, "", [], {})]
    if source.kind == "train" and source.runs:
        said.append(("seed", text(source.runs[0].seed)))
    return text(source.name), said


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return text(", ".join(f"{k} {v}" for k, v in value.items()))
    if isinstance(value, list):
        whole = value and all(type(v) is int for v in value) and value == list(range(value[0], value[-1] + 1))
        return f"{value[0]} to {value[-1]}" if whole and len(value) > 2 else text(", ".join(map(str, value)))
    return text(value)
