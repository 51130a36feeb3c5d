"""Goes through the pieces: plays each in a folder of its own, measures its models, and writes the page anew.

With `--write`, the page and its record also have the pieces that were played elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradreg.lab.about import provenance
from gradreg.lab.comparison import report
from gradreg.lab.comparison import run as comparison
from gradreg.lab.comparison.plan import Plan as ComparisonPlan
from gradreg.lab.comparison.plan import Taken
from gradreg.lab.comparison.schedule import file_name, weights_name
from gradreg.lab.folder import Hopeless, append_line, shown, write_json
from gradreg.lab.page import publish, tell, write_page
from gradreg.lab.player import on_processes, run_all
from gradreg.lab.progress import progress_bar
from gradreg.lab.records import kept_lines, read_results, sealed
from gradreg.lab.runs import Job
from gradreg.lab.study.storage import Place
from gradreg.lab.study.workers import MODELS
from gradreg.studies.images.controls import RATES, control_name, controls, line
from gradreg.studies.images.flatness import MEASURES, Kept, measure
from gradreg.studies.images.page import page, told
from gradreg.studies.images.pieces import PIECES, QUICK, Piece
from gradreg.studies.images.record import current, merged, place_of, recorded, write_record
from gradreg.studies.images.summary import piece_row, taken_from

KIND = "images"
PAGE = "images.md"
FLATNESS, CONTROLS = "flatness.jsonl", "controls.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which pieces are played, and how."""

    names: tuple[str, ...]
    is_quick: bool = False
    path: str | None = None
    """Folder of the four files of Fashion-MNIST; by default that of Debian's package."""
    workers: int = 2

    def of(self, piece: Piece, taken: Mapping[str, Taken] | None = None) -> ComparisonPlan:
        return (piece.quick_plan if self.is_quick else piece.plan)(self.path, taken)

    def recorded(self, write: Path | None) -> list[Row]:
        """What lies beside the page."""
        return [] if write is None else recorded(write, self.is_quick, self.of)


def pieces_of(is_quick: bool) -> tuple[str, ...]:
    return QUICK if is_quick else tuple(PIECES)


def begin(plan: Plan, folder: Path) -> None:
    """Write config.json."""
    write_json(folder / "config.json", sealed({"kind": KIND, "is_quick": plan.is_quick, "path": plan.path}))


def run_images(plan: Plan, folder: Path, write: Path | None = None) -> Row:
    """Play what is left of the pieces that are named; return what results.json holds."""
    for name in plan.names:
        _play(plan, PIECES[name], folder, write)
        _gather(plan, folder, write)  # also what is there so far is a page
    results = _gather(plan, folder, write)
    tell(told(results), results, folder)
    return results


def _play(plan: Plan, piece: Piece, study: Path, write: Path | None) -> None:
    folder = study / piece.name
    if (folder / "config.json").exists():
        known, place = comparison.known(folder)
        own = plan.of(piece, known.taken)
        if known != own:
            raise Hopeless(
                f"{piece.name} must be that of this version, got another plan in {shown(folder)}: begin anew."
            )
    else:
        own = plan.of(piece, _taken(plan, piece, study, write))
        comparison.check(own)
        folder.mkdir(exist_ok=True)
        place = Place("compare", folder.resolve())
        comparison.begin(own, folder, place, _command(plan, [piece.name]), plan.workers, ())
    results = comparison.carry_out(own, folder, place, plan.workers)
    publish(report.page(results), folder)
    _control(own, folder, plan.workers)
    if piece.measures_flatness:
        _measure(own, folder, plan.workers)


def check(plan: Plan, study: Path | None, write: Path | None) -> None:
    """Before anything is made, of a study that is begun or gone on with.

    Raises:
        BadInput: a record beside the page that is none; settings that a piece takes from another are nowhere.
    """
    plan.recorded(write)
    for name in plan.names:
        piece = PIECES[name]
        if piece.settings_of not in ("", *plan.names) and not (study and (study / name / "config.json").exists()):
            _taken(plan, piece, study, write)


def _taken(plan: Plan, piece: Piece, study: Path | None, write: Path | None) -> dict[str, Taken]:
    """The settings that a piece takes from another, of the study or of the record beside the page."""
    if not piece.settings_of:
        return {}
    rows = merged([piece.settings_of], _rows(plan, study) if study else [], plan.recorded(write))
    if not rows or rows[0]["is_earlier"]:
        inside = f"in {shown(study)}" if study else "of this study"
        beside = "beside a page of --write" if write is None else f"in {shown(place_of(write))}"
        raise Hopeless(
            f"{piece.name} takes its settings from {piece.settings_of}, which is neither {inside} nor {beside}, by the "
            f"plan of this version: "
            f"play that first, with --only {piece.settings_of}."
        )
    return taken_from(rows[0])


