"""The cost of a step relative to SGD, measured on one thread before any run starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from gradreg.lab.config import RunConfig
from gradreg.lab.data import Split, load
from gradreg.lab.methods import METHODS
from gradreg.lab.models import build
from gradreg.lab.tune import configure


def step_costs(task: RunConfig, chosen: Mapping[str, Mapping[str, Any]], rounds: int = 60) -> dict[str, float]:
    """Median over rounds of (a method's step) / (SGD's step of the same round), γ at full strength.

    A round takes one step of every method in turn, each on its own copy of the model and the same batch, so that a
    slow moment of the machine falls on all of them. A step is timed in processor time of this thread, which on a quiet
    machine is wall-clock time and on a busy one does not count the steps of others.
    """
    data = load(task)
    steps = {name: _step(configure(task, name, values, seed=0), data) for name, values in chosen.items()}
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds + 5):
        seconds = {name: step() for name, step in steps.items()}
        if k >= 5:  # the first rounds allocate
            for name in steps:
                ratios[name].append(seconds[name] / seconds["SGD"])
    return {name: median(values) for name, values in ratios.items()}


def _step(config: RunConfig, data: Split) -> Callable[[], float]:
    model = build(config, data).train()
    x, y = data.train.x[: config.batch_size], data.train.y[: config.batch_size]
    backward = METHODS[config.method].attach(model, 1, config).backward  # a run of one step: no warm-up
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=config.weight_decay)

    def step() -> float:
        started = time.thread_time()
        optimizer.zero_grad()
        backward(lambda: F.cross_entropy(model(x), y))
        optimizer.step()
        return time.thread_time() - started

    return step
