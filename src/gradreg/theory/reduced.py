r"""Many flows at once, in the variables that the theory leaves free.

In a diagonal network the loss is a polynomial of degree four, so a finite difference is a polynomial in ε, and a scheme
enters through two numbers, the moments of its stencil, $a = \epsilon\sum_k \omega_k s_k^2$ and
$b = \epsilon^2\sum_k \omega_k s_k^3$:

| | F-GR | B-GR | central | DB |
|---|---|---|---|---|
| a | ε | −ε | 0 | 0 |
| b | ε² | ε² | ε² | 0 |

Write $w_\pm = e^{q \pm p}$. The theory says that $p = X^\top\nu$ stays in the row space, so that ν (n numbers) and q (d
numbers) are all there is. With $\beta = 2e^{2q}\sinh 2p$, $S = 2e^{2q}\cosh 2p$, $r = X\beta - y$ and $g = X^\top r/n$:

$$n\dot\nu = -\big(r + \gamma\,[2X(S\circ g) + a\,X(\beta\circ g^2)]\big), \qquad
n\dot q = -\gamma\, g \circ X^\top\big(r + 2a\,X(S\circ g) + b\,X(\beta\circ g^2)\big)$$

and at the end $\alpha_{GR} = e^q$. For gradients regularized row by row, $g_i = x_i r_i$ takes the place of g, and the
sums over coordinates become products with the elementwise powers $X^2$ and $X^3$.

The system is stiff. Each step is a linearly implicit Euler step, extrapolated: the Jacobian need only resemble the
stiff part, since the error expands in powers of the step for any matrix (Hairer & Wanner, Solving ODEs II, IV.9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg.functional.schemes import Scheme, resolve_scheme
from gradreg.theory.flow import COLLAPSE, COLLAPSED, DIVERGED, check_strength
from gradreg.theory.model import check_data, initial_scale

SUBSTEPS = (1, 2, 3, 4, 5, 6)  # the extrapolated result is of order 6
SAFETY, SHRINK, GROW = 0.8, 0.1, 4.0  # usual bounds on the change of a step size


@dataclass(frozen=True)
class Flows:
    """Where each of B flows ended, float64; read `converged` first. See `Flow`."""

    beta: Tensor
    """(B, d)."""
    w_plus: Tensor
    """(B, d)."""
    w_minus: Tensor
    """(B, d)."""
    alpha_gr: Tensor
    """(B, d)."""
    train_loss: Tensor
    """(B,)."""
    converged: Tensor
    """(B,), bool. Where False, every other field is a state on the way."""
    reasons: tuple[str, ...]
    """Why each stopped."""
    time: Tensor
    """(B,)."""
    num_steps: int
    """Steps of the batch."""


def moments(scheme: str | Scheme, epsilon: float) -> tuple[float, float]:
    r"""$(\epsilon\sum_k \omega_k s_k^2, \; \epsilon^2\sum_k \omega_k s_k^3)$ of a scheme; zero for `exact`.

    Example:
        >>> moments("backward", 0.5), moments("central", 0.5)
        ((-0.5, 0.25), (0.0, 0.25))
    """
    stencil = resolve_scheme(scheme).stencil
    return epsilon * sum(w * s**2 for s, w in stencil), epsilon**2 * sum(w * s**3 for s, w in stencil)


def flows(
    X: Tensor,
    y: Tensor,
    *,
    alpha: Sequence[float] | float,
    gamma: Sequence[float] | float,
    epsilon: Sequence[float | None] | float | None = None,
    scheme: Sequence[str | Scheme] | str | Scheme = "forward",
    per_sample: bool = False,
    max_time: float = 1e7,
    max_steps: int = 3000,
    tolerance: float = 1e-8,
    accuracy: float = 1e-8,
) -> Flows:
    r"""Integrate B flows on one data set together, each with its own α, γ, ε and scheme, until $X\beta = y$.

    The same flows as `flow` gives one at a time, from equations that assume what `flow` lets one test.

    Args:
        X: (n, d) with n < d.
        y: (n,), reached by some β.
        alpha: α > 0, one number or B of them.
        gamma: γ ≥ 0, one number or B.
        epsilon: ε > 0, one number or B; None for `exact` and for γ = 0.
        scheme: one scheme or B.
        per_sample: regularize the gradient of each row's loss by itself and average; see `flow`.
        max_time: time budget of each flow.
        max_steps: work budget of the batch.
        tolerance: a flow has converged when ‖Xβ − y‖∞ ≤ `tolerance` · ‖y‖∞.
        accuracy: largest estimated error of log w in a step.

    Returns:
        `Flows`, with `converged=False` and a reason for those that diverge or run out of their budget.

    Raises:
        ValueError: as `flow`, or lists of different lengths.

    Example:
        >>> from gradreg.theory import sparse_regression
        >>> data = sparse_regression(n=4, d=8, num_active=1)
        >>> ends = flows(data.X, data.y, alpha=0.3, gamma=[0.0, 0.1], epsilon=0.1)
        >>> ends.converged.tolist(), bool((ends.alpha_gr[1] < ends.alpha_gr[0]).all())
        ([True, True], True)
    """
    X, y = check_data(X, y, "flows")
    alphas, gammas, epsilons, schemes = _together(alpha, gamma, epsilon, scheme)
    pairs = []
    for strength, length, name in zip(gammas, epsilons, schemes):
        resolved = resolve_scheme(name)
        pairs.append(moments(resolved, check_strength(strength, length, resolved)))
    for name, value in (
        ("max_time", max_time),
        ("max_steps", max_steps),
        ("tolerance", tolerance),
        ("accuracy", accuracy),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}.")
    scale = torch.stack([initial_scale(value, X.shape[1]) for value in alphas])
    a, b = torch.tensor(pairs, dtype=torch.float64).T[..., None]
    strengths = torch.tensor(gammas, dtype=torch.float64)[:, None]
    system = _System(X, y, per_sample)
    return _march(system, scale.log(), strengths, a, b, max_time, int(max_steps), tolerance, accuracy)


def _together(*values: object) -> list[list]:
    """Each as a list of one common length."""
    lists = [list(v) if isinstance(v, Sequence) and not isinstance(v, str) else None for v in values]
    lengths = {len(v) for v in lists if v is not None} or {1}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(f"alpha, gamma, epsilon and scheme must be single or lists of one length ≥ 1, got {lengths}.")
    (size,) = lengths
    return [[v] * size if listed is None else listed for v, listed in zip(values, lists)]


class _System:
    """The right-hand side for a batch: ν (B, n), q (B, d), and γ, a, b (B, 1)."""

    def __init__(self, X: Tensor, y: Tensor, per_sample: bool) -> None:
        self.X, self.y, self.n, self.per_sample = X, y, len(y), per_sample
        self.squares, self.cubes = X**2, X**3

    def read(self, nu: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """β, S, r."""
        p = nu @ self.X
        plus, minus = torch.exp(2 * (q + p)), torch.exp(2 * (q - p))
        return plus - minus, plus + minus, (plus - minus) @ self.X.T - self.y

    def rate(self, nu: Tensor, q: Tensor, gamma: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """dν/dt and dq/dt."""
        beta, total, r = self.read(nu, q)
        if self.per_sample:
            first, second = 2 * r * (total @ self.squares.T), r.square() * (beta @ self.cubes.T)
            pull = -gamma * ((r * (r + a * first + b * second)) @ self.squares)
        else:
            g = r @ self.X / self.n
            first, second = 2 * (total * g) @ self.X.T, (beta * g.square()) @ self.X.T
            pull = -gamma * g * ((r + a * first + b * second) @ self.X)
        return -(r + gamma * (first + a * second)) / self.n, pull / self.n

    def stiff_part(self, nu: Tensor, q: Tensor, gamma: Tensor) -> Tensor:
        """−∂ν̇/∂ν at r = 0, (B, n, n): all eigenvalues are ≥ 0."""
        _, total, _ = self.read(nu, q)
        kernel = (self.X * (2 * total)[:, None, :]) @ self.X.T
        if self.per_sample:
            return (1 + 2 * gamma * (total @ self.squares.T))[..., None] * kernel / self.n
        return (kernel + gamma[..., None] / self.n * kernel @ kernel) / self.n


def _step(system: _System, nu: Tensor, q: Tensor, h: Tensor, *strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ν and q after a step h (B, 1), and the estimated error of log w in it (B,)."""
    stiff = system.stiff_part(nu, q, strength[0])
    identity = torch.eye(system.n, dtype=nu.dtype)
    table: list[Tensor] = []
    before = table
    for count in SUBSTEPS:
        small = h / count
        inverse = torch.linalg.inv(identity + small[..., None] * stiff)
        there, level = nu, q
        for _ in range(count):
            rate, pull = system.rate(there, level, *strength)
            there = there + small * (inverse @ rate[..., None])[..., 0]
            level = level + small * pull
        row = [torch.cat([there, level], dim=1)]
        for k, entry in enumerate(before):  # Aitken and Neville, for an expansion in powers of h
            fewer = SUBSTEPS[len(before) - 1 - k]
            row.append(row[-1] + (row[-1] - entry) / (count / fewer - 1))
        before = row
    change = before[-1] - before[-2]
    delta_p, delta_q = change[:, : system.n] @ system.X, change[:, system.n :]
    error = torch.maximum(delta_p.abs().amax(1), delta_q.abs().amax(1))
    return before[-1][:, : system.n], before[-1][:, system.n :], error


