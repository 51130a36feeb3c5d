r"""The flow of gradient regularization in a diagonal network, integrated as it stands.

$$\frac{dw_\pm}{dt} = -\hat g_\pm(w), \qquad
\hat g = \nabla L + \frac\gamma\epsilon \sum_k \omega_k [\nabla L(w + s_k\epsilon\nabla L) - \nabla L]$$

with the stencil $(s_k, \omega_k)$ of a scheme, and the exact $H\nabla L$ for double backpropagation. Nothing here uses
the theory; the theory says, exactly for every ε, with $g_k' = g(w + s_k\epsilon\nabla L)$ and
$\bar g = \sum_k \omega_k s_k g_k'$ (for double backpropagation $\bar g = g$),

$$w_+ \circ w_- = \alpha_{GR}^2, \qquad \alpha_{GR} = \alpha\circ\exp\Big(-\gamma\int_0^\infty g\circ\bar g\,dt\Big),
\qquad \beta_\infty = \operatorname{argmin}\{\phi_{\alpha_{GR}}(\beta) : X\beta = y\}.$$

The integral is carried along as d further unknowns. `flows` in reduced.py uses the theory and is much faster; this is
its reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradreg._install import how
from gradreg.functional.schemes import Scheme, resolve_scheme
from gradreg.theory.model import check_data, initial_scale

DIVERGED = 1e6  # growth of ‖Xβ − y‖ from the start, beyond which a flow counts as diverged
COLLAPSED = 1e-3  # share of α, below which all weights together count as collapsed
COLLAPSE = "; all weights shrank toward the saddle w = 0: γ is too large for this α"


@dataclass(frozen=True)
class Flow:
    """Where a flow ended, float64; read `converged` first."""

    beta: Tensor
    """β, (d,)."""
    w_plus: Tensor
    """(d,)."""
    w_minus: Tensor
    """(d,)."""
    alpha_gr: Tensor
    """α∘exp(−γ∫g∘ḡ dt) from the integral up to `time`, (d,)."""
    train_loss: float
    """‖Xβ − y‖²/4n."""
    converged: bool
    """Whether ‖Xβ − y‖∞ fell to `tolerance` · ‖y‖∞. If not, every other field is a state on the way."""
    reason: str
    """Why it stopped."""
    time: float
    """t of the last state."""
    num_evaluations: int
    """Evaluations of ĝ, those for Jacobians included."""


class _OutOfBudget(Exception):
    pass


def check_strength(gamma: float, epsilon: float | None, scheme: Scheme) -> float:
    """ε as a number (1 where it plays no part), or an error that says what is wrong with γ or ε."""
    if not (isinstance(gamma, (int, float)) and math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a finite number ≥ 0, got {gamma}.")
    if scheme.is_exact or (gamma == 0 and epsilon is None):
        return 1.0
    if not (isinstance(epsilon, (int, float)) and math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(
            f"epsilon must be a finite number > 0 with scheme={scheme.name!r}, got {epsilon}. "
            'For the limit ε → 0 pass scheme="exact".'
        )
    return float(epsilon)


def flow(
    X: Tensor,
    y: Tensor,
    *,
    alpha: float | Tensor,
    gamma: float,
    epsilon: float | None = None,
    scheme: str | Scheme = "forward",
    per_sample: bool = False,
    max_time: float = 1e7,
    max_evaluations: int = 1_000_000,
    tolerance: float = 1e-10,
    rtol: float = 1e-10,
    atol: float = 1e-13,
) -> Flow:
    r"""Integrate $\dot w_\pm = -\hat g_\pm(w)$ from $w_\pm = \alpha$ until $X\beta = y$, by a stiff solver (LSODA).

    Args:
        X: (n, d) with n < d.
        y: (n,), reached by some β.
        alpha: α > 0, a number or (d,).
        gamma: strength γ ≥ 0; 0 is the flow of plain gradient descent.
        epsilon: step length ε > 0 along ∇L; not used by `exact`.
        scheme: `forward` (F-GR), `backward` (B-GR), `central`, `exact` (DB), or a `Scheme`.
        per_sample: regularize the gradient of each row's loss $L_i = (x_i^\top\beta - y_i)^2/4$ by itself and
            average: the expected step of stochastic gradient descent with one row a batch. Then
            $\alpha_{GR} = \alpha\circ\exp(-\gamma\int \frac1n\sum_i g_i\circ\bar g_i\,dt)$.
        max_time: time budget, in units of t.
        max_evaluations: work budget, in evaluations of ĝ.
        tolerance: the flow has converged when ‖Xβ − y‖∞ ≤ `tolerance` · ‖y‖∞.
        rtol: relative tolerance of the solver, for each unknown.
        atol: absolute tolerance of the solver.

    Returns:
        a `Flow`. A flow that diverges, gets stuck, or runs out of its budget has `converged=False` and a `reason`.

    Raises:
        ValueError: before integrating: X and y that do not fit or are not finite, n ≥ d, no β with Xβ = y, α ≤ 0,
            γ < 0, ε ≤ 0 with a finite difference, an unknown scheme, or a budget or tolerance that is not positive.
        ImportError: scipy is missing.

    References:
        Karakida et al., [Understanding Gradient Regularization](https://arxiv.org/abs/2210.02720), ICML 2023.

    Example:
        >>> from gradreg.theory import minimize_potential, sparse_regression
        >>> data = sparse_regression(n=4, d=8, num_active=1)
        >>> end = flow(data.X, data.y, alpha=0.3, gamma=0.1, epsilon=0.1)
        >>> end.converged
        True
        >>> torch.allclose(end.w_plus * end.w_minus, end.alpha_gr**2, rtol=0, atol=1e-8)
        True
        >>> torch.allclose(end.beta, minimize_potential(data.X, data.y, end.alpha_gr), rtol=0, atol=1e-6)
        True
    """
    scheme = resolve_scheme(scheme)
    X, y = check_data(X, y, "flow")
    start = initial_scale(alpha, X.shape[1])
    epsilon = check_strength(gamma, epsilon, scheme)
    for name, value in (
        ("max_time", max_time),
        ("max_evaluations", max_evaluations),
        ("tolerance", tolerance),
        ("rtol", rtol),
        ("atol", atol),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}.")
    return _integrate(X, y, start, gamma, epsilon, scheme, per_sample, max_time, max_evaluations, tolerance, rtol, atol)


def _integrate(
    X: Tensor,
    y: Tensor,
    start: Tensor,
    gamma: float,
    epsilon: float,
    scheme: Scheme,
    per_sample: bool,
    max_time: float,
    max_evaluations: int,
    tolerance: float,
    rtol: float,
    atol: float,
) -> Flow:
    np, solve_ivp = _scipy()
    d, rows, targets = X.shape[1], X.numpy(), y.numpy()
    field = regularized_field(X, y, gamma, epsilon, scheme, per_sample)
    calls = 0
    last = (0.0, np.concatenate([start.numpy(), start.numpy(), np.zeros(d)]))

    def counted(t: float, state: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > max_evaluations:
            raise _OutOfBudget
        return field(state)

    def misfit(state: Any) -> float:
        return float(np.abs(rows @ (state[:d] ** 2 - state[d : 2 * d] ** 2) - targets).max())

    goal, limit = tolerance * float(np.abs(targets).max()), DIVERGED * misfit(last[1])

    # Events are called with every accepted state, so the last one is at hand when the budget ends.
    def has_converged(t: float, state: Any) -> float:
        nonlocal last
        last = (t, state.copy())
        return misfit(state) - goal

    def has_diverged(t: float, state: Any) -> float:
        size = misfit(state)
        return size - limit if math.isfinite(size) else 1.0

    has_converged.terminal = has_diverged.terminal = True  # pyright: ignore[reportFunctionMemberAccess]
    if misfit(last[1]) <= goal:
        return _flow(X, y, start, gamma, last, calls, True, "Xβ = y at the start")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            found = solve_ivp(
                counted,
                (0.0, max_time),
                last[1],
                method="LSODA",
                rtol=rtol,
                atol=atol,
                events=[has_converged, has_diverged],
            )
    except _OutOfBudget:
        return _flow(X, y, start, gamma, last, calls, False, f"max_evaluations = {max_evaluations} reached")
    last = (float(found.t[-1]), found.y[:, -1])
    if found.status == 1 and len(found.t_events[0]):
        return _flow(X, y, start, gamma, last, calls, True, "Xβ = y to the tolerance")
    if found.status == 1:
        reason = f"diverged: ‖Xβ − y‖∞ grew by a factor of {DIVERGED:g}"
    elif found.status == 0:
        speed = float(np.abs(field(last[1])[: 2 * d]).max())
        reason = f"max_time = {max_time:g} reached with |dw/dt| = {speed:.1e} and ‖Xβ − y‖∞ = {misfit(last[1]):.1e}"
    else:
        reason = f"diverged or too stiff: the solver stopped at t = {last[0]:g} ({found.message})"
    return _flow(X, y, start, gamma, last, calls, False, reason)


def _flow(
    X: Tensor,
    y: Tensor,
    start: Tensor,
    gamma: float,
    last: tuple[float, Any],
    calls: int,
    converged: bool,
    reason: str,
) -> Flow:
    time, state = last
    w_plus, w_minus, integral = torch.as_tensor(state).view(3, -1).clone().unbind()
    beta = w_plus.square() - w_minus.square()
    loss = ((X @ beta - y).square().sum() / (4 * len(y))).item()
    alpha_gr = start * torch.exp(-gamma * integral)
    if not converged and torch.maximum(w_plus, w_minus).max() < COLLAPSED * start.max():
        reason += COLLAPSE
    return Flow(beta, w_plus, w_minus, alpha_gr, loss, converged, reason, time, calls)


def regularized_field(
    X: Tensor, y: Tensor, gamma: float, epsilon: float, scheme: Scheme, per_sample: bool
) -> Callable[[Any], Any]:
    r"""$(w_+, w_-, \int g\circ\bar g) \mapsto (-\hat g_+, -\hat g_-, g\circ\bar g)$, NumPy arrays of shape (3d,).

    A group is a set of rows whose gradient is regularized by itself: all n, or each of them. What the groups give is
    averaged.
    """
    np, _ = _scipy()
    rows, values, d = X.numpy(), y.numpy(), X.shape[1]
    groups = rows[:, None, :] if per_sample else rows[None]  # (groups, rows, d)
    targets = values[:, None] if per_sample else values[None]
    size = groups.shape[1]

    def back(residual: Any) -> Any:
        return np.matmul(residual[:, None, :], groups)[:, 0, :] / size

    def forth(beta: Any) -> Any:
        return np.matmul(groups, beta[..., None])[..., 0]

    def g_of(plus: Any, minus: Any) -> Any:
        return back(forth(plus**2 - minus**2) - targets)

    def field(state: Any) -> Any:
        plus, minus = state[None, :d], state[None, d : 2 * d]
        g = g_of(plus, minus)
        if scheme.is_exact:  # the derivative of ±w∘g along ±w∘g
            dg = back(forth(2 * (plus**2 + minus**2) * g))
            penalty_plus, penalty_minus, g_bar = plus * (g * g + dg), minus * (g * g - dg), g
        else:
            penalty_plus = penalty_minus = g_bar = np.zeros_like(g)
            for node, weight in scheme.stencil:
                there_plus, there_minus = plus * (1 + node * epsilon * g), minus * (1 - node * epsilon * g)
                g_there = g_of(there_plus, there_minus)
                penalty_plus = penalty_plus + weight / epsilon * (there_plus * g_there - plus * g)
                penalty_minus = penalty_minus - weight / epsilon * (there_minus * g_there - minus * g)
                g_bar = g_bar + weight * node * g_there
        parts = (-(plus * g + gamma * penalty_plus), minus * g - gamma * penalty_minus, g * g_bar)
        return np.concatenate([part.mean(0) for part in parts])

    return field


def _scipy() -> tuple[Any, Any]:
    try:
        import numpy as np
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError(f"gradreg.theory.flow needs scipy: {how('lab')}") from error
    return np, solve_ivp
