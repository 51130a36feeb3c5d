r"""One step of a stack: every slice with its own γ, ε, ascent and optimizer settings, in rows.

All slices of a stack need the same passes (`Passes`), so that none pays for a pass that it does not use; what is left
to differ are numbers. Where a number is the same for all slices it is a float, else a column (S, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import gradreg
from gradreg.functional import Adaptive
from gradreg.lab.batched.models import StackedModel
from gradreg.lab.batched.rules import Rule
from gradreg.lab.config import RunConfig
from gradreg.lab.runs import first_averaged

Numbers = float | Tensor

BETA1, BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8  # the defaults of torch.optim
ETA = Adaptive().eta
DECAY = gradreg.LargeGradients().decay


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

    A first gradient that is zero or not finite displaces nothing, and ĝ = g1, as in `gradreg.GradientRegularizer`;
    neither does a direction that is not known yet.

    Args:
        model: takes the gradients.
        rules: of the slices, all with the same passes.
        weights: (S, P), for the sizes.
        num_steps: of the run.
    """

    def __init__(self, model: StackedModel, rules: Sequence[Rule], weights: Tensor, num_steps: int) -> None:
        self._model = model
        self._passes = passes = rules[0].passes
        assert all(rule.passes == passes for rule in rules)
        self._gradient = torch.empty_like(weights)
        if passes.scheme not in ("none", "known"):
            self._second = torch.empty_like(weights)
        if passes.scheme not in ("none", "exact"):
            self._displaced = torch.empty_like(weights)
        if passes.scheme == "central":
            self._third = torch.empty_like(weights)
        if passes.share < 1 and passes.scheme != "split":
            self._part = torch.empty_like(weights)
        if passes.is_ahead:
            self._ahead = torch.empty_like(weights)
        if passes.direction == "previous":
            self._previous = torch.zeros_like(weights)
        if passes.carries:
            self._carried, self._carried_norm = torch.zeros_like(weights), weights.new_ones(len(weights), 1)
        self._test = _StackedTest([rule.threshold for rule in rules], weights) if passes.is_tested else None
        exact = weights.new_tensor(
            [[rule.gamma, rule.epsilon, rule.rising_steps, rule.ahead] for rule in rules], dtype=torch.float64
        )
        self._gamma, self._epsilon, self._rising, self._radius = exact.unsqueeze(2).unbind(1)
        self._last_rising = max(rule.rising_steps for rule in rules)
        self._starts_at_once = any(rule.rising_steps == 0 for rule in rules)
        normalized = [rule.is_normalized for rule in rules]
        self._none_normalized, self._all_normalized = not any(normalized), all(normalized)
        self._is_normalized = weights.new_tensor(normalized, dtype=torch.bool).unsqueeze(1)
        self._signs = weights.new_tensor([[float(rule.sign)] for rule in rules])
        self._levels = weights.new_tensor([rule.level for rule in rules])
        self._is_flooded = any(rule.level > -float("inf") for rule in rules)
        self._risen = torch.ones_like(self._gamma)
        self._full_strength: tuple[Tensor, Tensor] | None = None
        self._first_step = round(passes.start * num_steps)
        self._is_drawn = gradreg.bernoulli(1.0, passes.probability)

    def gradient(self, weights: Tensor, x: Tensor, y: Tensor, step: int, momentum: Tensor | None = None) -> Tensor:
        """ĝ (S, P), in memory that the next call writes over; `momentum` is the optimizer's, before this step."""
        if self._passes.is_ahead:
            assert momentum is not None
            radius = -self._radius * self._rise(step)
            weights = torch.addcmul(weights, momentum, _along(momentum, radius), out=self._ahead)
        found = self._found(weights, x, y, step, momentum)
        if self._passes.direction == "previous":
            self._previous.copy_(found)
        return found

    def _found(self, weights: Tensor, x: Tensor, y: Tensor, step: int, momentum: Tensor | None) -> Tensor:
        scheme = self._passes.scheme
        if scheme == "none" or not self._is_due(step):
            first = self._gradient
            losses = self._model.gradient(weights, x, y, first, self._is_flooded)
            if losses is not None:
                first.mul_((losses - self._levels).sign_().unsqueeze(1))  # ∇|L − b|
            return self._with_carried(first) if self._passes.carries and step >= self._first_step else first
        if scheme == "known":
            known = self._known(momentum)
            stride = _along(known, self._signs * self._gamma * self._rise(step))
            torch.addcmul(weights, known, stride, out=self._displaced)
            self._model.gradient(self._displaced, x, y, self._gradient)
            return self._gradient
        return self._split(weights, x, y, step, momentum) if scheme == "split" else self._penalized(weights, x, y, step)

    def _is_due(self, step: int) -> bool:
        """Whether any slice has a penalty in a step."""
        passes = self._passes
        return (
            step >= self._first_step
            and step % passes.period == passes.period - 1
            and self._is_drawn(step) > 0
            and (step > 0 or self._starts_at_once)
        )

    def _penalized(self, weights: Tensor, x: Tensor, y: Tensor, step: int) -> Tensor:
        passes, whole, part, second = self._passes, self._gradient, self._gradient, self._second
        if passes.share < 1:
            part, size = self._part, y.shape[1]
            count = _rows(passes.share, size)
            self._model.gradient(weights, x[:, count:].contiguous(), y[:, count:].contiguous(), whole)
            x, y = x[:, :count].contiguous(), y[:, :count].contiguous()
            self._model.gradient(weights, x, y, part)
            whole.lerp_(part, count / size)
        else:
            self._model.gradient(weights, x, y, part)
        gamma, ratio = self._strength_at(step, weights.dtype)
        if passes.scheme == "exact":
            self._model.curvature_product(weights, x, y, part, second)
            return part.addcmul_(second, gamma)
        norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        is_usable = norm.isfinite() & (norm > 0) & (gamma > 0)
        if self._test is not None:
            is_usable &= self._test.is_large(norm, gamma > 0)
        direction, stride = self._displacement(weights, part, norm, is_usable)
        torch.addcmul(weights, direction, stride, out=self._displaced)
        self._model.gradient(self._displaced, x, y, second)
        if passes.scheme == "one-sided":
            if whole is part and not passes.carries:
                return part.lerp_(second, torch.where(is_usable, ratio, 0.0))
            penalty = second.sub_(part)
        else:
            torch.addcmul(weights, direction, stride, value=-1, out=self._displaced)
            self._model.gradient(self._displaced, x, y, self._third)
            penalty, ratio = second.sub_(self._third), ratio / 2
        penalty.mul_(torch.where(is_usable, ratio, 0.0))
        if passes.carries:
            self._carried.copy_(penalty)
            self._carried_norm = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
        return whole.add_(penalty)

    def _split(self, weights: Tensor, x: Tensor, y: Tensor, step: int, momentum: Tensor | None) -> Tensor:
        """(1 − λ) ∇L_A(θ) + λ ∇L_B(θ + εd); a slice that has no penalty yet weighs rows alike."""
        passes, first, second, size = self._passes, self._gradient, self._second, y.shape[1]
        count = _rows(1 - passes.share, size)
        self._model.gradient(weights, x[:, :count].contiguous(), y[:, :count].contiguous(), first)
        if passes.direction == "gradient":
            norm = torch.linalg.vector_norm(first, dim=1, keepdim=True)
            direction, scale = first, torch.where(norm.isfinite() & (norm > 0), 1.0, 0.0)
            scale = torch.where(self._is_normalized & (scale > 0), scale / norm, scale)
        else:
            direction = self._known(momentum)
            scale = _along(direction, self._signs)
        rise = self._rise(step)
        stride = scale * (self._epsilon * rise).to(weights.dtype)
        torch.addcmul(weights, direction, stride, out=self._displaced)
        self._model.gradient(self._displaced, x[:, count:].contiguous(), y[:, count:].contiguous(), second)
        weight = torch.where(rise > 0, passes.share, 1 - count / size).to(weights.dtype)
        return first.lerp_(second, weight)

    def _known(self, momentum: Tensor | None) -> Tensor:
        if self._passes.direction == "previous":
            return self._previous
        assert momentum is not None
        return momentum

    def _with_carried(self, first: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(first, dim=1, keepdim=True)
        return first.addcmul_(self._carried, norm / self._carried_norm)

    def _rise(self, step: int) -> Tensor:
        """Share of its strength that each slice has, (S, 1); it rises in float64, as Python's numbers do."""
        if step >= self._last_rising:
            return self._risen
        return torch.where(self._rising > step, step / self._rising, 1.0)

    def _strength_at(self, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """γ and γ/ε of a step, (S, 1)."""
        if step >= self._last_rising and self._full_strength is not None:
            return self._full_strength
        gamma = self._gamma * self._rise(step)
        strength = gamma.to(dtype), (gamma / self._epsilon).to(dtype)
        if step >= self._last_rising:
            self._full_strength = strength
        return strength

    def _displacement(
        self, weights: Tensor, gradient: Tensor, norm: Tensor, is_usable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(vectors, stride) with εd = stride · vectors; a stride of 0 where there is no direction or no penalty."""
        direction, length = gradient, norm
        if self._passes.is_adaptive:
            spare = self._third if self._passes.scheme == "central" else self._second
            scale = torch.abs(weights, out=self._displaced).add_(ETA)
            direction = torch.mul(scale, gradient, out=spare)
            length = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
            direction.mul_(scale)
        stride = self._epsilon.to(gradient.dtype)
        if self._passes.is_adaptive or self._all_normalized:
            stride = stride / length
        elif not self._none_normalized:
            stride = torch.where(self._is_normalized, stride / length, stride)
        return direction, torch.where(is_usable, stride, 0.0)


class _StackedTest:
    """`gradreg.LargeGradients` for every slice, in float64."""

    def __init__(self, thresholds: Sequence[float], weights: Tensor) -> None:
        self._thresholds = weights.new_tensor([[t] for t in thresholds], dtype=torch.float64)
        self._mean = torch.full_like(self._thresholds, math.nan)
        self._variance = torch.zeros_like(self._thresholds)

    def is_large(self, norm: Tensor, is_due: Tensor) -> Tensor:
        """Takes ‖g1‖ in where it is finite and a penalty is due."""
        square = norm.double().square()
        mean = torch.where(self._mean.isnan(), square, DECAY * self._mean + (1 - DECAY) * square)
        variance = DECAY * self._variance + (1 - DECAY) * (square - mean).square()
        counts = is_due & square.isfinite() & (square > 0)
        self._mean = torch.where(counts, mean, self._mean)
        self._variance = torch.where(counts, variance, self._variance)
        return counts & (square >= self._mean + self._thresholds * self._variance.sqrt())


def _along(vectors: Tensor, radius: Tensor) -> Tensor:
    """The factor that gives each vector the length `radius`; 0 for one that is zero or not finite."""
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(norm.isfinite() & (norm > 0), radius.to(vectors.dtype) / norm, 0.0)


def _rows(share: float, size: int) -> int:
    """So many of the rows as the engine takes: rounded, at least one, not all."""
    return min(max(1, math.floor(share * size + 0.5)), size - 1)


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

    @property
    def momentum(self) -> Tensor:
        """What torch keeps as `momentum_buffer` or `exp_avg`; zero before the first step."""
        return self._mean

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


class StackedAverage:
    """The mean of the weights over the last steps, as `torch.optim.swa_utils.AveragedModel` keeps it.

    Args:
        shares: of the steps, for each slice; 0 averages nothing.
        weights: (S, P), read after every step.
        num_steps: of the run.
    """

    def __init__(self, shares: Sequence[float], weights: Tensor, num_steps: int) -> None:
        self._weights = weights
        self._first_steps = [first_averaged(share, num_steps) for share in shares]
        self._mean = weights.clone() if any(shares) else None

    def update(self, step: int) -> None:
        """The step is done."""
        if self._mean is None:
            return
        parts = [1 / (step - first + 1) if step >= first else 0.0 for first in self._first_steps]
        if any(parts):
            self._mean.lerp_(self._weights, self._weights.new_tensor(parts).unsqueeze(1))

    def take_place(self) -> None:
        """weights ← their mean, where there is one."""
        if self._mean is not None:
            for k, first in enumerate(self._first_steps):
                if first < math.inf:
                    self._weights[k] = self._mean[k]
