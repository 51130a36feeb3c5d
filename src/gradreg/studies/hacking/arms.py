"""What is done against the hack: an arm, with the one number that is chosen for it.

All are GRPO with AdamW on the same prompts, without a clipped ratio, since each batch of answers is used once:

    L = −(1/N) Σ_i A_i Σ_t log π(y_it | …),   A_i = (r_i − mean of its group) / (deviation of its group + 1e-4)

with N the words of all answers. A divergence from the start is that of the distributions over all words, exactly, at
each place of the answers, averaged over the N places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradreg

LossFn = Callable[[], Tensor]
Step = Callable[[LossFn], Tensor]
"""Leaves in `.grad` what the optimizer shall see, and returns the loss."""

BLOCKS = "blocks.*"
PUBLISHED_CLIP, PUBLISHED_QUOTIENT = 10.0, 10.0
"""Of the first independent test: both gradients clipped to this norm before the difference, and γ/ε."""
MOST_QUOTIENT = 1e3
"""Of γ/ε, where γ follows a ratio."""
EPSILON = 0.1
"""Of F-GR by ratio."""


@dataclass(frozen=True)
class Arm:
    """A row of the table."""

    name: str
    about: str
    symbol: str = ""
    """Of the number that is chosen."""
    values: tuple[float, ...] = (math.nan,)
    """Candidates, the mildest first."""


NONE = Arm("none", "GRPO alone")
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        NONE,
        Arm("KL", "KL divergence to the start, times β in the loss", "β", (0.03, 0.1, 0.3, 1.0, 3.0)),
        Arm("χ²", "χ² divergence from the start, times β in the loss", "β", (0.003, 0.01, 0.03, 0.1, 0.3)),
        Arm("GR by ratio", "F-GR on the blocks, γ by its ratio", "ratio", (1.0, 3.0, 10.0, 30.0, 100.0)),
        Arm(
            "GR as published",
            "F-GR on the blocks, both gradients clipped to 10 first, γ/ε = 10",
            "γ",
            (1e-3, 1e-2, 0.1, 0.3, 1.0),
        ),
        Arm("clipping", "gradient norm clipped", "norm", (1.0, 0.5, 0.2, 0.1, 0.05)),
        Arm("smaller rate", "learning rate, over that of the others", "times", (0.3, 0.1, 0.05, 0.02, 0.01)),
        Arm("early stop", "until the verifier pays so much on average", "pay", (0.9, 0.7, 0.6, 0.5, 0.4)),
    )
}


def step_of(arm: str, value: float, policy: nn.Module) -> Step:
    """How an arm turns a loss into gradients."""
    if arm == "GR by ratio":
        return ByRatio(policy, value)
    if arm == "GR as published":
        return lambda loss_fn: as_published(loss_fn, policy, value)
    if arm == "clipping":
        return lambda loss_fn: _clipped(loss_fn, policy, value)
    return _plain


def _plain(loss_fn: LossFn) -> Tensor:
    loss = loss_fn()
    loss.backward()
    return loss


def _clipped(loss_fn: LossFn, policy: nn.Module, norm: float) -> Tensor:
    loss = _plain(loss_fn)
    nn.utils.clip_grad_norm_(policy.parameters(), norm)
    return loss


class ByRatio:
    """F-GR on the blocks, whose γ is calibrated on the first batch and follows the ratio from then on."""

    def __init__(self, policy: nn.Module, ratio: float) -> None:
        self._policy, self._ratio = policy, ratio
        self._own: gradreg.GradientRegularizer | None = None

    def __call__(self, loss_fn: LossFn) -> Tensor:
        if self._own is None:
            options = {"epsilon": EPSILON, "include": [BLOCKS]}
            start = gradreg.calibrated_gamma(self._policy, lambda f: f(), [loss_fn], target=self._ratio, **options)
            target = gradreg.TargetRatio(self._ratio, ramp=0, limit=MOST_QUOTIENT, start=start, period=1)
            self._own = gradreg.GradientRegularizer(self._policy, target, **options)
        return self._own.backward(loss_fn)


def as_published(loss_fn: LossFn, policy: nn.Module, gamma: float) -> Tensor:
    """ĝ = c(g1) + (γ/ε)(c(g2) − c(g1)) on the blocks, where c clips to a norm of 10: an error of published code, since
    what is clipped first is no difference of gradients. Kept here to be measured.
    """
    named = dict(policy.named_parameters())
    inside = [p for name, p in named.items() if name.startswith("blocks.")]
    epsilon = gamma / PUBLISHED_QUOTIENT

    def clipped() -> tuple[Tensor, dict[str, Tensor]]:
        loss = loss_fn()
        found = torch.autograd.grad(loss, list(named.values()))
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in found]))
        scale = (PUBLISHED_CLIP / norm).clamp(max=1.0)
        return loss, dict(zip(named, (g * scale for g in found)))

    loss, first = clipped()
    before = [p.detach().clone() for p in inside]
    ids = {id(p) for p in inside}
    with torch.no_grad():
        for name, p in named.items():
            if id(p) in ids:
                p.add_(first[name], alpha=epsilon)
    _, second = clipped()
    with torch.no_grad():
        for p, value in zip(inside, before):
            p.copy_(value)
        for name, p in named.items():
            own = first[name]
            p.grad = own + PUBLISHED_QUOTIENT * (second[name] - own) if id(p) in ids else own.clone()
    return loss


def divergence(arm: str, log_now: Tensor, log_start: Tensor) -> Tensor:
    """Of each place, from all words: KL(π‖π₀) = Σ π log π/π₀, or χ²(π‖π₀) = Σ π²/π₀ − 1."""
    now = log_now.exp()
    if arm == "χ²":
        return (2 * log_now - log_start).exp().sum(-1) - 1
    return (now * (log_now - log_start).nan_to_num(0.0)).sum(-1)
