"""Slips that one makes: each says what was meant, or is simply done right; none is silently another method."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from by_hand import (
    EPSILON,
    GAMMA,
    SEED,
    Idle,
    batch,
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
from gradreg.functional import Gradient

# The optimizer steps where the weights are displaced.

MAKE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "its scheduler's": lambda p: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(p, lr=0.1), 1).optimizer,
}


@pytest.mark.parametrize("name", MAKE)
def test_a_step_inside_the_block_is_refused_at_its_line(name):
    model = smooth()
    optimizer, regularizer = MAKE[name](model.parameters()), regularizer_of(model)
    before, reached = everything(model), []

    def block():
        with regularizer.perturbed():
            loss_of(model).backward()
            reached.append("before")
            optimizer.step()
            reached.append("after")

    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="indent"):
        block()
    assert reached == ["before"]
    assert_same(everything(model)[0], before[0])
    assert not optimizer.state


def test_a_step_through_a_scaler_inside_the_block_is_refused():
    model = smooth()
    optimizer, regularizer = MAKE["SGD"](model.parameters()), regularizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    before = everything(model)[0]

    def block():
        with regularizer.perturbed():
            loss_of(model).backward()
            scaler.step(optimizer)

    with pytest.raises(RuntimeError, match="indent"):
        block()
    assert_same(everything(model)[0], before)


def test_a_step_of_the_wrapper_inside_the_block_is_refused():
    model = smooth()
    regularizer = regularizer_of(model)
    optimizer = gradreg.RegularizedOptimizer(MAKE["SGD"](model.parameters()), regularizer)
    before = everything(model)[0]
    loss_of(model).backward()

    def block():
        with regularizer.perturbed():
            loss_of(model).backward()
            optimizer.step()

    with pytest.raises((RuntimeError, ValueError)):
        block()
    assert_same(everything(model)[0], before)


@own_passes
def test_a_step_inside_the_loss_while_displaced_is_refused(door):
    model = smooth()
    optimizer, before = MAKE["SGD"](model.parameters()), everything(model)[0]
    weight = model[0].weight.clone()

    def loss(model):
        value = loss_of(model)
        if not torch.equal(model[0].weight, weight):
            optimizer.step()
        return value

    with pytest.raises(RuntimeError):
        step(door, regularizer_of(model), loss)
    assert_same(everything(model)[0], before)


@own_passes
def test_a_step_at_the_end_of_each_pass_is_refused(door):
    model = smooth()
    optimizer, regularizer = MAKE["SGD"](model.parameters()), regularizer_of(model)

    def loss(model):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss_of(model)

    with pytest.raises((RuntimeError, ValueError)):
        step(door, regularizer, loss)
    assert regularizer.step == 0


@each_door
def test_an_optimizer_of_another_model_steps_when_it_likes(door):
    model, other = smooth(), smooth()
    optimizer = MAKE["SGD"](other.parameters())

    def loss(model):
        loss_of(other).backward()
        optimizer.step()
        return loss_of(model)

    by_hand = expected(model, loss_of)
    step(door, regularizer_of(model), loss)
    assert_close(gradients(model), by_hand)


@each_door
def test_an_optimizer_steps_after_the_door_has_closed(door):
    model = smooth()
    optimizer, regularizer = MAKE["SGD"](model.parameters()), regularizer_of(model)
    for _ in range(3):
        by_hand = expected(model, loss_of)
        step(door, regularizer, loss_of)
        assert_close(gradients(model), by_hand)
        optimizer.step()


def by_hand_in_hook(model):
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad, alpha=0.1))


def under_no_grad_in_hook(model):
    @torch.no_grad()
    def move(p):
        p.sub_(p.grad, alpha=0.1)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(move)


def by_optimizers_in_hooks(model):
    """As in PyTorch's tutorial: one optimizer for each parameter, stepped as its gradient arrives."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1, foreach=False) for p in model.parameters()}

    def move(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(move)


IN_HOOKS = [by_hand_in_hook, under_no_grad_in_hook, by_optimizers_in_hooks]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("install", IN_HOOKS, ids=lambda install: install.__name__)
@own_passes
def test_a_step_in_a_backward_hook_is_refused(door, install, when):
    model = smooth()
    if when == "before":
        install(model)
    regularizer = regularizer_of(model)
    if when == "after":
        install(model)
    named = r"hook|0\.weight" if install is by_hand_in_hook else "hook"  # .data leaves no other trace than its values
    with pytest.raises((ValueError, RuntimeError), match=named):
        step(door, regularizer, loss_of)
    assert regularizer.step == 0


# A moving average of weights is taken where they are displaced.


def by_averaged_model(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    return lambda: average.update_parameters(model)


def by_lerp(model):
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update():
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p, 0.1)

    return update


def by_state_dict(model):
    """Saving is refused outright: contract 12."""
    average = copy.deepcopy(model)
    return lambda: average.load_state_dict(model.state_dict())


@pytest.mark.parametrize("make", [by_averaged_model, by_lerp], ids=lambda make: make.__name__)
def test_a_moving_average_taken_inside_the_block_is_warned_of_once(make):
    model = smooth()
    update, regularizer = make(model), regularizer_of(model)

    def two_steps():
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            with regularizer.perturbed():
                loss_of(model).backward()
                update()

    with pytest.warns(UserWarning, match="displaced") as caught:
        two_steps()
    assert len([w for w in caught if "average" in str(w.message)]) == 1


def test_a_state_dict_taken_inside_the_block_is_refused():
    model = smooth()
    update, regularizer = by_state_dict(model), regularizer_of(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="displaced"), regularizer.perturbed():
        update()


@pytest.mark.parametrize("make", [by_averaged_model, by_lerp, by_state_dict], ids=lambda make: make.__name__)
@each_door
def test_a_moving_average_taken_after_the_door_has_closed_passes(door, make):
    model = smooth()
    update = make(model)
    step(door, regularizer_of(model), loss_of)
    update()


# Gradient scalers.


def test_a_scaled_loss_is_told_to_go_into_backward():
    model = smooth()
    scaler, before = torch.amp.GradScaler("cpu", init_scale=1024.0), everything(model)
    meant = re.escape("backward=lambda loss: scaler.scale(loss).backward()")
    with pytest.raises(ValueError, match=meant):
        regularizer_of(model).backward(lambda: scaler.scale(loss_of(model)))
    assert_same(everything(model), before)


def test_a_loss_that_is_merely_multiplied_passes():
    model = smooth()
    by_hand = expected(model, lambda twin: loss_of(twin) * 1024.0)
    step("backward", regularizer_of(model), lambda model: loss_of(model) * 1024.0)
    assert_close(gradients(model), by_hand)


def test_a_scaler_that_is_turned_off_passes():
    model = smooth()
    scaler, by_hand = torch.amp.GradScaler("cpu", enabled=False), expected(model, loss_of)
    step("backward", regularizer_of(model), lambda model: scaler.scale(loss_of(model)))
    assert_close(gradients(model), by_hand)


def scaled_block(model, scaler, **options):
    regularizer = regularizer_of(model)
    for _ in range(2):
        model.zero_grad()
        scaler.scale(loss_of(model)).backward()
        with regularizer.perturbed(**options):
            scaler.scale(loss_of(model)).backward()


def test_a_block_under_a_scaler_without_its_scale_is_warned_of_once():
    model = smooth()
    with pytest.warns(UserWarning, match="grad_scale") as caught:
        scaled_block(model, torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert len([w for w in caught if "GradScaler" in str(w.message)]) == 1  # beside that of the ratio


def test_a_block_under_a_scaler_with_its_scale_passes():
    model = smooth()
    by_hand = expected(model, loss_of)
    scaled_block(model, torch.amp.GradScaler("cpu", init_scale=1024.0), grad_scale=1024.0)
    assert_close(gradients(model), [1024 * g for g in by_hand])


def test_a_block_on_unscaled_gradients_passes():
    model = smooth()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), MAKE["SGD"](model.parameters())
    by_hand, regularizer = expected(model, loss_of), regularizer_of(model)
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    with regularizer.perturbed():
        loss_of(model).backward()
    assert_close(gradients(model), by_hand)


# Parameters where a model belongs.


@pytest.mark.parametrize(
    "give", [lambda m: m.parameters(), lambda m: list(m.parameters()), lambda m: m.named_parameters()]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda given, base: gradreg.sam(given, rho=0.05),
        lambda given, base: gradreg.asam(given, 0.5),
        lambda given, base: gradreg.gnp(given, 0.1, 0.5),
        lambda given, base: gradreg.msam(given, base, 0.1),
        lambda given, base: gradreg.GradientRegularizer(given, 0.1, 0.1),
    ],
    ids=["sam", "asam", "gnp", "msam", "GradientRegularizer"],
)
def test_parameters_in_the_place_of_the_model_are_refused_with_the_way_out(make, give):
    model = smooth()
    with pytest.raises(TypeError, match=r"pass the model|model itself"):
        make(give(model), MAKE["SGD"](model.parameters()))


