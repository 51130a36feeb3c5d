"""A method on a model: it turns a loss into the gradient that the optimizer sees.

γ rises from 0 over the first steps (`warmup`): without it a large γ diverges in some seeds. So does ρ of a step in one
pass. SAM and flooding have no γ and run as published, from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradreg
from gradreg.lab.config import RunConfig
from gradreg.lab.methods import SIGNS

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Batch], Tensor]
Schedule = float | Callable[[int], float]


class Backward(Protocol):
    """Adds the gradient to `.grad` and returns L(θ), detached; `backward` runs the backward pass of a loss."""

    def __call__(
        self, loss_fn: LossFunction, batches: Sequence[Batch], /, *, backward: Callable[[Tensor], Any] = ...
    ) -> Tensor: ...


@dataclass(frozen=True)
class Attached:
    """A method on a model."""

    backward: Backward
    regularizer: gradreg.GradientRegularizer | None = None
    """What has a state to save, if the method has one."""
    flooded: Flooded | None = None
    """Flooding, which has a count to save."""


class Flooded:
    """Flooding that counts the steps whose loss lay below the level; the count stays where the loss is until read."""

    def __init__(self, level: float) -> None:
        self._flooding = gradreg.Flooding(level)
        self._steps = torch.zeros((), dtype=torch.int64)

    def __call__(self, loss: Tensor) -> Tensor:
        self._steps = self._steps.to(loss.device) + (loss.detach() < self._flooding.level)
        return self._flooding(loss)

    @property
    def steps(self) -> int:
        return int(self._steps)

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps = torch.tensor(count)


Attach = Callable[[nn.Module, int, RunConfig, Optimizer], Attached]


def attach(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    """The method of a configuration on a model, for a run of so many steps."""
    return _WAYS[config.method](model, num_steps, config, optimizer)


def _sgd(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    del model, num_steps, config, optimizer
    return Attached(_plainly(lambda loss: loss))


def _flooding(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    """Returns the loss before flooding, as the other methods do."""
    del model, num_steps, optimizer
    assert config.level is not None
    flooded = Flooded(config.level)
    return Attached(_plainly(flooded), flooded=flooded)


def _plainly(transform: Callable[[Tensor], Tensor]) -> Backward:
    def run(
        loss_fn: LossFunction, batches: Sequence[Batch], /, *, backward: Callable[[Tensor], Any] = Tensor.backward
    ) -> Tensor:
        (batch,) = batches
        loss = loss_fn(batch)
        backward(transform(loss))
        return loss.detach()

    return run


def _penalty(scheme: str) -> Attach:
    def attach(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
        assert config.gamma is not None
        gamma = _in_its_steps(_rising(config.gamma, num_steps, config), num_steps, config)
        epsilon = 1.0 if config.epsilon is None else config.epsilon  # DB has none
        ascent = "gradient" if scheme == "exact" else config.ascent
        options = _options(config, optimizer, _rising(config.lookahead, num_steps, config))
        return _attached(gradreg.GradientRegularizer(model, gamma, epsilon, scheme=scheme, ascent=ascent, **options))

    return attach


def _sam(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    assert config.rho is not None
    rho = _in_its_steps(config.rho, num_steps, config)
    preset = gradreg.asam if config.method == "ASAM" else gradreg.sam
    return _attached(preset(model, rho, **_options(config, optimizer, config.lookahead)))


def _one_pass(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    assert config.rho is not None
    rho = _in_its_steps(_rising(config.rho, num_steps, config), num_steps, config)
    sign = SIGNS[config.method]
    direction = gradreg.Momentum(optimizer, sign) if config.method == "MSAM" else gradreg.Previous(sign)
    return _attached(gradreg.GradientRegularizer(model, rho, rho, ascent=direction))


def _split(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    """ε rises with γ, so that the share of the batch that is displaced stays."""
    assert config.gamma is not None
    assert config.epsilon is not None
    gamma = _in_its_steps(_rising(config.gamma, num_steps, config), num_steps, config)
    known = {"momentum": lambda: gradreg.Momentum(optimizer), "previous": gradreg.Previous}
    return _attached(
        gradreg.GradientRegularizer(
            model,
            gamma,
            _rising(config.epsilon, num_steps, config),
            ascent=known[config.ascent]() if config.ascent in known else config.ascent,
            batch=gradreg.Split(),
        )
    )


def _attached(regularizer: gradreg.GradientRegularizer) -> Attached:
    return Attached(regularizer.backward, regularizer)


def _rising(value: float, num_steps: int, config: RunConfig) -> Schedule:
    rising_steps = round(config.warmup * num_steps)
    return gradreg.warmup(value, rising_steps) if rising_steps and value else value


def _in_its_steps(value: Schedule, num_steps: int, config: RunConfig) -> Schedule:
    if config.start:
        value = gradreg.late(value, round(config.start * num_steps))
    if config.period > 1:
        value = gradreg.every(value, config.period)
    return gradreg.bernoulli(value, config.probability) if config.probability < 1 else value


def _options(config: RunConfig, optimizer: Optimizer, lookahead: Schedule) -> dict[str, Any]:
    return {
        "batch": gradreg.Fraction(config.fraction) if config.fraction < 1 else None,
        "at": gradreg.Ahead(gradreg.Momentum(optimizer), lookahead) if config.lookahead else None,
        "when": None if config.threshold is None else gradreg.LargeGradients(config.threshold),
    }


_WAYS: dict[str, Attach] = {
    "SGD": _sgd,
    "F-GR": _penalty("forward"),
    "B-GR": _penalty("backward"),
    "Central": _penalty("central"),
    "DB": _penalty("exact"),
    "SAM": _sam,
    "ASAM": _sam,
    **dict.fromkeys(SIGNS, _one_pass),
    "Split": _split,
    "Flooding": _flooding,
}
