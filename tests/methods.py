"""Methods: schemes × ascents × doors, and each door as one function that leaves ĝ in `.grad`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problems import Trial
from torch import Tensor

import gradreg

SCHEMES = ["forward", "backward", "central", "exact"]
ASCENTS = ["gradient", "normalized", "adaptive"]
GAMMA, EPSILON = 0.3, 0.05


class Still(torch.optim.Optimizer):
    """A base optimizer that moves nothing, so that ĝ can be looked at behind the third door."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        assert closure is None or closure() is not None


def by_backward(regularizer: gradreg.GradientRegularizer, loss_fn: Callable[[], Tensor]) -> Tensor:
    regularizer.model.zero_grad()
    return regularizer.backward(loss_fn)


def by_perturbed(regularizer: gradreg.GradientRegularizer, loss_fn: Callable[[], Tensor]) -> Tensor:
    regularizer.model.zero_grad()
    loss = loss_fn()
    loss.backward()
    with regularizer.perturbed():
        loss_fn().backward()
    return loss.detach()


def by_closure(regularizer: gradreg.GradientRegularizer, loss_fn: Callable[[], Tensor]) -> Tensor:
    optimizer = gradreg.RegularizedOptimizer(Still(regularizer.model.parameters()), regularizer)
    return optimizer.step(closure_of(optimizer, loss_fn)).detach()


def closure_of(optimizer: torch.optim.Optimizer, loss_fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    return closure


DOORS = {"backward": by_backward, "perturbed": by_perturbed, "closure": by_closure}


@dataclass(frozen=True)
class Method:
    scheme: str
    ascent: str
    door: str

    def __str__(self) -> str:
        return f"{self.scheme}-{self.ascent}-{self.door}"

    @property
    def num_passes(self) -> int:
        return {"forward": 2, "backward": 2, "central": 3, "exact": 1}[self.scheme]

    def regularizer(self, trial: Trial, gamma: Any = GAMMA, epsilon: Any = EPSILON, **options: Any):
        """Without the replay check, which is one pass more; test_replay_check.py is about it."""
        options = {"scheme": self.scheme, "ascent": self.ascent, "replay_check": False, **options}
        return gradreg.GradientRegularizer(trial.model, gamma, epsilon, **options)

    def run(self, trial: Trial, gamma: Any = GAMMA, epsilon: Any = EPSILON, **options: Any) -> Tensor:
        """One step from a fixed random state; ĝ is in `.grad`."""
        regularizer = self.regularizer(trial, gamma, epsilon, **options)
        torch.manual_seed(2)
        return DOORS[self.door](regularizer, trial.loss)


def _is_served(scheme: str, door: str) -> bool:
    """One block cannot hold two displaced passes, and a closure hides the loss from double backpropagation."""
    return door == "backward" or scheme in ("forward", "backward") or (scheme, door) == ("central", "closure")


METHODS = [Method(s, a, d) for s in SCHEMES for a in ASCENTS for d in DOORS if _is_served(s, d)]
FORWARD = [method for method in METHODS if method.scheme == "forward"]
STENCILS = [method for method in METHODS if method.scheme != "exact"]


def plain(trial: Trial) -> Tensor:
    """One pass of plain training from the same random state."""
    torch.manual_seed(2)
    trial.model.zero_grad()
    loss = trial.loss()
    loss.backward()
    return loss.detach()


def gradient_at(trial: Trial, weights: list[Tensor]) -> list[Tensor | None]:
    """∇L by plain autograd on a copy of the model with other weights, from the random state of `run`."""
    there = Trial(trial.problem)
    there.model = copy.deepcopy(trial.model)
    for p, w in zip(there.model.parameters(), weights):
        p.data = w.clone()
    plain(there)
    return there.gradients()
