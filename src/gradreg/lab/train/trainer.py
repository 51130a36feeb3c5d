"""The training loop of the lab: data, model, method, optimizer, schedule, precision, one epoch at a time.

A cosine learning rate that ends at 0, weight decay in the optimizer. A row of the training part is seen once in an
epoch, in an order that the seed decides; the last partial batch is dropped. With several processes a batch is split
among them and gradients are averaged, so that a step is that of one process to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg.lab.attach import Batch, attach
from gradreg.lab.config import RunConfig
from gradreg.lab.data.parts import Part
from gradreg.lab.folder import BadInput
from gradreg.lab.methods import ONE_PASS
from gradreg.lab.processes import Processes, resolve
from gradreg.lab.randomness import random_state, set_random_state
from gradreg.lab.rows import TensorRows, moved, shared_out
from gradreg.lab.task import Task
from gradreg.lab.tasks import trained
from gradreg.lab.train.checkpoint import differences
from gradreg.lab.train.forward import compiled, laid_out, loss_of


@dataclass
class Place:
    """How far a run is."""

    epoch: int = 0
    """Finished epochs."""
    position: int = 0
    """Steps into the next one."""


class Trainer:
    """A run in memory.

    Args:
        config: what to run.
        task: by default that of the configuration.
        processes: those that share each batch; by default this one alone.
        follows_penalty: measure `penalty_ratio` in the last step of each epoch; no bit of the run depends on it.

    Raises:
        BadInput: a device that is not there, batches that the processes cannot share, or the exact penalty where
            PyTorch cannot differentiate twice.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task | None = None,
        processes: Processes | None = None,
        follows_penalty: bool = False,
    ) -> None:
        self.processes = processes or Processes(device=resolve(config.device))
        _check(config, self.processes)
        self.config = config
        self.task = trained(config) if task is None else task
        self.device = self.processes.device
        self.model = laid_out(self.task.build(config.seed), config, self.device)
        self.steps_per_epoch = self.task.train.num_batches(config.batch_size)
        self.num_steps = config.epochs * self.steps_per_epoch
        self._forward = self._wrapped(self.model)
        self._loss = loss_of(self.task, self._forward, config, self.device)
        self.optimizer = make_optimizer(config, self.model, self.task)
        attached = attach(self._forward, self.num_steps, config, self.optimizer)
        self._backward, self.regularizer, self.flooded = attached.backward, attached.regularizer, attached.flooded
        self._cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.num_steps)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._batch_order = torch.Generator().manual_seed(config.seed)
        self._augmentation = torch.Generator().manual_seed(config.seed)
        self._epoch_start = self._batch_order.get_state()  # before the order of the epoch was drawn
        self._epoch_random: dict[str, Any] | None = None  # what data that draws started from
        self._is_drawing = not isinstance(self.task.train, Part | TensorRows)
        has_first_gradient = self.regularizer is not None and config.method not in ONE_PASS
        self._follows_penalty = follows_penalty and has_first_gradient
        self.penalty_ratio = 0.0
        self.place = Place()

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.place.epoch * self.steps_per_epoch + self.place.position

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def epoch(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end of the epoch; whether it came so far, since `should_stop` is asked after every step."""
        batches = self._batches()
        self._forward.train()
        for batch in batches:
            is_last = self.place.position == self.steps_per_epoch - 1
            if is_last and self._follows_penalty:
                assert self.regularizer is not None
                self.regularizer.diagnostics()  # having been read, they are measured in the next step
            self._step(batch)
            self.place.position += 1
            if is_last:
                self._end_epoch()
            if should_stop():
                return is_last
        return True

    def _batches(self) -> Iterator[Batch]:
        """What is left of the epoch. Data that draws random numbers draws those that it drew before a stop."""
        self._batch_order.set_state(self._epoch_start)
        here = random_state(self.device) if self._is_drawing else None
        if self.place.position == 0:
            self._epoch_random = here
        elif self._epoch_random is not None:
            set_random_state(self._epoch_random, self.device)
        batches = iter(self.task.train.batches(self._batch_order, self.config.batch_size))
        for _ in range(self.place.position):
            next(batches)
        if here is not None and self.place.position:
            set_random_state(here, self.device)
        return batches

    def _step(self, batch: Batch) -> None:
        part = self._share(batch)
        self.optimizer.zero_grad()
        if self.config.precision == "fp16":
            self._backward(self._loss, [part], backward=lambda loss: self._scaler.scale(loss).backward())
        else:
            self._backward(self._loss, [part])
        self._scaler.step(self.optimizer)
        self._scaler.update()
        with warnings.catch_warnings():
            if self.config.precision == "fp16":  # a scaler that skips the first step makes the schedule complain
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self._cosine.step()

    def _share(self, batch: Batch) -> Batch:
        """This process's rows; the whole batch is augmented first, so that they do not depend on the others."""
        if self.task.transform is not None:
            batch = self.task.transform(batch, self._augmentation)
        return moved(shared_out(batch, self.processes.rank, self.processes.size), self.device)

    def _end_epoch(self) -> None:
        if self._follows_penalty:
            assert self.regularizer is not None
            ratio = self.regularizer.diagnostics()["penalty_ratio"]
            assert isinstance(ratio, Tensor)
            self.penalty_ratio = ratio.item()
        self.place = Place(self.place.epoch + 1)
        self._epoch_start = self._batch_order.get_state()

    def _wrapped(self, model: nn.Module) -> nn.Module:
        if self.processes.size > 1:
            model = DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        return compiled(model, self.config)

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come; tensors are not copied."""
        regularizer = self.regularizer
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._cosine.state_dict(),
            "scaler": self._scaler.state_dict(),
            "regularizer": None if regularizer is None else regularizer.state_dict(),
            "flooded_steps": None if self.flooded is None else self.flooded.steps,
            "penalty_ratio": self.penalty_ratio,
            "batch_order": self._epoch_start,
            "augmentation": self._augmentation.get_state(),
            "random": random_state(self.device),
            "epoch_random": self._epoch_random,
            "epoch": self.place.epoch,
            "position": self.place.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            BadInput: the state of another model; the message lists the differences, and nothing is changed.
        """
        different = differences(self.model.state_dict(), state["model"])
        if different:
            more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
            raise BadInput(f"the checkpoint is that of another model: {'; '.join(different[:5])}{more}.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._cosine.load_state_dict(state["schedule"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        if self.flooded is not None:
            self.flooded.steps = state.get("flooded_steps") or 0  # checkpoints of earlier versions have no count
        self.penalty_ratio = state["penalty_ratio"]
        self._epoch_start = state["batch_order"]
        self._augmentation.set_state(state["augmentation"])
        set_random_state(state["random"], self.device)
        self._epoch_random = state.get("epoch_random")
        self.place = Place(state["epoch"], state["position"])


def _check(config: RunConfig, processes: Processes) -> None:
    if config.method == "DB" and config.compile:
        raise BadInput("compile must be false with method DB: a compiled model cannot be differentiated twice.")
    if config.method == "DB" and processes.size > 1:
        raise BadInput("method must not be DB with several processes: what they reduce is the first derivative only.")
    if config.batch_size % processes.size:
        raise BadInput(
            f"batch_size must be a multiple of the {processes.size} processes that share it, got '{config.batch_size}'."
        )


def make_optimizer(config: RunConfig, model: nn.Module, task: Task | None = None) -> torch.optim.Optimizer:
    """The optimizer of a run on all parameters: the task's own, if it has one."""
    rate, decay = config.learning_rate, config.weight_decay
    if task is not None and task.optimizer is not None:
        found = task.optimizer(model.parameters(), lr=rate, weight_decay=decay)
        if not isinstance(found, torch.optim.Optimizer):
            raise BadInput(f"optimizer must make a torch.optim.Optimizer, got {type(found).__name__}.")
        return found
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=config.momentum, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(model.parameters(), lr=rate, weight_decay=decay)
