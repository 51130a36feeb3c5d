"""Arithmetic on lists of tensors, read as one long vector.

A list may mix shapes, dtypes and devices, hold complex tensors (read as pairs of reals), sparse gradients and
shards (DTensor). Reductions run in float32 or wider and answer with a 0-dim tensor on the device of the first tensor,
so that nothing here waits for an accelerator. Those over one tensor, `squared` and `dot`, stay on the shard at hand;
`total` and `norm` are where ranks speak to each other, once for a list, and every rank gets the same number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
)

Vectors = Sequence[Tensor]


def _reals(t: Tensor) -> Tensor:
    """The numbers to sum over: stored values if sparse, (real, imaginary) pairs if complex."""
    dense = t.coalesce().values() if t.is_sparse else t
    return torch.view_as_real(dense) if dense.is_complex() else dense


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to form differences and sums in: float32 for anything narrower.

    Example:
        >>> wide(torch.bfloat16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def is_low_precision(tensors: Vectors) -> bool:
    """Whether any of the tensors holds fewer digits than float32."""
    return any(t.dtype.itemsize < 4 for t in tensors)


def is_traced(t: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(t)  # pyright: ignore[reportAttributeAccessIssue]


def is_readable(t: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for an accelerator."""
    return t.device.type == "cpu"


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: there is none
    return module is not None and isinstance(t, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return "torch.distributed.tensor" in sys.modules and any(map(is_sharded, tensors))


def local(t: Any) -> Tensor:
    """The part of a tensor that this process holds, in place: all of it but for a DTensor."""
    return t.to_local() if is_sharded(t) else t


def _part_of_sum(value: Tensor, like: Any) -> Tensor:
    """A sum over the local part of a DTensor: what is missing is added over the mesh dimensions that shard it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if p.is_replicate() else Partial() for p in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements, run_check=False)


def squared(t: Tensor) -> Tensor:
    """‖t‖² of one tensor; on the host a dot product, the fastest reduction that needs no memory."""
    if is_sharded(t):
        return _part_of_sum(squared(local(t)), t)
    if t.is_sparse or t.is_complex():
        t = _reals(t)
    if t.is_cpu and t.dtype in (torch.float32, torch.float64) and t.is_contiguous() and not is_traced(t):
        flat = t.view(-1)
        return torch.dot(flat, flat)
    return torch.linalg.vector_norm(t, dtype=wide(t.dtype)).square()


def total(parts: Vectors) -> Tensor:
    """The sum of 0-dim tensors, on the device of the first and in the widest dtype; parts of shards are completed."""
    if any_sharded(parts):
        return total(_completed(parts))
    first = parts[0]
    if all(part.dtype == first.dtype and part.device == first.device for part in parts):
        return torch.stack(list(parts)).sum()
    dtype = max((part.dtype for part in parts), key=lambda d: d.itemsize)
    return torch.stack([part.to(first.device, dtype) for part in parts]).sum()


def _completed(parts: Sequence[Any]) -> list[Tensor]:
    """Sums over shards, added up over their mesh: one collective for each mesh and way of sharding."""
    plain = [part for part in parts if not is_sharded(part)]
    for group in _by_layout(parts):
        like = group[0]
        sum_here = total([local(part) for part in group])
        whole = type(like).from_local(sum_here, like.device_mesh, like.placements, run_check=False)
        plain.append(whole.full_tensor())
    return plain


def _by_layout(tensors: Sequence[Any]) -> list[list[Any]]:
    """The DTensors among them, in groups of one mesh and one way of sharding."""
    groups: dict[Any, list[Any]] = {}
    for t in tensors:
        if is_sharded(t):
            groups.setdefault((t.device_mesh, t.placements), []).append(t)
    return list(groups.values())


def norm(tensors: Vectors) -> Tensor:
    """‖x‖ over all tensors together."""
    if any_sharded(tensors):
        plain = [t for t in tensors if not is_sharded(t)]
        groups = _by_layout(tensors)
        parts = [_part_of_sum(norm([local(t) for t in group]).square(), group[0]) for group in groups]
        return total([norm(plain).square(), *parts] if plain else parts).sqrt()
    first = tensors[0]
    alike = all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    if first.is_cpu or not alike or first.is_complex() or any(t.is_sparse or is_traced(t) for t in tensors):
        return total([squared(t) for t in tensors]).sqrt()
    parts = _foreach_norm(list(tensors), 2, wide(first.dtype))
    return torch.linalg.vector_norm(torch.stack(parts))


def has_direction(length: Tensor) -> Tensor:
    """Whether a vector of this length has a direction: one that is zero or not finite has none."""
    return (length > 0) & (length < torch.inf)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ of two tensors of one shape."""
    if is_sharded(x):
        return _part_of_sum(dot(local(x), local(y)), x)
    x, y = _reals(x.to_dense()), _reals(y.to_dense())
    return torch.dot(x.flatten().to(wide(x.dtype)), y.flatten().to(wide(y.dtype)))


def copy_(targets: Vectors, sources: Vectors) -> None:
    """targets ← sources, outside of autograd."""
    if targets:
        with torch.no_grad():
            torch._foreach_copy_([local(t) for t in targets], [local(t) for t in sources])  # pyright: ignore[reportPrivateImportUsage]


def safe_reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def add_scaled(xs: Vectors, step: Tensor, ys: Vectors, out: Vectors) -> None:
    """out ← x + step · y; exactly x where `step` is 0, whatever y holds.

    A step on the host is read there, which costs nothing; on an accelerator it stays a tensor and masks.
    """
    if any_sharded(xs):
        xs, ys, out = ([local(t) for t in tensors] for tensors in (xs, ys, out))
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
        on_device = step.to(x.device, non_blocking=True)
        moved = torch.addcmul(x, y.to_dense() if y.is_sparse else y, on_device.to(x.dtype))
        torch.where(on_device != 0, moved, x, out=o)
