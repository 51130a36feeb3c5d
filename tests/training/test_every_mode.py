"""What every mode below two passes keeps: weights that come back, bit-exact resume, plain training at γ = 0."""

import copy
import io

import pytest
import torch
from modes import CHEAP, ONE_PASS, RHO, Problem, dropping, each_mode, sgd
from problems import assert_same
from torch import nn
from torch.nn import functional as F

import gradreg
from gradreg.training import anatomy, combination, displacement, second_pass


@each_mode
def test_steps_saved_and_resumed_are_the_same_steps_bit_for_bit(mode):
    def start():
        problem = dropping()
        optimizer = sgd(problem)
        return problem, optimizer, CHEAP[mode](problem, optimizer)

    problem, optimizer, regularizer = start()
    torch.manual_seed(3)
    problem.train(regularizer, optimizer, steps=4)
    file = io.BytesIO()
    states = [problem.model.state_dict(), optimizer.state_dict(), regularizer.state_dict(), torch.get_rng_state()]
    torch.save(states, file)
    problem.train(regularizer, optimizer, steps=4)

    file.seek(0)
    weights, of_optimizer, of_regularizer, rng = torch.load(file, weights_only=True)
    resumed, other, again = start()
    resumed.model.load_state_dict(weights)
    other.load_state_dict(of_optimizer)
    again.load_state_dict(of_regularizer)
    torch.set_rng_state(rng)
    resumed.train(again, other, steps=4)
    assert_same(resumed.model.state_dict(), problem.model.state_dict())
    assert str(again.state_dict()) == str(regularizer.state_dict())


@each_mode
def test_copies_go_on_as_the_original_does(mode):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=2)
    twin, other, again = copy.deepcopy((problem, optimizer, regularizer))
    problem.train(regularizer, optimizer, steps=2)
    twin.train(again, other, steps=2)
    assert_same(twin.model.state_dict(), problem.model.state_dict())


@each_mode
def test_zero_gamma_is_plain_training_bit_for_bit(mode):
    if "ahead" in mode:
        pytest.skip("moves the one pass too")
    problem, plain = dropping(), dropping()
    optimizer, other = sgd(problem), sgd(plain)
    regularizer = CHEAP[mode](problem, optimizer)
    regularizer.gamma = 0.0
    for trial, base, method in ((problem, optimizer, regularizer), (plain, other, None)):
        torch.manual_seed(5)
        for _ in range(3):
            base.zero_grad()
            if method is None:
                trial.loss().backward()
            else:
                method.backward(trial.loss, [trial.batch])
            base.step()
    assert_same(problem.model.state_dict(), plain.model.state_dict())
    assert problem.forwards == plain.forwards


@each_mode
@pytest.mark.parametrize("failing", [1, 2])
def test_weights_come_back_after_an_exception(mode, failing):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=2)
    before, places = copy.deepcopy(problem.model.state_dict()), [p.data_ptr() for p in problem.parameters]
    problem.forwards = 0

    def failing_loss(batch):
        loss = problem.loss(batch)
        if problem.forwards == failing:
            raise KeyboardInterrupt
        return loss

    optimizer.zero_grad()
    try:
        regularizer.backward(failing_loss, [problem.batch])
    except KeyboardInterrupt:
        pass
    else:
        assert problem.forwards < failing  # the mode runs fewer passes
    assert_same(problem.model.state_dict(), before)
    assert [p.data_ptr() for p in problem.parameters] == places
    problem.train(regularizer, optimizer)  # and goes on


@pytest.mark.parametrize("mode", ONE_PASS)
def test_a_state_dict_of_displaced_weights_is_an_error(mode):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=2)
    problem.model.state_dict()  # between steps the weights are the true ones
    seen = []

    def saving(batch):
        try:
            seen.append(problem.model.state_dict())
        except RuntimeError as error:
            seen.append(error)
        return problem.loss(batch)

    optimizer.zero_grad()
    regularizer.backward(saving, [problem.batch])
    assert isinstance(seen[-1], RuntimeError)
    assert "displaced" in str(seen[-1])


@pytest.mark.parametrize("mode", ONE_PASS)
def test_randomness_is_that_of_one_pass_over_the_batch(mode):
    problem = Problem(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer)
    problem.forwards = 0
    torch.manual_seed(1)
    problem.train(regularizer, optimizer)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    parts = [5, 5] if "split" in mode else [10]
    for rows in parts:
        F.dropout(torch.ones(rows, 8).double(), 0.3)
    assert torch.equal(torch.get_rng_state(), after)
    assert problem.forwards == len(parts)


@each_mode
def test_nothing_is_read_by_the_host(mode):
    """A tensor on the meta device has no values: whatever asks for one raises."""
    if mode == "large gradients":
        pytest.skip("decides on the host, and says so")
    problem = Problem()
    problem.model.to("meta")
    problem.batch = tuple(t.to("meta") for t in problem.batch)
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=4)
    assert regularizer.step == 4
    assert all(g.device.type == "meta" for g in problem.gradients)


@pytest.mark.parametrize("mode", ["momentum", "split", "ahead"])
def test_a_known_direction_takes_no_memory_beyond_the_base_optimizer(mode, monkeypatch):
    from contract import UNIT, usual_peak

    monkeypatch.setattr(anatomy, "LARGE_MODEL", 10 * 256 * 256)  # a large model, where memory counts
    for module in (combination, displacement, second_pass):
        monkeypatch.setattr(module, "LARGE", 256 * 256)

    def step(regularized):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(10)))
        batch = torch.randn(4, 256), torch.randint(256, (4,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

        def loss(pair):
            return F.cross_entropy(model(pair[0]), pair[1])

        if not regularized:
            return lambda: loss(batch).backward()
        if mode == "momentum":
            regularizer = gradreg.msam(model, optimizer, RHO)
        elif mode == "ahead":
            ahead = gradreg.Ahead(gradreg.Momentum(optimizer), RHO)
            regularizer = gradreg.GradientRegularizer(model, RHO / 2, RHO, batch=gradreg.Fraction(0.5), at=ahead)
        else:
            momentum = gradreg.Momentum(optimizer)
            regularizer = gradreg.GradientRegularizer(model, RHO / 2, RHO, ascent=momentum, batch=gradreg.Split())
        return lambda: regularizer.backward(loss, [batch])

    extra = (usual_peak(lambda: step(True)) - usual_peak(lambda: step(False))) / UNIT
    assert extra < {"momentum": 2.5, "split": 12.5, "ahead": 13.5}[mode]  # of ten; a first step measures
