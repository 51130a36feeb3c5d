"""How many configurations of a grid train in a second: one at a time, and as one batched model.

The grid is four methods, SGD, F-GR, B-GR and DB, in equal numbers, each run with a seed, γ and ε of its own, on
one-dimensional MNIST with an MLP of depth 3, batches of 100 and γ at full strength from the first step. Building the
runs is left out, recording is off. One at a time is done in the two ways that there are: all threads on one run, and
a process of one thread for each core, as `gradreg.lab.player` has it; the ratio is to the faster.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch

from gradreg.lab import objective
from gradreg.lab.attach import attach
from gradreg.lab.batched.runs import StackedRuns
from gradreg.lab.config import RunConfig
from gradreg.lab.data.parts import Part
from gradreg.lab.methods import METHODS
from gradreg.lab.processes import resolve
from gradreg.lab.runs import Job, make_optimizer
from gradreg.lab.tasks import trained

BATCH_SIZE = 100
EPOCH = 40
"""Steps in an epoch of the 4,000 rows."""
ALL_THREADS, EACH_CORE, BATCHED = "one at a time, all threads", "one at a time on each core", "batched"


@dataclass(frozen=True)
class GridSpeed:
    """What was measured; the interval is that of the median over rounds, 95%, by bootstrap."""

    width: int
    num_configs: int
    num_steps: int
    threads: int
    device: str
    configs_per_second: dict[str, float]
    """Of each way to train the grid, at `num_steps` steps a configuration."""
    baseline: str
    """The faster way to train one at a time."""
    ratio: float
    low: float
    high: float


def measure_grid_speed(
    width: int, num_configs: int, num_steps: int, rounds: int, plan: Callable[[Sequence[Job], int], list[list[int]]]
) -> GridSpeed:
    """In each round every way trains the grid once, in an order that rotates.

    Args:
        width: hidden units.
        num_configs: runs in the grid.
        num_steps: steps of each, up to 40 or a multiple of 40.
        rounds: paired rounds, after one that is not counted.
        plan: how runs are stacked on so many threads.
    """
    from gradreg.lab.stats import median_ratio

    jobs = [Job(config, num_records=0) for config in grid(width, num_configs, num_steps)]
    device, threads = resolve("auto"), torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1
    halves = [jobs[k::workers] for k in range(workers)]
    one_thread = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with _processes(workers) as processes, one_thread:

        def on_each_core() -> float:
            return max(processes.map(_train_alone, halves, [1] * workers))

        def batched() -> float:
            stacks = [StackedRuns([jobs[k] for k in places]) for places in plan(jobs, workers)]
            started = time.perf_counter()
            list(one_thread.map(_train_stack, stacks))
            return time.perf_counter() - started

        ways = {ALL_THREADS: lambda: _train_alone(jobs, threads), EACH_CORE: on_each_core, BATCHED: batched}
        seconds = {name: [] for name in ways}
        names = list(ways)
        for k in range(-1, rounds):
            for name in names[k % 3 :] + names[: k % 3]:
                took = ways[name]()
                if k >= 0:
                    seconds[name].append(took)
    baseline = min((ALL_THREADS, EACH_CORE), key=lambda name: median(seconds[name]))
    ratio = median_ratio(seconds[baseline], seconds[BATCHED])
    per_second = {name: num_configs / median(values) for name, values in seconds.items()}
    interval = ratio.median, ratio.low, ratio.high
    return GridSpeed(width, num_configs, num_steps, threads, device.type, per_second, baseline, *interval)


def grid(width: int, num_configs: int, num_steps: int) -> list[RunConfig]:
    """The configurations, the four methods in turn."""
    if num_steps < 1 or (num_steps > EPOCH and num_steps % EPOCH):
        raise ValueError(f"num_steps must be from 1 to {EPOCH} or a multiple of {EPOCH}, got {num_steps}.")
    configs = []
    for k, method in enumerate(islice(cycle(("SGD", "F-GR", "B-GR", "DB")), num_configs)):
        own = {"gamma": 0.01 * (1 + k % 5), "epsilon": 0.05 * (1 + k % 7)}
        settings: dict[str, Any] = {name: value for name, value in own.items() if name in METHODS[method].needs}
        configs.append(
            RunConfig(
                width=width,
                num_train=BATCH_SIZE * min(num_steps, EPOCH),
                epochs=max(1, num_steps // EPOCH),
                batch_size=BATCH_SIZE,
                warmup=0.0,
                seed=k,
                method=method,
                **settings,
            )
        )
    return configs


def _processes(count: int) -> Executor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def _train_alone(jobs: Sequence[Job], threads: int) -> float:
    """Seconds of training the runs one by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    total = 0.0
    for job in jobs:
        train = _single(job.config)
        started = time.perf_counter()
        train()
        total += time.perf_counter() - started
    torch.set_num_threads(before)
    return total


def _single(config: RunConfig) -> Callable[[], None]:
    """The loop of a run with nothing around it."""
    task, device = trained(config), resolve(config.device)
    model = task.build(config.seed).to(device).train()
    assert isinstance(task.train, Part)
    x, y = task.train.x.to(device), task.train.y.to(device)
    num_steps = config.epochs * (len(x) // config.batch_size)
    optimizer = make_optimizer(config, model)
    backward = attach(model, num_steps, config, optimizer).backward
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batch_order = torch.Generator().manual_seed(config.seed)

    def train() -> None:
        for _ in range(config.epochs):
            for rows in torch.randperm(len(x), generator=batch_order).to(device).split(config.batch_size):
                optimizer.zero_grad()
                backward(lambda batch: objective.loss(model, batch), [(x[rows], y[rows])])
                optimizer.step()
                cosine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return train


def _train_stack(runs: StackedRuns) -> None:
    runs.train()
    if runs.weights.is_cuda:
        torch.cuda.synchronize(runs.weights.device)
