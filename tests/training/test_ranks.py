"""Two ranks equal one process, for every door, with DDP and FSDP2; what is local is local; faults reach all ranks."""

from functools import cache
from itertools import product

import pytest
import ranks
import torch
from torch import nn

import gradreg
from gradreg.training.schedule import name_of

KINDS = ("ddp", "ddp, bucket views", "fsdp")
CASES = [
    *({"door": door, "scheme": s} for door in ("backward", "window") for s in ("forward", "backward", "central")),
    *({"door": "backward", "ascent": ascent} for ascent in ("normalized", "adaptive", ranks.halved)),
    *(
        {"door": door, **options}
        for door in ("window", "perturbed", "closure")
        for options in ({"exclude": "*bias"}, {"cap": 0.02}, {"nonfinite": "first"}, {"frozen": True})
    ),
    *(
        {"door": door, "ascent": ascent, "gamma": ranks.EPSILON}
        for door in ("backward", "window", "perturbed", "closure")
        for ascent in ("momentum", gradreg.Previous())
    ),
    *({"door": door, "ahead": True} for door in ("backward", "window", "closure")),
    {"door": "batch", "ahead": True, "batch": gradreg.Fraction(0.25)},
    *({"door": door, "when": gradreg.LargeGradients()} for door in ("window", "perturbed", "closure")),
    *(
        {"door": door, "ascent": ascent, "batch": batch}
        for door in ("batch", "window")
        for ascent in ("gradient", "momentum", gradreg.Previous())
        for batch in (gradreg.Fraction(0.25), gradreg.Split())
    ),
]


@cache
def results(kind):
    return ranks.on_two_ranks(ranks.both, kind, CASES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(len(CASES)), ids=[" ".join(map(name_of, case.values())) for case in CASES])
def test_two_ranks_equal_one_process(kind, k):
    for of_rank in results(kind):
        together, alone = of_rank[k]
        for ours, theirs in zip(together["weights"], alone["weights"]):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
        assert together["diagnostics"] == pytest.approx(alone["diagnostics"], rel=1e-9, nan_ok=True)


LOCAL = list(product([0.05, 0.1], [0.1], ["gradient", "normalized"], [1, 2]))
FAULTS = [("ddp", "global", 0.05), ("ddp", "local", 0.05), ("ddp", "local", 0.1), ("fsdp", "global", 0.05)]


@cache
def played(work, cases):
    """By rank, what `work` returned for each case."""
    return ranks.on_two_ranks(ranks.each, work, cases)


@pytest.mark.parametrize("k", range(len(LOCAL)), ids=[str(case) for case in LOCAL])
def test_a_local_ascent_averages_once(k):
    for of_rank in played(ranks.local_gradient, tuple(LOCAL)):
        result = of_rank[k]
        for ours, by_hand in zip(result["engine"], result["by hand"]):
            torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-14)
        assert result["averaged"] == result["buckets"], "as in plain training: each bucket once"


MODES = list(product([gradreg.Fraction(0.25), gradreg.Split()], ["gradient", "normalized"]))


@pytest.mark.parametrize("k", range(len(MODES)), ids=[str(mode) for mode in MODES])
def test_a_local_ascent_of_a_divided_batch_is_the_mean_over_ranks(k):
    for of_rank in played(ranks.local_modes, tuple(MODES)):
        for ours, by_hand in zip(of_rank[k]["engine"], of_rank[k]["by hand"]):
            torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [0, 1], ids=["γ < ε", "γ = ε"])
def test_fsdp_in_bfloat16_differs_in_float32(k):
    for of_rank in played(ranks.mixed, ((0.05,), (0.1,))):
        for ours, by_hand in zip(of_rank[k]["engine"], of_rank[k]["by hand"]):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, by_hand, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", range(len(FAULTS)), ids=[str(case) for case in FAULTS])
def test_a_nan_on_one_rank_is_seen_on_all(k):
    for of_rank in played(ranks.faulty, tuple(FAULTS)):
        assert of_rank[k] == {"finite": False, "kept": True}


@pytest.mark.parametrize("k", [0, 1], ids=["ddp", "fsdp"])
def test_a_rank_that_fails_ends_the_others_at_the_time_out_and_none_stays_displaced(k):
    waiting, failing = (of_rank[k] for of_rank in played(ranks.abandoned, (("ddp",), ("fsdp",))))
    assert failing == {"raised": "ArithmeticError", "kept": True, "gradients": 0}
    assert waiting == {"raised": "RuntimeError", "kept": True, "gradients": 0}


@pytest.mark.parametrize("k", [0, 1], ids=["ddp", "fsdp"])
def test_ranks_that_disagree_are_told_so(k):
    for of_rank in played(ranks.disagree, (("ddp",), ("fsdp",))):
        assert of_rank[k].count("ranks must agree on gamma, got 0.1 on rank 0 and 1.1 on rank 1") == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_distributed_checkpoint_resumes_on_as_many_ranks_and_on_one(kind, tmp_path):
    of_ranks = ranks.on_two_ranks(ranks.checkpointed, kind, str(tmp_path / "checkpoint"))
    for result in of_ranks:
        assert all(torch.equal(a, b) for a, b in zip(result["resumed"], result["straight"]))
    alone = ranks.resumed("one process", ranks.make_data(), str(tmp_path / "checkpoint"))
    for ours, theirs in zip(alone, of_ranks[0]["straight"]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"cap": 1.0}, {"nonfinite": "first"}, {"scheme": "central"}, {"scheme": "exact"}])
def test_a_local_ascent_refuses_what_needs_the_whole(options):
    with pytest.raises(ValueError, match="ascent_sync"):
        gradreg.GradientRegularizer(nn.Linear(2, 1), 0.1, 0.1, ascent_sync="local", **options)


def test_an_unknown_sync_is_refused_and_one_process_is_local_already():
    with pytest.raises(ValueError, match='ascent_sync must be "global" or "local"'):
        gradreg.GradientRegularizer(nn.Linear(2, 1), 0.1, 0.1, ascent_sync="rank")
    gradreg.GradientRegularizer(nn.Linear(2, 1), 0.1, 0.1, ascent_sync="local")
