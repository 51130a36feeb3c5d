"""The parts of a model, walked once and again only when they change: walking is slow beside a small model's step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, combinations
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from gradreg import _vectors as vectors
from gradreg.training.shards import sharded

LARGE_MODEL = 2**24
"""Numbers (64 MB of float32) from which on memory is worth Python for each large parameter of a step."""

Places = list[tuple[dict[str, Any], str, Tensor | None]]
"""(owner, name, tensor) of buffers."""

_REQUIRES_GRAD, _VALUES = attrgetter("requires_grad"), methodcaller("values")


def _address(p: Tensor) -> Any:
    return p.data_ptr() if type(p) is nn.Parameter else p.device


def is_lazy(p: Tensor) -> bool:
    """Whether a parameter gets its shape in the first forward."""
    return isinstance(p, UninitializedTensorMixin)


class Anatomy:
    """Modules, parameters and places of buffers of a model, kept up to date by `follow`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._walk()

    def _walk(self) -> None:
        self.modules: list[nn.Module] = list(self.model.modules())
        self.sharded = sharded(self.modules)
        self.parameters: list[nn.Parameter] = list(self.model.parameters())
        self._children = [m._modules for m in self.modules if m._modules]
        self._owners = [m._parameters for m in self.modules if m._parameters]
        self._buffers = [m._buffers for m in self.modules]
        self._buffer_ids: list[int] | None = None
        self._places: Places = []
        self._groups: list[list[Tensor]] = []
        self._seen = self._fingerprint()
        devices = {p.device for p in self.parameters if p.device.type not in ("cpu", "meta")}
        self.accelerators: list[torch.device] = sorted(devices, key=str)
        self.is_large = sum(p.numel() for p in self.parameters if not is_lazy(p)) >= LARGE_MODEL

    def _fingerprint(self) -> tuple[list[Any], ...]:
        """What changes when a module or parameter is added, replaced, moved, frozen or thawed."""
        parameters = [p for p in chain.from_iterable(map(_VALUES, self._owners)) if p is not None]
        is_plain = {*map(type, parameters)} <= {nn.Parameter}
        return (
            [*map(id, chain.from_iterable(map(_VALUES, self._children)))],
            [*map(len, self._owners)],
            [*map(id, parameters)],
            [*map(_REQUIRES_GRAD, parameters)],
            [*map(Tensor.data_ptr if is_plain else _address, parameters)],
        )

    def is_whole(self) -> bool:
        """Whether the model holds its own parameters, and no others in their place for a while."""
        return self._fingerprint()[2] == self._seen[2]

    def follow(self) -> bool:
        """Walk again where modules or parameters are others now, moved, or were frozen or thawed; whether it did."""
        if self._fingerprint() == self._seen:
            return False
        self._walk()
        return True

    def buffers(self) -> tuple[Places, list[list[Tensor]]]:
        """Every buffer as they stand now, and groups that one vector can hold; the same lists as long as they are."""
        now = [*map(id, chain.from_iterable(map(_VALUES, self._buffers)))]
        if now != self._buffer_ids:
            self._places = [(owner, name, buffer) for owner in self._buffers for name, buffer in owner.items()]
            self._buffer_ids, self._groups = now, _by_kind({id(b): b for _, _, b in self._places if b is not None})
        return self._places, self._groups


def _by_kind(buffers: Mapping[int, Tensor]) -> list[list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for key, buffer in buffers.items():
        is_plain = buffer.layout is torch.strided and not vectors.is_sharded(buffer)
        groups.setdefault((buffer.dtype, buffer.device) if is_plain else key, []).append(buffer)
    return list(groups.values())


def refuse_shared_memory(named: Mapping[str, nn.Parameter]) -> None:
    """Refuse two parameters that lie in the same memory: displaced apart, they would be two weights.

    Raises:
        ValueError: naming both, and how to tie them.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, p in named.items():
        if is_lazy(p):
            continue
        if p.layout is torch.strided and p.numel() > _span(p)[1] - _span(p)[0]:
            raise ValueError(
                f"the parameter {name!r} has several numbers in one place of its storage (expanded?), and cannot be "
                "displaced: give it memory of its own (p.data = p.data.contiguous())."
            )
        if p.layout is torch.strided and not vectors.is_sharded(p) and p.numel():
            by_storage.setdefault(p.untyped_storage().data_ptr(), []).append((name, p))
    for address, sharing in by_storage.items():
        for (one, p), (other, q) in combinations(sharing, 2):
            if address != 0 and _overlap(p, q):  # 0: on the meta device
                raise ValueError(
                    f"the parameters {one!r} and {other!r} share numbers of one storage, and would be displaced apart: "
                    "tie them as one Parameter (a.weight = b.weight, not a.weight.data = b.weight.data)."
                )


def _overlap(p: Tensor, q: Tensor) -> bool:
    """Whether two tensors of one storage share a number."""
    (a, b), (c, d) = _span(p), _span(q)
    if b <= c or d <= a:
        return False
    return (p.is_contiguous() and q.is_contiguous()) or bool(torch.isin(_cells(p), _cells(q)).any())


def _span(p: Tensor) -> tuple[int, int]:
    """The first position in its storage that a tensor reads, and the one after its last."""
    start = p.storage_offset()
    return int(start), int(start + 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride())))


def _cells(p: Tensor) -> Tensor:
    start, stop = _span(p)
    return torch.arange(start, stop).as_strided(p.shape, p.stride()).flatten()
