"""One training run: data, model, loop, metrics.

SGD with momentum 0.9, a cosine learning rate that ends at 0, weight decay in the optimizer. The model of the last
step is the one that is scored; nothing is picked along the way.

Defined as: *training loss* L and *gradient norm* ‖∇L‖₂ over all parameters, both of the plain cross-entropy (no
penalty, no flooding) on all training rows with the labels that were trained on, in evaluation mode, so that
BatchNorm uses its running statistics and the measurement leaves no trace. *Accuracy* is the share of rows whose
largest logit is the label.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gradreg.lab.methods import METHODS, Settings
from gradreg.lab.models import build
from gradreg.lab.tasks import Part, Task, load

MOMENTUM = 0.9


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    task: Task
    """Data, model, labels, length."""
    method: str
    """A name in the table of methods."""
    learning_rate: float
    """The first, and highest, of the cosine schedule."""
    weight_decay: float
    """Added to the gradient as weight_decay · θ, after the method has had its say."""
    settings: Settings = field(default_factory=dict)
    """The method's own: γ, ε, ρ or a level."""
    seed: int = 0
    """Initialization, order of the batches, which labels are random."""
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


def run(config: Config) -> Result:
    """Train and measure. Bitwise the same for the same configuration on the same machine."""
    started = time.perf_counter()
    task = config.task
    data = load(task, config.seed)
    model = build(task, config.seed)
    backward = METHODS[config.method].attach(model, task.num_steps, **config.settings)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=MOMENTUM, weight_decay=config.weight_decay
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.num_steps)
    batch_order = torch.Generator().manual_seed(config.seed)

    trace: list[dict[str, float]] = []
    record_every = max(1, task.epochs // config.num_records) if config.num_records else task.epochs + 1
    steps_per_epoch = task.num_train // task.batch_size
    for epoch in range(task.epochs):
        if epoch % record_every == 0 and config.num_records:
            trace.append({"step": epoch * steps_per_epoch, **measure(model, data.train)})
            if not math.isfinite(trace[-1]["train_loss"]):
                break
        model.train()
        order = torch.randperm(task.num_train, generator=batch_order)
        for rows in order[: steps_per_epoch * task.batch_size].split(task.batch_size):
            batch = data.train[rows]
            optimizer.zero_grad()
            backward(lambda batch=batch: F.cross_entropy(model(batch.x), batch.y))
            optimizer.step()
            cosine.step()

    last = measure(model, data.train)
    trace.append({"step": task.num_steps, **last})
    scored = {"test": data.test, "validation": data.validation}[config.scored_on]
    diverged = not math.isfinite(last["train_loss"])
    return Result(
        accuracy(model, scored), **last, trace=trace, diverged=diverged, seconds=time.perf_counter() - started
    )


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


def record(config: Config, result: Result) -> dict[str, Any]:
    """A line of runs.jsonl."""
    return {**asdict(config), "task": config.task.name, **asdict(result)}
