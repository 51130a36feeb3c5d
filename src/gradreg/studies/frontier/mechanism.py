r"""Why a mode works or not: the penalty that it applies, beside the exact one, at frozen points of a plain run.

The *penalty* of a mode is what it adds to the gradient, $\hat g - g_1$, in the mean over the batches of an epoch:
$\hat g$ by the engine, $g_1$ the gradient of the same batch at θ, both in training mode and without augmentation. A
*reference* is $\gamma H g_1$:

- `exact`: in the mean over the same batches, by double backpropagation, blind to the kinks of ReLU;
- `central`: the same by central differences, which see the kinks;
- `whole`: as `exact`, with the gradient and Hessian of the loss of all these rows. Batches also penalize their noise,
  $E\|g_1\|^2 = \|\nabla L\|^2 + \operatorname{tr} \operatorname{Cov} g_1$; this one does not.

A displacement of fixed length (SAM, a momentum, a previous gradient) is held against the γ at which the full method
pushes as hard, weight times displacement: γ over the mean of $\|g_1\|$, with γ = ρ for SAM and MSAM. So a ratio of 1
means: as strong, for what it displaces, as a displacement uphill. Schedules (`every`, `late`, `bernoulli`) are not
listed: in an active step they are the full method.

The weights stay, so the direction of `Previous` is ĝ of the batch before at the same point, and that of `Momentum` is
the run's, one for all batches. One direction is one draw: intervals are over runs (`over_seeds`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from gradreg import Fraction, GradientRegularizer, Momentum, Previous, Split, curvature, msam, sam
from gradreg import _vectors as vectors
from gradreg.lab import objective
from gradreg.lab.config import RunConfig
from gradreg.lab.data.parts import Part
from gradreg.lab.folder import BadInput
from gradreg.lab.randomness import seeded
from gradreg.lab.sharpness import batches_of
from gradreg.lab.stats import Interval, mean_interval
from gradreg.lab.train.trainer import Trainer, make_optimizer

SHARES = (0.02, 0.5, 1.0)
"""Of the steps of a run: its start, where there is a momentum already, its middle and its end."""

Batch = tuple[Tensor, Tensor]
Make = Callable[[nn.Module, torch.optim.Optimizer], GradientRegularizer]


@dataclass(frozen=True)
class Frozen:
    """A point of a run: weights, and the optimizer with its momentum."""

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Mode:
    """A way to apply the penalty."""

    name: str
    gamma: float
    """γ of its reference; ρ for SAM and MSAM."""
    make: Make
    has_length: bool = False
    """Its displacement has a length of its own, instead of that of the gradient."""


@dataclass(frozen=True)
class Alignment:
    """The penalty of a mode beside a reference; NaN where one of the two is zero or not finite."""

    mode: str
    reference: str
    """`exact`, `central` or `whole`."""
    cosine: float
    ratio: float
    """Norm of the penalty over that of the reference."""


@dataclass(frozen=True)
class Summary:
    """An alignment over runs."""

    mode: str
    reference: str
    cosine: Interval
    ratio: Interval


@dataclass(frozen=True)
class Ending:
    """Where a run ended: L on all rows of a part, in evaluation mode."""

    grad_norm: float
    trace: float
    trace_error: float
    """Standard error of the estimate of tr H."""


def modes(gamma: float, epsilon: float, rho: float, share: float = 0.1) -> list[Mode]:
    """One of each kind: γ and ε where the direction is the gradient, ρ where it has length 1.

    A split batch displaces half of its rows, λ = 1/2: with its own gradient as far as F-GR, with the momentum by 2ρ.
    """
    half, split = epsilon / 2, Split()

    def gr(gamma: float, epsilon: float, **options: object) -> Make:
        return lambda model, _: GradientRegularizer(model, gamma, epsilon, **options)  # type: ignore[arg-type]

    def split_momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> GradientRegularizer:
        return GradientRegularizer(model, rho, 2 * rho, ascent=Momentum(optimizer), batch=split)

    return [
        Mode("F-GR", gamma, gr(gamma, epsilon)),
        Mode("SAM", rho, lambda model, _: sam(model, rho), has_length=True),
        Mode(f"Fraction({share:g})", gamma, gr(gamma, epsilon, batch=Fraction(share))),
        Mode("Split, gradient", half, gr(half, epsilon, batch=split)),
        Mode("Split, momentum", rho, split_momentum, has_length=True),
        Mode("MSAM, ahead", rho, lambda model, optimizer: msam(model, optimizer, rho, sign=-1), has_length=True),
        Mode("MSAM, uphill", rho, lambda model, optimizer: msam(model, optimizer, rho, sign=+1), has_length=True),
        Mode("Previous, ahead", rho, gr(rho, rho, ascent=Previous(sign=-1)), has_length=True),
        Mode("Previous, uphill", rho, gr(rho, rho, ascent=Previous(sign=+1)), has_length=True),
    ]


def frozen_points(config: RunConfig, shares: Sequence[float] = SHARES) -> tuple[list[Frozen], Part]:
    """Train, and keep a copy at each of these shares of the steps, one step in at least; and the training rows.

    Raises:
        BadInput: shares that do not increase from 0 to 1, or a run that is not plain.
    """
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise BadInput(f"shares must increase within 0 to 1, got {', '.join(map(str, shares)) or 'none'}.")
    if config.method != "SGD":
        raise BadInput(f"method must be SGD, a plain run to look at, got {config.method!a}.")
    points = []
    with seeded(config.seed):
        trainer = Trainer(config)
        for share in shares:
            target = max(1, round(share * trainer.num_steps))
            while trainer.step < target:
                trainer.epoch(lambda target=target: trainer.step >= target)
            model = copy.deepcopy(trainer.model)
            optimizer = make_optimizer(config, model)
            optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
            points.append(Frozen(trainer.step, model, optimizer))
    rows = trainer.task.train
    assert isinstance(rows, Part)
    return points, rows


def alignments(
    point: Frozen, modes: Sequence[Mode], rows: Part, batch_size: int, epsilon: float, seed: int = 0
) -> list[Alignment]:
    """Cosine and norm ratio of each mode's penalty with each reference, over one epoch of batches.

    The first row is `exact` on batches in another order: how far the noise of batches lets two penalties agree.

    Args:
        point: stays as it is.
        modes: those to compare.
        rows: training rows.
        batch_size: rows in a batch, as in training; a last partial batch is dropped.
        epsilon: step ε of the central differences, along the gradient: that of the full method.
        seed: of the order of the rows.

    Raises:
        ValueError: fewer rows than a batch has.
    """
    if not 1 <= batch_size <= len(rows):
        raise ValueError(f"batch_size must be from 1 to {len(rows)} (the rows), got {batch_size}.")
    batches, others = (_batches(rows, batch_size, order) for order in (seed, seed + 1))
    steps = [[batch] for batch in batches]
    exact: Make = lambda model, _: GradientRegularizer(model, 1.0, 1.0, scheme="exact")  # noqa: E731
    central: Make = lambda model, _: GradientRegularizer(model, 1.0, epsilon, scheme="central")  # noqa: E731
    exactly, grad_norm = _penalty(point, exact, steps)
    references = {
        "exact": exactly,
        "central": _penalty(point, central, steps)[0],
        "whole": _penalty(point, exact, [batches])[0],
    }
    other, _ = _penalty(point, exact, [[batch] for batch in others])
    found = [_beside("exact, other batches", "exact", other, exactly)]
    for mode in modes:
        penalty, _ = _penalty(point, mode.make, steps)
        gamma = mode.gamma / grad_norm if mode.has_length else mode.gamma
        found += [_beside(mode.name, name, penalty, gamma * reference) for name, reference in references.items()]
    return found


def over_seeds(runs: Sequence[Sequence[Alignment]]) -> list[Summary]:
    """Means over runs, with Student's intervals.

    Raises:
        ValueError: fewer than 2 runs, or runs of other modes.
    """
    if len(runs) < 2:
        raise ValueError(f"runs must be at least 2 for an interval, got {len(runs)}: pass those of more seeds.")
    found = []
    for rows in zip(*runs, strict=True):
        names = {(row.mode, row.reference) for row in rows}
        if len(names) > 1:
            raise ValueError(f"runs must have the same modes in the same order, got {sorted(names)} in one row.")
        cosine, ratio = mean_interval([row.cosine for row in rows]), mean_interval([row.ratio for row in rows])
        found.append(Summary(*names.pop(), cosine, ratio))
    return found


def ending(model: nn.Module, rows: Part, num_probes: int = 32, seed: int = 0) -> Ending:
    """‖∇L‖ and tr H of the plain objective, by `gradreg.curvature`; the model stays as it is."""
    twin = copy.deepcopy(model).eval()
    device = next(twin.parameters()).device
    batches = batches_of(Part(rows.x.to(device), rows.y.to(device)))
    norm = curvature.gradient_norm(lambda batch: objective.loss(twin, batch), twin, batches)
    trace = curvature.hessian_trace(
        lambda batch: objective.loss(twin, batch), twin, batches, num_probes=num_probes, seed=seed
    )
    return Ending(norm, trace.mean, trace.standard_error)


def _batches(rows: Part, batch_size: int, seed: int) -> list[Part]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[part] for part in order.split(batch_size) if len(part) == batch_size]


def _penalty(point: Frozen, make: Make, steps: Sequence[Sequence[Part]]) -> tuple[Tensor, float]:
    """ĝ − g1 as one long vector, and ‖g1‖, both in the mean over steps; a step is one batch, or several as one."""
    model, optimizer = copy.deepcopy((point.model, point.optimizer))  # together: the same parameters in both
    model.train()
    device = next(model.parameters()).device
    regularizer = make(model, optimizer)

    def gradient(call: Callable[[Callable[[Batch], Tensor], list[Batch]], object], step: int) -> Tensor:
        batches = [(batch.x.to(device), batch.y.to(device)) for batch in steps[step]]
        model.zero_grad()
        with seeded(step + len(steps)):  # both calls see the same dropout masks
            call(lambda batch: objective.loss(model, batch) / len(batches), batches)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return parameters_to_vector(gradients).double()

    gradient(regularizer.backward, -1)  # so that the first step has a previous one
    total = norms = torch.zeros((), dtype=torch.float64, device=device)
    for step in range(len(steps)):
        first = gradient(lambda loss_fn, batches: torch.stack([*map(loss_fn, batches)]).sum().backward(), step)
        total = total + gradient(regularizer.backward, step) - first
        norms = norms + vectors.norm([first])
    return total / len(steps), norms.item() / len(steps)


def _beside(mode: str, reference: str, penalty: Tensor, expected: Tensor) -> Alignment:
    ours, theirs = vectors.norm([penalty]), vectors.norm([expected])
    cosine = vectors.dot(penalty, expected) / (ours * theirs)  # 0/0 is NaN
    return Alignment(mode, reference, cosine.item(), (ours / theirs).item())
