"""What a step costs relative to SGD: time in paired rounds, counted FLOPs and operations, peak memory.

Time: in a round every method makes one step, in an order that rotates; its ratio is taken to the SGD step of the same
round, so that a slow moment of the machine falls on all. Each method has a model of its own, and all the same batch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import mode
from typing import Any, TypeVar

import torch

from gradreg.lab.attach import attach
from gradreg.lab.config import RunConfig
from gradreg.lab.rows import moved
from gradreg.lab.stats import Ratio, median_ratio
from gradreg.lab.task import Task
from gradreg.lab.tasks import trained
from gradreg.lab.train.forward import compiled, laid_out, loss_of

MOST_ROUNDS, LEAST_ROUNDS, SECONDS_OF_COST = 30, 6, 20.0
RATE = 1e-3  # small: the timed weights should stay where they are
WARM_UP = 3  # rounds that allocate

Step = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]
CPU = torch.device("cpu")
BETWEEN = "between"
"""Of a method's steps, one that has no penalty."""


def step_costs(configs: Mapping[str, RunConfig], device: torch.device = CPU, rounds: int = 0) -> dict[str, Ratio]:
    """(a step of each run) / (SGD's step in the same round), medians over rounds, with γ at full strength.

    Where only every k-th step has a penalty, both kinds of steps are timed, and the mean over k of them is taken.

    Args:
        configs: runs of one task, by name, "SGD" among them.
        device: where the steps are made.
        rounds: of paired steps; by default as many as 20 seconds hold, from 6 to 30.
    """
    task = trained(configs["SGD"])
    steps = {name: make_step(config, task, device) for name, config in kinds(configs).items()}
    clock = clock_for(device, threads=1)
    if not rounds:
        started = time.perf_counter()
        paired_seconds(steps, 1, clock, warm_up=1)
        each = (time.perf_counter() - started) / 2
        rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, SECONDS_OF_COST / each)))
    seconds = paired_seconds(steps, rounds, clock, warm_up=1)
    return {name: median_ratio(took, seconds["SGD"]) for name, took in means(configs, seconds).items()}


def kinds(configs: Mapping[str, RunConfig]) -> dict[Hashable, RunConfig]:
    """What is to be timed: each run's step with γ at full strength, and one without, where only some have a penalty."""
    full = {name: replace(config, warmup=0.0, period=1) for name, config in configs.items()}
    now_and_then = [name for name, config in configs.items() if config.period > 1]
    return {**full, **{(name, BETWEEN): replace(full[name], period=10**6) for name in now_and_then}}


def means(configs: Mapping[str, RunConfig], seconds: Mapping[Hashable, Sequence[float]]) -> dict[str, list[float]]:
    """In each round, over as many steps as a run has from one penalty to the next."""
    found = {}
    for name, config in configs.items():
        share, took = 1 / config.period, seconds[name]
        found[name] = [share * a + (1 - share) * b for a, b in zip(took, seconds.get((name, BETWEEN), took))]
    return found


def make_step(config: RunConfig, task: Task, device: torch.device = CPU) -> Step:
    """One training step on the first rows, from the freshly built model of the run, in its layout and precision."""
    model = laid_out(task.build(config.seed), config, device).train()
    forward = compiled(model, config)
    loss = loss_of(task, forward, config, device)
    batch = moved(next(iter(task.train.chunks(config.batch_size, 0)))[0], device)
    if task.optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=config.weight_decay)
    else:
        optimizer = task.optimizer(model.parameters(), lr=RATE, weight_decay=config.weight_decay)
    backward = attach(forward, 1, config, optimizer).backward  # a run of one step: no warm-up

    def step() -> None:
        optimizer.zero_grad()
        backward(loss, [batch])
        optimizer.step()

    return step