def test_an_optimizer_in_the_place_of_the_model_is_refused():
    with pytest.raises(TypeError, match="model must be"):
        gradreg.sam(MAKE["SGD"](smooth().parameters()), rho=0.05)


# An ascent of one's own.

ASCENTS = {
    "one too few": lambda params, grads, scale: (grads[:-1], 1.0),
    "one too many": lambda params, grads, scale: ([*grads, grads[0]], 1.0),
    "none at all": lambda params, grads, scale: ([], 1.0),
    "another shape": lambda params, grads, scale: ([grads[0].T, *grads[1:]], 1.0),
    "a shape that broadcasts": lambda params, grads, scale: ([g[:1] for g in grads], 1.0),
    "numbers": lambda params, grads, scale: ([g.norm() for g in grads], 1.0),
    "None among them": lambda params, grads, scale: ([None, *grads[1:]], 1.0),
}


@pytest.mark.parametrize("name", ASCENTS)
@each_door
def test_an_ascent_of_other_vectors_is_refused_and_nothing_is_changed(door, name):
    model = net()

    def ascent(params, grads, grad_scale=1.0):
        return ASCENTS[name](params, grads, grad_scale)

    regularizer = regularizer_of(model, ascent=ascent)
    before = everything(model)
    with pytest.raises((ValueError, TypeError), match="ascent"):
        step(door, regularizer, loss_of)
    assert_same(everything(model)[0], before[0])
    if door != "perturbed":
        assert_same(everything(model)[1], before[1])
    assert regularizer.step == 0


