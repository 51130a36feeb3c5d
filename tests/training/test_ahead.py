"""All gradients of a step at a point ahead, against their formula written out."""

import copy

import pytest
import torch
from modes import CHEAP, RHO, Problem, norm, scaled, sgd
from problems import assert_close, assert_same

import gradreg


@pytest.mark.parametrize("batch", [None, gradreg.Fraction(0.3)], ids=str)
@pytest.mark.parametrize("scheme", ["forward", "backward", "central"])
@pytest.mark.parametrize("direction", ["momentum", "previous"])
def test_ahead_is_the_regularized_gradient_at_the_displaced_point(batch, scheme, direction):
    problem = Problem()
    optimizer = sgd(problem)
    known = gradreg.Momentum(optimizer) if direction == "momentum" else gradreg.Previous()
    regularizer = gradreg.GradientRegularizer(
        problem.model, 0.3, RHO, scheme=scheme, batch=batch, at=gradreg.Ahead(known, rho=0.7)
    )
    problem.train(regularizer, optimizer, steps=2)
    if direction == "momentum":
        vectors = scaled([optimizer.state[p]["momentum_buffer"] for p in problem.parameters], -1)
    else:
        vectors = [g.clone() for g in problem.gradients]
    moved = copy.deepcopy(problem)
    with torch.no_grad():
        for p, v in zip(moved.parameters, vectors):
            p.add_(v, alpha=0.7 / norm(vectors))
            p.grad = None
    gradreg.GradientRegularizer(moved.model, 0.3, RHO, scheme=scheme, batch=batch).backward(moved.loss, [moved.batch])
    before, places = copy.deepcopy(problem.model.state_dict()), [p.data_ptr() for p in problem.parameters]
    optimizer.zero_grad()
    regularizer.backward(problem.loss, [problem.batch])
    assert_close(problem.gradients, moved.gradients, rtol=1e-9, atol=1e-12)
    assert_same(problem.model.state_dict(), before)
    assert [p.data_ptr() for p in problem.parameters] == places
    assert float(regularizer.diagnostics()["realized"].norm) == pytest.approx(1)


def test_ahead_comes_back_bitwise_where_weights_are_views_that_must_stay_in_place():
    problem, flat = Problem(), Problem()
    buffer = torch.cat([p.detach().flatten() for p in flat.parameters])
    for p, part in zip(flat.parameters, buffer.split([p.numel() for p in flat.parameters])):
        p.data = part.view_as(p)
    for trial in (problem, flat):
        optimizer = sgd(trial)
        trial.train(CHEAP["ahead"](trial, optimizer), optimizer, steps=3)
        before = copy.deepcopy(trial.model.state_dict())
        CHEAP["ahead"](trial, optimizer).backward(trial.loss, [trial.batch])
        assert_same(trial.model.state_dict(), before)
    assert_same(flat.parameters, problem.parameters)
    assert torch.equal(buffer, torch.cat([p.detach().flatten() for p in flat.parameters]))


def test_ahead_without_a_penalty_is_msam():
    problem, other = Problem(), Problem()
    optimizer, base = sgd(problem), sgd(other)
    ahead = gradreg.Ahead(gradreg.Momentum(optimizer), rho=RHO)
    problem.train(gradreg.GradientRegularizer(problem.model, 0, 1, at=ahead), optimizer, steps=4)
    other.train(gradreg.msam(other.model, base, RHO), base, steps=4)
    assert_same(problem.parameters, other.parameters)


def test_ahead_serves_a_closure():
    problem, other = Problem(), Problem()
    base, optimizer = sgd(problem), sgd(other)
    options = [{"at": gradreg.Ahead(gradreg.Momentum(o), rho=lambda step: 0.1 * step)} for o in (base, optimizer)]
    wrapped = gradreg.RegularizedOptimizer(base, gradreg.GradientRegularizer(problem.model, 0.3, RHO, **options[0]))

    def closure():
        wrapped.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    regularizer = gradreg.GradientRegularizer(other.model, 0.3, RHO, **options[1])
    for _ in range(3):
        wrapped.step(closure)
        other.train(regularizer, optimizer)
    assert_close(problem.parameters, other.parameters, rtol=1e-12, atol=1e-14)


def test_ahead_moves_parameters_without_a_momentum_by_nothing():
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.GradientRegularizer(
        problem.model, 0.3, RHO, at=gradreg.Ahead(gradreg.Momentum(optimizer), rho=0.7)
    )
    problem.train(regularizer, optimizer, steps=2)
    del optimizer.state[problem.parameters[0]]["momentum_buffer"]
    moved = copy.deepcopy(problem)
    vectors = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in problem.parameters]
    with torch.no_grad():
        for p, v in zip(moved.parameters, vectors):
            p.sub_(v, alpha=0.7 / norm(vectors))
            p.grad = None
    gradreg.GradientRegularizer(moved.model, 0.3, RHO).backward(moved.loss)
    optimizer.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, moved.gradients, rtol=1e-9, atol=1e-12)
