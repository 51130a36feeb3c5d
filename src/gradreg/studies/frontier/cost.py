"""The measured time of a mode's step over that of plain training, in paired rounds, as `gradreg cost` takes it.

Three times: of the task's own model in the batched engine (the arithmetic of the step, little Python), of the same in
the real engine by `backward(loss_fn, batches)`, and there of a larger model, where a step is arithmetic again. A mode
that has its penalty in some of the steps only is measured in steps with and without, weighted by their shares; γ and ρ
are at full strength. The reference is always plain training on the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle

import torch
from torch.optim.swa_utils import AveragedModel

from gradreg.lab import objective
from gradreg.lab.attach import attach
from gradreg.lab.batched import most_slices
from gradreg.lab.batched.runs import StackedRuns
from gradreg.lab.config import RunConfig
from gradreg.lab.cost.steps import Step, paired_seconds
from gradreg.lab.data.parts import Part, Split
from gradreg.lab.runs import Job
from gradreg.lab.stats import Ratio, median_ratio
from gradreg.lab.task import Task
from gradreg.lab.tasks import builtin, trained
from gradreg.lab.train.trainer import Trainer
from gradreg.studies.frontier.modes import PLAIN, Candidate, Mode, job

LARGER = RunConfig(
    data="cifar10", path="none", model="vit", depth=2, width=128, batch_size=40, num_train=80, epochs=1, warmup=0
)
"""A small vision transformer, on random images: each weight is used for every patch, as in models that take long."""


Seconds = dict[tuple[str, int], list[float]]
"""Of each mode, with all that it does (0) and, where it does that in some of the steps only, without (1), by round."""


def shares(task: RunConfig, chosen: Mapping[str, Candidate], modes: Mapping[str, Mode]) -> dict[str, float]:
    """Of the steps of a run, those with a penalty; where ‖∇L‖ decides, as in one run on the task."""
    found = {}
    for name, mode in modes.items():
        config = job(task, mode, chosen[name], 0, "validation").config
        if config.threshold is not None:
            found[name] = _tested(config)
        elif "average" in chosen[name].settings:
            found[name] = chosen[name].settings["average"]
        else:
            found[name] = (1 - config.start) * config.probability / config.period
    return found


def _tested(config: RunConfig) -> float:
    trainer = Trainer(config)
    for _ in range(config.epochs):
        trainer.epoch()
    assert trainer.regularizer is not None
    active = trainer.regularizer.diagnostics()["active_steps"]
    assert isinstance(active, torch.Tensor)
    return active.item() / trainer.num_steps


def on_task(
    task: RunConfig,
    chosen: Mapping[str, Candidate],
    modes: Mapping[str, Mode],
    active: Mapping[str, float],
    rounds: int,
) -> tuple[dict[str, Ratio], dict[str, Ratio]]:
    """The batched engine, and the real one, on the model of a task."""
    own = trained(task)
    jobs = {name: job(task, mode, chosen[name], 0, "validation") for name, mode in modes.items()}
    in_stacks = {name: job for name, job in jobs.items() if job.config.threshold is None}  # which save no pass by it
    stacked = _seconds(in_stacks, stacked_step, rounds)
    engine = _seconds(_own(jobs), lambda job: engine_step(job, own), rounds)
    return ratios(stacked, active), ratios(engine, active)


def seconds_larger(modes: Mapping[str, Mode], rounds: int) -> Seconds:
    """The real engine on `LARGER`, random rows; what the settings are makes no difference to the work."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (2 * LARGER.batch_size,), generator=generator)
    part = Part(torch.randn(len(labels), 3, 32, 32, generator=generator), labels)
    task = builtin(LARGER, Split(part, part, part))
    jobs = {
        name: job(LARGER, mode, Candidate(1e-3, 0.0, mode.start[0]), 0, "validation") for name, mode in modes.items()
    }
    return _seconds(_own(jobs), lambda job: engine_step(job, task), rounds)


def stacked_step(job: Job) -> Step:
    """A step of a stack as large as in the study."""
    return StackedRuns([job] * most_slices(job.config)).repeat_last_step


def engine_step(job: Job, task: Task) -> Step:
    """A step of `gradreg.lab.train.trainer` at a learning rate that leaves the weights there, on two batches in turn:
    a test that compares ‖∇L‖ with its past needs something to compare.
    """
    config = job.config
    model = task.build(config.seed).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9, weight_decay=config.weight_decay)
    backward = attach(model, 1, config, optimizer).backward
    averaged = AveragedModel(model) if job.average else None
    rows = task.train
    assert isinstance(rows, Part)
    batches = cycle((part.x, part.y) for part in (rows[: config.batch_size], rows[-config.batch_size :]))

    def step() -> None:
        optimizer.zero_grad()
        backward(lambda batch: objective.loss(model, batch), [next(batches)])
        optimizer.step()
        if averaged is not None:
            averaged.update_parameters(model)

    return step


def _own(jobs: Mapping[str, Job]) -> dict[str, Job]:
    """Without what only stacks can do."""
    return {name: job for name, job in jobs.items() if not job.carries}


def variants(job: Job) -> list[Job]:
    """With all that the mode does at full strength, and, where it does it in some of the steps only, without."""
    always = replace(job.config, warmup=0.0, period=1, start=0.0, probability=1.0)
    if job.average:
        return [replace(job, config=always, average=1.0), replace(job, config=always, average=0.0)]
    if always.threshold is not None:
        return [replace(job, config=replace(always, threshold=c)) for c in (-1e6, 1e6)]
    if replace(always, warmup=job.config.warmup) == job.config:
        return [replace(job, config=always)]
    return [replace(job, config=always), replace(job, config=replace(always, period=10**6))]


def _seconds(jobs: Mapping[str, Job], make: Callable[[Job], Step], rounds: int) -> Seconds:
    steps = {(name, k): make(variant) for name, job in jobs.items() for k, variant in enumerate(variants(job))}
    return paired_seconds(steps, rounds, time.thread_time)


def ratios(seconds: Seconds, active: Mapping[str, float]) -> dict[str, Ratio]:
    """Over plain training, round by round; `active` is the share of steps with all that a mode does."""
    found = {}
    for name in dict.fromkeys(name for name, _ in seconds):
        took = seconds[name, 0]
        if (name, 1) in seconds:
            took = [active[name] * a + (1 - active[name]) * b for a, b in zip(took, seconds[name, 1])]
        found[name] = median_ratio(took, seconds[PLAIN.name, 0])
    return found
