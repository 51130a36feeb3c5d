"""ĝ by hand: plain gradients of deep copies of a model at the points that the engine visits, put together here.

A *pass* is a function of a model that leaves a gradient in `.grad`, in whatever way; a *loss* a function of a model
that returns a scalar with a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from methods import by_backward, by_perturbed
from problems import dense, gradients
from torch import Tensor, nn
from torch.nn import functional as F

import gradreg

GAMMA, EPSILON, SEED = 0.3, 0.05, 2
STENCILS = {"forward": [(1, 1)], "backward": [(-1, -1)], "central": [(1, 0.5), (-1, -0.5)]}

Loss = Callable[[nn.Module], Tensor]
Pass = Callable[[nn.Module], Any]


class Idle(torch.optim.Optimizer):
    """A base that moves nothing, so that ĝ can be looked at behind the third door."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


def by_closure(regularizer: gradreg.GradientRegularizer, loss_fn: Callable[[], Tensor], owned: Any = None) -> Tensor:
    parameters = regularizer.model.parameters() if owned is None else owned
    optimizer = gradreg.RegularizedOptimizer(Idle(parameters), regularizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    return optimizer.step(closure).detach()


DOORS = {"backward": by_backward, "perturbed": by_perturbed, "closure": by_closure}
each_door = pytest.mark.parametrize("door", DOORS)
own_passes = pytest.mark.parametrize("door", ["backward", "closure"])  # the doors that run the first pass themselves


def step(door: str, regularizer: gradreg.GradientRegularizer, loss: Loss) -> Tensor:
    """One step from the random state of `expected`; ĝ is in `.grad`."""
    torch.manual_seed(SEED)
    return DOORS[door](regularizer, lambda: loss(regularizer.model))


def expected(
    model: nn.Module, loss: Loss, gamma: float = GAMMA, epsilon: float = EPSILON, scheme: str = "forward"
) -> list[Tensor]:
    """ĝ of the ascent `gradient`, of a loss that is run forward and backward."""
    return expected_of_passes(model, lambda net: loss(net).backward(), gamma, epsilon, scheme)


def expected_of_passes(
    model: nn.Module, run: Pass, gamma: float = GAMMA, epsilon: float = EPSILON, scheme: str = "forward"
) -> list[Tensor]:
    """The same, where a pass is the caller's. The displacement starts from the weights that the first pass left."""
    first = _after(model, run)
    parameters, here = list(first.parameters()), _gradients(first)
    result = here
    for node, weight in STENCILS[scheme]:
        there = _gradients(_after(model, run, [p.detach() + node * epsilon * g for p, g in zip(parameters, here)]))
        result = [g + gamma / epsilon * weight * (o - h) for g, o, h in zip(result, there, here)]
    return result


def _after(model: nn.Module, run: Pass, weights: list[Tensor] | None = None) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.zero_grad()
    if weights is not None:
        for p, w in zip(twin.parameters(), weights):
            p.data = w.clone()
    torch.manual_seed(SEED)
    run(twin)
    return twin


def _gradients(model: nn.Module) -> list[Tensor]:
    return dense(gradients(model), list(model.parameters()))


def regularizer_of(model: nn.Module, **options: Any) -> gradreg.GradientRegularizer:
    return gradreg.GradientRegularizer(model, **{"gamma": GAMMA, "epsilon": EPSILON, **options})


def net(*layers: nn.Module) -> nn.Sequential:
    """A small model in float64, by default with a BatchNorm and a dropout in it."""
    usual = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
    model = nn.Sequential(*(layers or usual))
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model.double()


def smooth() -> nn.Sequential:
    return net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(rows) % 3


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return F.cross_entropy(model(x), y)


def everything(model: nn.Module) -> Any:
    """What a refused call must not change: weights and their places, buffers, gradients, random state."""
    weights = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    return [weights, [b.clone() for b in model.buffers()], gradients(model), torch.get_rng_state()]
