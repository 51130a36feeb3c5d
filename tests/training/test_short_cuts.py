"""What a step does not look at again, or not at all of: each short cut against the change that it could overlook."""

import copy

import pytest
import torch
from by_hand import each_door, loss_of, net, regularizer_of, smooth, step
from problems import assert_close, gradients
from torch import nn

import gradreg

# γ and ε that are numbers are checked once.


def test_numbers_that_do_not_go_together_are_refused_in_every_step():
    model = nn.Linear(3, 2)
    regularizer = gradreg.GradientRegularizer(model, 0.05, 0.2, batch=gradreg.Split())
    regularizer.gamma = 0.3
    for _ in range(3):
        with pytest.raises(ValueError, match="gamma must be below epsilon"):
            regularizer.backward(lambda x: model(x).square().mean(), [torch.ones(4, 3)])
    assert regularizer.step == 0
    regularizer.gamma = 0.1
    regularizer.backward(lambda x: model(x).square().mean(), [torch.ones(4, 3)])


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), True])
def test_a_bad_number_is_refused_in_every_step(bad):
    model = net()
    regularizer = regularizer_of(model)
    step("backward", regularizer, loss_of)
    regularizer.gamma = bad
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match="gamma must be"):
            step("backward", regularizer, loss_of)


@pytest.mark.parametrize("name", ["gamma", "epsilon"])
@each_door
def test_a_number_may_be_another_in_the_next_step_or_change_in_place(door, name):
    for start, change in ((0.3, None), (torch.tensor(0.3), torch.Tensor.mul_)):
        model = net()
        regularizer = regularizer_of(model, **{name: start})
        step(door, regularizer, loss_of)
        if change is None:
            setattr(regularizer, name, 0.15)
        else:
            change(start, 0.5)
        model.load_state_dict(net().state_dict())
        model.zero_grad()
        step(door, regularizer, loss_of)
        fresh = net()
        step(door, regularizer_of(fresh, **{name: 0.15}), loss_of)
        assert_close(gradients(model), gradients(fresh), rtol=1e-6, atol=1e-8)


# The norm is divided by the loss scale when somebody reads it.


@pytest.mark.parametrize("door", ["backward", "perturbed"])
def test_a_loss_scale_that_changes_in_place_before_the_norm_is_read(door):
    model, scale = smooth(), torch.tensor(8.0).double()
    loss_of(model).backward()
    expected_norm = torch.stack([g.norm() for g in gradients(model)]).norm().item()
    model.zero_grad()
    regularizer = regularizer_of(model)
    scaled = lambda loss: (loss * scale).backward()  # noqa: E731
    if door == "backward":
        regularizer.backward(lambda: loss_of(model), backward=scaled, grad_scale=scale)
    else:
        scaled(loss_of(model))
        with regularizer.perturbed(grad_scale=scale):
            scaled(loss_of(model))
    scale.mul_(2)
    assert regularizer.diagnostics()["grad_norm"].item() == pytest.approx(expected_norm, rel=1e-9)


# Few weights are displaced by one operation, which takes no two kinds of numbers.


class Wide:
    """An ascent that answers in another precision than the weights have."""

    def __call__(self, parameters, gradients, scale=1.0):
        return [g.double() for g in gradients], 1.0 / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_door
def test_a_direction_in_another_precision(door, dtype):
    model, plain = smooth().to(dtype), smooth().to(dtype)
    loss = lambda m: m(torch.linspace(-1, 1, 12).view(3, 4).to(dtype)).square().mean()  # noqa: E731
    step(door, regularizer_of(model, ascent=Wide(), epsilon=0.5), loss)
    step(door, regularizer_of(plain, epsilon=0.5), loss)
    assert all(p.dtype == g.dtype == dtype for p, g in zip(model.parameters(), gradients(model)))
    assert_close(gradients(model), gradients(plain), rtol=1e-2, atol=1e-3)


# Parts of a model are told apart by what holds them, and scripted modules hold them in their own way.


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model():
    model, plain = torch.jit.script(smooth()), smooth()
    regularizer, other = regularizer_of(model), regularizer_of(plain)
    for _ in range(2):
        for one, of_it in ((model, regularizer), (plain, other)):
            one.zero_grad()
            step("backward", of_it, loss_of)
        assert_close(gradients(model), gradients(plain))


# Optimizers that step in hooks are looked for at every parameter in the first step.


@pytest.mark.parametrize("k", range(4))
def test_a_step_in_the_hook_of_any_one_parameter_is_refused(k):
    model = smooth()
    weight = list(model.parameters())[k]
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def hook(p):
        optimizer.step()

    weight.register_post_accumulate_grad_hook(hook)
    with pytest.raises(ValueError, match="steps in a hook"):
        regularizer_of(model).backward(lambda: loss_of(model))


# Hooks of state dicts are put in their places without handles.


@each_door
def test_hooks_of_state_dicts_stay_and_may_be_registered_meanwhile(door):
    model, calls = smooth(), []
    note = lambda name: lambda *of: calls.append(name)  # noqa: E731
    handle = model[0].register_state_dict_pre_hook(note("before"))
    passes = []

    def loss(m):
        passes.append(None)
        if len(passes) == 2:  # the last pass: the replay is not checked
            model[2].register_state_dict_pre_hook(note("meanwhile"))
        if len(passes) == 2 and door != "perturbed":
            with pytest.raises(RuntimeError, match="displaced"):
                model.state_dict()
        return loss_of(m)

    regularizer = regularizer_of(model, replay_check=False)
    step(door, regularizer, loss)
    calls.clear()
    model.state_dict()
    assert calls == ["before", "meanwhile"]
    handle.remove()
    step(door, regularizer, loss_of)
    calls.clear()
    twin = copy.deepcopy(model)
    twin.state_dict()
    assert calls == ["meanwhile"]
    assert {type(m._state_dict_pre_hooks) for m in twin.modules()} == {type(nn.Linear(1, 1)._state_dict_pre_hooks)}
