"""The replay check: in the first active step the loss is called once more at θ, and must come out the same bit by bit.

What the engine replays by itself passes; a loss that depends on anything else is refused before anything is displaced.
Door 2 compares the outputs of the model when its block is entered.
"""

import copy
import random

import numpy as np
import pytest
import torch
from by_hand import (
    DOORS,
    SEED,
    batch,
    by_closure,
    each_door,
    everything,
    expected,
    loss_of,
    net,
    own_passes,
    regularizer_of,
    smooth,
    step,
)
from problems import assert_close, assert_same, gradients
from torch import nn
from torch.nn import functional as F

import gradreg

# What a loss may depend on beside the model, and the check finds. Each makes a loss with a state of its own.


def counting():
    calls = []

    def loss(model):
        calls.append(None)
        return loss_of(model) * (1 + 0.1 * len(calls))

    return loss


def own_generator():
    generator = torch.Generator().manual_seed(0)

    def loss(model):
        x, y = batch()
        return F.cross_entropy(model(x + torch.randn(x.shape, generator=generator, dtype=x.dtype)), y)

    return loss


def own_python_generator():
    dice = random.Random(0)
    return lambda model: loss_of(model) * dice.random()


def own_numpy_generator():
    dice = np.random.default_rng(0)
    return lambda model: loss_of(model) * dice.random()


def next_batch():
    """The data are drawn inside."""
    loader = iter(torch.randn(9, 8, 4, dtype=torch.float64))
    return lambda model: F.cross_entropy(model(next(loader)), batch()[1])


def next_labels():
    loader = iter(torch.randint(3, (9, 8)))
    return lambda model: F.cross_entropy(model(batch()[0]), next(loader))


def running_baseline():
    """REINFORCE: a mean of the losses so far."""
    baseline = torch.zeros(())

    def loss(model):
        value = loss_of(model)
        baseline.lerp_(value.detach().float(), 0.1)
        return (value - baseline).square()

    return loss


def momentum_encoder():
    """MoCo: a key encoder outside the model follows it in the loss."""
    encoder = smooth()
    nn.init.zeros_(encoder[0].weight)

    def loss(model):
        with torch.no_grad():
            for k, q in zip(encoder[0].parameters(), model[0].parameters()):
                k.mul_(0.9).add_(q, alpha=0.1)
        x, _ = batch()
        return (model(x) - encoder(x).detach()).square().mean()

    return loss


def queue_of_keys():
    queue = [torch.zeros(8, 3, dtype=torch.float64)]

    def loss(model):
        keys = model(batch()[0])
        queue.append(keys.detach())
        return (keys - torch.stack(queue).mean(0) + 1).square().mean()

    return loss


def input_changed_in_place():
    x, y = batch()
    return lambda model: F.cross_entropy(model(x.mul_(2)), y)


def labels_changed_in_place():
    x, y = batch()
    return lambda model: F.cross_entropy(model(x), y.add_(1).remainder_(3))


def switched_to_evaluation():
    def loss(model):
        value = loss_of(model)
        model.eval()  # for a metric, and never back
        return value

    return loss


def annealed():
    temperature = [1.0]

    def loss(model):
        temperature[0] *= 0.9
        x, y = batch()
        return F.cross_entropy(model(x) / temperature[0], y)

    return loss


def alternating():
    """A GAN's or a multi-task loss that takes turns."""
    turn = iter([0, 1] * 9)
    return lambda model: F.cross_entropy(model(batch()[0]), (batch()[1] + next(turn)) % 3)


STATES = [
    counting,
    own_generator,
    own_python_generator,
    own_numpy_generator,
    next_batch,
    next_labels,
    running_baseline,
    momentum_encoder,
    queue_of_keys,
    input_changed_in_place,
    labels_changed_in_place,
    switched_to_evaluation,
    annealed,
    alternating,
]
each_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


@each_state
@own_passes
def test_a_loss_with_a_state_of_its_own_is_refused_and_nothing_is_changed(door, state):
    model, loss = net(), state()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    regularizer = regularizer_of(model)
    run = by_closure if door == "closure" else type(regularizer).backward
    torch.manual_seed(SEED)
    before = everything(model)
    with pytest.raises(ValueError, match="loss"):
        run(regularizer, lambda: loss(model))
    assert_same(everything(model), before)
    assert regularizer.step == 0


