"""Runs of a study: each is kept as a line as soon as it ends, and searches go on in rounds of all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradreg.lab.folder import append_line
from gradreg.lab.player import Played, run_all
from gradreg.lab.progress import Show
from gradreg.lab.runs import Job, record
from gradreg.lab.search import Point, Search

K = TypeVar("K")
Row = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """How a study plays its runs."""

    lines: Path
    """Takes a line for each."""
    workers: int
    show: Show
    way: Callable[[Sequence[Job], int], Played] | None = None
    """By default each by itself."""

    def play(self, what: str, jobs: Sequence[Job]) -> list[Row]:
        """What `runs.record` says of each, in the order of the jobs."""
        rows: list[Row] = [{}] * len(jobs)
        self.show(what, 0, len(jobs))
        with closing((self.way or run_all)(jobs, self.workers)) as results:
            for done, (k, result) in enumerate(results, 1):
                rows[k] = record(jobs[k], result)
                append_line(self.lines, rows[k])
                self.show(what, done, len(jobs))
        return rows

    def tell(
        self,
        what: str,
        searches: Mapping[K, Search],
        asked: Mapping[K, Sequence[Point]],
        job: Callable[[K, Point, int], Job],
        seeds: Sequence[int],
    ) -> None:
        """Play some points of some searches with each of the seeds, and tell them the scores."""
        entries = [(key, point) for key, points in asked.items() for point in points]
        rows = self.play(what, [job(key, point, seed) for key, point in entries for seed in seeds])
        for k, (key, point) in enumerate(entries):
            of_point = rows[k * len(seeds) : (k + 1) * len(seeds)]
            searches[key].tell(point, [row["accuracy"] for row in of_point])

    def search(
        self, what: str, searches: Mapping[K, Search], job: Callable[[K, Point, int], Job], seeds: Sequence[int]
    ) -> None:
        """To the end, in rounds of all searches at once, so that no worker waits for the last run of one."""
        count = 0
        while asked := {key: points for key, search in searches.items() if (points := search.ask())}:
            count += 1
            self.tell(f"{what}, round {count}", searches, asked, job, seeds)
