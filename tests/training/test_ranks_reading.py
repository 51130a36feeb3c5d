"""Reading is local to a rank: who logs on rank 0 alone waits for nobody, and reads what every rank would."""

import meshes
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn

import gradreg

KINDS = ("ddp", "fsdp", "hsdp", "tensor")
METHODS = (
    {"ascent": "normalized"},
    {"gamma": ranks.EPSILON},
    {"ascent": "momentum", "gamma": ranks.EPSILON},
    {"ascent": gradreg.Previous(), "gamma": ranks.EPSILON},
    {"cap": 0.02},
    {"at": "ahead"},
)


def make(kind):
    """The model on four ranks, and this rank's rows."""
    from torch.distributed.fsdp import fully_shard

    if kind in meshes.KINDS:
        return meshes.make(kind)
    rank, (x, y) = torch.distributed.get_rank(), ranks.make_data()
    model = ranks.make_model()
    model = fully_shard(model) if kind == "fsdp" else nn.parallel.DistributedDataParallel(model)
    return model, (x[rank::4], y[rank::4])


def read(regularizer):
    assert "GradientRegularizer" in repr(regularizer)
    state, found = regularizer.state_dict(), dict(regularizer.diagnostics())
    realized = found.pop("realized")
    found |= {"realized cosine": realized.cosine, "realized norm": realized.norm}
    return {name: float(value) for name, value in found.items()} | {"step": state["step"]}


def train(model, rows, method, is_reading):
    """Three steps, read by some after each of them, and by all at the end."""
    x, y = rows
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"gamma": ranks.GAMMA, "epsilon": ranks.EPSILON, **method}
    if options.get("ascent") == "momentum":
        options["ascent"] = gradreg.Momentum(base)
    if "at" in options:
        options["at"] = gradreg.Ahead(gradreg.Momentum(base), rho=0.2)
    regularizer = gradreg.GradientRegularizer(model, **options)
    found = []
    for _ in range(3):
        base.zero_grad()
        regularizer.backward(lambda: F.cross_entropy(model(x), y))
        base.step()
        if is_reading:
            found.append(read(regularizer))
    return {"while training": found, "at the end": read(regularizer)}


def work(rank):
    return {(kind, k): train(*make(kind), m, is_reading=rank == 0) for kind in KINDS for k, m in enumerate(METHODS)}


@ranks.once
def on_four_ranks():
    return ranks.on_ranks(4, work)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(len(METHODS)), ids=list(map(str, METHODS)))
def test_rank_0_reads_alone_what_one_process_would(kind, k):
    alone = train(ranks.make_model(), ranks.make_data(), METHODS[k], is_reading=True)
    first, *others = (of_rank[kind, k] for of_rank in on_four_ranks())
    for ours, theirs in zip(first["while training"], alone["while training"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, nan_ok=True)
    for other in others:
        if kind == "ddp":  # what needs no sum over ranks may have been measured in another step
            assert other["at the end"]["grad_norm"] == pytest.approx(alone["at the end"]["grad_norm"], nan_ok=True)
        else:
            assert other["at the end"] == pytest.approx(alone["at the end"], rel=1e-9, nan_ok=True)
