from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from idx_files import write

from gradreg.lab.config import FIELDS, RunConfig
from gradreg.lab.data import idx, load
from gradreg.lab.methods import METHODS
from gradreg.lab.models import build
from gradreg.lab.player import run_all
from gradreg.lab.runs import Job, measure, run
from gradreg.studies.demo.tasks import TASKS
from gradreg.studies.demo.tune import GRIDS

DIGITS, MLP, *_ = (replace(task, epochs=2) for task in TASKS.values())


SIZES = {
    "mlp": {"depth": 2, "width": 8},
    "cnn": {},
    "resnet18": {"depth": 10},
    "wideresnet": {"depth": 10, "width": 1},
}
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


CHANGED = {
    "data": ({"model": "mlp"}, {"data": "digits", "path": None}),
    "num_train": ({}, {"num_train": 300}),
    "random_labels": ({}, {"random_labels": 0.5}),
    "augment": ({}, {"augment": True}),
    "shrink": ({}, {"shrink": 2}),
    "model": ({"depth": None}, {"model": "mlp"}),
    "depth": ({}, {"depth": 2}),
    "width": ({}, {"width": 5}),
    "patch": ({"model": "vit", "width": 8, "patch": 4}, {"patch": 2}),
    "method": ({}, {"method": "B-GR"}),
    "gamma": ({}, {"gamma": 0.2}),
    "ratio": ({"gamma": None, "ratio": 0.3}, {"ratio": 0.1}),
    "epsilon": ({}, {"epsilon": 0.1}),
    "rho": ({"method": "SAM", "gamma": None, "epsilon": None, "rho": 0.1}, {"rho": 0.2}),
    "level": ({"method": "Flooding", "gamma": None, "epsilon": None, "level": 1.0}, {"level": 2.0}),
    "ascent": ({}, {"ascent": "normalized"}),
    "warmup": ({}, {"warmup": 0.0}),
    "fraction": ({}, {"fraction": 0.5}),
    "lookahead": ({}, {"lookahead": 0.5}),
    "period": ({}, {"period": 2}),
    "start": ({}, {"start": 0.5}),
    "probability": ({}, {"probability": 0.5}),
    "threshold": ({}, {"threshold": 0.0}),
    "optimizer": ({}, {"optimizer": "adamw"}),
    "learning_rate": ({}, {"learning_rate": 0.2}),
    "weight_decay": ({}, {"weight_decay": 0.1}),
    "momentum": ({}, {"momentum": 0.5}),
    "batch_size": ({}, {"batch_size": 40}),
    "epochs": ({}, {"epochs": 3}),
    "precision": ({}, {"precision": "bf16"}),
    "seed": ({}, {"seed": 1}),
    **{f"activation, {name}": ({"model": name, **size}, {"activation": "silu"}) for name, size in SIZES.items()},
}


@pytest.fixture
def small(tmp_path):
    """A run on images of noise."""
    dice = np.random.default_rng(0)
    files = {}
    for part, rows in (("train", 400), ("t10k", 50)):
        files[f"{part}-images-idx3-ubyte"] = dice.integers(0, 256, (rows, 8, 8), dtype=np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = dice.integers(0, 4, rows, dtype=np.uint8)
    write(tmp_path, files)
    idx._read.cache_clear()
    model = {"model": "cnn", "depth": 1, "width": 4, "method": "F-GR", "gamma": 0.3, "epsilon": 0.3}
    return RunConfig(data="idx", path=str(tmp_path), num_train=200, batch_size=50, epochs=2, **model)


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_changes_the_run(name, small):
    """A field that is read and not obeyed makes every number of a study a wrong one."""
    around, change = CHANGED[name]
    base = replace(small, **around)
    assert metrics(run(Job(replace(base, **change)))) != metrics(run(Job(base)))


def test_no_field_is_left_out():
    elsewhere = {"file", "path"}  # where a task and its data are
    alike = {"compile", "channels_last", "device"}  # rounding alone: test_trainer.py
    assert {name.split(",")[0] for name in CHANGED} | elsewhere | alike == set(FIELDS)


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
