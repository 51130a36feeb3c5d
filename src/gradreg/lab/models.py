"""The models: an MLP for signals, and a small CNN with BatchNorm for images."""

from __future__ import annotations

import torch
from torch import nn

from gradreg.lab.tasks import NUM_CLASSES, Task


def build(task: Task, seed: int) -> nn.Module:
    """The model of a task, initialized by a seed; the global random state stays what it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return {"mlp": mlp, "cnn": cnn}[task.model]()


def mlp(width: int = 256) -> nn.Module:
    """Two hidden layers, for (n, 40)."""
    return nn.Sequential(
        nn.Linear(40, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )


def cnn(width: int = 16) -> nn.Module:
    """Two 3×3 convolutions with BatchNorm and pooling, for (n, 8, 8)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, NUM_CLASSES),
    )
