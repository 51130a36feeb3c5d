"""A fraction of the batch and a split batch, each against its formula written out."""

import copy
import math

import pytest
import torch
from modes import CHEAP, RHO, Problem, dropping, norm, scaled, sgd
from problems import assert_close, assert_same

import gradreg


@pytest.mark.parametrize(("share", "rows"), [(0.3, 3), (0.01, 1), (0.99, 9)])
@pytest.mark.parametrize("ascent", ["gradient", "normalized"])
def test_fraction_is_its_formula(share, rows, ascent):
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, ascent=ascent, batch=gradreg.Fraction(share))
    loss = regularizer.backward(problem.loss, [problem.batch])
    part = problem.rows(0, rows)
    g_all, g_part = problem.gradient(), problem.gradient(part)
    along = scaled(g_part, RHO / (1 if ascent == "gradient" else norm(g_part)))
    moved = problem.gradient(part, displaced_by=along)
    expected = [g + 0.3 / RHO * (b - a) for g, a, b in zip(g_all, g_part, moved)]
    assert_close(problem.gradients, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, problem.loss().detach())
    read = regularizer.diagnostics()
    penalty = norm([0.3 / RHO * (b - a) for a, b in zip(g_part, moved)])
    assert float(read["grad_norm"]) == pytest.approx(norm(g_part), rel=1e-10)
    assert float(read["penalty_ratio"]) == pytest.approx(penalty / norm(g_part), rel=1e-8)


def test_cheap_is_a_quarter_of_the_batch_in_every_fourth_step():
    problem = Problem()
    optimizer = torch.optim.Adagrad(problem.parameters, lr=0.1)  # which has no momentum
    regularizer = gradreg.cheap(problem.model, 0.3, RHO)
    part = problem.rows(0, 3)
    for step in range(8):
        expected = problem.gradient()
        if step % 4 == 3:
            g = problem.gradient(part)
            moved = problem.gradient(part, displaced_by=scaled(g, RHO))
            expected = [whole + 0.3 / RHO * (b - a) for whole, a, b in zip(expected, g, moved)]
        problem.model.zero_grad()
        before = problem.forwards
        regularizer.backward(problem.loss, [problem.batch])
        if step % 4 == 3:
            assert_close(problem.gradients, expected, rtol=1e-9, atol=1e-12)
        else:
            assert_same(problem.gradients, expected)
        passes = 3 if step % 4 == 3 else 1  # the quarter, the same displaced, and the rest
        assert problem.forwards - before == passes + (step == 3), "and the check of the first penalty"
        optimizer.step()


def test_cheap_follows_a_ratio():
    problem = Problem()
    optimizer = sgd(problem, lr=0.01, momentum=0)
    regularizer = gradreg.cheap(problem.model, gradreg.TargetRatio(0.2, ramp=0), epsilon=0.5)
    problem.train(regularizer, optimizer, steps=120)
    assert float(regularizer.diagnostics()["penalty_ratio"]) == pytest.approx(0.2, rel=0.2)
    assert gradreg.cheap(problem.model).gamma == gradreg.every(gradreg.TargetRatio(0.2), 4)


@pytest.mark.parametrize("stop", [3, 4, 13])
def test_cheap_without_a_number_resumes_bit_for_bit(stop):
    """Also between a measurement and the step that reads it."""

    def start():
        problem = dropping()
        return problem, sgd(problem), gradreg.cheap(problem.model)

    torch.manual_seed(3)
    problem, optimizer, regularizer = start()
    problem.train(regularizer, optimizer, steps=stop)
    states = copy.deepcopy([thing.state_dict() for thing in (problem.model, optimizer, regularizer)])
    rng = torch.get_rng_state()
    problem.train(regularizer, optimizer, steps=20)

    resumed, *things = start()
    for thing, state in zip((resumed.model, *things), states):
        thing.load_state_dict(state)
    torch.set_rng_state(rng)
    resumed.train(things[1], things[0], steps=20)
    assert_same(resumed.model.state_dict(), problem.model.state_dict())
    assert str(things[1].state_dict()) == str(regularizer.state_dict())


def test_fraction_of_a_window_cuts_through_micro_batches():
    problem = Problem()
    fraction = gradreg.Fraction(0.6)
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=fraction, replay_check=False)
    window = [problem.rows(0, 5), problem.rows(5, 10)]
    regularizer.backward(lambda batch: problem.loss(batch) / 2, window)
    whole = Problem()
    gradreg.GradientRegularizer(whole.model, 0.3, RHO, batch=gradreg.Fraction(0.6)).backward(whole.loss, [whole.batch])
    assert_close(problem.gradients, whole.gradients, rtol=1e-10, atol=1e-12)
    assert problem.forwards == 5  # five rows and one, both again displaced, and the other four