def _march(
    system: _System,
    q: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Tensor,
    max_time: float,
    max_steps: int,
    tolerance: float,
    accuracy: float,
) -> Flows:
    size, start = len(q), q.clone()
    nu, time = torch.zeros(size, system.n, dtype=q.dtype), torch.zeros(size, dtype=q.dtype)
    reasons = [""] * size
    goal = tolerance * system.y.abs().max()
    limit = DIVERGED * system.y.abs().max()
    # A first step that is short for the fastest mode; it adapts at once.
    fastest = torch.linalg.matrix_norm(system.stiff_part(nu, q, gamma), 1)
    h = 0.1 / fastest
    alive = torch.arange(size)
    num_steps = 0
    while len(alive) and num_steps < max_steps:
        num_steps += 1
        strength = (gamma[alive], a[alive], b[alive])
        step = torch.minimum(h[alive], max_time - time[alive])
        new_nu, new_q, error = _step(system, nu[alive], q[alive], step[:, None], *strength)
        misfit = system.read(new_nu, new_q)[2].abs().amax(1)
        is_finite = torch.isfinite(error) & torch.isfinite(misfit)
        accepted = is_finite & (error <= accuracy)
        moved = alive[accepted]
        nu[moved], q[moved] = new_nu[accepted], new_q[accepted]
        time[moved] += step[accepted]
        factor = SAFETY * (accuracy / error.clamp(min=1e-300)) ** (1 / len(SUBSTEPS))
        h[alive] = step * torch.where(is_finite, factor.clamp(SHRINK, GROW), SHRINK)
        endings = (
            (accepted & (misfit <= goal), "Xβ = y to the tolerance"),
            (accepted & (misfit > limit), f"diverged: ‖Xβ − y‖∞ grew by a factor of {DIVERGED:g}"),
            (~accepted & (h[alive] < 1e-14 * time[alive].clamp(min=1e-6)), "diverged: the step size fell to rounding"),
            (accepted & (time[alive] >= max_time), f"max_time = {max_time:g} reached"),
        )
        for ended, reason in endings:
            for k in alive[ended].tolist():
                reasons[k] = reasons[k] or reason
        alive = torch.tensor([k for k in alive.tolist() if not reasons[k]], dtype=torch.long)
    for k in alive.tolist():
        reasons[k] = f"max_steps = {max_steps} reached"
    beta, _, r = system.read(nu, q)
    p = nu @ system.X
    converged = r.abs().amax(1) <= goal
    loss = r.square().sum(1) / (4 * system.n)
    w_plus, w_minus = torch.exp(q + p), torch.exp(q - p)
    has_shrunk = ~converged & (torch.maximum(w_plus, w_minus).amax(1) < COLLAPSED * start.exp().amax(1))
    reasons = [reason + COLLAPSE if shrunk else reason for reason, shrunk in zip(reasons, has_shrunk.tolist())]
    return Flows(beta, w_plus, w_minus, torch.exp(q), loss, converged, tuple(reasons), time, num_steps)
