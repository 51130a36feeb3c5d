"""Independent computations on a few threads: torch's arithmetic runs outside of Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from gradreg.lab.progress import progress_bar


def run_jobs(jobs: Mapping[Any, Callable[[], Any]], workers: int, label: str) -> dict[Any, Any]:
    """What each job returns, by its key. After Ctrl-C those that wait are dropped, and those under way end first."""
    found: dict[Any, Any] = {}
    with progress_bar() as progress, ThreadPoolExecutor(workers, initializer=_prepare) as pool:
        progress(label, 0, len(jobs))
        futures = {pool.submit(job): key for key, job in jobs.items()}
        try:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                progress(label, len(found), len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _prepare() -> None:
    torch.set_num_threads(1)  # each thread has a number of its own
