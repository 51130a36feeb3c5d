r"""The potential that decides which interpolating β a diagonal network ends at.

$$\phi_a(\beta) = \sum_i \Big[\beta_i \operatorname{arcsinh}\frac{\beta_i}{2a_i^2} - \sqrt{\beta_i^2 + 4a_i^4}\Big],
\qquad \nabla\phi_a(\beta) = \operatorname{arcsinh}\frac{\beta}{2a^2}$$

For large $a$ it is quadratic, $4a^2(\phi_a + 2a^2) \to \beta^2$: the lazy regime. For small $a$ it is, to first order,
$\ell_1$: $\phi_a / \log(1/a^2) \to \|\beta\|_1$, the rich regime (Woodworth et al., 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradreg.theory.model import check_data, initial_scale

MAX_NEWTON_STEPS = 500


def potential(beta: Tensor, alpha: float | Tensor) -> Tensor:
    r"""$\phi_\alpha(\beta)$, shifted to be zero at β = 0 and convex with its minimum there.

    Args:
        beta: (…, d).
        alpha: α > 0, a number or (d,).

    Returns:
        $\phi_\alpha(\beta) - \phi_\alpha(0)$ of shape (…), evaluated without cancellation.

    Raises:
        ValueError: an α that is not positive, finite and of a fitting shape.

    Example:
        >>> beta = torch.tensor([3.0, -4.0], dtype=torch.float64)
        >>> wide = 4 * 100.0**2 * potential(beta, 100.0)  # ‖β‖² = 25
        >>> round(wide.item(), 3)
        25.0
    """
    beta = torch.as_tensor(beta, dtype=torch.float64)
    a2 = 2 * initial_scale(alpha, beta.shape[-1]).square()
    t = torch.asinh(beta / a2)
    # β = a2 sinh t, √(β² + a2²) = a2 cosh t; and cosh t − 1 = 2 sinh²(t/2).
    return (beta * t - 2 * a2 * torch.sinh(t / 2).square()).sum(-1)


def minimize_potential(X: Tensor, y: Tensor, alpha_gr: float | Tensor, *, tolerance: float = 1e-12) -> Tensor:
    r"""$\operatorname{argmin}\{\phi_a(\beta) : X\beta = y\}$, by Newton's method on the dual, with no flow involved.

    Stationarity says $\operatorname{arcsinh}(\beta / 2a^2) = X^\top\nu$ for some ν, so $\beta = 2a^2\sinh(X^\top\nu)$,
    and ν minimizes the convex function $\sum_i 2a_i^2\cosh(X^\top\nu)_i - y^\top\nu$ of n variables.

    Args:
        X: (n, d) with n < d.
        y: (n,), reached by some β.
        alpha_gr: $a$ > 0, a number or (d,).
        tolerance: largest allowed ‖Vᵀ(β − b)‖∞ / ‖Vᵀb‖∞, with V the right singular vectors of X and b any solution of
            Xb = y.

    Returns:
        β of shape (d,), float64.

    Raises:
        ValueError: X and y that do not fit or are not finite, n ≥ d, no β with Xβ = y, or an $a$ that is not positive.
        ArithmeticError: Newton's method did not reach the tolerance.

    Example:
        >>> X, y = torch.tensor([[1.0, 2.0]]), torch.tensor([1.0])
        >>> minimize_potential(X, y, 100.0)  # lazy: least Euclidean norm, Xᵀ(XXᵀ)⁻¹y
        tensor([0.2000, 0.4000], dtype=torch.float64)
        >>> minimize_potential(X, y, 1e-12)  # rich: least ‖β‖₁
        tensor([7.0711e-13, 5.0000e-01], dtype=torch.float64)
    """
    X, y = check_data(X, y, "minimize_potential")
    a2 = 2 * initial_scale(alpha_gr, X.shape[1]).square()
    # The same constraint with orthonormal rows: better conditioned, and rows that repeat fall away.
    U, singular, rows = torch.linalg.svd(X, full_matrices=False)
    kept = singular > 1e-12 * singular[0]
    rows, target = rows[kept], (U.T @ y)[kept] / singular[kept]

    nu = torch.zeros_like(target)
    for _ in range(MAX_NEWTON_STEPS):
        t = nu @ rows
        beta = a2 * torch.sinh(t)
        residual = rows @ beta - target
        if residual.abs().max() <= tolerance * target.abs().max():
            return beta
        hessian = (rows * (a2 * torch.cosh(t))) @ rows.T
        direction = torch.linalg.solve(hessian, residual)
        # The third derivative is at most ‖Δt‖∞ times the second, so a step with ‖Δt‖∞ ≤ 1 always descends.
        nu = nu - direction / (direction @ rows).abs().max().clamp(min=1.0)
    raise ArithmeticError(
        f"Newton's method did not reach Xβ = y to {tolerance:g} in {MAX_NEWTON_STEPS} steps; alpha_gr may be too "
        f"small, or too uneven, for float64: it spans {(a2.min() / 2).sqrt():.1e} to {(a2.max() / 2).sqrt():.1e}."
    )
