"""Tensors outside the model: trainable ones keep g1, in every door and host, with one warning."""

import copy
import warnings

import pytest
import torch
from by_hand import (
    DOORS,
    SEED,
    batch,
    by_closure,
    each_door,
    expected,
    loss_of,
    net,
    own_passes,
    regularizer_of,
    step,
)
from problems import assert_close, assert_same, gradients
from torch import nn
from torch.nn import functional as F

import gradreg


class Outside(nn.Module):
    """Trainable tensors of a loss that no model owns: a temperature, a head, weights of tasks."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(3, 3)
        self.scales = nn.Parameter(torch.zeros(2))
        self.prompt = nn.Parameter(torch.zeros(8, 4))
        self.double()

    def forward(self, model):
        x, y = batch()
        if self.kind == "prompt":
            return F.cross_entropy(model(x + self.prompt), y)
        logits = model(x)
        if self.kind == "temperature":
            return F.cross_entropy(logits / self.temperature, y)
        if self.kind == "head":
            return F.cross_entropy(self.head(logits.tanh()), y)
        tasks = torch.stack([F.cross_entropy(logits, y), logits.square().mean()])
        return (tasks * (-self.scales).exp() + self.scales).sum()

    def used(self):
        parts = {"temperature": [self.temperature], "prompt": [self.prompt], "scales": [self.scales]}
        return parts.get(self.kind, list(self.head.parameters()))


expects_warning = pytest.mark.filterwarnings("ignore:.*outside the model:UserWarning")
KINDS = ["temperature", "head", "scales", "prompt"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def plain(outside):
    """g1 of the outside tensors."""
    twin, model = copy.deepcopy(outside), net()
    torch.manual_seed(SEED)
    twin(model).backward()
    return gradients(twin)


def step_of(door, regularizer, outside, owned=None):
    """One step; the outside tensors start without gradients."""
    outside.zero_grad()
    torch.manual_seed(SEED)
    run = DOORS[door] if owned is None else lambda *args: by_closure(*args, owned=owned)
    run(regularizer, lambda: outside(regularizer.model))


@expects_warning
@each_kind
@each_door
def test_a_tensor_outside_the_model_keeps_the_first_gradient(door, kind):
    model, outside = net(), Outside(kind)
    by_hand, first = expected(model, outside), plain(outside)
    step_of(door, regularizer_of(model), outside)
    assert_same(gradients(outside), first)
    assert_close(gradients(model), by_hand)


@expects_warning
@each_kind
@each_door
def test_a_tensor_outside_the_model_keeps_the_first_gradient_in_later_steps(door, kind):
    model, outside = net(), Outside(kind)
    first, regularizer = plain(outside), regularizer_of(model)
    for _ in range(3):
        model.load_state_dict(net().state_dict())
        step_of(door, regularizer, outside)
        assert_same(gradients(outside), first)


@expects_warning
@each_kind
@pytest.mark.parametrize("scheme", ["backward", "central", "exact"])
def test_a_tensor_outside_the_model_keeps_the_first_gradient_in_every_scheme(scheme, kind):
    model, outside = net(), Outside(kind)
    first = plain(outside)
    step_of("backward", regularizer_of(model, scheme=scheme), outside)
    assert_same(gradients(outside), first)


@expects_warning
@each_kind
def test_a_tensor_that_the_base_optimizer_holds_keeps_the_first_gradient(kind):
    model, outside = net(), Outside(kind)
    first = plain(outside)
    step_of("closure", regularizer_of(model), outside, owned=[*model.parameters(), *outside.parameters()])
    assert_same(gradients(outside), first)


@each_kind
@pytest.mark.parametrize(
    "options", [{"include": "0.*"}, {"gamma": 0.05}, {"cap": 1.0}, {"nonfinite": "first"}], ids=str
)
@expects_warning
@each_door
def test_a_tensor_outside_the_model_keeps_the_first_gradient_whatever_is_chosen(door, options, kind):
    model, outside = net(), Outside(kind)
    first = plain(outside)
    step_of(door, regularizer_of(model, **options), outside)
    assert_same(gradients(outside), first)


@expects_warning
@each_kind
@own_passes
def test_the_gradient_of_a_tensor_outside_the_model_is_added_to_what_was_there(door, kind):
    """As in plain training: its owner clears it."""
    model, outside = net(), Outside(kind)
    first = plain(outside)
    for p in outside.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(SEED)
    DOORS[door](regularizer_of(model), lambda: outside(model))
    assert_close(
        gradients(outside), [torch.ones_like(p) + (0 if g is None else g) for p, g in zip(outside.parameters(), first)]
    )


def test_the_gradient_of_a_tensor_outside_the_model_is_summed_over_a_window():
    model, outside = net(), Outside("temperature")
    with pytest.warns(UserWarning, match="outside the model"):
        regularizer_of(model.eval()).backward(lambda factor: factor * outside(model), [1, 3])
    twin = Outside("temperature")
    (4 * twin(model)).backward()
    torch.testing.assert_close(outside.temperature.grad, twin.temperature.grad)


@each_door
def test_one_warning_in_all(door):
    model, outside = net(), Outside("head")
    regularizer = regularizer_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            outside.zero_grad()
            DOORS[door](regularizer, lambda: outside(model))
    assert [w.category for w in caught] == [UserWarning]
    assert "outside the model" in str(caught[0].message)
    assert "gradreg/training" not in caught[0].filename, "it points at a line of ours"


@each_door
def test_no_warning_without_such_a_tensor(door):
    model = net()
    step(door, regularizer_of(model), loss_of)  # a warning is an error


@own_passes
def test_a_leaf_made_anew_in_each_pass_is_no_tensor_outside_the_model(door):
    """WGAN-GP: the slope at an input that is made trainable inside the loss."""

    def penalized(model):
        x, y = batch()
        x.requires_grad_()
        logits = model(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + slope.square().sum()

    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    by_hand = expected(model, penalized)
    step(door, regularizer_of(model), penalized)
    assert_close(gradients(model), by_hand)


@each_door
def test_a_frozen_tensor_outside_the_model_is_left_alone(door):
    model, outside = net(), Outside("head").requires_grad_(False)
    step(door, regularizer_of(model), outside)
    assert gradients(outside) == [None] * len(gradients(outside))


# Two models, each with a regularizer: a GAN. Each is a stranger in the other's loss.


def test_each_of_two_models_keeps_the_others_first_gradient():
    generator, critic = net(nn.Linear(4, 4), nn.Tanh()), net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def loss_of_generator(generator, critic):
        return critic(generator(batch()[0])).square().mean()

    twin, other = copy.deepcopy(generator), copy.deepcopy(critic)
    loss_of_generator(twin, other).backward()
    by_hand = expected(generator, lambda twin: loss_of_generator(twin, copy.deepcopy(critic)))
    with pytest.warns(UserWarning, match="outside the model"):
        regularizer_of(generator).backward(lambda: loss_of_generator(generator, critic))
    assert_same(gradients(critic), gradients(other))
    assert_close(gradients(generator), by_hand)


def test_a_frozen_critic_passes_without_a_warning():
    generator, critic = net(nn.Linear(4, 4), nn.Tanh()), net(nn.Linear(4, 1)).requires_grad_(False)
    regularizer_of(generator).backward(lambda: critic(generator(batch()[0])).square().mean())
    assert critic[0].weight.grad is None


def test_a_teacher_under_no_grad_is_no_tensor_outside_the_model():
    student, teacher = net(), net()

    def distilled(model):
        with torch.no_grad():
            target = teacher.eval()(batch()[0]).softmax(-1)
        return F.cross_entropy(model(batch()[0]), target)

    step("backward", regularizer_of(student), distilled)
    assert gradients(teacher) == [None] * len(gradients(teacher))


def test_a_part_of_a_model_as_the_model_leaves_the_rest_with_its_first_gradient():
    whole, plain_whole = net(), net()
    torch.manual_seed(SEED)
    loss_of(plain_whole).backward()
    regularizer = regularizer_of(whole[4])
    torch.manual_seed(SEED)
    with pytest.warns(UserWarning, match="outside the model"):
        regularizer.backward(lambda: loss_of(whole))
    assert_same(gradients(whole)[:4], gradients(plain_whole)[:4])


@expects_warning
@each_door
def test_a_failing_pass_leaves_no_half_of_a_sum(door):
    model, outside = net(), Outside("temperature")
    first, weight = plain(outside)[0], model[0].weight.clone()

    def failing():
        loss = outside(model)
        if not torch.equal(model[0].weight, weight):
            model[0].weight.register_hook(lambda g: 1 / 0)
        return loss

    torch.manual_seed(SEED)
    with pytest.raises(ZeroDivisionError):
        DOORS[door](regularizer_of(model), failing)
    left = outside.temperature.grad
    assert left is None or (door != "backward" and torch.equal(left, first))


@expects_warning
def test_a_tensor_outside_the_model_is_trained_as_in_a_plain_step():
    """A whole loop: the temperature goes the way that its own gradients at θ say."""
    model, outside = net(), Outside("temperature")
    base = torch.optim.SGD([*model.parameters(), outside.temperature], lr=0.1)
    optimizer = gradreg.RegularizedOptimizer(base, regularizer_of(model))

    def closure():
        optimizer.zero_grad()
        loss = outside(model)
        loss.backward()
        return loss

    for _ in range(3):
        twin, there = copy.deepcopy(outside), copy.deepcopy(model)
        state = torch.get_rng_state()
        twin(there).backward()
        torch.set_rng_state(state)
        optimizer.step(closure)
        torch.testing.assert_close(outside.temperature, twin.temperature - 0.1 * twin.temperature.grad)


@expects_warning
@each_door
def test_a_tensor_outside_the_model_keeps_the_first_gradient_after_steps_without_a_penalty(door):
    model, loss = net(), Outside("temperature")
    regularizer = regularizer_of(model, gamma=lambda at: 0.3 * (at == 2))
    for _ in range(3):
        model.load_state_dict(net().state_dict())
        loss.temperature.grad = None
        step(door, regularizer, loss)
    alone = net()
    torch.manual_seed(SEED)
    first = torch.autograd.grad(loss(alone), loss.temperature)
    assert_same([loss.temperature.grad], first)
