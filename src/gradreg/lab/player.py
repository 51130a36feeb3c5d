"""Where runs are played: here, on a few processes of one thread each, or stacked as one model.

One interface: jobs in, the place of each with its result out, as they finish. Workers that share a study are in sweep/.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from gradreg.lab.batched import is_worthwhile, run_all_batched
from gradreg.lab.runs import Job, Result, run
from gradreg.lab.tasks import Source, know, sources

T = TypeVar("T")
R = TypeVar("R")
Played = Generator[tuple[int, Result], None, None]


def default_workers() -> int:
    """Two, or one where there is one core."""
    return min(2, os.cpu_count() or 1)


def play(jobs: Sequence[Job], workers: int) -> Played:
    """Each job in a stack where that is faster, and by itself where not."""
    stacked = [k for k, job in enumerate(jobs) if job.carries or is_worthwhile(job.config)]
    single = [k for k in range(len(jobs)) if k not in set(stacked)]
    for places, way in ((stacked, run_all_batched), (single, run_all)):
        if places:
            for k, result in way([jobs[k] for k in places], workers):
                yield places[k], result


def run_all(jobs: Sequence[Job], workers: int) -> Played:
    """Each job by itself, bitwise what `runs.run` gives."""
    return on_processes(run, jobs, workers)


def on_processes(call: Callable[[T], R], items: Sequence[T], workers: int) -> Generator[tuple[int, R], None, None]:
    """`call(item)` of each, with its place, as they finish; on processes of one thread that know this one's tasks.

    Ctrl-C reaches this process alone: calls that wait are dropped, those under way end and are not reported.
    """
    if workers == 1:
        yield from ((k, call(item)) for k, item in enumerate(items))
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_prepare, initargs=(sources(),))
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes that `submit` starts
        try:
            with without_main():
                futures = {pool.submit(call, item): k for k, item in enumerate(items)}
        finally:
            signal.signal(signal.SIGINT, before)
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that start here do not run the user's script again, which may have no `if __name__ == "__main__"`.

    They need nothing of it: tasks that live in it are sent with their code.
    """
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    try:
        for name in kept:
            delattr(main, name)
        main.__spec__ = None
        yield
    finally:
        with suppress(AttributeError):
            del main.__spec__
        for name, value in kept.items():
            setattr(main, name, value)


def _prepare(known: tuple[Source, ...]) -> None:
    torch.set_num_threads(1)
    know(known)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