def test_fraction_does_not_depend_on_a_loss_scale():
    plain, scaled_up = Problem(), Problem()
    for problem, scale in ((plain, 1.0), (scaled_up, 1024.0)):
        regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=gradreg.Fraction(0.3))
        regularizer.backward(problem.loss, [problem.batch], backward=lambda loss, s=scale: (s * loss).backward())
    assert_close([g / 1024 for g in scaled_up.gradients], plain.gradients, rtol=1e-10, atol=1e-12)


def test_fraction_adds_to_what_is_in_grad():
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=gradreg.Fraction(0.3))
    regularizer.backward(problem.loss, [problem.batch])
    once = [g.clone() for g in problem.gradients]
    regularizer.backward(problem.loss, [problem.batch])
    assert_close(problem.gradients, scaled(once, 2), rtol=1e-10, atol=1e-12)


def test_fraction_caps_the_penalty_against_the_gradient_of_its_rows():
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 30.0, RHO, batch=gradreg.Fraction(0.3), cap=0.5)
    regularizer.backward(problem.loss, [problem.batch])
    gap = [a - b for a, b in zip(problem.gradients, problem.gradient())]
    assert norm(gap) == pytest.approx(0.5 * norm(problem.gradient(problem.rows(0, 3))), rel=1e-8)


def test_fraction_of_dictionaries_and_nested_batches():
    problem = Problem()
    x, y = problem.batch
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=gradreg.Fraction(0.3))
    regularizer.backward(lambda batch: problem.loss((batch["x"][0], batch["y"])), [{"x": [x], "y": y, "epoch": 3}])
    other = Problem()
    gradreg.GradientRegularizer(other.model, 0.3, RHO, batch=gradreg.Fraction(0.3)).backward(other.loss, [other.batch])
    assert_same(problem.gradients, other.gradients)


@pytest.mark.parametrize(("share", "rows"), [(0.5, 5), (0.3, 3), (0.01, 1), (0.99, 9)])
@pytest.mark.parametrize("ascent", ["momentum", "gradient", "normalized"])
def test_split_is_its_formula_with_each_row_in_one_pass(share, rows, ascent):
    problem = Problem()
    optimizer = sgd(problem)
    choice = gradreg.Momentum(optimizer) if ascent == "momentum" else ascent
    regularizer = gradreg.GradientRegularizer(problem.model, share * RHO, RHO, ascent=choice, batch=gradreg.Split())
    problem.train(regularizer, optimizer, steps=2)
    here, ahead = problem.rows(0, 10 - rows), problem.rows(10 - rows, 10)
    first = problem.gradient(here)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in problem.parameters]
    along = {
        "momentum": scaled(momentum, -RHO / norm(momentum)),
        "gradient": scaled(first, RHO),
        "normalized": scaled(first, RHO / norm(first)),
    }[ascent]
    second = problem.gradient(ahead, displaced_by=along)
    optimizer.zero_grad()
    regularizer.backward(problem.loss, [problem.batch])
    expected = [(1 - share) * a + share * b for a, b in zip(first, second)]
    assert_close(problem.gradients, expected, rtol=1e-10, atol=1e-12)


def test_split_keeps_the_statistics_of_the_rows_at_theta():
    problem = dropping()
    optimizer = sgd(problem)
    regularizer = CHEAP["split, own gradient"](problem, optimizer)
    twin = copy.deepcopy(problem)
    regularizer.backward(problem.loss, [problem.batch])
    twin.loss(twin.rows(0, 5))
    assert_same(dict(problem.model.named_buffers()), dict(twin.model.named_buffers()))


@pytest.mark.parametrize("factor", [math.nan, math.inf, 0.0])
def test_split_displaces_nothing_along_a_gradient_that_cannot_be_used_and_leaves_it_visible(factor):
    problem = Problem()
    seen = []

    def loss(batch):
        seen.append([p.detach().clone() for p in problem.parameters])
        return problem.loss(batch) * (factor if len(seen) == 1 else 1.0)

    regularizer = gradreg.GradientRegularizer(problem.model, RHO / 2, RHO, batch=gradreg.Split())
    regularizer.backward(loss, [problem.batch])
    assert_same(seen[1], seen[0])
    assert all(g.isfinite().all() for g in problem.gradients) == (factor == 0)
    counts = regularizer.diagnostics()
    assert (int(counts["active_steps"]), int(counts["skipped_steps"])) == (0, 1)


def test_split_does_not_depend_on_a_loss_scale():
    plain, scaled_up = Problem(), Problem()
    for problem, scale in ((plain, 1.0), (scaled_up, 1024.0)):
        regularizer = gradreg.GradientRegularizer(problem.model, RHO / 2, RHO, batch=gradreg.Split())
        regularizer.backward(problem.loss, [problem.batch], backward=lambda loss, s=scale: (s * loss).backward())
    assert_close([g / 1024 for g in scaled_up.gradients], plain.gradients, rtol=1e-10, atol=1e-12)
