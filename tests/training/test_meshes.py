"""Four ranks equal one process on meshes: HSDP, tensor parallelism, FSDP2 over it, and FSDP2 in pipeline stages."""

from functools import cache

import meshes
import pytest
import ranks
import torch
import torch.nn.functional as F

import gradreg
from gradreg.training.schedule import name_of

CASES = [
    *({"door": "backward", "scheme": scheme} for scheme in ("forward", "backward", "central")),
    *({"door": "backward", "ascent": ascent} for ascent in ("normalized", "adaptive")),
    {"door": "window"},
    {"door": "window", "ascent": "normalized", "cap": 0.02},
    {"door": "perturbed"},
    {"door": "closure", "gamma": ranks.EPSILON},
    {"door": "closure", "exclude": "*bias", "nonfinite": "first"},
    {"door": "closure", "when": gradreg.LargeGradients()},
    *({"door": "backward", "ascent": ascent, "gamma": ranks.EPSILON} for ascent in ("momentum", gradreg.Previous())),
    {"door": "perturbed", "ascent": "momentum", "gamma": ranks.EPSILON},
    {"door": "backward", "ahead": True},
    {"door": "batch", "batch": gradreg.Fraction(0.5)},
    {"door": "window", "batch": gradreg.Split(), "ascent": "normalized"},
    {"door": "backward", "scheme": "exact", "ascent": "normalized"},
    {"door": "window", "scheme": "exact", "cap": 0.02},
]


@ranks.once
def on_four_ranks():
    return ranks.on_ranks(4, meshes.all_cases, meshes.KINDS, CASES)


@cache
def in_one_process(model, k):
    return ranks.train(meshes.make_model(model), ranks.make_data(), **CASES[k])


MEANT = [(kind, k) for kind in meshes.KINDS for k, case in enumerate(CASES) if meshes.is_meant(kind, case)]


@pytest.mark.parametrize(
    ("kind", "k"), MEANT, ids=[" ".join([kind, *map(name_of, CASES[k].values())]) for kind, k in MEANT]
)
def test_four_ranks_equal_one_process(kind, k):
    alone = in_one_process("sequence" if "sequence" in kind else "", k)
    for of_rank in on_four_ranks():
        together = of_rank[kind][k]
        for ours, theirs in zip(together["weights"], alone["weights"]):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
        assert together["diagnostics"] == pytest.approx(alone["diagnostics"], rel=1e-9, nan_ok=True)


def test_stages_of_a_pipeline_that_are_sharded():
    model, (x, y) = ranks.make_model(), ranks.make_data()
    gradreg.GradientRegularizer(model, ranks.GAMMA, ranks.EPSILON).backward(lambda: F.cross_entropy(model(x), y))
    for rank, of_rank in enumerate(on_four_ranks()):
        alone = [p.grad for p in (model[:2] if rank < 2 else model[2:]).parameters()]
        torch.testing.assert_close(of_rank["stages"], alone, rtol=0, atol=1e-14)
