"""How the model of a run lies in memory and is called: layout, compilation, precision.

The training loop and the steps that are timed share it, so that what is timed is what is run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradreg.lab.config import RunConfig
from gradreg.lab.rows import Batch
from gradreg.lab.task import Task

_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def laid_out(model: nn.Module, config: RunConfig, device: torch.device) -> nn.Module:
    """The model on a device. With channels last, what a convolution is given takes the layout of its weights."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model  # type: ignore[call-overload]


def compiled(model: nn.Module, config: RunConfig) -> nn.Module:
    """What is called in the place of the model."""
    return torch.compile(model) if config.compile else model  # type: ignore[return-value]


def loss_of(task: Task, forward: nn.Module, config: RunConfig, device: torch.device) -> Callable[[Batch], Tensor]:
    """The loss of a batch that is on the device, in the precision of the configuration."""
    dtype = _LOW_PRECISION.get(config.precision)

    def loss(batch: Batch) -> Tensor:
        if dtype is None:
            return task.objective.loss(forward, batch)
        with torch.autocast(device.type, dtype):
            return task.objective.loss(forward, batch)

    return loss
