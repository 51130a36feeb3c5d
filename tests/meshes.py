"""Models on device meshes: the workers behind tests/training/test_meshes.py and test_ranks_reading.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import ranks
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gradreg

Rows = tuple[torch.Tensor, torch.Tensor]
KINDS = ("hsdp", "tensor", "tensor, sequence", "fsdp × tensor, sequence")


class Normed(nn.Module):
    """A block with a layer norm, which sequence parallelism runs on a share of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + self.down(torch.tanh(self.up(self.norm(h)))))


@cache
def four_ranks() -> DeviceMesh:
    """Two by two, made once: each dimension makes process groups."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def make_model(kind: str) -> nn.Module:
    """The bare model of a kind."""
    if "sequence" not in kind:
        return ranks.make_model()
    torch.manual_seed(0)
    return Normed().double()


def make(kind: str) -> tuple[nn.Module, Rows]:
    """The model of a kind on four ranks, and this rank's rows."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = four_ranks()
    model, rank, (x, y) = make_model(kind), mesh.get_rank(), ranks.make_data()
    if kind == "hsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh), (x[rank::4], y[rank::4])
    if "sequence" in kind:
        plan = {
            "first": ColwiseParallel(output_layouts=Shard(0)),
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
            "last": RowwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        }
    else:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}  # and the last layer is held by every rank
    parallelize_module(model, mesh["inner"], plan)
    if not kind.startswith("fsdp"):
        return model, (x, y)
    outer = mesh["outer"]
    share = slice(outer.get_local_rank(), None, 2)
    for layer in (model.up, model.down) if "sequence" in kind else (model[0], model[2]):
        fully_shard(layer, mesh=outer)
    return fully_shard(model, mesh=outer), (x[share], y[share])


def is_meant(kind: str, case: dict[str, Any]) -> bool:
    """The exact scheme is refused under FSDP2."""
    return kind.startswith("tensor") or case.get("scheme") != "exact"


def stages_of_shards(rank: int) -> list[torch.Tensor]:
    """ĝ of two stages, each of them sharded over two ranks; this rank's stage, gathered."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    mesh, model, (x, y) = four_ranks(), ranks.make_model(), ranks.make_data()
    pipeline, share = mesh["outer"], slice(mesh["inner"].get_local_rank(), None, 2)
    is_first = pipeline.get_local_rank() == 0
    module = fully_shard(model[:2] if is_first else model[2:], mesh=mesh["inner"])
    stage = PipelineStage(module, pipeline.get_local_rank(), 2, torch.device("cpu"), group=pipeline.get_group())
    schedule = Schedule1F1B(stage, 2, loss_fn=F.cross_entropy)
    regularizer = gradreg.GradientRegularizer(module, ranks.GAMMA, ranks.EPSILON)

    def step() -> None:
        schedule.step(x[share]) if is_first else schedule.step(target=y[share])

    for _ in range(2):  # in the second step nothing is made for the first time
        module.zero_grad()
        step()
        with regularizer.perturbed():
            step()
    return [ranks.gathered(p.grad) for p in module.parameters()]


def all_cases(rank: int, kinds: Sequence[str], cases: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Three steps of each kind and case, and a pipeline."""
    trained = {
        kind: [ranks.train(*make(kind), **case) if is_meant(kind, case) else None for case in cases] for kind in kinds
    }
    return trained | {"stages": stages_of_shards(rank)}