@each_door
def test_an_ascent_that_raises_leaves_all_as_it_was(door):
    model, fails = net(), [True]

    def ascent(params, grads, grad_scale=1.0):
        if fails:
            raise KeyError(fails.pop())
        return Gradient()(params, grads, grad_scale)

    regularizer = regularizer_of(model, ascent=ascent)
    before, by_hand = everything(model), expected(model, loss_of)
    with pytest.raises(KeyError):
        step(door, regularizer, loss_of)
    assert_same(everything(model)[0], before[0])
    assert regularizer.step == 0
    model.load_state_dict(net().state_dict())
    step(door, regularizer, loss_of)
    assert_close(gradients(model), by_hand)


@each_door
def test_an_ascent_that_writes_into_its_arguments_does_not_move_the_weights(door):
    """It is handed θ and g1 themselves. What it makes of the gradient is its own doing; θ must come back."""
    model = smooth()
    before = everything(model)[0]

    def ascent(params, grads, grad_scale=1.0):
        return [g.clone() for g in grads], 1.0

    step(door, regularizer_of(model, ascent=ascent), loss_of)
    assert_same(everything(model)[0], before)


def test_an_error_while_the_gradient_is_remembered_leaves_all_as_it_was(monkeypatch):
    from gradreg.training.directions import Directions

    model = net()
    regularizer = gradreg.GradientRegularizer(model, 0.05, 0.05, ascent=gradreg.Previous())
    step("backward", regularizer, loss_of)
    before = everything(model)[0]

    def fails(*args):
        raise torch.OutOfMemoryError("a stand-in")

    monkeypatch.setattr(Directions, "remember", fails)
    model.zero_grad()
    with pytest.raises(torch.OutOfMemoryError):
        regularizer.backward(lambda: loss_of(model))
    assert_same(everything(model)[0], before)
    assert gradients(model) == [None] * len(gradients(model))
    assert regularizer.step == 1


