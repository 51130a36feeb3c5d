"""Pipeline parallelism: each process regularizes its stages, and together they make the ĝ of one process."""

from contextlib import ExitStack
from itertools import product

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn

import gradreg

X, Y = ranks.make_data()
SCHEDULES = ("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
DOORS = ("perturbed", "closure")
TROUBLES = ("", "no gradient in the first stages", "no number in the first stages")
CASES = [
    *product(SCHEDULES, ["perturbed"], [ranks.GAMMA], [{}], [""]),
    *product(SCHEDULES[:2], ["closure"], [ranks.GAMMA], [{}], [""]),
    *product(SCHEDULES[:1], DOORS, [ranks.EPSILON], [{"exclude": "*bias"}, {"scheme": "backward"}], [""]),
    *product(SCHEDULES[1:2], ["closure"], [ranks.GAMMA], [{"scheme": "central"}], [""]),
    *product(SCHEDULES[1:2], DOORS, [ranks.GAMMA, ranks.EPSILON], [{}], TROUBLES[1:]),
]
REFUSED = {
    "ascent": {"ascent": "normalized"},
    "ascent=Adaptive": {"ascent": "adaptive"},
    "ascent=Momentum": {"ascent": "momentum", "gamma": ranks.EPSILON},
    "ascent=Previous": {"ascent": gradreg.Previous(), "gamma": ranks.EPSILON},
    "cap=0.1": {"cap": 0.1},
    'nonfinite="first"': {"nonfinite": "first"},
    "when=LargeGradients": {"when": gradreg.LargeGradients()},
}


class BreaksBackward(torch.autograd.Function):
    """The identity, with a gradient that is no number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


class Part(nn.Module):
    """A quarter of a model, with a noise that is drawn anew in each forward, or none."""

    def __init__(self, inputs, outputs, breaks=False, noise=0.0):
        super().__init__()
        self.layer, self.breaks, self.noise, self.drawn = nn.Linear(inputs, outputs), breaks, noise, []

    def forward(self, x):
        if self.noise:
            self.drawn.append(torch.rand(x.shape[0], 1, dtype=x.dtype))
            x = x + self.noise * self.drawn[-1]
        x = torch.tanh(self.layer(x))
        return BreaksBackward.apply(x) if self.breaks else x


def parts(trouble="", noise=0.0):
    torch.manual_seed(0)
    sizes = [(6, 8), (8, 8), (8, 8), (8, 3)]
    made = [Part(*s, breaks=i == 1 and trouble == TROUBLES[2], noise=noise).double() for i, s in enumerate(sizes)]
    if trouble == TROUBLES[1]:
        nn.init.zeros_(made[2].layer.weight)
    return made


class Pipeline:
    """This rank's stages, and a schedule over all of them."""

    def __init__(self, rank, schedule, trouble="", noise=0.0):
        from torch.distributed import pipelining

        kind, quarters, device = getattr(pipelining.schedules, schedule), parts(trouble, noise), torch.device("cpu")

        def loss_fn(output, target):
            return F.cross_entropy(output, target)

        if "Interleaved" in schedule:
            self.models = [quarters[rank], quarters[rank + 2]]
            stages = [pipelining.PipelineStage(m, rank + 2 * i, 4, device) for i, m in enumerate(self.models)]
            self._schedule = kind(stages, 4, loss_fn=loss_fn)
        else:
            self.models = [nn.Sequential(*quarters[2 * rank : 2 * rank + 2])]
            self._schedule = kind(pipelining.PipelineStage(self.models[0], rank, 2, device), 4, loss_fn=loss_fn)
        self._is_first = rank == 0
        self._broken = [part for part in quarters if part.breaks]
        self._num_steps = 0

    def step(self):
        for part in self._broken:
            part.breaks = self._num_steps % 2 == 0  # in each first pass
        self._num_steps += 1
        if self._is_first:
            self._schedule.step(X)
            return None
        losses = []
        self._schedule.step(target=Y, losses=losses)
        return torch.stack(losses).mean()

    @property
    def parameters(self):
        return [p for m in self.models for p in m.parameters()]


def pass_through(door, regularizers, step, base, num_passes=2):
    if door == "closure":

        def closure():
            base.zero_grad()
            return step()

        regularizers[0].run_closure(closure)  # what RegularizedOptimizer.step(closure) calls, without the step
        return
    base.zero_grad()
    for _ in range(num_passes - 1):
        step()
    with ExitStack() as stack:
        for regularizer in regularizers:
            stack.enter_context(regularizer.perturbed())
        step()


def in_stages(rank, schedule, door, gamma, options, trouble):
    """ĝ of two steps of training, by stages."""
    pipeline = Pipeline(rank, schedule, trouble)
    base = torch.optim.SGD(pipeline.parameters, lr=0.1)
    regularizers = [gradreg.GradientRegularizer(m, gamma, ranks.EPSILON, **options) for m in pipeline.models]
    seen = []
    for _ in range(2):
        pass_through(door, regularizers, pipeline.step, base)
        seen += [p.grad.clone() for p in pipeline.parameters]
        if trouble != TROUBLES[2]:
            base.step()
    return seen


def alone(rank, schedule, door, gamma, options, trouble):
    """The same gradients of the same stages, by one process."""
    del door
    model = nn.Sequential(*parts(trouble))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = gradreg.GradientRegularizer(model, gamma, ranks.EPSILON, **options)
    mine = [model[rank], model[rank + 2]] if "Interleaved" in schedule else model[2 * rank : 2 * rank + 2]
    seen = []
    for _ in range(2):
        base.zero_grad()
        regularizer.backward(lambda: F.cross_entropy(model(X), Y))
        seen += [p.grad.clone() for m in mine for p in m.parameters()]
        base.step()
    return seen


def noise_of_passes(rank, door):
    """What the two passes of a first step drew, and what was drawn next."""
    pipeline = Pipeline(rank, "Schedule1F1B", noise=0.1)
    base = torch.optim.SGD(pipeline.parameters, lr=0.1)
    regularizer = gradreg.GradientRegularizer(pipeline.models[0], ranks.GAMMA, ranks.EPSILON)
    pass_through(door, [regularizer], pipeline.step, base)
    return [torch.stack(part.drawn[-8:]) for part in pipeline.models[0]]


def refusal(rank, options, door):
    pipeline = Pipeline(rank, "ScheduleGPipe")
    base = torch.optim.SGD(pipeline.parameters, lr=0.1, momentum=0.9)
    options = {"gamma": ranks.GAMMA, "epsilon": ranks.EPSILON, **options}
    if options.get("ascent") == "momentum":
        options["ascent"] = gradreg.Momentum(base)
    regularizer = gradreg.GradientRegularizer(pipeline.models[0], **options)
    before = [p.detach().clone() for p in pipeline.parameters]
    with pytest.raises(ValueError, match="pipeline stage") as caught:
        pass_through(door, [regularizer], pipeline.step, base, num_passes=1 + (options["gamma"] != options["epsilon"]))
    assert all(map(torch.equal, before, pipeline.parameters))
    return str(caught.value)


def work(rank):
    return {
        "cases": [in_stages(rank, *case) for case in CASES],
        "alone": [alone(rank, *case) for case in CASES if case[-1] != TROUBLES[2]],
        "noise": [noise_of_passes(rank, door) for door in DOORS],
        "refused": [[refusal(rank, options, door) for options in REFUSED.values()] for door in DOORS],
    }


@ranks.once
def on_two_ranks():
    return ranks.on_two_ranks(work)


HEALTHY = [k for k, case in enumerate(CASES) if case[-1] != TROUBLES[2]]


@pytest.mark.parametrize("i", range(len(HEALTHY)), ids=[str(CASES[k]) for k in HEALTHY])
def test_stages_together_equal_one_process(i):
    for of_rank in on_two_ranks():
        for ours, theirs in zip(of_rank["cases"][HEALTHY[i]], of_rank["alone"][i], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", sorted(set(range(len(CASES))) - set(HEALTHY)), ids=lambda k: str(CASES[k]))
def test_a_stage_without_a_usable_gradient_runs_the_pass_with_the_others_and_hides_nothing(k):
    first, second = (of_rank["cases"][k] for of_rank in on_two_ranks())
    assert not any(g.isfinite().any() for g in first)
    assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize("k", range(len(DOORS)), ids=DOORS)
def test_each_micro_batch_draws_what_it_drew_although_the_first_step_runs_one_more_for_shapes(k):
    for of_rank in on_two_ranks():
        for drawn in of_rank["noise"][k]:
            first, second = drawn.chunk(2)
            assert torch.equal(first, second)
            assert len(first.unique()) == first.numel()


@pytest.mark.parametrize("k", range(len(DOORS)), ids=DOORS)
def test_what_needs_the_norm_of_the_whole_is_refused_on_every_rank(k):
    for of_rank in on_two_ranks():
        for argument, text in zip(REFUSED, of_rank["refused"][k], strict=True):
            assert text.startswith(argument)
            assert 'ascent="gradient"' in text
