r"""A diagonal linear network: the smallest model with a lazy and a rich regime.

Convention of this room: $\beta = w_+^2 - w_-^2$ elementwise, $w_\pm(0) = \alpha > 0$, and

$$L(w) = \frac{1}{4n}\|X\beta - y\|^2, \qquad r = X\beta - y, \quad g = X^\top r / n, \qquad
\nabla_{w_\pm} L = \pm w_\pm \circ g.$$

$X$ is (n, d), one row a sample. Another normalization of the loss only rescales γ, ε and time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiagonalNetwork(nn.Module):
    r"""$f(x) = x^\top(w_+^2 - w_-^2)$, started at $w_\pm = \alpha$, where β = 0.

    Args:
        d: number of inputs.
        alpha: size α > 0 of the initial weights, a number or a tensor of shape (d,). Small: rich regime, sparse
            solutions. Large: lazy regime, solutions of small Euclidean norm.

    Raises:
        ValueError: d < 1, or an α that is not positive, finite and of a fitting shape.

    References:
        Woodworth et al., [Kernel and Rich Regimes](https://arxiv.org/abs/2002.09277), COLT 2020.

    Example:
        >>> network = DiagonalNetwork(3, alpha=0.5)
        >>> with torch.no_grad():
        ...     _ = network.w_plus.copy_(torch.tensor([1.0, 0.5, 2.0]))
        >>> network.beta.tolist()
        [0.75, 0.0, 3.75]
    """

    def __init__(self, d: int, alpha: float | Tensor) -> None:
        super().__init__()
        if d < 1:
            raise ValueError(f"d must be at least 1, got {d}.")
        start = initial_scale(alpha, d)
        self.w_plus = nn.Parameter(start.clone())
        self.w_minus = nn.Parameter(start.clone())

    @property
    def beta(self) -> Tensor:
        """β, of shape (d,), differentiable."""
        return self.w_plus.square() - self.w_minus.square()

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) → (…)."""
        return x @ self.beta

    def loss(self, X: Tensor, y: Tensor) -> Tensor:
        r"""$\|X\beta - y\|^2 / 4n$ of `X` (n, d) and `y` (n,)."""
        return (self(X) - y).square().sum() / (4 * len(y))


def initial_scale(alpha: float | Tensor, d: int) -> Tensor:
    """α as a float64 vector of shape (d,), checked."""
    value = torch.as_tensor(alpha, dtype=torch.float64)
    if value.ndim > 1 or (value.ndim == 1 and len(value) != d):
        raise ValueError(f"alpha must be a number or of shape ({d},), got shape {tuple(value.shape)}.")
    if not (value.isfinite() & (value > 0)).all():
        raise ValueError(f"alpha must be finite and > 0 in every coordinate, got {alpha}.")
    return value.expand(d)


def check_data(X: Tensor, y: Tensor, needs_choice: str) -> tuple[Tensor, Tensor]:
    """X and y in float64, or an error that names what does not fit; `needs_choice` is the result that needs n < d."""
    X, y = torch.as_tensor(X, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
    if X.ndim != 2 or y.ndim != 1 or len(X) != len(y) or not len(y):
        raise ValueError(
            f"X and y must be of shapes (n, d) and (n,) with one n ≥ 1, got {tuple(X.shape)} and {tuple(y.shape)}."
        )
    if not (X.isfinite().all() and y.isfinite().all()):
        raise ValueError("X and y must be finite, got NaN or infinity.")
    n, d = X.shape
    if n >= d:
        raise ValueError(
            f"{needs_choice} needs fewer rows than columns, n < d, got n = {n} and d = {d}: with n ≥ d no two β fit "
            "the data, so there is no bias to compute."
        )
    misfit = (X @ torch.linalg.lstsq(X, y, driver="gelsd").solution - y).norm()
    if misfit > 1e-8 * y.norm():
        raise ValueError(
            f"{needs_choice} needs some β with Xβ = y, but the rows of X are linearly dependent and the best misses y "
            f"by {misfit / y.norm():.1e} ‖y‖."
        )
    return X, y
