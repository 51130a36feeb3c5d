"""What is refused of the modes below two passes, and the nearest choice that it names."""

import copy
import math

import pytest
import torch
from modes import CHEAP, Problem, dropping, sgd
from problems import assert_same
from torch import nn

import gradreg


def _refusals():
    def build(problem, *args, **options):
        return gradreg.GradientRegularizer(problem.model, *args, **options)

    momentum = lambda problem, **options: gradreg.Momentum(sgd(problem, **options))  # noqa: E731
    yield "no momentum", lambda p: gradreg.msam(p.model, sgd(p, momentum=0), 1.0), "momentum=0.9"
    yield "no momentum in Adagrad", lambda p: gradreg.msam(p.model, torch.optim.Adagrad(p.parameters), 1.0), "Adagrad"
    yield "not an optimizer", lambda p: gradreg.msam(p.model, None, 1.0), "optimizer must be a built"
    yield (
        "a parameter that the optimizer lacks",
        lambda p: gradreg.msam(p.model, torch.optim.Adam(p.parameters[:2]), 1.0),
        "'2.weight'",
    )
    yield "rho", lambda p: gradreg.msam(p.model, sgd(p), -1.0), "rho must be"
    yield "sign", lambda p: gradreg.msam(p.model, sgd(p), 1.0, sign=0), "sign must be"
    yield "γ ≠ ε", lambda p: build(p, 0.1, 0.2, ascent=momentum(p)), "gamma=epsilon=0.2"
    yield "γ ≠ ε, previous", lambda p: build(p, 0.1, 0.2, ascent=gradreg.Previous()), "gamma=epsilon=0.2"
    yield "by name", lambda p: build(p, 0.1, 0.1, ascent="momentum"), "gradreg.Momentum(optimizer)"
    yield "previous by name", lambda p: build(p, 0.1, 0.1, ascent="previous"), "gradreg.Previous()"
    yield "backward", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), scheme="backward"), "other sign"
    yield "cap", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), cap=1.0), "one pass"
    yield "first", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), nonfinite="first"), "one pass"
    yield "when", lambda p: gradreg.msam(p.model, sgd(p), 1.0, when=gradreg.LargeGradients()), "bernoulli"
    yield "when, exact", lambda p: build(p, 0.1, 0.1, scheme="exact", when=gradreg.LargeGradients()), "when needs"
    yield "when, type", lambda p: build(p, 0.1, 0.1, when="large"), "when must be"
    yield "batch, type", lambda p: build(p, 0.1, 0.1, batch=0.1), "batch must be"
    yield "fraction 0", lambda p: gradreg.Fraction(0), "share must"
    yield "fraction 1", lambda p: gradreg.Fraction(1), "whole batch"
    yield "fraction nan", lambda p: gradreg.Fraction(math.nan), "from 0 to 1"
    yield "fraction text", lambda p: gradreg.Fraction("0.1"), "must be a number"
    yield "exact", lambda p: build(p, 0.1, 0.1, scheme="exact", batch=gradreg.Fraction(0.1)), "exact"
    yield "split γ ≥ ε", lambda p: build(p, 0.2, 0.2, batch=gradreg.Split()), "gamma=0.1"
    yield "split, central", lambda p: build(p, 0.1, 0.2, batch=gradreg.Split(), scheme="central"), "convex"
    yield "split, cap", lambda p: build(p, 0.1, 0.2, batch=gradreg.Split(), cap=1.0), "one pass"
    ahead = lambda problem, **options: gradreg.Ahead(momentum(problem, **options), 1.0)  # noqa: E731
    yield "ahead, type", lambda p: build(p, 0.1, 0.1, at=momentum(p)), "at must be"
    yield "ahead, direction", lambda p: gradreg.Ahead("momentum", 1.0), "direction must be"
    yield "ahead, rho", lambda p: gradreg.Ahead(gradreg.Previous(), -1.0), "rho must be"
    yield "ahead, no momentum", lambda p: build(p, 0.1, 0.1, at=ahead(p, momentum=0)), "momentum=0.9"
    yield "ahead, twice", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), at=ahead(p)), "moved its pass already"
    yield "ahead, split", lambda p: build(p, 0.1, 0.2, batch=gradreg.Split(), at=ahead(p)), "moved its pass already"
    yield "ahead, block", lambda p: build(p, 0.1, 0.2, at=ahead(p)).perturbed().__enter__(), "backward(loss_fn)"
    yield "cheap, optimizer", lambda p: gradreg.cheap(p.model, sgd(p), 10), "optimizer must be left out"
    yield "cheap, optimizers", lambda p: gradreg.cheap(p.model, [sgd(p)]), "optimizer must be left out"
    yield "cheap, rho", lambda p: gradreg.cheap(p.model, rho=0.2), "rho must be left out"
    yield "cheap, gamma", lambda p: gradreg.cheap(p.model, -1.0), "gamma must be"
    yield "cheap, gamma by name", lambda p: gradreg.cheap(p.model, "small"), "gamma must be"
    yield "cheap, epsilon", lambda p: gradreg.cheap(p.model, 0.1, 0.0), "epsilon must be"
    yield "cheap, period", lambda p: gradreg.cheap(p.model, period=0), "period must be"
    yield "cheap, batch", lambda p: gradreg.cheap(p.model, batch=0.25), "batch must be"
    yield "cheap, exact", lambda p: gradreg.cheap(p.model, scheme="exact"), "the whole batch"
    yield "probability", lambda p: gradreg.bernoulli(0.1, 1.5), "from 0 to 1"
    yield "seed", lambda p: gradreg.bernoulli(0.1, 0.5, seed=-1), "seed"
    yield "scale", lambda p: gradreg.every(0.1, 2, scale=-1), "scale"
    yield "decay", lambda p: gradreg.LargeGradients(decay=1), "decay"
    yield "threshold", lambda p: gradreg.LargeGradients(threshold=math.inf), "threshold"


