"""How far a command is: a bar on a terminal, one line that changes in a notebook, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from threading import Event, Lock, Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

EVERY = 30.0
"""Seconds before the first line where there is no terminal, and between two."""

Show = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Show]:
    """Yields `show(what, done, planned)`; `what` may hold the best so far."""
    console = Console(stderr=True)
    if _is_in_notebook():
        lines = Lines(_rewritten(), every=1.0)
        yield lines.show
        lines.say()
    elif console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty():
        with _bar(console) as show:
            yield show
    else:
        lines, ended = _of_this_process(), Event()
        thread = Thread(target=_keep_saying, args=(lines, ended), daemon=True)  # a run may take hours
        thread.start()
        try:
            yield lines.show
        finally:
            ended.set()
            thread.join()


class Lines:
    """Says how far a command is, not in the first `every` seconds, and at most once in as many."""

    def __init__(self, write: Callable[[str], object], every: float, clock: Callable[[], float] = time.monotonic):
        self._write, self._every, self._clock = write, every, clock
        self._begun = self._said = clock()
        self._what, self._done, self._planned = "", 0, 0
        self._stage = (self._begun, 0)  # when the count began, and at what
        self._lock = Lock()

    def show(self, what: str, done: int, planned: int) -> None:
        if planned != self._planned or done < self._done:
            self._stage = (self._clock(), done)
        self._what, self._done, self._planned = what, done, planned
        self.say_now_and_then()

    def say_now_and_then(self) -> None:
        with self._lock:
            if self._clock() - self._said >= self._every:
                self.say()

    def say(self) -> None:
        if not self._what:
            return
        self._said = now = self._clock()
        since, first = self._stage
        done, planned = self._done, self._planned
        left = f", {_span((now - since) * (planned - done) / (done - first))} left" if done > first else ""
        self._write(f"{self._what}: {done} of {planned}, {_span(now - self._begun)} elapsed{left}")


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@lru_cache(maxsize=1)
def _of_this_process() -> Lines:
    """One for all parts of a command."""
    return Lines(lambda line: print(f"gradreg: {line}", file=sys.stderr, flush=True), EVERY)


def _keep_saying(lines: Lines, ended: Event) -> None:
    while not ended.wait(1.0):
        lines.say_now_and_then()


def _is_in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _rewritten() -> Callable[[str], None]:
    """Writes to one place of the page, in which the last line stays."""
    from IPython.display import display  # type: ignore[import-not-found]

    handle: Any = None

    def write(line: str) -> None:
        nonlocal handle
        if handle is None:
            handle = display({"text/plain": line}, raw=True, display_id=True)
        else:
            handle.update({"text/plain": line}, raw=True)

    return write


@contextmanager
def _bar(console: Console) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}", table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, expand=True) as bar:  # what is long gives way, not the numbers
        line = bar.add_task("starting", total=None)
        yield lambda what, done, planned: bar.update(line, description=what, completed=done, total=planned)
