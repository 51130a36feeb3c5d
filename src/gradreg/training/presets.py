r"""Methods known by other names, as values of the four nouns.

Each is $\hat g = g_1 + \frac\gamma\epsilon (g_2 - g_1)$ with another ascent or another ratio γ/ε.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gradreg.functional.ascents import Adaptive
from gradreg.training.batch import Fraction
from gradreg.training.directions import Momentum
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import Schedule, check, every
from gradreg.training.target import TargetRatio

QUARTER = Fraction(0.25)


def sam(model: nn.Module, rho: Schedule, **options: Any) -> GradientRegularizer:
    r"""Sharpness-aware minimization: $\hat g = \nabla L(\theta + \rho \, \nabla L / \|\nabla L\|)$, that is γ = ε
    = ρ.

    Args:
        model: the model.
        rho: radius ρ > 0 in the units of the weights, a number or a function of the step.
        options: further arguments of `GradientRegularizer`.

    Raises:
        ValueError: ρ ≤ 0 or not finite.

    References:
        Foret et al., [Sharpness-Aware Minimization](https://arxiv.org/abs/2010.01412), ICLR 2021.

    Example:
        >>> sam(nn.Linear(2, 1), rho=0.05).gamma
        0.05
    """
    check("rho", rho)
    return GradientRegularizer(model, rho, rho, ascent="normalized", **options)


def asam(model: nn.Module, rho: Schedule, eta: float = 0.01, **options: Any) -> GradientRegularizer:
    r"""Adaptive SAM: the radius is measured relative to each weight, $d = T^2 g_1 / \|T g_1\|$ with $T = |\theta|
    + \eta$.

    Args:
        model: the model.
        rho: radius ρ > 0, a number or a function of the step; larger than SAM's, 0.5 to 2 in the paper.
        eta: η ≥ 0, keeps small weights moving.
        options: further arguments of `GradientRegularizer`.

    Raises:
        ValueError: ρ ≤ 0 or η < 0, or either not finite.

    References:
        Kwon et al., [ASAM](https://arxiv.org/abs/2102.11600), ICML 2021.

    Example:
        >>> asam(nn.Linear(2, 1), rho=0.5).epsilon
        0.5
    """
    check("rho", rho)
    return GradientRegularizer(model, rho, rho, ascent=Adaptive(eta), **options)


def msam(model: nn.Module, optimizer: Any, rho: Schedule, sign: int = -1, **options: Any) -> GradientRegularizer:
    r"""Momentum-SAM, one pass: $\hat g = \nabla L(\theta \pm \rho \, v / \|v\|)$ with the optimizer's momentum v.

    Args:
        model: the model.
        optimizer: the base optimizer, with momentum, or a list of several; see `Momentum`.
        rho: radius ρ > 0 in the units of the weights, a number or a function of the step; several times that of SAM.
        sign: −1 looks ahead, as the authors do, +1 uphill.
        options: further arguments of `GradientRegularizer`.

    Raises:
        ValueError: ρ ≤ 0 or not finite, another sign, an optimizer without momentum or without a selected parameter.

    References:
        Becker et al., [Momentum-SAM](https://arxiv.org/abs/2401.12033), 2024.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> msam(model, optimizer, rho=1.0).epsilon
        1.0
    """
    check("rho", rho)
    return GradientRegularizer(model, rho, rho, ascent=Momentum(optimizer, sign), **options)


def cheap(
    model: nn.Module,
    gamma: Schedule | None = None,
    epsilon: Schedule = 0.1,
    *,
    period: int = 4,
    batch: Fraction | None = QUARTER,
    **options: Any,
) -> GradientRegularizer:
    r"""What keeps most of the gain at little more than the price of plain training: F-GR in every fourth step, on a
    quarter of the batch.

    $$\hat g = \nabla L(\theta) + \frac\gamma\epsilon \left(\nabla L_A(\theta + \epsilon \, \nabla L_A(\theta)) -
    \nabla L_A(\theta)\right)$$

    in every `period`-th step, with the loss $L_A$ of the first rows of the batch, and $\nabla L$ in the others:
    1 + 1/16 passes, one extra copy of the parameters, any optimizer. Of what F-GR in every step gains over tuned plain
    training it keeps 0.99 [0.72, 1.24] and 0.87 [0.68, 1.19] on real images (ResNets of ReLU and of SiLU, 1,000 rows,
    5 paired seeds), and 0.59 [0.50, 0.68], 0.90 [0.77, 1.02] and 0.91 [0.76, 1.07] on three small tasks (MLPs, noisy
    labels, 16 seeds), all by SGD: where it keeps least, more than any other of at most 1.5 times (docs/frontier.md).
    On vision transformers by AdamW, where F-GR in every step shows no gain, neither does this (docs/images.md).

    It costs 1.08 to 1.14 times plain training on small vision transformers and 1.17 times on a ResNet of 8 channels, in
    batches of 64 and 128, and 1.23 to 1.28 times in batches of 50 (two CPU cores): a pass over few rows is dearer than
    its share. On a GPU it has not been timed yet.

    Call `backward(loss_fn, batches=[batch])`, with `loss_fn(batch)` a mean over rows, which are in random order.

    Args:
        model: the model.
        gamma: γ ≥ 0 of the steps that have a penalty, a function of the step, or a `TargetRatio`; None for
            `TargetRatio(0.2)` (docs/choosing.md). Tuned it was a ratio of 0.3 to 1 on ResNets with 1,000 real images,
            and 0.03 to 1 elsewhere.
        epsilon: ε > 0, a number or a function of the step.
        period: steps from one penalty to the next.
        batch: the rows that the penalty is taken on; None for all.
        options: further arguments of `GradientRegularizer`.

    Raises:
        ValueError: numbers outside of their range.
        TypeError: arguments of another kind, such as those of the `cheap` before.

    References:
        docs/frontier.md, docs/images.md; it is `every` and `Fraction`.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> regularizer = cheap(model)
        >>> x, y = torch.randn(20, 2), torch.randn(20, 1)
        >>> loss = regularizer.backward(lambda batch: (model(batch[0]) - batch[1]).square().mean(), [(x, y)])
    """
    gone = sorted({"rho", "share", "num_steps", "optimizer"} & options.keys())
    if gone or isinstance(gamma, torch.optim.Optimizer | list):
        name = gone[0] if gone else "optimizer"
        raise TypeError(f"{name} must be left out: the cheap that had it is Split now, see CHANGELOG.md.")
    strength = TargetRatio(0.2) if gamma is None else gamma
    check("gamma", strength)
    return GradientRegularizer(model, every(strength, period), epsilon, batch=batch, **options)


def gnp(model: nn.Module, radius: float, alpha: float, **options: Any) -> GradientRegularizer:
    r"""Gradient-norm penalty $\lambda \|\nabla L\|$, not squared: $\hat g = (1-\alpha) g_1 + \alpha \, \nabla
    L(\theta + r g_1/\|g_1\|)$.

    Args:
        model: the model.
        radius: r > 0 in the units of the weights; 0.1 in the paper.
        alpha: α = λ/r, between 0 (plain training) and 1 (SAM) or above; 0.8 in the paper.
        options: further arguments of `GradientRegularizer`.

    Raises:
        ValueError: r ≤ 0 or α < 0, or either not finite.

    References:
        Zhao et al., [Penalizing Gradient Norm](https://arxiv.org/abs/2202.03599), ICML 2022.

    Example:
        >>> gnp(nn.Linear(2, 1), radius=0.5, alpha=0.5).gamma
        0.25
    """
    check("radius", radius)
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number ≥ 0, got {alpha!r}; 0 is plain training, 1 is SAM.")
    return GradientRegularizer(model, radius * alpha, radius, ascent="normalized", **options)