REFUSALS = list(_refusals())


@pytest.mark.parametrize(("name", "make", "says"), REFUSALS, ids=[name for name, _, _ in REFUSALS])
def test_what_means_nothing_is_refused_with_the_nearest_choice(name, make, says):
    with pytest.raises((ValueError, TypeError)) as caught:
        make(Problem())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["fraction", "split"])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r, p: r.backward(p.loss), "batches must be given"),
        (lambda r, p: r.backward(p.loss, [p.rows(0, 1)]), "at least 2 rows"),
        (lambda r, p: r.backward(p.loss, [(p.batch[0], p.batch[1][:4])]), "same number of rows"),
        (lambda r, p: r.backward(p.loss, ["text"]), "without tensors"),
        (lambda r, p: r.backward(p.loss, [(p.batch[0], p.batch[1].numpy())]), "got an array"),
        (lambda r, p: r.perturbed().__enter__(), "cannot divide the batch"),
        (lambda r, p: r.run_closure(p.loss), "cannot divide the batch"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_and_nothing_is_lost(mode, call, says):
    problem = dropping()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer)
    before = copy.deepcopy((problem.model.state_dict(), problem.gradients, regularizer.state_dict()))
    with pytest.raises(ValueError, match=says):
        call(regularizer, problem)
    assert_same(problem.model.state_dict(), before[0])
    assert_same(problem.gradients, before[1])
    assert regularizer.state_dict() == before[2]


@pytest.mark.parametrize("ascent", ["momentum", "previous"])
def test_a_one_pass_block_after_a_first_pass_is_refused(ascent):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[ascent](problem, optimizer)
    problem.loss().backward()
    before = copy.deepcopy((problem.model.state_dict(), problem.gradients))
    with pytest.raises(ValueError, match="run no pass before"), regularizer.perturbed():
        problem.loss().backward()
    assert_same(problem.model.state_dict(), before[0])
    assert_same(problem.gradients, before[1])
    assert regularizer.step == 0


def test_a_schedule_that_parts_gamma_from_epsilon_is_refused_at_its_step():
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.GradientRegularizer(
        problem.model, gradreg.warmup(0.1, 2), 0.1, ascent=gradreg.Momentum(optimizer)
    )
    problem.train(regularizer, optimizer)  # γ = 0
    with pytest.raises(ValueError, match="at step 1"):
        problem.train(regularizer, optimizer)


def test_a_previous_gradient_of_another_model_is_refused():
    problem, other = Problem(), Problem(nn.Linear(4, 3))
    make = CHEAP["previous"]
    one, two = make(problem, sgd(problem)), make(other, sgd(other))
    problem.train(one, sgd(problem))
    before = two.state_dict()
    with pytest.raises(ValueError, match="no selected parameter"):
        two.load_state_dict(one.state_dict())
    assert two.state_dict() == before