@each_state
@own_passes
def test_a_refused_loss_never_saw_displaced_weights(door, state):
    model, loss, seen = net(), state(), []
    weight = model[0].weight.clone()

    def watched(model):
        seen.append(torch.equal(model[0].weight, weight))
        return loss(model)

    with pytest.raises(ValueError, match="loss"):
        step(door, regularizer_of(model), watched)
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (running_baseline, "baseline"),
        (momentum_encoder, "encoder"),
        (input_changed_in_place, r"\bx\b"),
        (labels_changed_in_place, r"\by\b"),
    ],
)
@own_passes
def test_the_tensor_that_changed_in_place_is_named(door, state, name):
    loss, model = state(), net()
    with pytest.raises(ValueError, match=name) as error:
        step(door, regularizer_of(model), loss)
    assert "another batch" not in str(error.value)


class Trainer:
    """A loss that is a method, with its state in attributes."""

    def __init__(self):
        self.center = torch.zeros(3, dtype=torch.float64)
        self.model = net()

    def loss(self):
        logits = self.model(batch()[0])
        self.center.lerp_(logits.detach().mean(0), 0.1)
        return (logits - self.center).square().mean()


def test_an_attribute_that_changed_in_place_is_named():
    trainer = Trainer()
    with pytest.raises(ValueError, match="center"):
        regularizer_of(trainer.model).backward(trainer.loss)


def test_a_tensor_in_a_container_that_changed_in_place_is_named():
    state, model = {"center": torch.zeros((), dtype=torch.float64)}, net()

    def loss(model):
        state["center"] += loss_of(model).detach()
        return loss_of(model) * (1 + state["center"])

    with pytest.raises(ValueError, match=r"center|state"):
        step("backward", regularizer_of(model), loss)


# State in the forward of the model, outside its buffers: every door finds it.


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = smooth()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * (1 + 0.1 * self.calls)


class PlainRunningMean(Counter):
    """BatchNorm written by hand, without register_buffer."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(3, dtype=torch.float64)

    def forward(self, x):
        out = self.body(x)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out - self.mean


class Cache(Counter):
    """Attention over what it saw before."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.body(x).detach())
        return self.body(x) + torch.stack(self.seen).sum(0)


class KeyEncoder(Counter):
    """MoCo in one module: frozen parameters follow the trainable ones, unseen by the list of buffers."""

    def __init__(self):
        super().__init__()
        self.key = smooth().requires_grad_(False)
        nn.init.zeros_(self.key[0].weight)

    def forward(self, x):
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.body.parameters()):
                k.mul_(0.9).add_(q, alpha=0.1)
        return self.body(x) - self.key(x)


class OwnGenerator(Counter):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.body(x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype))


class EveryOther(Counter):
    def forward(self, x):
        self.calls += 1
        return self.body(x) if self.calls % 2 else self.body(x).tanh()


MODELS = [Counter, PlainRunningMean, Cache, KeyEncoder, OwnGenerator, EveryOther]


@pytest.mark.parametrize("kind", MODELS)
@each_door
def test_a_model_with_a_state_of_its_own_is_refused_and_nothing_is_changed(door, kind):
    model = kind().double()
    regularizer = regularizer_of(model, include="body.*")
    torch.manual_seed(SEED)
    if door == "perturbed":  # the first pass is not ours: only its weights are held to what was before it
        before = everything(model.body)
        loss_of(model).backward()
        before[2] = gradients(model.body)
        with pytest.raises(ValueError, match="output"), regularizer.perturbed():
            pytest.fail("the block was entered")
    else:
        before = everything(model)
        with pytest.raises(ValueError, match="loss"):
            DOORS[door](regularizer, lambda: loss_of(model))
    now, then = (everything(model.body if door == "perturbed" else model), before)
    if kind is KeyEncoder and door != "perturbed":  # frozen weights may be large: they are not copied for this
        now, then = everything(model.body)[2], before[2][: len(list(model.body.parameters()))]
    assert_same(now, then)
    assert regularizer.step == 0


def test_a_frozen_parameter_that_the_forward_writes_is_named():
    model = KeyEncoder()
    with pytest.raises(ValueError, match=r"key\.0\.weight"):
        step("backward", regularizer_of(model, include="body.*"), loss_of)


# What passes.


def seeded_inside(model):
    torch.manual_seed(7)
    return loss_of(model)


def logged():
    history, counter = [], torch.zeros(())

    def loss(model):
        value = loss_of(model)
        history.append(value.item())
        counter.add_(1)
        return value

    return loss


