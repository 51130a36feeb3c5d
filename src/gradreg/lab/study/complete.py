"""A study beside its copy, runs.jsonl: one that has lost finished runs is not run again in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gradreg.lab.config import FIELDS, RunConfig, from_mapping
from gradreg.lab.folder import BadInput
from gradreg.lab.records import opened
from gradreg.lab.study.schedule import Schedule
from gradreg.lab.study.storage import Place
from gradreg.lab.study.study import Study


def check_complete(folder: Path, place: Place, schedule: Schedule, command: str | None) -> None:
    """That the study still has every run that runs.jsonl, a copy of it, shows as finished: none is run twice.

    Raises:
        BadInput: it has lost some, and nothing was changed.
    """
    copied = set(_finished_in(folder / "runs.jsonl"))
    if not copied:
        return
    known: set[tuple[RunConfig, str]] = set()
    if place.url is not None or (folder / "study.log").stat().st_size:
        with Study(place) as study:
            board = study.board()
        jobs = [schedule.job(board.first[key].user_attrs["what"]) for key in board.results]
        known = {(job.config, job.scored_on) for job in jobs}
    if lost := len(copied - known):
        raise BadInput(
            f"the study {place} has lost {lost} of the {len(copied)} finished runs in runs.jsonl: put back a "
            f"copy of it, or begin anew in another folder with: {command}."
        )


def _finished_in(path: Path) -> Iterator[tuple[RunConfig, str]]:
    """Configuration and part of each line that is whole."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError, BadInput):
            row = opened(line)
            yield from_mapping({name: row[name] for name in FIELDS if name in row}), row["scored_on"]