def captured(step: Step) -> Step:
    """A step that is one launch of a CUDA graph: what the host does around it is done once, when it is captured.

    Steps are made before, in which a method may check and measure more than later.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Step) -> None:
    del step  # kept by the partial, for it holds the memory that the graph reads and writes
    graph.replay()


def is_processor_time(device: torch.device, threads: int) -> bool:
    return device.type == "cpu" and threads == 1


def clock_for(device: torch.device, threads: int) -> Clock:
    """Wall-clock time, after the device is done; on one host thread the processor time of that thread.

    Processor time is wall-clock time on a quiet machine, and on a busy one it does not count the steps of others.
    """
    if is_processor_time(device, threads):
        return time.thread_time
    if device.type == "cpu":
        return time.perf_counter

    def after_device() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return after_device


def paired_seconds(
    steps: Mapping[Key, Step],
    rounds: int,
    clock: Clock,
    warm_up: int = WARM_UP,
    progress: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:
    """Seconds of each step in each round, after `warm_up` rounds that are not counted."""
    names = list(steps)
    seconds: dict[Key, list[float]] = {name: [] for name in names}
    for k in range(-warm_up, rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            started = clock()
            steps[name]()
            took = clock() - started
            if k >= 0:
                seconds[name].append(took)
        progress()
    return seconds


def count_flops(step: Step) -> int:
    """Two for each multiplication and addition of a matrix product or convolution, as torch's counter knows them.

    Element by element operations, normalization, softmax, the optimizer and copies are not counted. One step is made
    before, since a first step checks the replay by one forward pass more.
    """
    from torch.utils.flop_counter import FlopCounterMode

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def count_operations(step: Step, profiles: int = 5) -> int:
    """The operations that a later step dispatches: forward, backward and whatever stands around them.

    Counted is each `aten::` record of the profiler that lies in no other, be it called by Python, by autograd or by a
    hook: `nn.Linear` is one, and one `torch._foreach_add` over all parameters is one. Take from it the count of a loop
    that makes the same passes and nothing else, and what the method adds to them is left.

    Two steps are made before, in which a method may measure and check more than later. The profiler loses records
    now and then, so the most frequent count of several profiles of one step each is taken.

    Example:
        >>> a, b = [torch.ones(2)] * 9, [torch.ones(2)] * 9
        >>> count_operations(lambda: [x + y for x, y in zip(a, b)]), count_operations(lambda: torch._foreach_add(a, b))
        (9, 1)
    """
    for _ in range(2):
        step()
    return mode(_count_operations_once(step) for _ in range(profiles))


def _count_operations_once(step: Step) -> int:
    with _silent_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(_is_dispatched(event) for event in profile.events() or ())


def _is_dispatched(event: Any) -> bool:
    if not event.name.startswith("aten::") or event.name == "aten::_has_compatible_shallow_copy_type":
        return False  # the latter is what `p.data = t` asks before it sets a pointer
    above = [one.name for one in _ancestors(event)]
    if event.name == "aten::detach" and above and above[0] == "torch::autograd::AccumulateGrad":
        return False  # autograd lays a gradient into `.grad`; torch.autograd.grad has no such record
    return not any(name.startswith("aten::") for name in above)


def _ancestors(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def peak_bytes(make: Callable[[], Step], device: torch.device = CPU) -> int:
    """The most bytes that the second step holds at once, beyond the fresh model and its batch.

    On the host the profiler's record of every allocation is added up; on a GPU the allocator counts.
    """
    gc.collect()  # garbage of before would be given back while we count
    step = make()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - start
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
        with torch.profiler.record_function("second step"):
            step()
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    events = results.events()
    begin = next(e.start_ns() for e in events if e.name() == "second step")
    held = peak = 0
    for time_ns, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        if time_ns >= begin:
            peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's C++ side talks on the descriptor itself, and its log level is read when torch is imported."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def keep_heap() -> None:
    """Let the heap keep what it is given back, from here to the end of the process.

    Whether glibc returns memory to the kernel between two steps is luck, and costs any method up to a tenth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:  # glibc
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
