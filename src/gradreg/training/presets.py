r"""Methods known by other names, as values of the four nouns.

Each is $\hat g = g_1 + \frac\gamma\epsilon (g_2 - g_1)$ with another ascent or another ratio γ/ε.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gradreg.functional.ascents import Adaptive
from gradreg.training.batch import Split
from gradreg.training.directions import Momentum
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import Schedule, check, warmup


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
    optimizer: Any,
    num_steps: int,
    *,
    rho: float = 0.2,
    share: float = 0.5,
    **options: Any,
) -> GradientRegularizer:
    r"""What keeps most of the gain at about the price of plain training: half of each batch at θ, half of it ahead
    along the optimizer's momentum v, where it is going.

    $$\hat g = (1-\lambda) \, \nabla L_A(\theta) + \lambda \, \nabla L_B(\theta - \rho \, v / \|v\|)$$

    One pass in all, and one extra copy of the parameters. Of what F-GR in every step gains over tuned plain
    training it keeps 1.04 [0.95, 1.13], 0.84 [0.68, 0.98] and 1.38 [1.14, 1.71] on three small tasks (MLPs by SGD,
    noisy labels, 16 paired seeds) and 0.92 [0.71, 1.15] of 1.0 points on real images (a ResNet, 1,000 rows, 5 seeds):
    where it keeps least, more than any other mode below 1.5 times (docs/frontier.md). With 10,000 rows F-GR gains
    nothing over plain training whose weight decay is tuned well, and this loses 0.2 points with noisy labels and
    shows nothing with clean ones (docs/images.md; what is marked there is not to be built on).
    `ascent=Previous(sign=-1)` keeps 0.97 [0.82, 1.39] on that ResNet for less, and 0.47 on one small task.

    It costs 1.10 to 1.22 times plain training on vision transformers in batches of 64 and 128, 1.16 to 1.32 times
    on that ResNet of 8 channels, 1.39 to 1.49 times in batches of 50 (two CPU cores), and 1.37 times in a CUDA graph
    but 2.41 eagerly with ResNet-18 (an H200, docs/gpu.md): half a batch launches as much as a whole one. ρ was tuned
    each time, between 0.2 and 4.5, and does not travel; the default is cautious (docs/choosing.md).

    Call `backward(loss_fn, batches=[batch])`, with `loss_fn(batch)` a mean over rows, which are in random order.

    Args:
        model: the model.
        optimizer: the base optimizer, with momentum, or a list of several; see `Momentum`.
        num_steps: of the training; ρ rises over the first 30 % of them.
        rho: ρ > 0, the way ahead, in the units of the weights; 0.2 without a number. Tune it, by factors of 3.
        share: λ, of the batch that is ahead, between 0 and 1.
        options: further arguments of `GradientRegularizer`.

    Raises:
        ValueError: numbers outside of their range, an optimizer without momentum.
        TypeError: arguments of another kind, such as those of the `cheap` before.

    References:
        docs/frontier.md, docs/images.md; it is `Split` along `Momentum`.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> regularizer = cheap(model, optimizer, num_steps=1000)
        >>> x, y = torch.randn(20, 2), torch.randn(20, 1)
        >>> loss = regularizer.backward(lambda batch: (model(batch[0]) - batch[1]).square().mean(), [(x, y)])
    """
    if gone := sorted({"gamma", "epsilon", "period"} & options.keys()):
        raise TypeError(f"{gone[0]} must be left out: γ is share · rho; the cheap that had it is in CHANGELOG.md.")
    if isinstance(rho, bool) or not (isinstance(rho, int | float) and 0 < rho < math.inf):
        raise ValueError(f"rho must be a number > 0, got {rho!r}; a function of the step is for Split itself.")
    if not (isinstance(share, int | float) and 0 < share < 1):
        raise ValueError(f"share must be a number between 0 and 1, got {share!r}; 1 is msam, 0 plain training.")
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer ≥ 1, got {num_steps!r}.")
    rising_steps = max(1, round(0.3 * num_steps))
    gamma, epsilon = warmup(share * rho, rising_steps), warmup(rho, rising_steps)
    return GradientRegularizer(model, gamma, epsilon, ascent=Momentum(optimizer), batch=Split(), **options)


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
