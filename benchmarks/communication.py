"""What a step communicates: collectives of a rank, and how many numbers are in them, by wrapper and method.

    python benchmarks/communication.py     # four gloo processes, two minutes

Counted in the third step of a method by the profiler, on rank 0: large collectives carry weights, gradients or
activations, small ones (under 100 numbers) sums of norms. A number counts once for each collective that carries it,
whatever the algorithm below does; an all-gather counts what comes out, a reduce-scatter what goes in. These are counts,
the same on any machine.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradreg

os.environ["KINETO_LOG_LEVEL"] = "5"  # the profiler is quiet
RANKS, WIDTH, BLOCKS, ROWS = 4, 128, 4, 16
Step = Callable[[list[Tensor]], object]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def network(wrapper: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    if wrapper in ("FSDP2", "HSDP 2×2"):
        shape, names = ((RANKS,), ("shard",)) if wrapper == "FSDP2" else ((2, 2), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    if wrapper == "TP":
        mesh = init_device_mesh("cpu", (RANKS,))
        for block in model:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def methods(model: nn.Module, optimizer: torch.optim.Optimizer, wrapper: str) -> dict[str, Step]:
    """What a window of micro-batches is handed to, in the place of a loop of backward passes."""

    def plain(window: list[Tensor]) -> None:
        for k, batch in enumerate(window):
            last = k == len(window) - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last  # what no_sync() does
            loss_fn(batch).backward()

    def loss_fn(batch: Tensor) -> Tensor:
        return model(batch).square().mean() / 10

    def by(regularizer: gradreg.GradientRegularizer) -> Step:
        return lambda window: regularizer.backward(loss_fn, window)

    found: dict[str, Step] = {"plain": plain, "F-GR": by(gradreg.GradientRegularizer(model, 0.05, 0.1))}
    found["F-GR on 1/8 of rows"] = by(gradreg.GradientRegularizer(model, 0.05, 0.1, batch=gradreg.Fraction(1 / 8)))
    if wrapper == "DDP":
        found["SAM, local ascent"] = by(gradreg.sam(model, 0.05, ascent_sync="local"))
    found["MSAM, one pass"] = by(gradreg.msam(model, optimizer, 0.5))
    return found


def count(step: Callable[[], object]) -> tuple[int, int, int, int]:
    """Large collectives and their numbers, small ones and theirs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    large = numbers = small = few = 0
    pending = None
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.name.startswith("c10d::"):
            which = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1}.get(event.name)
            pending = None if which is None else math.prod(event.input_shapes[which])
        elif event.name.startswith("gloo:") and event.input_shapes:
            # An all-reduce shows its shape here only; gloo makes a reduce-scatter of an all-reduce.
            size = math.prod(event.input_shapes[0]) if pending is None else pending
            if size >= 100:
                large, numbers = large + 1, numbers + size
            else:
                small, few = small + 1, few + size
    return large, numbers, small, few


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=dist.FileStore(f"{folder}/store", RANKS))
    if rank == 0:
        print(f"torch {torch.__version__}, {RANKS} processes; collectives of one step on one rank")
        print(f"{'':33} large, copies of the parameters   small, numbers")
    for wrapper in ("DDP", "FSDP2", "HSDP 2×2", "TP"):
        for micro_batches in (1, 4):
            for name in NAMES[wrapper]:
                model = network(wrapper)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
                run = methods(model, optimizer, wrapper)[name]
                torch.manual_seed(1 if wrapper == "TP" else rank)

                def step(run=run, optimizer=optimizer, micro_batches=micro_batches) -> None:
                    optimizer.zero_grad()
                    run([torch.randn(ROWS, WIDTH) for _ in range(micro_batches)])
                    optimizer.step()

                step()
                step()
                large, numbers, small, few = count(step)
                if rank == 0:
                    copies = numbers / (BLOCKS * 8 * WIDTH * WIDTH)
                    title = f"{wrapper}, window of {micro_batches}"
                    print(f"{title:22} {name:20} {large:3d} {copies:13.2f} {small:17d} {few:6d}", flush=True)
    dist.barrier()
    os._exit(0)  # threads of gloo may outlive Python's end, and abort it


NAMES = {
    "DDP": ("plain", "F-GR", "SAM, local ascent", "F-GR on 1/8 of rows", "MSAM, one pass"),
    "FSDP2": ("plain", "F-GR", "F-GR on 1/8 of rows", "MSAM, one pass"),
    "HSDP 2×2": ("plain", "F-GR", "MSAM, one pass"),
    "TP": ("plain", "F-GR", "MSAM, one pass"),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (folder,), nprocs=RANKS)
