"""Hosts known by their closures, here by stand-ins; the real ones are in tests/integrations."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradreg
from gradreg.training.hosts import loss_division


class Module(nn.Linear):
    """What a Lightning closure brings along."""

    automatic_optimization = True

    def __init__(self, accumulate=1, clip=None):
        super().__init__(2, 1)
        self.trainer = SimpleNamespace(accumulate_grad_batches=accumulate, gradient_clip_val=clip)

    def configure_gradient_clipping(self):
        pass

    configure_gradient_clipping.__module__ = "lightning.pytorch.core.module"


class OwnClipping(Module):
    def configure_gradient_clipping(self):
        pass


def wrap_closure(module, optimizer, closure):
    return closure()


wrap_closure.__module__ = "lightning.pytorch.plugins.precision.precision"


def take_a_step(module):
    regularizer = gradreg.GradientRegularizer(module, 0.1, 0.1)
    optimizer = gradreg.RegularizedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), regularizer)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(4, 2)).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure=functools.partial(wrap_closure, module, optimizer, closure))


def test_a_plain_lightning_closure_is_run():
    assert take_a_step(Module()) > 0


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Module(accumulate=2), "accumulate_grad_batches=2"),
        (Module(clip=1.0), "gradient_clip_val=1.0"),
        (OwnClipping(), "configure_gradient_clipping clips"),
    ],
)
def test_what_two_calls_would_make_wrong_is_refused(module, message):
    before = module.weight.clone()
    with pytest.raises(ValueError, match=message):
        take_a_step(module)
    assert torch.equal(module.weight, before)


def test_a_division_by_accelerate_is_part_of_the_loss():
    class Accelerator:
        gradient_accumulation_steps = 3

        def backward(self, loss):
            (1000 * (loss / 3)).backward()

    assert loss_division(Accelerator().backward) == 3
    assert loss_division(torch.Tensor.backward) == loss_division(lambda loss: None) == 1
    model = nn.Linear(2, 1).double()
    regularizer = gradreg.GradientRegularizer(model, 0.1, 0.1)

    def loss_fn():
        return model(torch.ones(4, 2, dtype=torch.float64)).square().mean()

    regularizer.backward(loss_fn, backward=Accelerator().backward)
    scaled = model.weight.grad / 1000
    model.zero_grad()
    regularizer.backward(lambda: loss_fn() / 3)
    torch.testing.assert_close(scaled, model.weight.grad, rtol=0, atol=1e-14)
