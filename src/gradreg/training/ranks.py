"""Ranks: what several processes that train one model must share, and what each may keep to itself.

DistributedDataParallel averages gradients inside each backward pass, FSDP2 shards parameters and gradients; either
way each pass leaves the gradient of the whole batch, and norms are those of the whole model (_vectors.py). With
`ascent_sync="local"` every rank displaces its weights along the gradient of its own share of the batch (m-sharpness)
and only the second pass communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg import _vectors as vectors
from gradreg.training.comm_hooks import check_hook
from gradreg.training.shards import keeps_gradients

SYNCS = ("global", "local")


class Ranks:
    """The processes behind a model; one, where it is not wrapped.

    Raises:
        ValueError: a local ascent where gradients cannot be kept from being averaged.
    """

    def __init__(self, model: nn.Module, ascent_sync: str, is_one_pass: bool = False) -> None:
        wrapped = getattr(model, "_forward_module", model)  # Lightning Fabric holds the wrapper within its own
        self._replicas = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        self._meshes = {p.device_mesh for p in model.parameters() if vectors.is_sharded(p)}  # type: ignore[attr-defined]
        self.is_local = ascent_sync == "local" and _world_size() > 1
        if self.is_local and self._replicas is None:
            raise ValueError(
                'ascent_sync="local" needs the DistributedDataParallel wrapper itself, whose no_sync() keeps the first '
                f'pass local, got {type(model).__name__}: wrap the model first, or use ascent_sync="global".'
            )
        self._communicates_twice = not (self.is_local or is_one_pass)
        self._have_agreed = self._has_warned = False

    @property
    def is_replicated(self) -> bool:
        """Whether g2 is averaged only after it arrived, so that what is measured on arrival is this rank's own."""
        return self._replicas is not None

    @property
    def is_alone(self) -> bool:
        """Whether no wrapper waits for the gradients of all parameters."""
        return _world_size() == 1

    def first_pass(self) -> AbstractContextManager[None]:
        """Around forward and backward of the first pass, which a local ascent keeps from communicating."""
        return self.quiet() if self.is_local else nullcontext()

    def check_sync(self, sharded: Sequence[Any]) -> None:
        """
        Args:
            sharded: the modules that FSDP2 has sharded.

        Raises:
            ValueError: gradients are kept from being averaged, and those that are put aside would never be.
        """
        held = self._replicas is not None and not self._replicas.require_backward_grad_sync
        if held or keeps_gradients(sharded):
            raise ValueError(
                "backward() runs two passes whose gradients must be averaged over the ranks, and the model is within "
                "no_sync() or set_requires_gradient_sync(False): leave it out and hand over the micro-batches of the "
                "window, backward(loss_fn, batches), which DistributedDataParallel averages once a pass."
            )

    def quiet(self) -> AbstractContextManager[None]:
        """Around passes whose gradients nobody uses, or whose window goes on: ranks communicate in its last."""
        return nullcontext() if self._replicas is None else _no_sync(self._replicas)

    def agree(self, configuration: Callable[[], Mapping[str, str]]) -> None:
        """Compare the configuration with the other ranks', once.

        Raises:
            ValueError: on every rank, naming the first field that differs and its values, or a communication hook that
                does not average.
        """
        if self._replicas is not None and not self._has_warned:
            self._has_warned = check_hook(self._replicas, self._communicates_twice)
        if self._have_agreed:
            return
        for group in self._groups():
            compare(configuration(), group)
        self._have_agreed = True

    def mean(self, measurement: Tensor) -> Tensor:
        """Of a number that each rank has measured on its own; nothing is read. Shards measure together."""
        if self._replicas is None or _world_size() == 1:
            return measurement
        everyone = measurement.clone()
        dist.all_reduce(everyone, group=self._replicas.process_group)
        return everyone / dist.get_world_size(self._replicas.process_group)

    def _groups(self) -> list[Any]:
        if self._replicas is not None:
            return [self._replicas.process_group]
        return [group for mesh in self._meshes for group in mesh.get_all_groups()]


def compare(configuration: Mapping[str, str], group: Any = None) -> None:
    """Hold a configuration against those of the other ranks of a process group.

    Raises:
        ValueError: on every rank, naming the first field that differs and its values.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, dict(configuration), group=group)
    for field, value in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if theirs[field] != value:
                raise ValueError(
                    f"ranks must agree on {field}, got {value} on rank 0 and {theirs[field]} on rank {rank}: "
                    "build the regularizer with the same arguments in every process."
                )


@contextmanager
def _no_sync(model: DistributedDataParallel) -> Iterator[None]:
    before = model.require_backward_grad_sync  # a user's own no_sync() stays as it is
    model.require_backward_grad_sync = False
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
