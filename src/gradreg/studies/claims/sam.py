r"""Claim (d): a step of un-normalized SAM, $\theta \leftarrow \theta - \eta \nabla L(\theta + \rho \nabla L(\theta))$,
is a step of F-GR with γ = ε = ρ.

Two codes that share nothing but the model: SAM by hand, and `gradreg.GradientRegularizer` with an optimizer of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import GradientRegularizer
from gradreg.lab.config import RunConfig
from gradreg.lab.data import load
from gradreg.lab.models import build
from gradreg.lab.tables import Table
from gradreg.studies.claims.claim import AtMost, Claim, Measured, Plan, Subclaim

RHO, RATE, NUM_STEPS = 0.1, 0.1, 20
BOUND = 1e-12
CASES = {
    "d1, MLP": RunConfig(data="mnist1d", model="mlp", batch_size=100),
    "d2, CNN with BatchNorm": RunConfig(data="digits", model="cnn", batch_size=50),
}
CONTROL = 0.9  # γ/ε where the identity must not hold

Batch = tuple[Tensor, Tensor]


def measure(plan: Plan, folder: Path) -> Measured:
    del folder
    values = {key: [difference(replace(config, seed=seed)) for seed in plan.seeds] for key, config in CASES.items()}
    rows = [
        (key, f"{max(values[key]):.1e}", f"{difference(replace(config, seed=plan.seeds[0]), CONTROL):.1e}")
        for key, config in CASES.items()
    ]
    table = Table("The same measurement where it must find a difference", ("", "γ = ε", f"γ = {CONTROL:g} ε"), rows)
    return Measured(values, {"ρ = ε": RHO, "η": RATE, "steps": NUM_STEPS, "arithmetic": "float64"}, [table])


def difference(config: RunConfig, ratio: float = 1.0) -> float:
    """The largest ‖θ_SAM − θ_F-GR‖/‖θ_SAM − θ₀‖ after any of the steps, with γ = ratio · ε."""
    data = load(config)
    start = build(config, data).double().train()
    by_hand, regularized = deepcopy(start), deepcopy(start)
    optimizer = torch.optim.SGD(regularized.parameters(), lr=RATE)
    regularizer = GradientRegularizer(regularized, ratio * RHO, RHO)
    largest = 0.0
    for x, y in _batches(data.train.x.double(), data.train.y, config):
        sam_step(by_hand, x, y)
        optimizer.zero_grad()
        regularizer.backward(lambda x=x, y=y: F.cross_entropy(regularized(x), y))
        optimizer.step()
        distance, travelled = (_flat(by_hand) - _flat(other) for other in (regularized, start))
        largest = max(largest, (distance.norm() / travelled.norm()).item())
    return largest


def sam_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Up by ρ∇L, the gradient there, down from where it began."""
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    uphill = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, uphill):
            p += RHO * g
    there = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    with torch.no_grad():
        for p, before, g in zip(parameters, start, there):
            p.copy_(before - RATE * g)


def _batches(x: Tensor, y: Tensor, config: RunConfig) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(NUM_STEPS):
        rows = torch.randperm(len(y), generator=generator)[: config.batch_size]
        yield x[rows], y[rows]


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


CLAIM = Claim(
    letter="d",
    title="SAM without normalization is F-GR",
    says="Sharpness-aware minimization without normalization is finite-difference gradient regularization with γ = ε.",
    where="Named in the abstract as a close relation.",
    how=f"SAM by hand and `GradientRegularizer` with γ = ε, {NUM_STEPS} steps of SGD from the same weights on the same "
    "batches, in float64: the largest distance between the two along the way, over the distance travelled.",
    differs="SAM as published divides the ascent by ‖∇L‖; then ε depends on the step (`ascent='normalized'`).",
    subclaims=tuple(
        Subclaim(key, "The two trajectories are one.", "relative distance of the weights", AtMost(BOUND))
        for key in CASES
    ),
    measure=measure,
)