def _command(plan: Plan, names: Sequence[str]) -> str:
    path = f" --path {json.dumps(plan.path)}" if plan.path else ""
    only = "" if tuple(names) == pieces_of(plan.is_quick) else f" --only {' '.join(names)}"
    return f"gradreg images{' --quick' * plan.is_quick}{only}{path}"


def _control(plan: ComparisonPlan, folder: Path, workers: int) -> None:
    """Plain training at the learning rate and weight decay of the other arms; each run a line as it is there."""
    path = folder / CONTROLS
    known = [{**row, "score": None} for row in kept_lines(path)]
    jobs = _controls(plan, folder)
    todo = [job for job in jobs if line(job, None) not in known or (job.weights and not job.weights.exists())]
    with progress_bar() as progress, closing(run_all(todo, workers)) as found:
        for count, (k, result) in enumerate(found, 1):
            append_line(path, sealed(line(todo[k], result.score)))
            progress("plain training at the settings of others", count, len(todo))


def _controls(plan: ComparisonPlan, folder: Path) -> list[Job]:
    """With the file that takes the model, where models are kept."""
    jobs = controls(plan.base, read_results(folder / "results.json")["arms"], plan.seeds)
    if not plan.keeps_models:
        return jobs
    places = [folder / MODELS / file_name(control_name(line(job, None)), job.config.seed) for job in jobs]
    return [replace(job, weights=place) for job, place in zip(jobs, places)]


def _measure(plan: ComparisonPlan, folder: Path, workers: int) -> None:
    """Of the models that are not measured yet, or not in all, each a line as it is there.

    A model of other settings is another one, although its file has the same name; of two lines the later one counts.
    """
    known = [line for line in kept_lines(folder / FLATNESS) if {*MEASURES} <= {*line}]
    points = {name: {**found.point} for name, found in taken_from(read_results(folder / "results.json")).items()}
    models = [
        (
            arm.name,
            points[arm.name],
            arm.config(plan.base, points[arm.name], seed),
            folder / MODELS / weights_name(arm, seed),
        )
        for seed in plan.seeds
        for arm in plan.arms
    ]
    for job in _controls(plan, folder):
        if job.weights:
            point = {name: getattr(job.config, name) for name in RATES}
            models.append((control_name(point), point, job.config, job.weights))
    named = [
        ({"arm": name, "seed": config.seed, "point": point}, Kept(config, weights))
        for name, point, config, weights in models
        if weights.exists()
    ]
    todo = [(row, kept) for row, kept in named if not any({**line, **row} == line for line in known)]
    with progress_bar() as progress, closing(on_processes(measure, [kept for _, kept in todo], workers)) as found:
        for count, (k, row) in enumerate(found, 1):
            append_line(folder / FLATNESS, sealed({**todo[k][0], **row}))
            progress("what flatness buys", count, len(todo))


def _rows(plan: Plan, folder: Path) -> list[Row]:
    """Of the pieces that a study has."""
    rows = []
    for name in pieces_of(plan.is_quick):
        try:
            found = read_results(folder / name / "results.json")
        except OSError:
            continue
        measured = kept_lines(folder / name / FLATNESS) if PIECES[name].measures_flatness else []
        rows.append(piece_row(PIECES[name], found, measured, kept_lines(folder / name / CONTROLS)))
    return current(rows, plan.of)


def _gather(plan: Plan, folder: Path, write: Path | None) -> Row:
    """What is there by now, as results.json and as the page."""
    rows = _rows(plan, folder)
    results = _results(plan, folder, rows)
    write_json(folder / "results.json", results)
    publish(page(results), folder, folder / PAGE)
    if write is not None:
        whole = _results(plan, folder, merged(pieces_of(plan.is_quick), rows, plan.recorded(write)))
        write_record(write, whole)
        write_page(page(whole, place_of(write).name), write)
    return results


def _results(plan: Plan, folder: Path, rows: Sequence[Row]) -> Row:
    planned = pieces_of(plan.is_quick)
    return {
        "name": folder.resolve().name,
        **provenance(_command(plan, planned), plan.workers, threads=1),
        "date": time.strftime("%Y-%m-%d"),
        "is_quick": plan.is_quick,
        "training_seconds": sum(row["seconds"] for row in rows),
        "pieces": rows,
        "missing": [name for name in planned if name not in [row["name"] for row in rows if not row["is_earlier"]]],
    }
