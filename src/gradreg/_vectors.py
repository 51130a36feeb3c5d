"""Arithmetic on lists of tensors, read as one long vector.

A list may mix shapes, dtypes and devices, hold complex tensors (read as pairs of reals), sparse gradients and
shards (DTensor). Reductions run in float32 or wider and answer with a 0-dim tensor on the device of the first tensor,
so that nothing here waits for an accelerator. Those over one tensor, `squared` and `dot`, stay on the shard at hand;
`total` and `norm` are where ranks speak to each other, once for a list, and every rank gets the same number.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import (
    Tensor,
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.nn import Parameter

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


_PLAIN = {Tensor, Parameter}
_DOTTED = {torch.float32, torch.float64}  # whose dot product with itself is wide enough
_KIND, _DTYPE = attrgetter("dtype", "device", "layout"), attrgetter("dtype")


def are_sharded(kinds: set[type]) -> bool:
    """Whether tensors of these types are shards, any of them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and not kinds <= _PLAIN and any(issubclass(kind, module.DTensor) for kind in kinds)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return are_sharded({*map(type, tensors)})


_ONE = torch.ones(())
FEW = 2**18
"""Numbers up to which a list is copied into one vector: calls cost more than memory there."""
MANY = 2**22
"""The same on an accelerator, where a call is a launch: a copy of 16 MiB in float32."""


def are_few(tensors: Vectors) -> bool:
    """Whether a list is so small that one operation on a copy of all beats one operation on each."""
    return sum(map(Tensor.numel, tensors)) <= FEW


def are_together(tensors: Vectors) -> bool:
    """Whether one vector can hold them, and one operation on it beats one on each."""
    return len(tensors) > 0 and {*map(type, tensors)} <= _PLAIN and are_few(tensors) and _are_alike(tensors)


class Kind(NamedTuple):
    """What a list of tensors is, which stays as long as it does; looking again costs as much as a pass over it."""

    are_together: bool  # one vector can hold them, and one operation on it beats one on each
    are_low_precision: bool  # any of them holds fewer digits than float32
    are_sharded: bool  # any of them is a DTensor


def kind_of(tensors: Vectors) -> Kind:
    return Kind(are_together(tensors), is_low_precision(tensors), any_sharded(tensors))


class Vector(list[Tensor]):
    """Tensors that are read as one vector, and keep what holds all of it, for reading, until it is dropped.

    Args:
        tensors: not written to as long as `piece` is asked for.
        together: what `are_together` said of those whose gradients these are; looking again costs as much as the copy.
    """

    __slots__ = ("piece",)

    def __init__(self, tensors: Iterable[Tensor], together: bool | None = None) -> None:
        super().__init__(tensors)
        self.piece: Tensor | None = None
        """All numbers in one tensor; None where they are many or mixed."""
        if self and (are_together(self) if together is None else together) and {*map(type, self)} <= _PLAIN:
            with contextlib.suppress(RuntimeError):  # a gradient may be sparse
                self.piece = flat(self) if len(self) > 1 else self[0].flatten()  # one needs no copy


def _piece(tensors: Vectors) -> Tensor | None:
    return tensors.piece if isinstance(tensors, Vector) and tensors.piece is not None else Vector(tensors).piece


def flat(tensors: Vectors) -> Tensor:
    """All numbers of plain tensors of one kind in one vector, a copy."""
    if len(tensors) == 1:  # of which torch makes a view
        return tensors[0].flatten().clone()
    return torch._C._nn.flatten_dense_tensors(tensors)  # pyright: ignore[reportAttributeAccessIssue]


def parts(vector: Tensor, like: Vectors) -> Vectors:
    """Views of a vector that `flat` made, in the shapes of the tensors that it was made of."""
    return torch._C._nn.unflatten_dense_tensors(vector, like)  # pyright: ignore[reportAttributeAccessIssue]


def _are_alike(tensors: Vectors) -> bool:
    """Plain tensors of one real dtype on one device."""
    first = tensors[0]
    if first.is_complex() or is_traced(first) or first.layout is not torch.strided:
        return False
    return len({*map(_KIND, tensors)}) == 1


def is_alone(t: Tensor) -> bool:
    """Whether nobody but this very object can reach the memory of a tensor on the host."""
    is_plain = type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided and not t.is_inference()
    if not is_plain or not t.is_contiguous():
        return False
    storage = t.untyped_storage()
    count = getattr(torch._C, "_storage_Use_Count", lambda _: 0)(storage._cdata)  # with `storage` itself
    return count == 2 and storage.nbytes() == t.numel() * t.element_size()


def local(t: Any) -> Tensor:
    """The part of a tensor that this process holds, in place: all of it but for a DTensor."""
    return t.to_local() if is_sharded(t) else t


