r"""One step of a stack: every slice with its own γ, ε, ascent and optimizer settings, in rows.

All slices of a stack need the same passes (`Passes`), so that none pays for a pass that it does not use; what is left
to differ are numbers. Where a number is the same for all slices it is a float, else a column (S, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradreg.functional import Adaptive
from gradreg.lab.batched.models import StackedModel
from gradreg.lab.config import RunConfig

Numbers = float | Tensor

SCHEMES = {"F-GR": "forward", "B-GR": "backward", "Central": "central", "DB": "exact"}
BETA1, BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8  # the defaults of torch.optim
ETA = Adaptive().eta


@dataclass(frozen=True)
class Passes:
    """What a method has computed in a step, beside the first gradient."""

    scheme: str = "none"
    """`none`, `one-sided`, `central` or `exact`."""
    is_adaptive: bool = False

    @property
    def count(self) -> int:
        """Gradients in a step, or as many as it costs."""
        return {"none": 1, "one-sided": 2, "central": 3, "exact": 3}[self.scheme]


@dataclass(frozen=True)
class Rule:
    """A method as numbers: ĝ = g1 + (γ/ε)(g2 − g1), g2 at θ + εd; ε < 0 is the backward difference."""

    passes: Passes = Passes()
    gamma: float = 0.0
    epsilon: float = 1.0
    is_normalized: bool = False
    rising_steps: int = 0
    level: float = -float("inf")
    """Flood level."""


def rule_of(config: RunConfig, num_steps: int) -> Rule:
    """The same method as `METHODS[config.method]` attaches.

    Raises:
        KeyError: a method that has no such form.
    """
    if config.method == "SGD" or config.gamma == 0:
        return Rule()
    if config.method == "Flooding":
        assert config.level is not None
        return Rule(level=config.level)
    if config.method in ("SAM", "ASAM"):
        assert config.rho is not None
        is_adaptive = config.method == "ASAM"
        return Rule(Passes("one-sided", is_adaptive), config.rho, config.rho, is_normalized=not is_adaptive)
    scheme = SCHEMES[config.method]
    assert config.gamma is not None
    rising = Rule(gamma=config.gamma, rising_steps=round(config.warmup * num_steps))
    if scheme == "exact":
        return replace(rising, passes=Passes("exact"))
    assert config.epsilon is not None
    return replace(
        rising,
        passes=Passes("central" if scheme == "central" else "one-sided", config.ascent == "adaptive"),
        epsilon=-config.epsilon if scheme == "backward" else config.epsilon,
        is_normalized=config.ascent == "normalized",
    )


def numbers(values: Sequence[float], like: Tensor) -> Numbers:
    """One float if all are equal, else a column (S, 1)."""
    return values[0] if len(set(values)) == 1 else like.new_tensor(values).unsqueeze(1)


def add_scaled_(target: Tensor, vector: Tensor, by: Numbers) -> None:
    """target ← target + by · vector."""
    if isinstance(by, Tensor):
        target.addcmul_(vector, by)
    else:
        target.add_(vector, alpha=by)


class StackedRegularizer:
    """Makes ĝ of every slice.

    A first gradient that is zero or not finite displaces nothing, and ĝ = g1, as in `gradreg.GradientRegularizer`.

    Args:
        model: takes the gradients.
        rules: of the slices, all with the same passes.
        weights: (S, P), for the sizes.
    """

    def __init__(self, model: StackedModel, rules: Sequence[Rule], weights: Tensor) -> None:
        self._model = model
        self._passes = rules[0].passes
        assert all(rule.passes == self._passes for rule in rules)
        self._gradient = torch.empty_like(weights)
        if self._passes.scheme != "none":
            self._second = torch.empty_like(weights)
        if self._passes.scheme in ("one-sided", "central"):
            self._displaced = torch.empty_like(weights)
        if self._passes.scheme == "central":
            self._third = torch.empty_like(weights)
        exact = weights.new_tensor(
            [[rule.gamma, rule.epsilon, rule.rising_steps] for rule in rules], dtype=torch.float64
        )
        self._gamma, self._epsilon, self._rising = exact.unsqueeze(2).unbind(1)
        self._last_rising = max(rule.rising_steps for rule in rules)
        self._starts_at_once = any(rule.rising_steps == 0 for rule in rules)
        normalized = [rule.is_normalized for rule in rules]
        self._none_normalized, self._all_normalized = not any(normalized), all(normalized)
        self._is_normalized = weights.new_tensor(normalized, dtype=torch.bool).unsqueeze(1)
        self._levels = weights.new_tensor([rule.level for rule in rules])
        self._is_flooded = any(rule.level > -float("inf") for rule in rules)
        self._strength: tuple[Tensor, Tensor] | None = None

    def gradient(self, weights: Tensor, x: Tensor, y: Tensor, step: int) -> Tensor:
        """ĝ (S, P), in memory that the next call writes over."""
        first = self._gradient
        losses = self._model.gradient(weights, x, y, first, self._is_flooded)
        if losses is not None:
            first.mul_((losses - self._levels).sign_().unsqueeze(1))  # ∇|L − b|
        if self._passes.scheme == "none" or (step == 0 and not self._starts_at_once):
            return first
        gamma, ratio = self._strength_at(step, weights.dtype)
        if self._passes.scheme == "exact":
            self._model.curvature_product(weights, x, y, first, self._second)
            return first.addcmul_(self._second, gamma)
        direction, stride = self._displacement(weights, first, gamma)
        torch.addcmul(weights, direction, stride, out=self._displaced)
        self._model.gradient(self._displaced, x, y, self._second)
        if self._passes.scheme == "one-sided":
            return first.lerp_(self._second, ratio)
        torch.addcmul(weights, direction, stride, value=-1, out=self._displaced)
        self._model.gradient(self._displaced, x, y, self._third)
        return first.addcmul_(self._second.sub_(self._third), ratio, value=0.5)

    def _strength_at(self, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """γ and γ/ε of a step, (S, 1); they rise in float64, as Python's numbers do."""
        if step > self._last_rising and self._strength is not None:
            return self._strength
        rise = torch.where(self._rising > step, step / self._rising, 1.0)
        gamma = self._gamma * rise
        self._strength = gamma.to(dtype), (gamma / self._epsilon).to(dtype)
        return self._strength

    def _displacement(self, weights: Tensor, first: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors, stride) with εd = stride · vectors; a stride of 0 where there is no direction or no penalty."""
        norm = torch.linalg.vector_norm(first, dim=1, keepdim=True)
        is_usable = norm.isfinite() & (norm > 0) & (gamma > 0)
        direction, length = first, norm
        if self._passes.is_adaptive:
            spare = self._third if self._passes.scheme == "central" else self._second
            scale = torch.abs(weights, out=self._displaced).add_(ETA)
            direction = torch.mul(scale, first, out=spare)
            length = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
            direction.mul_(scale)
        stride = self._epsilon.to(first.dtype)
        if self._passes.is_adaptive or self._all_normalized:
            stride = stride / length
        elif not self._none_normalized:
            stride = torch.where(self._is_normalized, stride / length, stride)
        return direction, torch.where(is_usable, stride, 0.0)


class StackedOptimizer:
    """SGD with momentum, Adam or AdamW, as torch.optim has them, with settings of each slice's own."""

    def __init__(self, configs: Sequence[RunConfig], weights: Tensor) -> None:
        self._kind = configs[0].optimizer
        self._weights = weights
        self._rate = numbers([c.learning_rate for c in configs], weights)
        self._decay = numbers([c.weight_decay for c in configs], weights)
        self._has_decay = any(c.weight_decay for c in configs)
        self._momentum = numbers([c.momentum for c in configs], weights)
        self._mean = torch.zeros_like(weights)
        if self._kind != "sgd":
            self._square = torch.zeros_like(weights)
            self._root = torch.empty_like(weights)

    def step(self, gradient: Tensor, step: int, share: float) -> None:
        """Move the weights; `gradient` is written over. `share` of the learning rate is left by its schedule."""
        weights, rate = self._weights, self._rate * share
        if self._has_decay and self._kind == "adamw":
            weights.mul_(1 - rate * self._decay)
        elif self._has_decay:
            add_scaled_(gradient, weights, self._decay)
        if self._kind == "sgd":
            add_scaled_(weights, self._mean.mul_(self._momentum).add_(gradient), -rate)
            return
        self._mean.lerp_(gradient, 1 - BETA1)
        self._square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        root = torch.sqrt(self._square, out=self._root).div_((1 - BETA2 ** (step + 1)) ** 0.5).add_(ADAM_EPSILON)
        size = rate * (-1 / (1 - BETA1 ** (step + 1)))
        if isinstance(size, Tensor):
            weights.addcmul_(torch.div(self._mean, root, out=root), size)
        else:
            weights.addcdiv_(self._mean, root, value=size)
