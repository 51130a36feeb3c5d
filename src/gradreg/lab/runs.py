"""One training run: data, model, loop, metrics.

A cosine learning rate that ends at 0, weight decay in the optimizer. The model of the last
step is the one that is scored; nothing is picked along the way.

Defined as: *training loss* L and *gradient norm* ‖∇L‖₂ over all parameters, both of the plain cross-entropy (no
penalty, no flooding) on all training rows with the labels that were trained on, in evaluation mode, so that
BatchNorm uses its running statistics and the measurement leaves no trace. *Accuracy* is the share of rows whose
largest logit is the label.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gradreg.lab.config import RunConfig
from gradreg.lab.data import Part, load
from gradreg.lab.methods import METHODS
from gradreg.lab.models import build


@dataclass(frozen=True)
class Job:
    """A run, and what is looked at in it."""

    config: RunConfig
    scored_on: str = "test"
    """`test`, or `validation` while tuning: a run looks at one of the two."""
    num_records: int = 10
    """About how often the training loss and ‖∇L‖ are recorded on the way; 0 for the last step only."""


@dataclass(frozen=True)
class Result:
    """What a run measured; NaN where it diverged."""

    accuracy: float
    train_loss: float
    grad_norm: float
    trace: list[dict[str, float]]
    """`step`, `train_loss`, `grad_norm`, evenly spaced; the last step included."""
    diverged: bool
    seconds: float


def run(job: Job) -> Result:
    """Train and measure. Bitwise the same for the same configuration on the same machine."""
    started = time.perf_counter()
    config = job.config
    data = load(config)
    model = build(config, data)
    steps_per_epoch = len(data.train) // config.batch_size
    num_steps = config.epochs * steps_per_epoch
    backward = METHODS[config.method].attach(model, num_steps, config).backward
    optimizer = make_optimizer(config, model)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batch_order = torch.Generator().manual_seed(config.seed)

    trace: list[dict[str, float]] = []
    record_every = max(1, config.epochs // job.num_records) if job.num_records else config.epochs + 1
    for epoch in range(config.epochs):
        if epoch % record_every == 0 and job.num_records:
            trace.append({"step": epoch * steps_per_epoch, **measure(model, data.train)})
            if not math.isfinite(trace[-1]["train_loss"]):
                break
        model.train()
        order = torch.randperm(len(data.train), generator=batch_order)
        for rows in order[: steps_per_epoch * config.batch_size].split(config.batch_size):
            batch = data.train[rows]
            optimizer.zero_grad()
            backward(lambda batch=batch: F.cross_entropy(model(batch.x), batch.y))
            optimizer.step()
            cosine.step()

    last = measure(model, data.train)
    trace.append({"step": num_steps, **last})
    scored = {"test": data.test, "validation": data.validation}[job.scored_on]
    diverged = not math.isfinite(last["train_loss"])
    return Result(
        accuracy(model, scored), **last, trace=trace, diverged=diverged, seconds=time.perf_counter() - started
    )


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run on all parameters."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=config.momentum, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(model.parameters(), lr=rate, weight_decay=decay)


def measure(model: nn.Module, part: Part) -> dict[str, float]:
    """Loss and ‖∇L‖ of the plain objective on all rows, in evaluation mode."""
    model.eval()
    loss = F.cross_entropy(model(part.x), part.y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    return {"train_loss": loss.item(), "grad_norm": norm.item()}


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Share of rows whose largest logit is the label, in evaluation mode."""
    model.eval()
    return (model(part.x).argmax(1) == part.y).float().mean().item()


def record(job: Job, result: Result) -> dict[str, Any]:
    """A line of runs.jsonl."""
    return {**asdict(job.config), "task": job.config.task, "scored_on": job.scored_on, **asdict(result)}
