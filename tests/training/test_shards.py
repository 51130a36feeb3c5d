"""FSDP2 with weights left gathered: every pass computes with the weights that it should, and so does what follows."""

from functools import cache
from itertools import product

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn

import gradreg

X, Y = ranks.make_data()


def sharded(model):
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def keep_after_backward(model):
    for module in sharded(model):
        module.set_reshard_after_backward(False)


def gather(model):
    for module in sharded(model):
        module.unshard()


def begin_to_gather(model):
    for module in sharded(model):
        module.unshard(async_op=True)


def evaluate(model):
    with torch.no_grad():
        model(X)


class Twice(nn.Module):
    """The middle layer is used twice, so that its gradient arrives in two parts."""

    def __init__(self):
        super().__init__()
        self.layers = ranks.make_model()

    def forward(self, x):
        first, tanh, middle, _, last = self.layers
        return last(tanh(middle(tanh(middle(tanh(first(x)))))))


def shard(model):
    """All layers but the last, which the root holds and keeps between forward and backward."""
    from torch.distributed.fsdp import fully_shard

    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]:
        fully_shard(layer)
    return fully_shard(model)


HABITS = (keep_after_backward, gather, begin_to_gather, evaluate)
DOORS = ("backward", "window", "perturbed", "closure", "backward, one pass", "perturbed, one pass", "backward, ahead")
CASES = [*product(HABITS, DOORS)]


def train(model, rows, door, habit=lambda model: None):
    """Two steps: the gradients, and what an evaluation right after each door says."""
    x, y = rows
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.full_like(p, 0.1)
    options = {"epsilon": 0.1}
    if "one pass" in door:
        options |= {"ascent": gradreg.Momentum(optimizer), "epsilon": ranks.GAMMA}
    if "ahead" in door:
        options["at"] = gradreg.Ahead(gradreg.Momentum(optimizer), rho=0.2)
    habit(model)
    regularizer = gradreg.GradientRegularizer(model, ranks.GAMMA, **options)

    def loss(batch=(x, y), parts=1):
        return F.cross_entropy(model(batch[0]), batch[1]) / parts

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        habit(model)
        if door == "window":
            regularizer.backward(lambda batch: loss(batch, 2), list(zip(x.chunk(2), y.chunk(2))))
        elif door.startswith("backward"):
            regularizer.backward(loss)
        elif door == "closure":
            regularizer.run_closure(closure)
        else:
            if "one pass" not in door:
                loss().backward()
                habit(model)
            with regularizer.perturbed():
                loss().backward()
        with torch.no_grad():
            seen.append(model(X))
        for module in sharded(model):
            module.reshard()
        seen += [ranks.gathered(p.grad).clone() for p in model.parameters()]
        optimizer.step()
    return seen


def trained(rank, habit, door):
    return train(shard(ranks.make_model()), (X[rank::2], Y[rank::2]), door, habit)


def used_twice(rank, door):
    return train(shard(Twice()), (X[rank::2], Y[rank::2]), door)


def broken_off(rank):
    """The displaced pass fails after its first layer; what an evaluation and another step say then."""
    model = shard(ranks.make_model())
    regularizer = gradreg.GradientRegularizer(model, ranks.GAMMA, ranks.EPSILON)
    passes = []

    def fail(module, args):
        passes.append(1)
        if len(passes) == 2:
            raise ArithmeticError("of the second pass")

    def step():
        regularizer.backward(lambda: F.cross_entropy(model(X[rank::2]), Y[rank::2]))

    handle = model[2].register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ArithmeticError):
        step()
    handle.remove()
    with torch.no_grad():
        seen = [model(X)]
    step()
    return [*seen, *(ranks.gathered(p.grad) for p in model.parameters())]


def work(rank):
    return {
        "habits": [trained(rank, *case) for case in CASES],
        "twice": [used_twice(rank, door) for door in DOORS],
        "broken off": broken_off(rank),
    }


@ranks.once
def on_two_ranks():
    return ranks.on_two_ranks(work)


@cache
def in_one_process(model, door):
    return train(model(), (X, Y), door)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", range(len(CASES)), ids=[f"{habit.__name__}, {door}" for habit, door in CASES])
def test_gathered_weights_are_given_back_before_and_after_they_move(k):
    for of_rank in on_two_ranks():
        assert_same(of_rank["habits"][k], in_one_process(ranks.make_model, CASES[k][1]))


@pytest.mark.parametrize("k", range(len(DOORS)), ids=DOORS)
def test_a_layer_that_is_used_twice(k):
    for of_rank in on_two_ranks():
        assert_same(of_rank["twice"][k], in_one_process(Twice, DOORS[k]))


def test_a_displaced_pass_that_broke_off_leaves_no_gathered_weights_of_its_own():
    model = ranks.make_model()
    gradreg.GradientRegularizer(model, ranks.GAMMA, ranks.EPSILON).backward(lambda: F.cross_entropy(model(X), Y))
    expected = [ranks.make_model()(X).detach(), *(p.grad for p in model.parameters())]
    for of_rank in on_two_ranks():
        assert_same(of_rank["broken off"], expected)
