"""The batched engine: a grid of runs, or as much of it as fits, trains as one model.

Runs can share a stack if they have the same data, model, optimizer, batch size and number of epochs; each keeps its own
method, γ, ε, ρ, level, learning rate, weight decay, momentum, warm-up, seed and random labels, and gets the result
of a run of its own to rounding. Runs are stacked by the passes that they need, so that SGD does not wait for the
second gradient of the others.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from gradreg.lab.batched.models import linear_layers
from gradreg.lab.batched.rules import rule_of
from gradreg.lab.batched.runs import StackedRuns
from gradreg.lab.batched.speed import GridSpeed, measure_grid_speed
from gradreg.lab.config import FIELDS, RunConfig
from gradreg.lab.data.parts import Part
from gradreg.lab.objective import cross_entropy
from gradreg.lab.processes import resolve
from gradreg.lab.runs import Job, Result
from gradreg.lab.task import Loop
from gradreg.lab.tasks import task_of, trained

Progress = Callable[[str, int, int], None]  # what is running, runs done, runs planned

OWN = (
    *("random_labels", "method", "gamma", "epsilon", "rho", "level", "ascent", "warmup"),
    *("fraction", "lookahead", "period", "start", "probability", "threshold"),
    *("learning_rate", "weight_decay", "momentum", "seed"),
)
"""The fields in which the runs of a stack may differ."""
SHARED = ("file", "data", "path", "num_train", "model", "depth", "width", "optimizer", "batch_size", "epochs", "device")
PLAIN = {"augment": False, "compile": False, "precision": "fp32"}
"""Fields that must have this value. So must a field that is not named here have its default."""

MOST_WEIGHTS = 2**18
"""Weights in a stack on the host, where a step should stay within a core's cache; see docs/batched.md."""
MOST_SLICES = 16
MOST_MAPPED = 4
"""Slices of a model that is not an MLP."""
MOST_WEIGHTS_ON_DEVICE = 2**26


def is_stackable(config: RunConfig) -> bool:
    """Whether `run_batched` takes it.

    Example:
        >>> [is_stackable(RunConfig(data="digits", model=model)) for model in ("mlp", "cnn")]
        [True, False]
    """
    return obstacle(config) is None


def is_worthwhile(config: RunConfig) -> bool:
    """Whether a stack is faster than single runs: that of an MLP, whose passes are written out, or any on a GPU.

    Other models on the host take about as long in a stack as alone.
    """
    return is_stackable(config) and (_is_mlp(config) or resolve(config.device).type != "cpu")


def obstacle(config: RunConfig) -> str | None:
    """What keeps a run out of a stack, or None."""
    for name, spec in FIELDS.items():
        value = getattr(config, name)
        if name not in OWN and name not in SHARED and value != PLAIN.get(name, spec.default):
            return f"{name} must be {PLAIN.get(name, spec.default)}, got {value}"
    try:
        rule_of(config, 1)
    except KeyError:
        return f"method must not be {config.method}"
    task = task_of(config)
    if isinstance(task, Loop):
        return "the task must be a Task, got a function with a loop of its own"
    if not isinstance(task.train, Part):
        return "training rows must be two tensors (x, y)"
    if task.objective.loss is not cross_entropy:
        return "the loss must be cross-entropy"
    if task.optimizer is not None or task.transform is not None:
        return "the task must have no optimizer and no transform of its own"
    model = _outline(_shared(config))
    if next(model.buffers(), None) is not None:
        return f"model must have no buffers (BatchNorm), got {config.model}"
    if any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 for layer in model.modules()):
        return f"model must have no dropout, got {config.model}"
    return None


