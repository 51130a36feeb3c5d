"""Runs that train as one stack: the loop of trainer.py with its measurements, for many configurations at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gradreg.lab import objective
from gradreg.lab.batched.models import stack
from gradreg.lab.batched.rules import rule_of
from gradreg.lab.batched.training import StackedAverage, StackedOptimizer, StackedRegularizer
from gradreg.lab.data.parts import Part
from gradreg.lab.objective import Evaluation
from gradreg.lab.processes import resolve
from gradreg.lab.runs import Job, Result
from gradreg.lab.tasks import trained


class StackedRuns:
    """S runs with the same data, architecture, batch size, epochs, optimizer and passes.

    Each has its own initialization, order of the batches and random labels, by its seed, as a run of its own has.
    Building them reads and puts back the global random state, so it belongs into the main thread; `run` may be called
    in any.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        configs = [job.config for job in jobs]
        device = resolve(configs[0].device)
        tasks = [trained(config) for config in configs]
        models = [task.build(config.seed) for config, task in zip(configs, tasks)]
        parts = [task.train for task in tasks]
        assert all(isinstance(part, Part) for part in parts)
        self._jobs = jobs
        self._task = tasks[0]
        self._x = parts[0].x.to(device)
        self._y = torch.stack([part.y for part in parts]).to(device)
        self._batch_size = configs[0].batch_size
        self._epochs = configs[0].epochs
        self._steps_per_epoch = len(self._x) // self._batch_size
        self.num_steps = self._epochs * self._steps_per_epoch
        self.weights = torch.stack([parameters_to_vector(model.parameters()).detach() for model in models]).to(device)
        self._model: nn.Module = models[0].to(device)  # which moves its own weights, so not before
        self._stack = stack(self._model)
        rules = [rule_of(job.config, self.num_steps, job.carries) for job in jobs]
        self._regularizer = StackedRegularizer(self._stack, rules, self.weights, self.num_steps)
        self._average = StackedAverage([job.average for job in jobs], self.weights, self.num_steps)
        self._optimizer = StackedOptimizer(configs, self.weights)
        self._orders = [torch.Generator().manual_seed(config.seed) for config in configs]
        self._diverged: dict[int, Tensor] = {}
        self._is_odd = False

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> list[Result]:
        """Train and measure; `should_stop` is asked after every epoch, and ends it with KeyboardInterrupt."""
        started = time.perf_counter()
        traces: list[list[dict[str, float]]] = [[] for _ in self._jobs]
        for epoch in range(self._epochs):
            recorded = [k for k, job in enumerate(self._jobs) if self._is_recorded(job, epoch)]
            self._record(traces, recorded, epoch * self._steps_per_epoch)
            if len(self._diverged) == len(self._jobs):
                break
            self.epoch(epoch)
            if should_stop():
                raise KeyboardInterrupt
        self._average.take_place()
        for k, weights in self._diverged.items():
            self.weights[k] = weights
        last = self._measure()
        scores = [self._score(k) for k in range(len(self._jobs))]
        traces_of_hessian = self._hessian_traces()
        seconds = (time.perf_counter() - started) / len(self._jobs)
        return [
            Result(
                score.score,
                measured["train_loss"],
                measured["grad_norm"],
                trace=[*trace, {"step": self.num_steps, **measured}],
                diverged=not math.isfinite(measured["train_loss"]),
                seconds=seconds,
                hessian_trace=hessian_trace,
                num_scored=score.count,
            )
            for job, score, measured, trace, hessian_trace in zip(self._jobs, scores, last, traces, traces_of_hessian)
        ]

    def train(self) -> None:
        """All epochs, nothing measured."""
        for epoch in range(self._epochs):
            self.epoch(epoch)

    @torch.no_grad()
    def epoch(self, epoch: int) -> None:
        """Every row of every run once, the last partial batch dropped."""
        size = self._batch_size
        orders = torch.stack([torch.randperm(len(self._x), generator=g) for g in self._orders]).to(self._x.device)
        first = epoch * self._steps_per_epoch
        for step in range(first, first + self._steps_per_epoch):
            share = (1 + math.cos(math.pi * step / self.num_steps)) / 2
            self._step(orders[:, (step - first) * size : (step - first + 1) * size], step, share)

    @torch.no_grad()
    def repeat_last_step(self) -> None:
        """The work of one step, to be timed, at a learning rate of 0: on the first rows, then the last, in turn."""
        self._is_odd = not self._is_odd
        first = len(self._x) - self._batch_size if self._is_odd else 0
        rows = torch.arange(first, first + self._batch_size, device=self._x.device).expand(len(self._jobs), -1)
        self._step(rows, self.num_steps - 1, share=0.0)

    def _step(self, rows: Tensor, step: int, share: float) -> None:
        x, y = self._batch(rows)
        gradient = self._regularizer.gradient(self.weights, x, y, step, self._optimizer.momentum)
        self._optimizer.step(gradient, step, share)
        self._average.update(step)

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(S, B, …) rows of the data, with the labels of each run."""
        x = self._x.index_select(0, rows.reshape(-1)).unflatten(0, rows.shape)
        if self._y.ndim == 2:
            return x, self._y.gather(1, rows)
        return x, self._y.take_along_dim(rows.unsqueeze(2), 1)

    def _is_recorded(self, job: Job, epoch: int) -> bool:
        return job.num_records > 0 and epoch % max(1, self._epochs // job.num_records) == 0

    def _record(self, traces: Sequence[list[dict[str, float]]], recorded: Sequence[int], step: int) -> None:
        """A point of the trace; a run that is found diverged ends here, its weights put aside."""
        running = [k for k in recorded if k not in self._diverged]
        measured = self._measure() if running else []
        for k in running:
            traces[k].append({"step": step, **measured[k]})
            if not math.isfinite(measured[k]["train_loss"]):
                self._diverged[k] = self.weights[k].clone()

    @torch.no_grad()
    def _measure(self) -> list[dict[str, float]]:
        """What `runs.measure` gives, a batch of rows at a time: the memory of a training step is enough."""
        count = len(self._jobs)
        total, part = torch.zeros_like(self.weights), torch.empty_like(self.weights)
        losses = self.weights.new_zeros(count, dtype=torch.float64)
        for rows in torch.arange(len(self._x), device=self._x.device).split(self._batch_size):
            x, y = self._batch(rows.expand(count, -1))
            loss = self._stack.gradient(self.weights, x, y, part, with_loss=True)
            assert loss is not None
            share = len(rows) / len(self._x)
            losses += loss.double() * share
            total.add_(part, alpha=share)
        norms = torch.linalg.vector_norm(total, dim=1)
        return [{"train_loss": a, "grad_norm": b} for a, b in zip(losses.tolist(), norms.tolist())]

    @torch.no_grad()
    def _hessian_traces(self) -> list[float | None]:
        """Hutchinson's mean of zᵀHz over the random signs z of `gradreg.curvature.hessian_trace`, the same for all."""
        num_probes = max(job.num_probes for job in self._jobs)
        total = self.weights.new_zeros(len(self._jobs), num_probes, dtype=torch.float64)
        gradient, product, along = (torch.empty_like(self.weights) for _ in range(3))
        for rows in torch.arange(len(self._x), device=self._x.device).split(self._batch_size) if num_probes else ():
            x, y = self._batch(rows.expand(len(self._jobs), -1))
            self._stack.gradient(self.weights, x, y, gradient)
            generator = torch.Generator().manual_seed(0)
            for k in range(num_probes):
                signs = torch.randint(0, 2, self.weights.shape[1:], generator=generator, dtype=torch.int8)
                along.copy_(2 * signs - 1)
                self._stack.curvature_product(self.weights, x, y, along, product)
                total[:, k] += (along * product).sum(1).double() * (len(rows) / len(self._x))
        return [
            total[k, : job.num_probes].mean().item() if job.num_probes else None for k, job in enumerate(self._jobs)
        ]

    def _score(self, k: int) -> Evaluation:
        rows = {"test": self._task.test, "validation": self._task.validation}[self._jobs[k].scored_on]
        vector_to_parameters(self.weights[k].clone(), self._model.parameters())
        return objective.evaluate(self._model, rows, of=self._task.objective)
