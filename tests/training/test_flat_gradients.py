"""Gradients that are views into one flat buffer, as some optimizers and reducers keep them: they stay such views."""

import pytest
import torch
from methods import DOORS
from problems import PROBLEMS, Trial

from gradreg import GradientRegularizer

MLP = next(problem for problem in PROBLEMS if problem.name == "mlp")


def flatten_gradients(model):
    """`.grad` of every parameter becomes a view into one buffer, which is returned."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
    return flat


@pytest.mark.parametrize("options", [{}, {"exclude": "*bias"}, {"scheme": "central"}, {"cap": 0.01}], ids=str)
def test_the_first_door_adds_into_the_buffer(options):
    plain, trial = Trial(MLP), Trial(MLP)
    flat = flatten_gradients(trial.model)
    for of in (plain, trial):
        regularizer = GradientRegularizer(of.model, 0.05, 0.1, **options)
        for _ in range(2):  # the second call adds to what the first left
            regularizer.backward(of.loss)
    expected = torch.cat([p.grad.flatten() for p in plain.model.parameters()])
    torch.testing.assert_close(flat, expected)
    assert all(p.grad.untyped_storage().data_ptr() == flat.data_ptr() for p in trial.model.parameters())


@pytest.mark.parametrize("door", ["perturbed", "closure"])
def test_the_other_doors_leave_it_in_the_buffer(door):
    plain, trial = Trial(MLP), Trial(MLP)
    flat = flatten_gradients(trial.model)
    trial.model.zero_grad = lambda set_to_none=True: flat.zero_()  # such buffers are cleared in place
    for of in (plain, trial):
        DOORS[door](GradientRegularizer(of.model, 0.05, 0.1), of.loss)
    torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in plain.model.parameters()]))
    assert all(p.grad.untyped_storage().data_ptr() == flat.data_ptr() for p in trial.model.parameters())


def test_after_an_exception_the_buffer_is_as_it_was():
    trial = Trial(MLP)
    flat = flatten_gradients(trial.model)
    flat += 1.0
    calls = []

    def failing():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trial.loss()

    with pytest.raises(KeyboardInterrupt):
        GradientRegularizer(trial.model, 0.05, 0.1).backward(failing)
    assert torch.equal(flat, torch.ones_like(flat))
    assert all(p.grad.untyped_storage().data_ptr() == flat.data_ptr() for p in trial.model.parameters())
