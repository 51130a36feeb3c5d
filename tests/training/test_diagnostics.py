"""Diagnostics against what can be computed from the gradients themselves."""

import math

import pytest
import torch
from methods import DOORS, EPSILON, GAMMA, METHODS, Method, gradient_at
from problems import Trial, dense
from torch.nn import functional as F

from gradreg import GradientRegularizer


def flat(tensors, like):
    return torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in dense(tensors, like)])


def measure(trial, method, **options):
    regularizer = method.regularizer(trial, **options)
    torch.manual_seed(2)
    DOORS[method.door](regularizer, trial.loss)
    return regularizer.diagnostics()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_measurements_agree_with_the_gradients(trial, method):
    found = measure(trial, method)
    first = flat(gradient_at(Trial(trial.problem), trial.weights[0]), trial.weights[0])
    mixed = flat(trial.gradients(), trial.weights[0])
    close = {"rtol": 1e-7, "atol": 1e-9, "check_dtype": False}
    torch.testing.assert_close(found["grad_norm"], first.norm(), **close)
    torch.testing.assert_close(found["penalty_ratio"], (mixed - first).norm() / first.norm(), **close)
    assert (int(found["active_steps"]), int(found["skipped_steps"])) == (1, 0)


@pytest.mark.parametrize("gamma", [GAMMA, EPSILON])
@pytest.mark.parametrize("method", [m for m in METHODS if m.scheme in ("forward", "backward")], ids=str)
def test_the_cosine_is_that_of_both_gradients(trial, method, gamma):
    found = measure(trial, method, gamma=gamma)
    first, second = (flat(gradient_at(Trial(trial.problem), w), w) for w in trial.weights)
    expected = torch.nn.functional.cosine_similarity(first, second, dim=0)
    torch.testing.assert_close(found["cosine"], expected, rtol=1e-7, atol=1e-7)


def test_the_exact_scheme_has_no_second_gradient():
    found = measure(Trial("mlp"), Method("exact", "gradient", "backward"))
    assert math.isnan(found["cosine"])


@pytest.mark.parametrize("method", [m for m in METHODS if m.scheme in ("forward", "backward")], ids=str)
def test_in_float64_the_displacement_is_realized(trial, method):
    realized = measure(trial, method)["realized"]
    assert float(realized.cosine) == pytest.approx(1, abs=1e-6)
    assert float(realized.norm) == pytest.approx(1, abs=1e-6)


def windows(door, regularizer, trial, batches, factor=1.0):
    """One window of micro-batches through each door."""

    def loss(batch):
        return F.cross_entropy(trial.model(batch[0]), batch[1]) / len(batches)

    def run():
        for batch in batches:
            (loss(batch) * factor).backward()

    def closure():
        trial.model.zero_grad()
        run()
        return torch.zeros(())

    if door == "backward":
        regularizer.backward(loss, batches, backward=lambda value: (value * factor).backward())
    elif door == "closure":
        regularizer.run_closure(closure)
    else:
        run()
        with regularizer.perturbed(grad_scale=factor):
            run()


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("door", DOORS)
def test_a_window_is_measured_as_one_batch(door, num):
    whole, trial = Trial("mlp"), Trial("mlp")
    expected = measure(whole, Method("forward", "gradient", "backward"))
    regularizer = GradientRegularizer(trial.model, GAMMA, EPSILON)
    windows(door, regularizer, trial, list(zip(*(part.chunk(num) for part in trial.batch))))
    found = regularizer.diagnostics()
    for key in ("grad_norm", "penalty_ratio", "cosine", "realized"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("door", ["backward", "perturbed"])
def test_a_loss_scale_is_divided_out(door):
    whole, trial = Trial("mlp"), Trial("mlp")
    expected = measure(whole, Method("forward", "gradient", "backward"))
    regularizer = GradientRegularizer(trial.model, GAMMA, EPSILON)
    windows(door, regularizer, trial, [trial.batch], factor=4096.0)
    found = regularizer.diagnostics()
    for key in ("grad_norm", "penalty_ratio", "cosine", "realized"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-7, atol=1e-7)


def test_every_reading_is_followed_by_a_measurement():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, GAMMA, EPSILON)
    for _ in range(3):
        regularizer.backward(trial.loss)
        with torch.no_grad():
            trial.model[0].weight.mul_(1.5)
        other = Trial("mlp")
        other.model.load_state_dict(trial.model.state_dict())
        regularizer.diagnostics()
        trial.model.zero_grad()
        regularizer.backward(trial.loss)
        expected = GradientRegularizer(other.model, GAMMA, EPSILON)
        expected.backward(other.loss)
        for key in ("grad_norm", "penalty_ratio", "cosine"):
            torch.testing.assert_close(regularizer.diagnostics()[key], expected.diagnostics()[key])


def test_nothing_is_known_before_the_first_step():
    found = GradientRegularizer(Trial("mlp").model, GAMMA, EPSILON).diagnostics()
    assert math.isnan(found["grad_norm"])
    assert math.isnan(found["penalty_ratio"])
    assert int(found["active_steps"]) == int(found["skipped_steps"]) == 0


@pytest.mark.parametrize("gamma", [0.3 * EPSILON, 0.7 * EPSILON, EPSILON, 3 * EPSILON])
def test_measuring_does_not_change_a_bit(gamma):
    """Or a run that was resumed, which measures its first step, would not be the run that was not."""
    gradients = []
    for is_wanted in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 5))
        x = torch.randn(32, 20)
        regularizer = GradientRegularizer(model, gamma, EPSILON)
        regularizer._carried.diagnostics.is_wanted = is_wanted
        regularizer.backward(lambda model=model, x=x: model(x).square().mean())
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
