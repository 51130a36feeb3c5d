r"""Data for diagonal networks: a Gaussian design, centered or shifted, and a sparse truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseRegression:
    r"""$y = X\beta^* + \text{noise}$ with $X_{ij} \sim N(\mu, \sigma^2)$ and k active coordinates."""

    X: Tensor
    """(n, d)."""
    y: Tensor
    """(n,)."""
    beta: Tensor
    """The truth β*, (d,)."""
    shift: float
    """μ."""
    scale: float
    """σ."""

    @property
    def is_active(self) -> Tensor:
        """Where β* ≠ 0, (d,)."""
        return self.beta != 0

    def test_error(self, beta: Tensor) -> Tensor:
        r"""The expected squared error on a new row over the variance of its signal, in closed form.

        $$\frac{\mathbb E\,(x^\top(\beta - \beta^*))^2}{\operatorname{Var}(x^\top\beta^*)}
          = \frac{\sigma^2\|\delta\|^2 + \mu^2 (\mathbf 1^\top\delta)^2}{\sigma^2\|\beta^*\|^2}, \quad
          \delta = \beta - \beta^*$$

        1 is the error of predicting the mean; 0 that of the truth. No noise is in it.

        Args:
            beta: β of shape (…, d).

        Returns:
            shape (…).

        Example:
            >>> data = sparse_regression(n=5, d=9, num_active=2, shift=3.0)
            >>> errors = data.test_error(torch.stack([data.beta, 0 * data.beta]))
            >>> [round(error, 12) for error in errors.tolist()]  # 0, and (1 + 3²(2/√2)²) / 1
            [0.0, 19.0]
        """
        delta = beta - self.beta
        spread = self.scale**2 * delta.square().sum(-1) + self.shift**2 * delta.sum(-1).square()
        return spread / (self.scale**2 * self.beta.square().sum())


def sparse_regression(
    n: int, d: int, num_active: int, *, shift: float = 0.0, scale: float = 1.0, noise: float = 0.0, seed: int = 0
) -> SparseRegression:
    r"""Draw $X_{ij} \sim N(\mu, \sigma^2)$ and $y = X\beta^* + \nu N(0, I)$ with a k-sparse $\beta^* = 1/\sqrt k$.

    Args:
        n: rows.
        d: columns.
        num_active: k, from 1 to d, the first k; ‖β*‖ = 1.
        shift: μ. With μ = 0 the design is centered.
        scale: σ > 0.
        noise: ν ≥ 0, standard deviation of the noise in y.
        seed: of the generator; the global random state is left alone.

    Raises:
        ValueError: n or d < 1, k outside 1…d, σ ≤ 0, ν < 0, or anything not finite.

    Example:
        >>> data = sparse_regression(n=5, d=9, num_active=4)
        >>> data.X.shape, data.beta.tolist()
        (torch.Size([5, 9]), [0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    """
    if n < 1 or d < 1 or not 1 <= num_active <= d:
        raise ValueError(f"n ≥ 1, d ≥ 1 and 1 ≤ num_active ≤ d are needed, got n={n}, d={d}, num_active={num_active}.")
    if not (all(map(math.isfinite, (shift, scale, noise))) and scale > 0 and noise >= 0):
        raise ValueError(f"finite shift, scale > 0 and noise ≥ 0 are needed, got {shift}, {scale} and {noise}.")
    generator = torch.Generator().manual_seed(seed)
    X = shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)
    beta = torch.zeros(d, dtype=torch.float64)
    beta[:num_active] = num_active**-0.5
    y = X @ beta + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return SparseRegression(X, y, beta, shift, scale)
