"""What is refused about ranks, and why: FSDP1, hooks that do not average, gradients that are held back."""

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, optimizer_overlap_hooks
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as post_local
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks as quantization
from torch.nn.parallel import DistributedDataParallel

import gradreg


def power_state():
    return power.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)


def handed_on(state, bucket):
    return power.powerSGD_hook(state, bucket)


def built_in(kind, model):
    model._register_builtin_comm_hook(kind)


def stepping(model):
    functional = optimizer_overlap_hooks._OptimizerHookState(_Stepping())
    model.register_comm_hook(
        None, optimizer_overlap_hooks._hook_then_optimizer(default_hooks.allreduce_hook, functional)
    )


class _Stepping:
    def step_param(self, param, grad):
        raise AssertionError("refused before")


HOOKS = {  # what is said of a hook where both passes communicate, and where one does
    "none": (lambda model: None, "", ""),
    "allreduce": (lambda model: model.register_comm_hook(None, default_hooks.allreduce_hook), "", ""),
    "built-in allreduce": (partial(built_in, dist.BuiltinCommHookType.ALLREDUCE), "", ""),
    "none at all": (lambda model: model.register_comm_hook(None, debugging_hooks.noop_hook), "", ""),
    "fp16": (lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_hook), "rounds", ""),
    "built-in fp16": (partial(built_in, dist.BuiltinCommHookType.FP16_COMPRESS), "rounds", ""),
    "fp16 around": (
        lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)),
        "rounds",
        "",
    ),
    "PowerSGD": (lambda model: model.register_comm_hook(power_state(), power.powerSGD_hook), "powerSGD_hook", ""),
    "PowerSGD in fp16": (
        lambda model: model.register_comm_hook(power_state(), default_hooks.fp16_compress_wrapper(power.powerSGD_hook)),
        "powerSGD_hook",
        "",
    ),
    "PowerSGD handed on": (lambda model: model.register_comm_hook(power_state(), handed_on), "powerSGD_hook", ""),
    "quantized": (
        lambda model: model.register_comm_hook(None, quantization.quantization_pertensor_hook),
        "quantization_pertensor_hook",
        None,  # torch has none on the host
    ),
    "local SGD": (
        lambda model: model.register_comm_hook(
            post_local.PostLocalSGDState(None, None, 100), post_local.post_localSGD_hook
        ),
        "post_localSGD_hook",
        "",
    ),
    "stepping": (stepping, "hook_then_optimizer_wrapper", "hook_then_optimizer_wrapper"),
}


def said(rank, name, method):
    """What a regularizer says in its second step, when the hook is there, and whether ĝ is that without a hook."""
    x, y = ranks.make_data()
    x, y = x[rank::2].float(), y[rank::2]
    gradients = []
    for hook in ("none", name):
        model = DistributedDataParallel(ranks.make_model().float())
        base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        options = {"ascent": gradreg.Momentum(base)} if method == "one pass" else {"ascent_sync": method}
        regularizer = gradreg.GradientRegularizer(model, 0.1, 0.1, **options)
        HOOKS[hook][0](model)
        words = []
        for _ in range(2):
            model.zero_grad()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    regularizer.backward(lambda model=model: F.cross_entropy(model(x), y))
                    base.step()
                except ValueError as error:
                    words.append(str(error))
            words += [str(w.message) for w in caught if "communication hook" in str(w.message)]
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    same = len(gradients[0]) == len(gradients[1]) and all(map(torch.allclose, *gradients))
    return words, same


def refusals_of_fsdp1(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    told = []
    for use_orig_params in (False, True):
        wrapped = FullyShardedDataParallel(
            ranks.make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        for model in (wrapped, torch.nn.Sequential(wrapped)):
            with pytest.raises(ValueError, match="fully_shard") as caught:
                gradreg.GradientRegularizer(model, 0.1, 0.1)
            told.append(str(caught.value))
    return told


def within_no_sync(rank, kind, options):
    """What `backward` says where gradients are held back, and whether the same window in one call works after it."""
    x, y = ranks.make_data()
    model, halves = ranks.wrapped(kind), list(zip(x[rank::2].chunk(2), y[rank::2].chunk(2)))
    regularizer = gradreg.GradientRegularizer(model, ranks.GAMMA, ranks.EPSILON, **options)

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0]), batch[1]) / 2

    if kind == "fsdp":
        model.set_requires_gradient_sync(False)
    with model.no_sync() if kind == "ddp" else nullcontext(), pytest.raises(ValueError, match="no_sync") as caught:
        regularizer.backward(loss_fn, halves[:1])
    if kind == "fsdp":
        model.set_requires_gradient_sync(True)
    regularizer.backward(loss_fn, halves)
    return str(caught.value)


HELD = [("ddp", {}), ("ddp", {"batch": gradreg.Split()}), ("ddp", {"ascent_sync": "local"}), ("fsdp", {})]
CASES = [(name, method) for name, (*_, once) in HOOKS.items() for method in ("global", "local", "one pass")]
CASES = [(name, method) for name, method in CASES if method == "global" or HOOKS[name][2] is not None]


def work(rank):
    warnings.simplefilter("ignore")
    refused = {"fsdp1": refusals_of_fsdp1(rank), "held": [within_no_sync(rank, *case) for case in HELD]}
    return refused | {case: said(rank, *case) for case in CASES}


@ranks.once
def on_two_ranks():
    return ranks.on_two_ranks(work)


@pytest.mark.parametrize("case", CASES, ids=map(", ".join, CASES))
def test_a_communication_hook_is_refused_or_warned_of_where_it_would_make_the_penalty(case):
    name, method = case
    expected = HOOKS[name][1 if method == "global" else 2]
    for of_rank in on_two_ranks():
        words, same = of_rank[case]
        if expected == "":
            assert words == []
        elif expected == "rounds":
            assert len(words) == 1, "once"
            assert "rounds the gradients of both passes" in words[0]
        else:
            assert len(words) == 2, "in every step"
            assert all(f"communication hook {expected}" in text for text in words)
        if name in ("allreduce", "built-in allreduce"):
            assert same


def test_fsdp1_is_refused_with_the_way_out():
    for of_rank in on_two_ranks():
        assert len(of_rank["fsdp1"]) == 4
        assert all("FullyShardedDataParallel (FSDP1)" in text for text in of_rank["fsdp1"])


@pytest.mark.parametrize("k", range(len(HELD)), ids=map(str, HELD))
def test_a_micro_batch_by_itself_is_refused_where_its_gradients_would_never_be_averaged(k):
    for of_rank in on_two_ranks():
        assert "backward(loss_fn, batches)" in of_rank["held"][k]
