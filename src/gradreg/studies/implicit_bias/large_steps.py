r"""Plain gradient descent and SGD at a finite step η, which regularize by themselves.

In a diagonal network a step is $w_\pm \leftarrow w_\pm\circ(1 \mp \eta g)$, so that the product is known exactly:

$$w_+\circ w_- = \alpha^2\prod_t(1 - \eta^2 g_t^2) \approx \alpha^2\exp\Big(-\eta\int g^2\,dt\Big)$$

which is α_GR² of the exact penalty with γ = η/2 (Barrett & Dherin, 2021); with one row a step, g_t is the gradient of
that row, and the penalty is the per-sample one (Smith et al., 2021). The row-space condition holds to O(η²) only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg.theory import SparseRegression

CHECK_EVERY = 50


@dataclass(frozen=True)
class Descent:
    """Where gradient descent ended on each of S data sets."""

    beta: Tensor
    """(S, d)."""
    scale: Tensor
    """√(w₊∘w₋), (S, d): what α_GR is for a flow."""
    converged: Tensor
    """(S,), bool: ‖Xβ − y‖∞ ≤ tolerance · ‖y‖∞. Where False, the other fields are a state on the way."""
    num_steps: int


def descend(
    data: Sequence[SparseRegression],
    *,
    alpha: float,
    rate: float,
    one_row: bool,
    seed: int,
    tolerance: float = 1e-5,
    max_steps: int = 100_000,
) -> Descent:
    """Gradient descent of step η = `rate` on several data sets of one shape at once, until all fit or diverge.

    Args:
        data: S data sets.
        alpha: w± at the start.
        rate: η.
        one_row: SGD with one row a step, rows in a new random order each epoch; otherwise all rows.
        seed: of the order.
        tolerance: see `Descent.converged`.
        max_steps: budget; a run that needs more has not converged.
    """
    X, y = torch.stack([d.X for d in data]), torch.stack([d.y for d in data])
    num_rows = X.shape[1]
    generator = torch.Generator().manual_seed(seed)
    plus = torch.full((len(data), X.shape[2]), alpha, dtype=torch.float64)
    minus = plus.clone()
    goal = tolerance * y.abs().amax(1)
    order: list[int] = []
    step = 0
    while True:
        beta = plus.square() - minus.square()
        if step % CHECK_EVERY == 0 or step >= max_steps:
            misfit = (torch.einsum("snd,sd->sn", X, beta) - y).abs().amax(1)
            converged = misfit <= goal
            if step >= max_steps or (converged | ~misfit.isfinite() | (misfit > 1e6 * goal / tolerance)).all():
                return Descent(beta, (plus * minus).clamp(min=0).sqrt(), converged, step)
        if one_row:
            order = order or torch.randperm(num_rows, generator=generator).tolist()
            row = order.pop()
            x = X[:, row]
            g = x * ((x * beta).sum(1) - y[:, row])[:, None]
        else:
            residual = torch.baddbmm(y[..., None], X, beta[..., None], beta=-1)
            g = (X.mT @ residual)[..., 0] / num_rows
        plus, minus = plus * (1 - rate * g), minus * (1 + rate * g)
        step += 1
