from dataclasses import asdict, replace

import pytest
import torch

from gradreg.lab.data import load
from gradreg.lab.methods import METHODS
from gradreg.lab.models import build
from gradreg.lab.player import run_all
from gradreg.lab.runs import Job, measure, run
from gradreg.studies.demo.tasks import TASKS
from gradreg.studies.demo.tune import GRIDS

DIGITS, MLP, *_ = (replace(task, epochs=2) for task in TASKS.values())


SETTINGS = {
    **{name: grid[0] for name, grid in GRIDS.items()},
    "Central": GRIDS["F-GR"][0],
    **dict.fromkeys(("ASAM", "MSAM", "Previous", "Previous-down"), GRIDS["SAM"][0]),
    "Split": {"gamma": 0.1, "epsilon": 0.2},
}


def config(method, task=DIGITS, settings=None, **changes):
    settings = SETTINGS[method] if settings is None else settings
    return replace(task, method=method, learning_rate=0.05, weight_decay=1e-3, **settings, **changes)


def play(*args, scored_on="test", num_records=10, **changes):
    return run(Job(config(*args, **changes), scored_on, num_records))


def metrics(result):
    return {key: value for key, value in asdict(result).items() if key != "seconds"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_reproducible_bit_for_bit(method):
    torch.manual_seed(1)
    first = metrics(play(method))
    torch.manual_seed(2)
    assert metrics(play(method)) == first
    assert metrics(play(method, seed=1)) != first


@pytest.mark.parametrize("method", ["F-GR", "B-GR", "Central", "DB"])
def test_no_strength_is_plain_sgd(method):
    assert metrics(play(method, settings={**SETTINGS[method], "gamma": 0.0})) == metrics(play("SGD"))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("SGD", "Flooding")])
def test_a_method_changes_the_run(method):
    assert metrics(play(method)) != metrics(play("SGD"))


def test_flooding_below_the_loss_is_plain_sgd_and_above_it_keeps_the_loss_up():
    plain = play("SGD")
    assert metrics(play("Flooding", settings={"level": 0.0})) == metrics(plain)
    assert play("Flooding", settings={"level": 1.9}).train_loss > plain.train_loss


def test_the_trace_starts_at_the_first_step_and_ends_at_the_last():
    result = play("SGD")
    assert [point["step"] for point in result.trace] == [0, 6, 12]
    assert result.trace[-1]["grad_norm"] == result.grad_norm
    assert len(play("SGD", num_records=0).trace) == 1


def test_recording_and_the_rows_that_are_scored_do_not_change_training():
    plain, unseen = play("SGD"), play("SGD", num_records=0, scored_on="validation")
    assert plain.train_loss == unseen.train_loss
    assert plain.score != unseen.score


def test_the_gradient_norm_is_that_of_the_mean_loss():
    """One parameter moved by h along ∇L changes the loss by h‖∇L‖, to first order."""
    data = load(MLP)
    model, train = build(MLP, data), data.train
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
    result = run(Job(replace(config("SGD", task=MLP), learning_rate=1e3)))
    assert result.diverged


def test_two_processes_give_what_one_gives():
    jobs = [Job(config("SGD", seed=seed)) for seed in (0, 1)]
    alone = {k: metrics(result) for k, result in run_all(jobs, workers=1)}
    assert {k: metrics(result) for k, result in run_all(jobs, workers=2)} == alone
