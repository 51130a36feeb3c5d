"""The methods that are compared, as values: each turns a loss into the gradient that the optimizer sees.

γ rises from 0 over the first steps (`warmup`): without it a large γ diverges in some seeds. SAM and flooding have no
γ and run as published, from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

import gradreg

if TYPE_CHECKING:
    from gradreg.lab.config import RunConfig

LossFunction = Callable[[], Tensor]


class Backward(Protocol):
    """Adds the gradient to `.grad` and returns L(θ), detached; `backward` runs the backward pass of a loss."""

    def __call__(self, loss_fn: LossFunction, /, *, backward: Callable[[Tensor], Any] = ...) -> Tensor: ...


@dataclass(frozen=True)
class Attached:
    """A method on a model."""

    backward: Backward
    regularizer: gradreg.GradientRegularizer | None = None
    """What has a state to save, if the method has one."""


@dataclass(frozen=True)
class Method:
    """A row of the tables."""

    name: str
    about: str
    """One line for the reports."""
    needs: tuple[str, ...]
    """The settings of a configuration that it reads."""
    attach: Callable[[nn.Module, int, RunConfig], Attached]
    """The method on a model, for a run of so many steps."""


def _sgd(model: nn.Module, num_steps: int, config: RunConfig) -> Attached:
    del model, num_steps, config

    def run(loss_fn: LossFunction, *, backward: Callable[[Tensor], Any] = Tensor.backward) -> Tensor:
        loss = loss_fn()
        backward(loss)
        return loss.detach()

    return Attached(run)


def _penalty(scheme: str) -> Callable[[nn.Module, int, RunConfig], Attached]:
    def attach(model: nn.Module, num_steps: int, config: RunConfig) -> Attached:
        assert config.gamma is not None
        rising_steps = round(config.warmup * num_steps)
        gamma = gradreg.warmup(config.gamma, rising_steps) if rising_steps else config.gamma
        epsilon = 1.0 if config.epsilon is None else config.epsilon  # DB has none
        ascent = "gradient" if scheme == "exact" else config.ascent
        regularizer = gradreg.GradientRegularizer(model, gamma, epsilon, scheme=scheme, ascent=ascent)
        return Attached(regularizer.backward, regularizer)

    return attach


def _sam(model: nn.Module, num_steps: int, config: RunConfig) -> Attached:
    del num_steps
    assert config.rho is not None
    regularizer = gradreg.sam(model, config.rho)
    return Attached(regularizer.backward, regularizer)


def _asam(model: nn.Module, num_steps: int, config: RunConfig) -> Attached:
    del num_steps
    assert config.rho is not None
    regularizer = gradreg.asam(model, config.rho)
    return Attached(regularizer.backward, regularizer)


def _flooding(model: nn.Module, num_steps: int, config: RunConfig) -> Attached:
    """Returns the loss before flooding, as the other methods do."""
    del model, num_steps
    assert config.level is not None
    flooding = gradreg.Flooding(config.level)

    def run(loss_fn: LossFunction, *, backward: Callable[[Tensor], Any] = Tensor.backward) -> Tensor:
        loss = loss_fn()
        backward(flooding(loss))
        return loss.detach()

    return Attached(run)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("SGD", "plain training", (), _sgd),
        Method("F-GR", "forward difference of the gradient", ("gamma", "epsilon"), _penalty("forward")),
        Method("B-GR", "backward difference of the gradient", ("gamma", "epsilon"), _penalty("backward")),
        Method("Central", "centered difference of the gradient", ("gamma", "epsilon"), _penalty("central")),
        Method("DB", "the exact penalty by double backpropagation", ("gamma",), _penalty("exact")),
        Method("SAM", "gradient at distance ρ uphill", ("rho",), _sam),
        Method("ASAM", "gradient at a distance uphill that scales with the weights", ("rho",), _asam),
        Method("Flooding", "loss pushed back up below a level", ("level",), _flooding),
    )
}