# Random numbers that are drawn before the model is called.


def noisy_labels(model, draw):
    x, y = batch()
    target = F.one_hot(y, 3) + draw(x)
    return (model(x) - target).square().mean()


DRAWS = {
    "torch": lambda x: torch.randn(8, 3, dtype=x.dtype),
    "random": lambda x: random.random(),
    "NumPy": lambda x: np.random.rand(),
    "a permutation": lambda x: torch.randperm(3).double(),
}
each_draw = pytest.mark.parametrize("name", DRAWS)


def seeded():
    random.seed(0)
    np.random.seed(0)


@each_draw
def test_random_numbers_before_the_model_are_refused_in_a_block(name):
    model = net()
    before = everything(model)[0]
    with pytest.raises(ValueError, match="random"):
        step("perturbed", regularizer_of(model), lambda model: noisy_labels(model, DRAWS[name]))
    assert_same(everything(model)[0], before)


@each_draw
def test_random_numbers_before_the_model_are_refused_in_a_later_block(name):
    model = net()
    regularizer = regularizer_of(model)
    step("perturbed", regularizer, loss_of)
    with pytest.raises(ValueError, match="random"):
        step("perturbed", regularizer, lambda model: noisy_labels(model, DRAWS[name]))


@each_draw
@own_passes
def test_random_numbers_before_the_model_are_replayed_where_the_passes_are_ours(door, name):
    model = net()

    def loss(model):
        return noisy_labels(model, DRAWS[name])

    def from_the_seed(model):
        seeded()
        return loss(model)

    by_hand = expected(model, from_the_seed)
    seeded()
    step(door, regularizer_of(model), loss)
    assert_close(gradients(model), by_hand)


@each_door
def test_random_numbers_after_the_model_are_replayed(door):
    def loss(model):
        logits = model(batch()[0])
        return (logits + torch.randn_like(logits)).square().mean()

    model = net()
    by_hand = expected(model, loss)
    step(door, regularizer_of(model), loss)
    assert_close(gradients(model), by_hand)


def test_random_numbers_drawn_once_for_both_passes_pass_in_a_block():
    model = net()
    torch.manual_seed(SEED)
    x = batch()[0] + torch.randn(8, 4, dtype=torch.float64)
    state = torch.get_rng_state()

    def loss(model):
        return F.cross_entropy(model(x), batch()[1])

    def from_there(model):
        torch.set_rng_state(state)
        return loss(model)

    by_hand, regularizer = expected(model, from_there), regularizer_of(model)
    torch.set_rng_state(state)
    loss(model).backward()
    with regularizer.perturbed():
        loss(model).backward()
    assert_close(gradients(model), by_hand)


def test_random_numbers_before_the_model_are_replayed_by_accelerate():
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from gradreg.integrations.accelerate import AcceleratedRegularizer

    model = net()
    by_hand = expected(model, lambda twin: noisy_labels(twin, DRAWS["torch"]))
    accelerator = Accelerator(cpu=True)
    regularizer = AcceleratedRegularizer(accelerator, accelerator.prepare(model), GAMMA, EPSILON)
    torch.manual_seed(SEED)
    with accelerator.accumulate(model):
        regularizer.backward(lambda b: noisy_labels(model, DRAWS["torch"]), batch())
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert_close(gradients(model), by_hand)


# Forwards that no backward follows, around the first pass of a block.


