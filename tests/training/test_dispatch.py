"""What a step dispatches beyond its passes is a fixed number of operations, however many parameters there are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import gradreg
from gradreg.lab.cost.steps import count_operations

WIDTH = 8


class Setting:
    """A model of `depth` equal layers, its loss and its optimizer."""

    def __init__(self, depth):
        self.model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)))
        self.x, self.y = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def loss(self):
        return F.mse_loss(self.model(self.x), self.y)

    def passes(self, number):
        """No method: `number` passes and a step of the optimizer."""

        def step():
            for _ in range(number):
                self.optimizer.zero_grad()
                self.loss().backward()
            self.optimizer.step()

        return step


def by_backward(setting, regularizer):
    def step():
        setting.optimizer.zero_grad()
        regularizer.backward(setting.loss)
        setting.optimizer.step()

    return step


def by_perturbed(setting, regularizer):
    def step():
        setting.optimizer.zero_grad()
        setting.loss().backward()
        with regularizer.perturbed():
            setting.optimizer.zero_grad()
            setting.loss().backward()
        setting.optimizer.step()

    return step


def by_closure(setting, regularizer):
    optimizer = gradreg.RegularizedOptimizer(setting.optimizer, regularizer)

    def closure():
        optimizer.zero_grad()
        loss = setting.loss()
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


DOORS = {"backward": by_backward, "perturbed": by_perturbed, "closure": by_closure}
METHODS = {  # and the number of its passes
    "F-GR": (lambda model: gradreg.GradientRegularizer(model, 0.05, 0.1), 2),
    "SAM": (lambda model: gradreg.sam(model, rho=0.05), 2),
    "Central": (lambda model: gradreg.GradientRegularizer(model, 0.05, 0.1, scheme="central"), 3),
}


def beyond_passes(method, door, depth):
    make, number = METHODS[method]
    ours, plain = Setting(depth), Setting(depth)
    return count_operations(DOORS[door](ours, make(ours.model))) - count_operations(plain.passes(number))


SERVED = [(m, d) for m in METHODS for d in DOORS if (m, d) != ("Central", "perturbed")]  # one block is one pass


@pytest.mark.parametrize(("method", "door"), SERVED)
def test_operations_beyond_the_passes_do_not_grow_with_the_number_of_parameters(method, door):
    few, many = (beyond_passes(method, door, depth) for depth in (3, 12))
    assert 0 < few == many


@pytest.mark.parametrize(("method", "door"), SERVED)
def test_nor_do_they_on_the_path_of_an_accelerator(method, door, masked):
    few, many = (beyond_passes(method, door, depth) for depth in (3, 12))
    assert 0 < few == many


def test_a_loop_that_handles_each_parameter_by_itself_is_found_out():
    def per_parameter(setting):
        passes = setting.passes(2)

        def step():
            passes()
            for p in setting.model.parameters():
                p.detach().mul(2)

        return step

    beyond = [count_operations(per_parameter(Setting(d))) - count_operations(Setting(d).passes(2)) for d in (3, 12)]
    assert beyond == [2 * 2 * 3, 2 * 2 * 12]


def test_work_in_hooks_is_counted():
    setting = Setting(3)
    plain = count_operations(setting.passes(2))
    for p in setting.model.parameters():
        p.register_hook(lambda g: g.lerp(g, 0.5))
    assert count_operations(setting.passes(2)) == plain + 2 * 6


@pytest.mark.parametrize(("method", "door"), SERVED)
def test_no_number_is_copied_to_an_accelerator(method, door, masked):
    """A tensor made of a number on the host is a copy, which waits for the device and which no CUDA graph can hold."""
    setting = Setting(3)
    regularizer = METHODS[method][0](setting.model)
    step = DOORS[door](setting, regularizer)
    step(), step()
    regularizer.diagnostics()  # the next step measures, too
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    names = {event.name for event in profiled.events() or ()}
    assert "aten::addmm" in names
    assert "aten::lift_fresh" not in names
