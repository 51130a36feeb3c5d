"""One pass: momentum, the previous gradient, and a displacement that comes back through any host's graph."""

import copy
import math

import pytest
import torch
from modes import BASES, DOORS, ONE_PASS, RHO, Problem, norm, scaled, sgd
from problems import assert_close, assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradreg


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("door", DOORS)
def test_momentum_takes_the_gradient_at_the_displaced_point_in_one_pass(base, sign, door):
    problem = Problem()
    make, key = BASES[base]
    optimizer = make(problem.parameters)
    regularizer = gradreg.msam(problem.model, optimizer, RHO, sign=sign)
    problem.train(regularizer, optimizer, steps=2)
    momentum = [optimizer.state[p][key].clone() for p in problem.parameters]
    expected = problem.gradient(displaced_by=scaled(momentum, sign * RHO / norm(momentum)))
    before, places = copy.deepcopy(problem.model.state_dict()), [p.data_ptr() for p in problem.parameters]
    problem.forwards = 0
    open_door, passes = DOORS[door]
    open_door(regularizer, optimizer, problem)
    assert problem.forwards == passes
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)
    read = regularizer.diagnostics()
    assert float(read["realized"].norm) == pytest.approx(1)
    assert (int(read["active_steps"]), int(read["skipped_steps"])) == (2, 1)
    assert_same(problem.model.state_dict(), before)
    assert [p.data_ptr() for p in problem.parameters] == places


@pytest.mark.parametrize("door", DOORS)
def test_the_first_step_has_no_momentum_and_is_plain(door):
    problem = Problem()
    optimizer = sgd(problem)
    DOORS[door][0](gradreg.msam(problem.model, optimizer, RHO), optimizer, problem)
    assert_close(problem.gradients, problem.gradient(), rtol=1e-12, atol=1e-14)


def test_momentum_looks_ahead_where_nesterov_does():
    """At ρ = lr · μ · ‖v‖ the displaced point is Nesterov's."""
    problem = Problem()
    optimizer = sgd(problem)
    plain = gradreg.GradientRegularizer(problem.model, 0, 1)
    problem.train(plain, optimizer, steps=3)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in problem.parameters]
    expected = problem.gradient(displaced_by=scaled(momentum, -0.1 * 0.9))
    optimizer.zero_grad()
    gradreg.msam(problem.model, optimizer, rho=0.1 * 0.9 * norm(momentum)).backward(problem.loss)
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sign", [-1, 1])
def test_previous_takes_the_gradient_of_the_step_before_as_ascent(sign):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.GradientRegularizer(problem.model, RHO, RHO, ascent=gradreg.Previous(sign))
    previous = problem.gradient()
    problem.train(regularizer, optimizer)
    assert_close(problem.gradients, previous, rtol=1e-12, atol=1e-14)
    for _ in range(2):
        expected = problem.gradient(displaced_by=scaled(previous, sign * RHO / norm(previous)))
        problem.train(regularizer, optimizer)
        assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)
        previous = [g.clone() for g in problem.gradients]
        torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-3)  # what is done to .grad later does not matter


def test_a_previous_gradient_that_is_not_finite_is_no_direction():
    problem = Problem()
    optimizer = sgd(problem, lr=0.0)
    regularizer = gradreg.GradientRegularizer(problem.model, RHO, RHO, ascent=gradreg.Previous())
    optimizer.zero_grad()
    regularizer.backward(lambda: problem.loss() * math.inf)
    optimizer.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, problem.gradient(), rtol=1e-12, atol=1e-14)
    counts = regularizer.diagnostics()
    assert (int(counts["active_steps"]), int(counts["skipped_steps"])) == (0, 2)


def test_an_optimizer_that_regularizes_takes_a_one_pass_mode():
    problem = Problem()
    base = sgd(problem)
    optimizer = gradreg.RegularizedOptimizer(base, gradreg.msam(problem.model, base, RHO))

    def closure():
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    twin = copy.deepcopy(problem)
    other = sgd(twin)
    for _ in range(3):
        optimizer.step(closure)
        twin.train(gradreg.msam(twin.model, other, RHO), other)
    assert problem.forwards == 3
    assert_close(problem.parameters, twin.parameters, rtol=1e-12, atol=1e-14)


def test_what_is_not_selected_does_not_move_in_one_pass():
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.msam(problem.model, optimizer, RHO, include="0.*")
    problem.train(regularizer, optimizer, steps=2)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in problem.parameters]
    factor = -RHO / norm(momentum[:2])
    expected = problem.gradient(displaced_by=[factor * v if k < 2 else 0 * v for k, v in enumerate(momentum)])
    optimizer.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)


def test_low_precision_weights_that_do_not_move_are_told():
    problem = Problem()
    problem.model.bfloat16()
    problem.batch = problem.batch[0].bfloat16(), problem.batch[1]
    optimizer = sgd(problem)
    regularizer = gradreg.msam(problem.model, optimizer, 1e-5)
    problem.train(regularizer, optimizer)
    with pytest.warns(UserWarning, match="Rounding realized only"):
        problem.train(regularizer, optimizer)


class Tied(nn.Module):
    """A weight whose gradient arrives in parts, within the backward pass, if the checkpoints are reentrant."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            if self.reentrant:
                x = checkpoint(lambda h: self.shared(h).tanh(), x, use_reentrant=True)
            else:
                x = self.shared(x).tanh()
        return self.last(x)


def _tied(reentrant, steps, make):
    torch.manual_seed(0)
    problem = Problem(Tied(reentrant))
    optimizer = sgd(problem)
    regularizer = make(problem, optimizer)
    problem.train(regularizer, optimizer, steps)
    return problem.parameters


def test_one_pass_through_reentrant_checkpoints_is_the_same():
    make = ONE_PASS["momentum"]
    assert_close(_tied(True, 4, make), _tied(False, 4, make), rtol=1e-12, atol=1e-14)


def test_a_selection_through_reentrant_checkpoints_is_the_same():
    def make(problem, optimizer):
        return gradreg.GradientRegularizer(problem.model, 0.1, RHO, include="*shared*")

    assert_close(_tied(True, 3, make), _tied(False, 3, make), rtol=1e-12, atol=1e-14)