def dropping():
    return net(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


ROOM = torch.empty(8, 4, dtype=torch.float64)


def fresh_inputs(k):
    return batch()[0] + k


def filled_in_place(k):
    """A static buffer, as for CUDA graphs: the same tensor with each batch."""
    return ROOM.copy_(batch()[0] + k)


PLACES = [
    "none",
    "before zero_grad",
    "after zero_grad",
    "after the first pass",
    "after the step",
]


def steps_of_a_block(model, regularizer, places, inputs):
    """Steps with a forward in training mode at a place, each held against ĝ by hand."""
    optimizer, y = MAKE["SGD"](model.parameters()), batch()[1]
    for k, place in enumerate(places):

        def extra(now, place=place, k=k):
            if place == now:
                F.cross_entropy(model(inputs(k)), y).item()

        extra("before zero_grad")
        optimizer.zero_grad()
        extra("after zero_grad")
        x = inputs(k)
        by_hand = expected(model, lambda twin, x=x: F.cross_entropy(twin(x), y))
        torch.manual_seed(SEED)
        F.cross_entropy(model(x), y).backward()
        extra("after the first pass")
        with regularizer.perturbed():
            F.cross_entropy(model(x), y).backward()
        assert_close(gradients(model), by_hand)
        optimizer.step()
        extra("after the step")


each_input = pytest.mark.parametrize("inputs", [fresh_inputs, filled_in_place], ids=lambda inputs: inputs.__name__)


@each_input
@pytest.mark.parametrize("place", PLACES)
def test_a_forward_that_no_backward_follows_shifts_no_mask(place, inputs):
    model = dropping()
    steps_of_a_block(model, regularizer_of(model), [place] * 4, inputs)


@each_input
@pytest.mark.parametrize("seed", range(4))
def test_forwards_here_and_there_shift_no_mask(seed, inputs):
    model = dropping()
    steps_of_a_block(model, regularizer_of(model), random.Random(seed).choices(PLACES, k=7), inputs)


@each_input
def test_a_batch_that_a_guard_skips_shifts_no_mask(inputs):
    model = dropping()
    regularizer, optimizer, y = regularizer_of(model), MAKE["SGD"](model.parameters()), batch()[1]
    for k in range(7):
        optimizer.zero_grad()
        x = inputs(k)
        by_hand = expected(model, lambda twin, x=x: F.cross_entropy(twin(x), y))
        torch.manual_seed(SEED)
        loss = F.cross_entropy(model(x), y)
        if k in (1, 2, 4):
            continue  # skipped
        loss.backward()
        with regularizer.perturbed():
            F.cross_entropy(model(x), y).backward()
        assert_close(gradients(model), by_hand)
        optimizer.step()


# Nothing to displace.


def loss_without_the_last(model):
    return model[:3](batch()[0]).square().mean()


@pytest.mark.parametrize("scheme", ["forward", "backward", "central", "exact"])
@pytest.mark.parametrize("ascent", ["gradient", "normalized", "adaptive"])
def test_without_a_gradient_to_follow_the_step_is_skipped(scheme, ascent):
    model, plain = net(), net()
    regularizer = regularizer_of(model, include="4.*", scheme=scheme, ascent=ascent)
    loss_without_the_last(plain).backward()
    step("backward", regularizer, loss_without_the_last)
    assert_same(gradients(model), gradients(plain))
    assert regularizer.diagnostics()["skipped_steps"] == 1
    assert regularizer.step == 1


@pytest.mark.parametrize("ascent", ["gradient", "normalized", "adaptive"])
def test_without_a_gradient_to_follow_a_closure_is_skipped(ascent):
    model, plain = net(), net()
    regularizer = regularizer_of(model, include="4.*", ascent=ascent)
    loss_without_the_last(plain).backward()
    step("closure", regularizer, loss_without_the_last)
    assert_same(gradients(model), gradients(plain))
    assert regularizer.diagnostics()["skipped_steps"] == 1


@pytest.mark.parametrize(
    "options", [{"batch": gradreg.Split(), "gamma": 0.025}, {"batch": gradreg.Fraction(0.5)}], ids=str
)
@pytest.mark.parametrize("ascent", ["gradient", "normalized", "adaptive"])
def test_without_a_gradient_to_follow_a_part_of_a_batch_is_skipped(options, ascent):
    model, plain = smooth(), smooth()
    regularizer = regularizer_of(model, include="2.*", ascent=ascent, **options)

    def loss(model, x):
        return model[:2](x).square().mean()

    loss(plain, batch()[0]).backward()
    regularizer.backward(lambda x: loss(model, x), [batch()[0]])
    assert_close(gradients(model)[:2], gradients(plain)[:2])
    assert gradients(model)[2:] == [None, None]


@pytest.mark.parametrize("nonfinite", ["keep", "first"])
@pytest.mark.parametrize("bad", [1, 2])
def test_a_central_step_with_a_gradient_that_is_not_finite_is_skipped(bad, nonfinite):
    """In either of its displaced passes."""
    model, plain = smooth(), smooth()
    weight, displaced = model[0].weight.clone(), []

    def loss(model):
        displaced.extend([None] if not torch.equal(model[0].weight, weight) else [])
        return loss_of(model) * (torch.nan if len(displaced) == bad else 1)

    regularizer = regularizer_of(model, scheme="central", nonfinite=nonfinite)
    step("backward", regularizer, loss)
    loss_of(plain).backward()
    assert regularizer.diagnostics()["skipped_steps"] == 1
    if nonfinite == "first":
        assert_same(gradients(model), gradients(plain))
    else:
        assert not any(g.isfinite().all() for g in gradients(model))


# Graphs that are kept from pass to pass.


def memoized():
    """Features are computed once for each batch."""
    cache = {}

    def loss(model):
        if "features" not in cache:
            cache["features"] = model[:2](batch()[0])
        return F.cross_entropy(model[2](cache["features"]), batch()[1])

    return loss


class Memory(nn.Sequential):
    """The same inside the model: keys and values that are kept with their graph."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = self[0](x)
        return self[2](self[1](self.kept))


@own_passes
def test_a_graph_that_was_kept_between_passes_is_explained(door):
    model = smooth()
    before = everything(model)[0]
    with pytest.raises(RuntimeError, match="kept"):
        step(door, regularizer_of(model), memoized())
    assert_same(everything(model)[0], before)


@each_door
def test_a_graph_that_the_model_kept_between_passes_is_explained(door):
    model = Memory(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    before = everything(model)[0]
    with pytest.raises(RuntimeError, match="kept"):
        step(door, regularizer_of(model), loss_of)
    assert_same(everything(model)[0], before)


def test_another_error_of_a_backward_pass_is_not_explained_away():
    model = smooth()

    def loss(model):
        value = loss_of(model)
        value.register_hook(lambda g: (_ for _ in ()).throw(RuntimeError("mine")))
        return value

    with pytest.raises(RuntimeError, match="mine"):
        step("backward", regularizer_of(model), loss)


# A block that is left early.


def test_a_block_in_which_no_backward_pass_ran_is_refused():
    """A guard inside it: g2 is not zero, it is not there."""
    model = smooth()
    regularizer = regularizer_of(model)
    loss_of(model).backward()

    def block():
        for _ in range(1):
            with regularizer.perturbed():
                loss_of(model)
                continue

    before = everything(model)[0]
    with pytest.raises((ValueError, RuntimeError), match="block"):
        block()
    assert_same(everything(model)[0], before)
    assert regularizer.step == 0


def test_a_closure_that_runs_a_backward_pass_in_its_first_call_only_is_refused():
    model, calls = smooth(), []
    optimizer = gradreg.RegularizedOptimizer(Idle(model.parameters()), regularizer_of(model))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        if not calls:
            loss.backward()
        calls.append(None)
        return loss

    with pytest.raises((ValueError, RuntimeError), match="closure"):
        optimizer.step(closure)
