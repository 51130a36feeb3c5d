from dataclasses import asdict, replace

import pytest
import torch

from gradreg.lab.methods import METHODS
from gradreg.lab.models import build
from gradreg.lab.pool import run_all
from gradreg.lab.runs import Config, measure, run
from gradreg.lab.tasks import TASKS, load

DIGITS, MLP, *_ = (replace(task, epochs=2) for task in TASKS.values())


def config(method, task=DIGITS, settings=None, **changes):
    return Config(task, method, 0.05, 1e-3, METHODS[method].grid[0] if settings is None else settings, **changes)


def metrics(result):
    return {key: value for key, value in asdict(result).items() if key != "seconds"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_reproducible_bit_for_bit(method):
    torch.manual_seed(1)
    first = metrics(run(config(method)))
    torch.manual_seed(2)
    assert metrics(run(config(method))) == first
    assert metrics(run(config(method, seed=1))) != first


@pytest.mark.parametrize("method", ["F-GR", "B-GR", "DB"])
def test_no_strength_is_plain_sgd(method):
    assert metrics(run(config(method, settings={"gamma": 0.0}))) == metrics(run(config("SGD")))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("SGD", "Flooding")])
def test_a_method_changes_the_run(method):
    assert metrics(run(config(method))) != metrics(run(config("SGD")))


def test_flooding_below_the_loss_is_plain_sgd_and_above_it_keeps_the_loss_up():
    plain = run(config("SGD"))
    assert metrics(run(config("Flooding", settings={"level": 0.0}))) == metrics(plain)
    assert run(config("Flooding", settings={"level": 1.9})).train_loss > plain.train_loss


def test_the_trace_starts_at_the_first_step_and_ends_at_the_last():
    result = run(config("SGD"))
    assert [point["step"] for point in result.trace] == [0, 6, 12]
    assert result.trace[-1]["grad_norm"] == result.grad_norm
    assert len(run(config("SGD", num_records=0)).trace) == 1


def test_recording_and_the_rows_that_are_scored_do_not_change_training():
    plain, unseen = run(config("SGD")), run(config("SGD", num_records=0, scored_on="validation"))
    assert plain.train_loss == unseen.train_loss
    assert plain.accuracy != unseen.accuracy


def test_the_gradient_norm_is_that_of_the_mean_loss():
    """One parameter moved by h along ∇L changes the loss by h‖∇L‖, to first order."""
    model, train = build(MLP, 0), load(MLP, 0).train
    at_start = measure(model, train)
    loss = torch.nn.functional.cross_entropy(model(train.x), train.y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    step = 1e-2
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter += step * gradient / at_start["grad_norm"]
    rise = (measure(model, train)["train_loss"] - at_start["train_loss"]) / step
    assert rise == pytest.approx(at_start["grad_norm"], rel=0.05)


def test_a_diverged_run_says_so():
    result = run(replace(config("SGD", task=MLP), learning_rate=1e6))
    assert result.diverged


def test_two_processes_give_what_one_gives():
    configs = [config("SGD", seed=seed) for seed in (0, 1)]
    alone = {k: metrics(result) for k, result in run_all(configs, workers=1)}
    assert {k: metrics(result) for k, result in run_all(configs, workers=2)} == alone
