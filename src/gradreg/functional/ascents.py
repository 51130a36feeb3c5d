"""The ascent: which way the weights are displaced before the second gradient.

An ascent maps parameters and their gradient to a direction, written as `(vectors, scale)` with d = scale ·
vectors, so that a direction parallel to the gradient costs no memory: `vectors` may be the gradient itself. It
uses plain tensor operations only, so it serves the training engine and `torch.func.vmap` alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradreg._vectors import Vectors, norm, safe_reciprocal

Scale = float | Tensor


class Ascent(Protocol):
    """Chooses the direction d of the displacement θ + εd.

    `grads` holds `grad_scale` · ∇L, so that a loss scale never has to be divided out of the gradients in place: an
    ascent that is not scale-free divides its `scale` by it.
    """

    def __call__(self, params: Vectors, grads: Vectors, grad_scale: Scale = 1.0) -> tuple[Vectors, Scale]: ...


@dataclass(frozen=True)
class Gradient:
    r"""$d = \nabla L$: the ascent step of F-GR, not normalized (Karakida et al., ICML 2023)."""

    def __call__(self, params: Vectors, grads: Vectors, grad_scale: Scale = 1.0) -> tuple[Vectors, Scale]:
        del params
        return grads, 1.0 / grad_scale


@dataclass(frozen=True)
class Normalized:
    r"""$d = \nabla L / \|\nabla L\|$: the displacement has length ε (SAM, Foret et al., 2021; GNP, Zhao et al., 2022).

    The zero gradient gives the zero direction.
    """

    def __call__(self, params: Vectors, grads: Vectors, grad_scale: Scale = 1.0) -> tuple[Vectors, Scale]:
        del params, grad_scale  # scale-free
        return grads, safe_reciprocal(norm(grads))


@dataclass(frozen=True)
class Adaptive:
    r"""$d = T^2 \nabla L / \|T \nabla L\|$ with $T = |\theta| + \eta$, elementwise (ASAM, Kwon et al., 2021).

    Invariant to a rescaling of the weights that leaves the function as it is. The direction is a second vector beside
    the gradient: one more copy of the parameters while the weights are displaced.

    Args:
        eta: $\eta \ge 0$, keeps small weights moving.
        weights_only: $T = 1$ for tensors of fewer than two dimensions (biases, norm scales), as in the authors' code.
    """

    eta: float = 0.01
    weights_only: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta must be a finite number ≥ 0, got {self.eta}.")

    def __call__(self, params: Vectors, grads: Vectors, grad_scale: Scale = 1.0) -> tuple[Vectors, Scale]:
        del grad_scale  # scale-free
        dense = [g.to_dense() if g.is_sparse else g for g in grads]
        scales = [torch.ones_like(p) if self.weights_only and p.ndim < 2 else p.abs() + self.eta for p in params]
        lengths = [t * g for t, g in zip(scales, dense)]
        return [t * x for t, x in zip(scales, lengths)], safe_reciprocal(norm(lengths))


ASCENTS: dict[str, Ascent] = {"gradient": Gradient(), "normalized": Normalized(), "adaptive": Adaptive()}


def resolve_ascent(ascent: str | Ascent) -> Ascent:
    """The ascent of that name, or the callable itself."""
    if isinstance(ascent, str):
        if ascent not in ASCENTS:
            raise ValueError(f"ascent must be one of {sorted(ASCENTS)} or a callable, got {ascent!r}.")
        return ASCENTS[ascent]
    if not callable(ascent):
        raise TypeError(f"ascent must be one of {sorted(ASCENTS)} or a callable, got {ascent!r}.")
    return ascent
