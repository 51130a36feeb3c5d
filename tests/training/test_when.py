"""When a second pass runs: AE-SAM's test, random steps, a scaled radius."""

import math
import statistics

import pytest
import torch
from modes import RHO, Problem, norm, scaled, sgd
from problems import assert_close

import gradreg
from gradreg.training.schedule import RunningTest


def test_the_running_test_is_that_of_ae_sam():
    squares = torch.rand(50).square().tolist()
    test = RunningTest(gradreg.LargeGradients(threshold=0.3, decay=0.8))
    mean, variance = squares[0], 0.0
    for step, n in enumerate(squares):
        mean = 0.8 * mean + 0.2 * n if step else n
        variance = 0.8 * variance + 0.2 * (n - mean) ** 2
        assert test.is_large(n, step) == (n >= mean + 0.3 * math.sqrt(variance))
    assert not test.is_large(math.nan, 0)
    assert test.mean == pytest.approx(mean)


def test_a_threshold_may_change_with_the_step():
    never = RunningTest(gradreg.LargeGradients(threshold=lambda step: -100.0 if step == 3 else 100.0))
    never.is_large(1.0, 0)
    assert [never.is_large(1.1, step) for step in range(1, 5)] == [False, False, True, False]


@pytest.mark.parametrize("door", ["backward", "perturbed", "closure"])
def test_the_second_pass_runs_only_where_the_gradient_is_large(door):
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, when=gradreg.LargeGradients())
    optimizer = sgd(problem, lr=0.0)

    def run(factor):
        if door == "perturbed":
            optimizer.zero_grad()
            (factor * problem.loss()).backward()
            with regularizer.perturbed():
                (factor * problem.loss()).backward()
        elif door == "backward":
            optimizer.zero_grad()
            regularizer.backward(lambda: factor * problem.loss())
        else:

            def closure():
                problem.model.zero_grad()
                loss = factor * problem.loss()
                loss.backward()
                return loss

            regularizer.run_closure(closure)
        return [g / factor for g in problem.gradients]

    first = problem.gradient()
    run(1.0)
    assert_close(run(0.1), first, rtol=1e-12, atol=1e-14)  # small beside the first: g1
    large = run(10.0)
    assert norm([a - b for a, b in zip(large, first)]) > 1e-3 * norm(first)
    counts = regularizer.diagnostics()
    assert (int(counts["active_steps"]), int(counts["skipped_steps"])) == (2, 1)


def test_bernoulli_draws_its_share_of_the_steps():
    gamma = gradreg.bernoulli(gradreg.warmup(0.2, 10), probability=0.3, seed=4)
    values = [gamma(step) for step in range(20_000)]
    assert statistics.fmean(v > 0 for v in values[10:]) == pytest.approx(0.3, abs=0.015)
    assert set(values[10:]) == {0.0, 0.2}
    assert values == [gamma(step) for step in range(20_000)]
    other = gradreg.bernoulli(0.2, probability=0.3, seed=5)
    assert values[10:100] != [other(step) for step in range(10, 100)]


def test_sharpness_aware_every_third_step_with_a_scaled_radius():
    problem = Problem()
    regularizer = gradreg.sam(problem.model, gradreg.every(RHO, 3, scale=3))
    first = problem.gradient()
    for step in range(3):
        problem.model.zero_grad()
        regularizer.backward(problem.loss)
        if step < 2:
            assert_close(problem.gradients, first, rtol=1e-12, atol=1e-14)
    along = scaled(first, 3 * RHO / norm(first))
    assert_close(problem.gradients, problem.gradient(displaced_by=along), rtol=1e-12, atol=1e-14)