def filled_again():
    """A tensor that each call fills in place with the same numbers."""
    room = torch.empty(8, 4, dtype=torch.float64)
    return lambda model: F.cross_entropy(model(room.copy_(batch()[0])), batch()[1])


def from_a_list_of_batches(model):
    return sum(F.cross_entropy(model(x), y) for x, y in [batch(), batch(5)])


HARMLESS = {
    "batch norm and dropout": lambda: loss_of,
    "seeded inside": lambda: seeded_inside,
    "logged": logged,
    "filled again": filled_again,
    "two forwards": lambda: from_a_list_of_batches,
}


@pytest.mark.parametrize("name", HARMLESS)
@each_door
def test_what_is_replayed_passes(door, name):
    model = net()
    by_hand = expected(model, HARMLESS[name]())
    step(door, regularizer_of(model), HARMLESS[name]())
    assert_close(gradients(model), by_hand)


@own_passes
def test_all_global_generators_are_replayed(door):
    """Doors 1 and 3 know the moment before the loss; door 2 only that before the model."""

    def augmented(model):
        x, y = batch()
        shift = torch.rand(()) + random.random() + np.random.rand()
        return F.cross_entropy(model(x + shift), y)

    def seeded(model):
        random.seed(0)
        np.random.seed(0)
        return augmented(model)

    model = net()
    by_hand = expected(model, seeded)
    random.seed(0)
    np.random.seed(0)
    step(door, regularizer_of(model), augmented)
    assert_close(gradients(model), by_hand)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@own_passes
def test_a_loss_that_is_not_finite_is_the_same_both_times(door, value):
    model = net()
    regularizer = regularizer_of(model)
    step(door, regularizer, lambda model: loss_of(model) * value)
    assert regularizer.diagnostics()["skipped_steps"] == 1


@each_door
def test_after_the_check_buffers_and_random_state_are_those_of_one_pass(door):
    model, plain = net(), net()
    torch.manual_seed(SEED)
    loss_of(plain).backward()
    state = torch.get_rng_state()
    step(door, regularizer_of(model), loss_of)
    assert_same(torch.get_rng_state(), state)
    assert_same(list(model.buffers()), list(plain.buffers()))


def test_the_loss_returned_is_that_of_the_first_call():
    model = smooth()
    value = loss_of(model).detach()
    assert_same(step("backward", regularizer_of(model), loss_of), value)


# When it is done.


def calls_of(door, regularizer, steps, before_step=lambda k: None):
    """How often the loss is called in each step."""
    counts = []
    for k in range(steps):
        before_step(k)
        calls = []

        def loss(model, calls=calls):
            calls.append(None)
            return loss_of(model)

        step(door, regularizer, loss)
        counts.append(len(calls))
    return counts


@own_passes
def test_the_loss_is_called_once_more_in_the_first_step_only(door):
    assert calls_of(door, regularizer_of(net()), 3) == [3, 2, 2]


@own_passes
def test_the_first_active_step_counts_and_not_the_first(door):
    late = regularizer_of(net(), gamma=gradreg.late(0.3, start=2))
    assert calls_of(door, late, 4) == [1, 1, 3, 2]


@own_passes
def test_it_can_be_turned_off(door):
    assert calls_of(door, regularizer_of(net(), replay_check=False), 2) == [2, 2]


@own_passes
def test_it_can_be_asked_for_again(door):
    regularizer = regularizer_of(net())
    asked = calls_of(door, regularizer, 4, lambda k: regularizer.check_replay() if k == 2 else None)
    assert asked == [3, 2, 3, 2]


@own_passes
def test_asked_for_it_is_done_though_it_was_turned_off(door):
    regularizer = regularizer_of(net(), replay_check=False)
    regularizer.check_replay()
    assert calls_of(door, regularizer, 2) == [3, 2]


def test_asked_for_in_a_plain_step_it_is_done_in_the_next_active_one():
    regularizer = regularizer_of(net(), gamma=lambda k: 0.3 if k % 2 else 0.0)
    asked = calls_of("backward", regularizer, 6, lambda k: regularizer.check_replay() if k == 2 else None)
    assert asked == [1, 3, 1, 3, 1, 2]


def test_it_is_done_for_each_micro_batch_of_a_window():
    model, calls = net(), []

    def loss(part):
        calls.append(part)
        return F.cross_entropy(model(batch()[0][part]), batch()[1][part])

    regularizer_of(model).backward(loss, [slice(0, 4), slice(4, 8)])
    assert calls == [slice(0, 4), slice(4, 8)] * 3