def is_laid_out(t: Any, like: Any) -> bool:
    """Whether two tensors are divided among ranks alike, so that arithmetic on their parts is that on the whole."""
    return not is_sharded(t) or t.placements == like.placements


def laid_out(t: Any, like: Any) -> Tensor:
    """The same tensor, divided among ranks as `like` is: parts of a sum that are still to be added up are, here."""
    return t if is_laid_out(t, like) else t.redistribute(placements=like.placements)


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
    if t.is_cpu and t.dtype in _DOTTED and t.is_contiguous() and not is_traced(t):
        line = t.view(-1)
        return torch.dot(line, line)
    return torch.linalg.vector_norm(t, dtype=wide(t.dtype)).square()


def total(parts: Vectors) -> Tensor:
    """The sum of small tensors, on the device of the first and in the widest dtype; parts of shards are completed."""
    if any_sharded(parts):
        return total(_completed(parts))
    first = parts[0]
    if all(part.dtype == first.dtype and part.device == first.device for part in parts):
        return torch.stack(list(parts)).sum(0)
    dtype = max((part.dtype for part in parts), key=lambda d: d.itemsize)
    return torch.stack([part.to(first.device, dtype) for part in parts]).sum(0)


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
    piece, first = _piece(tensors), tensors[0]
    if piece is not None and piece.dtype in _DOTTED and piece.is_cpu:
        return torch.dot(piece, piece).sqrt()
    if piece is not None:
        return torch.linalg.vector_norm(piece, dtype=wide(piece.dtype))
    if first.is_cpu or not _are_alike(tensors):
        return total([squared(t) for t in tensors]).sqrt()
    lengths = _foreach_norm(list(tensors), 2, wide(first.dtype))
    return torch.linalg.vector_norm(torch.stack(lengths))


Scalar = float | Tensor
"""A number that the host knows, or one on an accelerator, which it does not wait for."""


def read(x: Tensor) -> Scalar:
    """The number itself, where reading it takes no waiting."""
    return x.item() if is_readable(x) else x


def scalar_like(like: Tensor, x: Scalar) -> Tensor:
    """x in the kind of another; of a number by a fill, since a copy from the host waits, and no graph can hold it."""
    return x.to(like.device, like.dtype) if isinstance(x, Tensor) else like.new_full((), x)


def by_kind(tensors: Vectors) -> list[list[Tensor]]:
    """In groups of one dtype and device, which one operation can serve."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        here = local(t)
        groups.setdefault((here.dtype, here.device, here.layout), []).append(here)
    return list(groups.values())


def has_direction(length: Scalar) -> bool | Tensor:
    """Whether a vector of this length has a direction: one that is zero or not finite has none."""
    if isinstance(length, Tensor):
        return (length > 0) & (length < torch.inf)
    return 0 < length < math.inf


def is_finite(x: Scalar) -> bool | Tensor:
    return x.isfinite() if isinstance(x, Tensor) else math.isfinite(x)


def are_finite(tensors: Vectors) -> bool | Tensor:
    """Whether all numbers of dense tensors of one kind are, in one sweep that copies nothing."""
    found = torch.zeros((), device=tensors[0].device)
    one = _ONE if found.is_cpu else torch.ones_like(found)
    look = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
    look(list(tensors), found, one)  # as gradient scalers do, with a scale of 1
    return read(found) == 0


def dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ of two tensors of one shape."""
    if is_sharded(x):
        return _part_of_sum(dot(local(x), local(y)), x)
    x, y = _reals(x.to_dense()), _reals(y.to_dense())
    dtype = wide(torch.promote_types(x.dtype, y.dtype))
    return torch.dot(x.flatten().to(dtype), y.flatten().to(dtype))


def products(x: Tensor, y: Tensor) -> Tensor:
    """‖x‖², ⟨x, y⟩ and ‖y‖² of two tensors of one shape, in one vector, so that `total` completes them together."""
    if is_sharded(x):
        return _part_of_sum(products(local(x), local(y)), x)
    return torch.stack([squared(x), dot(x, y), squared(y)])


def copy_(targets: Vectors, sources: Vectors) -> None:
    """targets ← sources, outside of autograd."""
    if targets:
        with torch.no_grad():
            if any_sharded(targets):
                targets, sources = [local(t) for t in targets], [local(t) for t in sources]
            torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def reciprocal(length: Scalar) -> Scalar:
    """1/length, and 0 for one that is 0 or not finite."""
    if isinstance(length, Tensor):
        return torch.where((length > 0) & (length < torch.inf), 1 / length, 0.0)
    return 1 / length if has_direction(length) else 0.0


def safe_reciprocal(x: Scalar) -> Scalar:
    """1/x, and 0 where x is 0."""
    if isinstance(x, Tensor):
        return torch.where(x == 0, 0.0, 1 / x)
    return 0.0 if x == 0 else 1 / x


