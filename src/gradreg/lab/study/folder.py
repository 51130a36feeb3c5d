"""The folder of a study: what config.json says of it, how it is found again, and how its results are written, once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradreg.lab.about import git_state, provenance
from gradreg.lab.folder import BadInput, json_line, shown, write_json, write_text
from gradreg.lab.records import Damaged, read_record, read_results, sealed
from gradreg.lab.study.board import Board
from gradreg.lab.study.journal import locked
from gradreg.lab.study.schedule import Row, Schedule
from gradreg.lab.study.storage import Place, without_password
from gradreg.lab.study.study import Study


def begin(folder: Path, place: Place, command: str, workers: int, **own: Any) -> None:
    """Write config.json: where the study is, what the numbers may depend on, and what its kind says besides."""
    about = {
        "name": folder.resolve().name,
        **provenance(command, workers),
        "git": git_state(),
        "ran_in": os.getcwd(),
        **own,
        "study": {
            "name": place.name,
            "storage": None if place.url is None else without_password(place.url),
            "grace": place.grace,
        },
    }
    write_json(folder / "config.json", sealed(about))


def find(folder: Path, url: str | None, kind: str, noun: str) -> tuple[Row, Place]:
    """What config.json says, and where the study is.

    Args:
        folder: of the study.
        url: of its database, where the password is needed.
        kind: `kind` in config.json.
        noun: what such a study is called.

    Raises:
        BadInput: the folder is of nothing of the kind, its record was changed, or its database needs a password.
    """
    no_such = f"--resume must be the folder of a {noun}, got {shown(folder)}"
    try:
        about = read_record(folder / "config.json")
        known, name, grace = (about["study"][key] for key in ("storage", "name", "grace"))
        is_plan = about.get("kind", "sweep") == kind and isinstance(about["plan"], Mapping)
        if not (is_plan and isinstance(name, str) and isinstance(grace, int)):
            raise TypeError
    except Damaged as error:
        raise BadInput(
            f"{shown(folder / 'config.json')} {error}; put it right, or begin another {noun} in a new folder. After a "
            'change of your own, take out its line "check".'
        ) from None
    except OSError as error:
        raise BadInput(f"{no_such}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        why = f", whose config.json {error}" if type(error) is ValueError else ""
        raise BadInput(f"{no_such}{why}.") from None
    if known is None:
        if url is not None:
            raise BadInput(f"--storage must be left out: the {noun} in {shown(folder)} has a journal.")
        if not (folder / "study.log").is_file():
            raise BadInput(f"{no_such}: study.log is missing; begin again in a new folder.")
        return about, Place(name, folder.resolve())
    if url is None and known.count(":***@"):
        raise BadInput(f"--storage must be given again: the password of {known} is not stored in {shown(folder)}.")
    return about, Place(name, url=url or known, grace=grace)


def conclude(folder: Path, place: Place, schedule: Schedule, summary: Callable[[Row, Board, list[Row]], Row]) -> Row:
    """Write results.json, runs.jsonl and the tracebacks of runs that failed; return what results.json holds.

    Once, unless there are more runs by now: a later version may ask more of the same plan.

    Args:
        folder: of the study.
        place: of the study.
        schedule: of its runs, which have all been made.
        summary: of config.json, the study and the lines of runs.jsonl, what results.json says besides.
    """
    (folder / ".locks").mkdir(exist_ok=True)
    path = folder / "results.json"
    with locked(folder / ".locks" / "results"):
        known = read_results(path) if path.exists() else None
        with Study(place) as study:
            board = study.board()
        rows = schedule.rows(board)
        if known is not None and known.get("num_runs", len(rows)) == len(rows):
            return known
        lines = without_tracebacks(folder, rows)
        write_text(folder / "runs.jsonl", "".join(json_line(sealed(line)) for line in lines))
        try:
            about = read_record(folder / "config.json")
        except ValueError as error:
            said = f"{shown(folder / 'config.json')} {error}; put it right: the runs are kept in the study."
            raise BadInput(said) from None
        write_json(path, sealed({**about, **summary(about, board, lines)}))
        return read_record(path)  # numbers as whoever reads it later finds them


def without_tracebacks(folder: Path, lines: Sequence[Row]) -> list[Row]:
    """Runs that failed with their last line; the whole of it is a file in failed/."""
    found = []
    for line in lines:
        if line.get("error"):
            place = folder / "failed"
            place.mkdir(exist_ok=True)
            count = len(list(place.iterdir()))
            write_text(place / f"{count:04d}-seed-{line['seed']}.txt", line["error"])
            line = {**line, "error": line["error"].strip().splitlines()[-1]}
        found.append(line)
    return found