def run_batched(jobs: Sequence[Job], progress: Progress | None = None) -> list[Result]:
    """What `[run(job) for job in jobs]` gives, to rounding; `seconds` is a run's share of its stack.

    Uses as many threads as torch is set to, each with a stack of its own.

    Raises:
        ValueError: a run that cannot be stacked; it should run by itself.
    """
    results: list[Result | None] = [None] * len(jobs)
    with closing(run_all_batched(jobs)) as finished:
        for done, (k, result) in enumerate(finished, 1):
            results[k] = result
            if progress is not None:
                progress("training", done, len(jobs))
    return [result for result in results if result is not None]


def run_all_batched(jobs: Sequence[Job], workers: int | None = None) -> Generator[tuple[int, Result], None, None]:
    """The place of each job with its result, stack by stack as they finish.

    After Ctrl-C, stacks that wait are dropped and those under way end with their epoch.

    Args:
        jobs: any that can be stacked.
        workers: threads, by default as many as torch is set to; a GPU is used by one.

    Raises:
        ValueError: a run that cannot be stacked.
    """
    for k, job in enumerate(jobs):
        why = obstacle(job.config)
        if why is not None:
            raise ValueError(f"jobs[{k}] must be a run that can be stacked: {why}. Use runs.run for it.")
    on_host = all(resolve(job.config.device).type == "cpu" for job in jobs)
    workers = (workers or torch.get_num_threads()) if on_host else 1
    waiting = plan(jobs, workers)
    if workers == 1 or len(waiting) == 1:
        for places in waiting:
            yield from zip(places, StackedRuns([jobs[k] for k in places]).run())
        return
    stop = threading.Event()
    running: dict[Future[list[Result]], list[int]] = {}
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            while waiting or running:
                while waiting and len(running) <= workers:  # one more than run, to be there when a thread is free
                    places = waiting.pop(0)
                    runs = StackedRuns([jobs[k] for k in places])
                    running[pool.submit(runs.run, stop.is_set)] = places
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield from zip(running.pop(future), future.result())
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def plan(jobs: Sequence[Job], workers: int) -> list[list[int]]:
    """Stacks, as places in `jobs`, the longest first: equal in size within a group, a multiple of the workers."""
    groups: dict[Any, list[int]] = {}
    for k, job in enumerate(jobs):
        config = job.config
        key = (_shared(config), rule_of(config, 1, job.carries).passes)
        groups.setdefault(key, []).append(k)
    stacks: list[tuple[float, list[int]]] = []
    for key, places in groups.items():
        config = jobs[places[0]].config
        count = math.ceil(len(places) / most_slices(config))
        if resolve(config.device).type == "cpu":
            count = min(len(places), workers * math.ceil(count / workers))
        cost = key[-1].count * config.epochs
        parts = [places[i * len(places) // count : (i + 1) * len(places) // count] for i in range(count)]
        stacks += [(cost * len(part), part) for part in parts]
    return [places for _, places in sorted(stacks, key=lambda item: -item[0])]


def grid_speed(width: int, num_configs: int, num_steps: int, rounds: int) -> GridSpeed:
    """Configurations per second of a grid, one at a time and batched; what is measured is told in grid_speed.py."""
    return measure_grid_speed(width, num_configs, num_steps, rounds, plan)


def most_slices(config: RunConfig) -> int:
    """Runs in a stack: on the host so many that their weights fit a core's cache, on a device many more."""
    weights = sum(p.numel() for p in _outline(_shared(config)).parameters())
    if resolve(config.device).type == "cpu":
        return max(1, min(MOST_SLICES if _is_mlp(config) else MOST_MAPPED, MOST_WEIGHTS // weights))
    return max(1, MOST_WEIGHTS_ON_DEVICE // weights)


def _is_mlp(config: RunConfig) -> bool:
    return bool(linear_layers(_outline(_shared(config))))


def _shared(config: RunConfig) -> RunConfig:
    """What the runs of a stack have in common."""
    return RunConfig(**{name: getattr(config, name) for name in SHARED})


@lru_cache(maxsize=64)
def _outline(shared: RunConfig) -> nn.Module:
    """The model without its numbers."""
    task = trained(shared)
    with torch.device("meta"):
        return task.model()
