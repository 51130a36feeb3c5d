"""Many runs on a few processes, one thread each; results arrive as they finish."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from gradreg.lab.runs import Job, Result, run


def default_workers() -> int:
    """Two, or one where there is one core."""
    return min(2, os.cpu_count() or 1)


def run_all(jobs: Sequence[Job], workers: int) -> Generator[tuple[int, Result], None, None]:
    """The place of each job with its result, in the order in which they finish.

    Ctrl-C reaches this process alone: runs that wait are dropped, those under way end and are not reported.
    """
    if workers == 1:
        yield from ((k, run(job)) for k, job in enumerate(jobs))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_prepare)
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes that `submit` starts
        try:
            futures = {pool.submit(run, job): k for k, job in enumerate(jobs)}
        finally:
            signal.signal(signal.SIGINT, before)
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
