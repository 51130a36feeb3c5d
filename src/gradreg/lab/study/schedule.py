"""What a study's workers ask of a plan: which runs come next, what each is, how far all is.

A schedule is a function of what the study holds: every worker comes to the same answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradreg.lab.config import RunConfig
from gradreg.lab.runs import Job, record
from gradreg.lab.study.board import Board, Entry

Row = dict[str, Any]
Point = Mapping[str, Any]
"""Fields of a configuration, by name."""

MOST_ATTEMPTS = 3
"""Of a run, from when a worker starts: one that kills its workers must not do so for ever."""


@dataclass(frozen=True)
class Status:
    """How far it is."""

    done: int
    planned: int
    text: str
    """The best so far."""
    is_finished: bool


class Schedule(ABC):
    """What a study's workers ask: which runs should be there, what each is, how far all is."""

    base: RunConfig

    def __init__(self) -> None:
        self._before: Mapping[str, int] | None = None

    @property
    @abstractmethod
    def num_runs(self) -> int:
        """At most, the test runs included."""

    def look_ahead(self, runs: int) -> None:
        """Want so many runs at once, where they can be told before the others are in."""
        del runs

    @abstractmethod
    def wanted(self, board: Board) -> list[Entry]:
        """The runs that should be in the study, in order."""

    @abstractmethod
    def job(self, what: Mapping[str, Any]) -> Job:
        """A run from what its entry says."""

    @abstractmethod
    def status(self, board: Board) -> Status: ...

    def weights(self, what: Mapping[str, Any]) -> str:
        """Name of the file that takes the weights at the end of a run; empty if none does."""
        del what
        return ""

    def line(self, what: Mapping[str, Any]) -> Row:
        """What a line of runs.jsonl says besides the run."""
        del what
        return {}

    def note_attempts(self, board: Board) -> None:
        """Failures of before do not count against the runs of this worker."""
        if self._before is None:
            self._before = dict(board.attempts)

    def attempts(self, key: str) -> int:
        """How many failures a run may have before it is given up."""
        return (self._before or {}).get(key, 0) + MOST_ATTEMPTS

    def given_up(self, board: Board) -> str:
        """One line on what has failed too often."""
        key, error = next((key, error) for key, error in board.errors.items() if key not in board.current)
        what = board.first[key].user_attrs["what"]
        fields = ", ".join(f"{name} {value}" for name, value in {**what["point"], "seed": what["seed"]}.items())
        return f"a run has failed {board.attempts[key]} times and was given up ({fields}): {error}."

    def rows(self, board: Board) -> list[Row]:
        """The lines of runs.jsonl, in the order of the plan."""
        results = board.results
        return [
            {**record(self.job(entry.what), results[entry.key]), **self.line(entry.what)}
            for entry in self.wanted(board)
        ]


def key_of(name: str, seed: int, scored_on: str) -> str:
    """Of a run: the name of its point, its seed, and the rows that it is scored on."""
    return f"{name}:{seed}:{scored_on}"


def entry_of(name: str, point: Point, seed: int, scored_on: str, **more: Any) -> Entry:
    what = {"point": dict(point), "seed": seed, "scored_on": scored_on, **more}
    return Entry(key_of(name, seed, scored_on), what)
