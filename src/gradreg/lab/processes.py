"""The processes of a run: one, or those that torchrun started, on PyTorch's own DistributedDataParallel."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from gradreg.lab.folder import BadInput


@dataclass(frozen=True)
class Processes:
    """All processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def is_first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is true in any of them."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def check_agreement(self, what: str, value: Any) -> None:
        """Raises BadInput where two of them have another value, compared by its text."""
        if self.size == 1:
            return
        digest = hashlib.sha256(repr(value).encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.int64, device=self.device)
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise BadInput(f"{what} must be the same in all {self.size} processes, and is not.")


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Those that torchrun started (RANK, WORLD_SIZE and LOCAL_RANK are set), else this one alone.

    Raises:
        BadInput: `cuda` where there is none.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    on = resolve(device, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))
    if size == 1:
        yield Processes(device=on)
        return
    if on.type == "cuda":
        torch.cuda.set_device(on)
    dist.init_process_group("nccl" if on.type == "cuda" else "gloo")
    try:
        yield Processes(rank, size, on)
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process. One of several ends at once: threads of the group live on, and may abort while Python ends."""
    if _number("WORLD_SIZE", 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def resolve(device: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """`auto` takes a GPU if there is one; each process of a machine takes its own.

    Raises:
        BadInput: fewer GPUs than processes.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if found < local_size:
        raise BadInput(
            f"device must be cpu where {local_size} CUDA devices are needed and {found} found, got {device!a}."
        )
    return torch.device("cuda", local_rank)


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))