def test_a_difference_in_a_later_micro_batch_is_found():
    model, noise = net(), torch.Generator().manual_seed(0)

    def loss(k):
        return loss_of(model) * (1 + k * torch.rand((), generator=noise))

    before = everything(model)
    with pytest.raises(ValueError, match="loss"):
        regularizer_of(model).backward(loss, [0, 1])
    assert_same(everything(model)[:2], before[:2])


def test_the_check_runs_no_backward_pass_in_the_first_door():
    model, passes = net(), []

    def backward(loss):
        passes.append(None)
        loss.backward()

    regularizer_of(model).backward(lambda: loss_of(model), backward=backward)
    assert len(passes) == 2


@pytest.mark.parametrize("scheme", ["backward", "central"])
def test_it_is_done_once_whatever_the_scheme(scheme):
    displaced = {"backward": 1, "central": 2}[scheme]
    counts = calls_of("backward", regularizer_of(net(), scheme=scheme), 2)
    assert counts == [2 + displaced, 1 + displaced]


def test_one_pass_needs_no_replay_and_no_check():
    model = net()
    regularizer = gradreg.GradientRegularizer(model, 0.1, 0.1, ascent=gradreg.Previous())
    assert calls_of("backward", regularizer, 2) == [1, 1]


class Counted(Counter):
    """A count that the output does not depend on."""

    def forward(self, x):
        self.calls += 1
        return self.body(x)


def test_the_forwards_of_a_first_pass_are_run_again_when_a_block_is_entered():
    model, counts = Counted(), []
    regularizer = regularizer_of(model)
    for _ in range(3):
        model.calls = 0
        step("perturbed", regularizer, loss_of)
        counts.append(model.calls)
    assert counts == [3, 2, 2]


def test_each_forward_of_a_first_pass_is_compared():
    model = Counted()
    regularizer = regularizer_of(model)
    model.forward = lambda x: model.body(x) * (2 if len(x) < 8 else 1)  # the same for each batch: passes
    step("perturbed", regularizer, from_a_list_of_batches)
    regularizer.check_replay()
    turns = iter(range(99))
    model.forward = lambda x: model.body(x) * (next(turns) if len(x) < 8 else 1)
    with pytest.raises(ValueError, match="output"):
        step("perturbed", regularizer, from_a_list_of_batches)


def test_it_can_be_turned_off_for_blocks():
    model = Counter()
    step("perturbed", regularizer_of(model, replay_check=False), loss_of)
    assert model.calls == 2


# After it refused.


@own_passes
def test_the_next_step_checks_again(door):
    model = net()
    regularizer = regularizer_of(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="loss"):
            step(door, regularizer, counting())
    by_hand = expected(model, loss_of)
    step(door, regularizer, loss_of)
    assert_close(gradients(model), by_hand)
    assert regularizer.step == 1


@own_passes
def test_turned_off_a_loss_with_a_state_is_taken_as_it_comes(door):
    model = smooth()
    by_hand = expected(model, loss_of)
    step(door, regularizer_of(model, replay_check=False), counting())
    assert not torch.equal(gradients(model)[0], by_hand[0])


def test_an_error_in_the_check_call_is_an_error_of_the_pass():
    model, calls = net(), []

    def loss():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("mine")
        return loss_of(model)

    torch.manual_seed(SEED)
    before = everything(model)
    with pytest.raises(KeyError, match="mine"):
        regularizer_of(model).backward(loss)
    assert_same(everything(model), before)


def test_a_copy_of_a_regularizer_checks_for_itself():
    assert calls_of("backward", copy.deepcopy(regularizer_of(net())), 2) == [3, 2]


def test_the_keyword_must_be_a_truth_value():
    with pytest.raises((TypeError, ValueError), match="replay_check"):
        regularizer_of(net(), replay_check="always")


def test_a_base_moves_nothing_when_the_loss_is_refused():
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer, loss = gradreg.RegularizedOptimizer(base, regularizer_of(model)), counting()

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    before = everything(model)
    with pytest.raises(ValueError, match="loss"):
        optimizer.step(closure)
    assert_same(everything(model), before)
    assert not base.state


def test_the_check_of_a_second_regularizer_is_its_own():
    model = net()
    step("backward", regularizer_of(model), loss_of)
    assert calls_of("backward", regularizer_of(model, scheme="backward"), 2) == [3, 2]
