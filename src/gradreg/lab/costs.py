"""The cost of a step relative to SGD, measured on one thread before any run starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from gradreg.lab.methods import METHODS
from gradreg.lab.models import build
from gradreg.lab.tasks import Task, load


def step_costs(task: Task, chosen: Mapping[str, Mapping[str, Any]], rounds: int = 60) -> dict[str, float]:
    """Median over rounds of (a method's step) / (SGD's step of the same round), γ at full strength.

    A round takes one step of every method in turn, each on its own copy of the model and the same batch, so that a
    slow moment of the machine falls on all of them. A step is timed in processor time of this thread, which on a quiet
    machine is wall-clock time and on a busy one does not count the steps of others.
    """
    batch = load(task, 0).train[: task.batch_size]
    steps = {name: _step(task, name, chosen[name], batch.x, batch.y) for name in METHODS}
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    for k in range(rounds + 5):
        seconds = {name: step() for name, step in steps.items()}
        if k >= 5:  # the first rounds allocate
            for name in METHODS:
                ratios[name].append(seconds[name] / seconds["SGD"])
    return {name: median(values) for name, values in ratios.items()}


def _step(task: Task, name: str, chosen: Mapping[str, Any], x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    model = build(task, 0).train()
    backward = METHODS[name].attach(model, 1, **chosen["settings"])  # a run of one step: no warm-up after it
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=chosen["weight_decay"])

    def step() -> float:
        started = time.thread_time()
        optimizer.zero_grad()
        backward(lambda: F.cross_entropy(model(x), y))
        optimizer.step()
        return time.thread_time() - started

    return step
