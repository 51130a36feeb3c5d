"""Arithmetic on lists of tensors, read as one long vector.

A list may mix shapes, dtypes and devices, hold complex tensors (read as pairs of reals) and sparse gradients.
Reductions run in float32 or wider and answer with a 0-dim tensor on the device of the first tensor, so that
nothing here waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Vectors = Sequence[Tensor]


def _reals(tensors: Vectors) -> list[Tensor]:
    """Views of the numbers to sum over: stored values if sparse, (real, imaginary) pairs if complex."""
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    return [torch.view_as_real(t) if t.is_complex() else t for t in dense]


def _accumulator(tensors: Vectors) -> torch.dtype:
    return torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in tensors) else torch.float32


def norm(tensors: Vectors) -> Tensor:
    """‖x‖ over all tensors together."""
    dtype = _accumulator(tensors)
    reals = _reals(tensors)
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in reals):  # vmap has no rule for foreach
        parts = [torch.linalg.vector_norm(t, dtype=dtype) for t in reals]
    else:
        parts = list(torch._foreach_norm(reals, 2, dtype))
    return torch.linalg.vector_norm(torch.stack([part.to(parts[0].device) for part in parts]))


def dot(xs: Vectors, ys: Vectors) -> Tensor:
    """⟨x, y⟩ over all tensors together."""
    dtype = _accumulator(xs)
    pairs = zip(_reals(xs), _reals(ys))
    parts = [torch.dot(x.flatten().to(dtype), y.flatten().to(dtype)) for x, y in pairs]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def safe_reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def scale_(tensors: Vectors, factor: float | Tensor) -> None:
    """x ← factor · x, in place; a 0-dim tensor may stand on another device than x."""
    if isinstance(factor, Tensor) and any(t.device != factor.device for t in tensors):
        for t in tensors:
            t.mul_(factor.to(t.device, non_blocking=True))
    else:
        torch._foreach_mul_(list(tensors), factor)


def add_scaled(xs: Vectors, step: Tensor, ys: Vectors, out: Vectors) -> None:
    """out ← x + step · y; exactly x where `step` is 0, whatever y holds.

    A step on the host is read there, which costs nothing; on an accelerator it stays a tensor and masks.
    """
    if step.device.type == "cpu" and all(x.device.type == "cpu" for x in xs):
        alpha = step.item()
        for x, y, o in zip(xs, ys, out):
            if alpha == 0:
                o.copy_(x)
            elif y.is_sparse:
                o.copy_(x).add_(y, alpha=alpha)
            else:
                torch.add(x, y, alpha=alpha, out=o)
        return
    for x, y, o in zip(xs, ys, out):
        local = step.to(x.device, non_blocking=True)
        moved = torch.addcmul(x, y.to_dense() if y.is_sparse else y, local.to(x.dtype))
        torch.where(local != 0, moved, x, out=o)
