"""The models: an MLP for signals, and a small CNN with BatchNorm for images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from gradreg.lab.config import RunConfig
from gradreg.lab.data import Split


def build(config: RunConfig, data: Split) -> nn.Module:
    """The model of a run, initialized by its seed; the global random state stays what it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        return MODELS[config.model](config, data)


def mlp(config: RunConfig, data: Split) -> nn.Module:
    """`depth` linear layers (3) of `width` hidden units (256) with ReLU, for rows of any shape."""
    depth, width = config.depth or 3, config.width or 256
    sizes = [data.train.x[0].numel(), *[width] * (depth - 1), data.num_classes]
    layers: list[nn.Module] = [] if data.train.x.ndim == 2 else [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(config: RunConfig, data: Split) -> nn.Module:
    """Two 3×3 convolutions of `width` (16) and twice as many channels with BatchNorm and pooling, for (n, 8, 8)."""
    width = config.width or 16
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
        nn.Linear(8 * width, data.num_classes),
    )


MODELS: dict[str, Callable[[RunConfig, Split], nn.Module]] = {"mlp": mlp, "cnn": cnn}