def add_scaled(xs: Vectors, step: Scalar, ys: Vectors, out: Vectors) -> None:
    """out ← x + step · y; exactly x where `step` is 0, whatever y holds.

    A step on the host is read there, which costs nothing; on an accelerator it stays a tensor and masks.
    """
    if any_sharded(xs):
        xs, ys, out = ([local(t) for t in tensors] for tensors in (xs, ys, out))
    alpha = step.item() if isinstance(step, Tensor) and all(map(is_readable, [step, *xs])) else step
    if isinstance(alpha, Tensor):
        _add_masked(xs, alpha, ys, out)
    elif alpha == 0:
        copy_(out, xs)
    elif are_few(xs) and _are_alike([*xs, *ys]):
        if out is not xs:
            copy_(out, xs)
        torch._foreach_add_(list(out), list(ys), alpha=alpha)  # pyright: ignore[reportPrivateImportUsage]
    else:  # in one sweep through memory
        for x, y, o in zip(xs, ys, out):
            if y.is_sparse:
                o.copy_(x).add_(y, alpha=alpha)
            else:
                torch.add(x, y, alpha=alpha, out=o)


def moved(xs: Vectors, step: Scalar, ys: Vectors) -> list[Tensor]:
    """x + step · y in memory of its own, of few x of one kind; exactly x where `step` is 0, whatever y holds."""
    if isinstance(step, Tensor):
        copies = list(parts(flat(xs), xs))
        add_scaled(xs, step, ys, out=copies)
        return copies
    if step == 0:
        return [x.clone() for x in xs]
    if {*map(_DTYPE, ys)} != {xs[0].dtype}:  # an ascent or a momentum in another precision
        copies = [torch.empty_like(x) for x in xs]
        add_scaled(xs, step, ys, out=copies)
        return copies
    return list(torch._foreach_add(list(xs), list(ys), alpha=step))  # pyright: ignore[reportPrivateImportUsage]


def _add_masked(xs: Vectors, step: Tensor, ys: Vectors, out: Vectors) -> None:
    """Group by group: what a small tensor costs on an accelerator is the launch."""
    for group in _groups(zip(xs, ys, out)):
        x, y, o = map(list, zip(*group))
        on_device = step.to(x[0].device, x[0].dtype, non_blocking=True)
        is_moved = on_device != 0
        if len(x) > 1:
            move = torch.where(is_moved, flat(y) * on_device, -0.0)  # x − 0 is x in every bit, also where x is −0
            if out is not xs:
                copy_(o, x)
            torch._foreach_add_(o, list(parts(move, x)))  # pyright: ignore[reportPrivateImportUsage]
        else:
            moved = torch.addcmul(x[0], y[0].to_dense(), on_device)
            torch.where(is_moved, moved, x[0], out=o[0])


def _groups(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Those of one kind that a vector of at most `MANY` numbers holds together; what has none, or is larger, alone."""
    groups: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
    numbers: dict[Any, int] = {}
    for triple in triples:
        x, y, out = triple
        if not (_are_alike([x, y]) and _are_alike([y])):
            yield [triple]
            continue
        kind = _KIND(x)
        if numbers.get(kind, 0) + x.numel() > MANY:
            yield from filter(None, [groups.pop(kind, [])])
            numbers[kind] = 0
        if _is_channels_last(x):
            triple = _as_stored(x), _as_stored(y), _as_stored(out)
        groups.setdefault(kind, []).append(triple)
        numbers[kind] = numbers.get(kind, 0) + x.numel()
    yield from groups.values()


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _as_stored(t: Tensor) -> Tensor:
    """A view that is contiguous where the tensor is channels last: one operation serves many such alone."""
    return t.permute(0, 2, 3, 1)


def square_and_distance(xs: Vectors, ys: Vectors) -> tuple[Tensor, Tensor]:
    """‖y‖² and ‖x − y‖², the difference formed in float32 or wider; of shards with one collective for both."""
    if any_sharded(xs):
        both = total([_square_and_distance_of_part(x, y) for x, y in zip(xs, ys)])
        return both[0], both[1]
    x, y = _piece(xs), _piece(ys)
    if x is not None and y is not None:
        return squared(y), squared(x.to(wide(x.dtype)) - y)
    pairs = [(x.to_dense(), y.to_dense()) for x, y in zip(xs, ys)]
    return total([squared(y) for _, y in pairs]), total([squared(x.to(wide(x.dtype)) - y) for x, y in pairs])


def _square_and_distance_of_part(x: Tensor, y: Tensor) -> Tensor:
    here = torch.stack(square_and_distance([local(x)], [local(y)]))
    return _part_of_sum(here, x) if is_sharded(x) else here
