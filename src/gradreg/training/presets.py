r"""Methods known by other names, as values of the four nouns.

Each is $\hat g = g_1 + \frac\gamma\epsilon (g_2 - g_1)$ with another ascent or another ratio γ/ε.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gradreg.functional.ascents import Adaptive
from gradreg.training.batch import Fraction
from gradreg.training.directions import Ahead, Momentum
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import Schedule, check, every, warmup
from gradreg.training.target import TargetRatio


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


CHEAP_GAMMA = TargetRatio(0.03, ramp=0)
"""A third of the default: the gradient of a tenth of a batch, which it is relative to, is up to three times as long."""


def cheap(
    model: nn.Module,
    optimizer: Any,
    num_steps: int,
    *,
    gamma: Schedule | None = None,
    epsilon: float = 0.5,
    rho: float = 0.03,
    share: float = 0.1,
    period: int = 3,
    **options: Any,
) -> GradientRegularizer:
    r"""The best of `gradreg frontier`, on small tasks, at no more than 1.10 times plain training: all of a step ahead
    along the momentum, and in every third step a penalty on a tenth of the batch.

    $$\tilde\theta = \theta - \rho \, v / \|v\|, \quad \hat g = \nabla L_D(\tilde\theta)
    + \tfrac\gamma\epsilon [\nabla L_A(\tilde\theta + \epsilon \nabla L_A) - \nabla L_A(\tilde\theta)]$$

    1.03 passes on average, and one extra copy of the parameters. Measured with γ = 0.05, ρ = 1 (docs/frontier.md; 16
    paired seeds, two CPU cores): 1.07 times plain training on a small vision transformer, and 0.99 [0.90, 1.06], 1.03
    [0.94, 1.13] and 1.44 [1.23, 1.74] of what F-GR in every step gains over tuned SGD, on the three tasks where it
    gains. Those are small networks with noisy labels, and neither numbers nor shares travel: ρ is a length in the
    units of the weights, and 1 ruined training elsewhere (docs/choosing.md); on real images with random labels and a
    ResNet with BatchNorm, tuned, it kept 0.32 [0.05, 0.48] at 1.23 times, and a penalty in every fourth step 1.03
    [0.76, 1.29] at 1.27 times (docs/images.md, 5 seeds). The defaults are cautious: turn γ and ρ up on yours.

    Call `backward(loss_fn, batches=[batch])`, with `loss_fn(batch)` a mean over rows.

    Args:
        model: the model.
        optimizer: the base optimizer, with momentum, or a list of several.
        num_steps: of the training; γ and ρ rise over the first 30 % of them.
        gamma: γ, on the share alone, in the steps that have a penalty, a number, a function of the step or a
            `TargetRatio`; None is `TargetRatio(0.03, ramp=0)`. Tune it first, by factors of 3.
        epsilon: ε.
        rho: ρ, the way ahead, in the units of the weights; tune it second. 0 stays at θ.
        share: of the batch that the penalty is taken on.
        period: a penalty in every so many steps.
        options: further arguments of `GradientRegularizer`.

    Raises:
        ValueError: numbers outside of their range, an optimizer without momentum.

    References:
        docs/frontier.md, docs/images.md; its two halves are `Fraction` and `Ahead`.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> regularizer = cheap(model, optimizer, num_steps=1000)
        >>> x, y = torch.randn(20, 2), torch.randn(20, 1)
        >>> loss = regularizer.backward(lambda batch: (model(batch[0]) - batch[1]).square().mean(), [(x, y)])
    """
    gamma = CHEAP_GAMMA if gamma is None else gamma
    check("gamma", gamma)
    check("rho", rho or 1.0)
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer ≥ 1, got {num_steps!r}.")
    rising_steps = max(1, round(0.3 * num_steps))
    return GradientRegularizer(
        model,
        every(warmup(gamma, rising_steps), period),
        epsilon,
        batch=Fraction(share),
        at=Ahead(Momentum(optimizer), warmup(rho, rising_steps)),
        **options,
    )


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
