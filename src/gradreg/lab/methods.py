"""The methods that are compared, as values: each turns a loss into the gradient that the optimizer sees.

A method has a grid of settings, the same number for each, from which the tuning chooses on validation rows. γ rises
from 0 over the first 30% of the steps: without it a large γ diverges in some seeds. SAM and flooding have no γ and
run as published, from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from torch import Tensor, nn

import gradreg

LossFunction = Callable[[], Tensor]
Backward = Callable[[LossFunction], Tensor]  # leaves the gradient in .grad and returns L(θ)
Settings = dict[str, float]

WARMUP_SHARE = 0.3


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    about: str
    """One line for the report."""
    grid: tuple[Settings, ...]
    """The settings that the tuning tries."""
    attach: Callable[..., Backward]
    """`attach(model, num_steps, **settings)` gives the backward pass of a run of `num_steps` steps."""


def _sgd(model: nn.Module, num_steps: int) -> Backward:
    del model, num_steps

    def backward(loss_fn: LossFunction) -> Tensor:
        loss = loss_fn()
        loss.backward()
        return loss.detach()

    return backward


def _penalty(scheme: str) -> Callable[..., Backward]:
    def attach(model: nn.Module, num_steps: int, *, gamma: float, epsilon: float = 1.0) -> Backward:
        rising = gradreg.warmup(gamma, max(1, round(WARMUP_SHARE * num_steps)))
        return gradreg.GradientRegularizer(model, rising, epsilon, scheme=scheme).backward

    return attach


def _sam(model: nn.Module, num_steps: int, *, rho: float) -> Backward:
    del num_steps
    return gradreg.sam(model, rho).backward


def _flooding(model: nn.Module, num_steps: int, *, level: float) -> Backward:
    """Returns the loss before flooding, as the other methods do."""
    del model, num_steps
    flooding = gradreg.Flooding(level)

    def backward(loss_fn: LossFunction) -> Tensor:
        loss = loss_fn()
        flooding(loss).backward()
        return loss.detach()

    return backward


def _grid(**values: tuple[float, ...]) -> tuple[Settings, ...]:
    return tuple(dict(zip(values, point)) for point in product(*values.values()))


_GAMMA_EPSILON = _grid(gamma=(0.05, 0.2, 0.5), epsilon=(0.3, 1.0))

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("SGD", "plain training", ({},), _sgd),
        Method("F-GR", "forward difference of the gradient", _GAMMA_EPSILON, _penalty("forward")),
        Method("B-GR", "backward difference of the gradient", _GAMMA_EPSILON, _penalty("backward")),
        Method(
            "DB",
            "the exact penalty by double backpropagation",
            _grid(gamma=(0.003, 0.01, 0.03, 0.1, 0.2, 0.4)),
            _penalty("exact"),
        ),
        Method("SAM", "gradient at distance ρ uphill", _grid(rho=(0.01, 0.02, 0.05, 0.1, 0.2, 0.4)), _sam),
        Method(
            "Flooding",
            "loss pushed back up below a level",
            _grid(level=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8)),
            _flooding,
        ),
    )
}
