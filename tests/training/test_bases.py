"""Bases behind the third door: what an optimizer sees in its step is what it would see in plain training."""

import copy

import pytest
import torch
from by_hand import SEED, expected, loss_of, net, regularizer_of, smooth
from problems import assert_close, assert_same, copy_of, gradients
from torch import nn

import gradreg


class Base(torch.optim.Optimizer):
    """SGD by hand; relatives read more than the gradient."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    def parameters(self):
        return [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, lr in self.parameters():
            self.move(p, lr, loss)
        return loss

    def move(self, p, lr, loss):
        p.sub_(p.grad, alpha=lr)


class Polyak(Base):
    """The step length is the loss over the squared gradient (Polyak; SPS, ALI-G)."""

    def move(self, p, lr, loss):
        assert loss is not None, "step() was called without the loss"
        total = sum(q.grad.square().sum() for q, _ in self.parameters())
        p.sub_(p.grad * loss.detach() / total, alpha=lr)


class LossInState(Base):
    """Prodigy and line searches keep the last loss and compare."""

    def move(self, p, lr, loss):
        state = self.state[p]
        is_better = loss.item() < state.get("loss", torch.inf)
        state["loss"] = loss.item()
        p.sub_(p.grad, alpha=lr if is_better else lr / 2)


class KeepsGradient(Base):
    """The gradient itself is kept for the next step (Adan, OASIS, gradient differences), and not a copy of it."""

    def move(self, p, lr, loss):
        last = self.state[p].get("last_grad")
        p.sub_(p.grad if last is None else 2 * p.grad - last, alpha=lr)
        self.state[p]["last_grad"] = p.grad


class KeepsGradients(Base):
    """All gradients so far (Anderson acceleration)."""

    def move(self, p, lr, loss):
        self.state[p].setdefault("history", []).append(p.grad)
        p.sub_(torch.stack(self.state[p]["history"]).mean(0), alpha=lr)


class WritesGradient(Base):
    """The update is made in place of the gradient."""

    def move(self, p, lr, loss):
        p.grad.mul_(lr).sign_()
        p.sub_(p.grad, alpha=lr)


class DropsGradient(Base):
    def move(self, p, lr, loss):
        p.sub_(p.grad, alpha=lr)
        p.grad = None


class RandomStep(Base):
    """Langevin dynamics draws in its step."""

    def move(self, p, lr, loss):
        p.sub_(p.grad + 0.01 * torch.randn_like(p), alpha=lr)


class NoClosure(Base):
    def step(self):
        return super().step()


class KeywordOnly(Polyak):
    def step(self, *, closure=None):
        return super().step(closure)


BASES = [
    Base,
    Polyak,
    LossInState,
    KeepsGradient,
    KeepsGradients,
    WritesGradient,
    DropsGradient,
    RandomStep,
    NoClosure,
    KeywordOnly,
    torch.optim.SGD,
    torch.optim.AdamW,
]
each_base = pytest.mark.parametrize("kind", BASES, ids=lambda kind: kind.__name__)


def closure_of(model, loss=loss_of):
    def closure():
        model.zero_grad()
        value = loss(model)
        value.backward()
        return value

    return closure


def train(model, step, steps=4):
    """`step(closure)` a few times; weights, buffers, gradients, losses and random state."""
    torch.manual_seed(SEED)
    losses = [step(closure_of(model)) for _ in range(steps)]
    return [list(model.parameters()), list(model.buffers()), gradients(model), losses, torch.get_rng_state()]


def by_hand_with(base, model):
    """A step of a base with ĝ from deep copies: the base is given the loss at θ and never runs a pass itself."""

    def step(closure):
        loss, state = closure(), torch.get_rng_state()
        for p, g in zip(model.parameters(), expected(model, loss_of)):
            p.grad = g
        torch.set_rng_state(state)
        return call(base, lambda: loss)

    return step


def call(base, closure):
    if not isinstance(base, NoClosure):
        return base.step(closure=closure)
    loss = closure()
    base.step()
    return loss


@each_base
def test_gamma_at_zero_is_plain_training_bit_for_bit(kind):
    plain, model = net(), net()
    plain_base = kind(plain.parameters(), lr=0.1)
    optimizer = gradreg.RegularizedOptimizer(kind(model.parameters(), lr=0.1), regularizer_of(model, gamma=0.0))
    wanted = train(plain, lambda closure: call(plain_base, closure))
    assert_same(train(model, optimizer.step), wanted)
    assert_same(copy_of(optimizer.state_dict()["state"]), copy_of(plain_base.state_dict()["state"]))


@each_base
def test_a_base_sees_the_regularized_gradient_and_the_loss(kind):
    """Several steps, against gradients and losses from deep copies."""
    model, twin = smooth(), smooth()
    optimizer = gradreg.RegularizedOptimizer(kind(model.parameters(), lr=0.1), regularizer_of(model))
    train(model, optimizer.step)
    train(twin, by_hand_with(kind(twin.parameters(), lr=0.1), twin))
    assert_close(list(model.parameters()), list(twin.parameters()))


@each_base
def test_the_loss_that_the_wrapper_returns_is_that_at_theta(kind):
    model = smooth()
    loss = loss_of(model).detach()
    optimizer = gradreg.RegularizedOptimizer(kind(model.parameters(), lr=0.1), regularizer_of(model))
    assert_same(torch.as_tensor(optimizer.step(closure_of(model))).detach(), loss)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_a_gradient_that_was_kept_is_never_written_into(gamma):
    model = smooth()
    base = KeepsGradient(model.parameters(), lr=0.1)
    optimizer = gradreg.RegularizedOptimizer(base, regularizer_of(model, gamma=gamma))
    optimizer.step(closure_of(model))
    kept = {p: (state["last_grad"], state["last_grad"].clone()) for p, state in base.state.items()}
    optimizer.regularizer.run_closure(closure_of(model))  # a step of which the base knows nothing
    assert_same([g for g, _ in kept.values()], [copied for _, copied in kept.values()])


@pytest.mark.parametrize("door", ["backward", "perturbed"])
def test_a_gradient_that_was_kept_is_never_written_into_in_the_other_doors(door):
    model = smooth()
    regularizer = regularizer_of(model)
    closure_of(model)()
    kept = [(p.grad, p.grad.clone()) for p in model.parameters()]
    if door == "backward":
        model.zero_grad()
        regularizer.backward(lambda: loss_of(model))
    else:
        model.zero_grad()
        closure_of(model)()
        with regularizer.perturbed():
            loss_of(model).backward()
    assert_same([g for g, _ in kept], [copied for _, copied in kept])


# Bases that cannot be served.


class CallsTwice(Base):
    def step(self, closure=None):
        closure()
        return super().step(closure)


class MovesFirst(Base):
    """A look-ahead: the closure is called at other weights."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.1)
        return super().step(closure)


class LineSearch(Base):
    def step(self, closure=None):
        loss = closure()
        super().step()
        return min(loss, closure())


@pytest.mark.parametrize("kind", [CallsTwice, MovesFirst, LineSearch], ids=lambda kind: kind.__name__)
def test_a_base_that_evaluates_its_closure_at_points_of_its_own_is_refused(kind):
    model = smooth()
    optimizer = gradreg.RegularizedOptimizer(kind(model.parameters(), lr=0.1), regularizer_of(model))
    with pytest.raises((ValueError, RuntimeError), match="closure"):
        optimizer.step(closure_of(model))


def test_a_base_that_never_calls_its_closure_still_has_its_gradient():
    class Ignores(Base):
        def step(self, closure=None):
            return super().step()

    model = smooth()
    by_hand = expected(model, loss_of)
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = gradreg.RegularizedOptimizer(Ignores(model.parameters(), lr=0.1), regularizer_of(model))
    assert_same(torch.as_tensor(optimizer.step(closure_of(model))).detach(), loss_of(smooth()).detach())
    assert_close(list(model.parameters()), [w - 0.1 * g for w, g in zip(weights, by_hand)])


def test_a_base_that_holds_none_of_the_selected_parameters_is_refused():
    model, other = smooth(), smooth()
    with pytest.raises(ValueError, match="base"):
        gradreg.RegularizedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), regularizer_of(model))
    with pytest.raises(ValueError, match="base"):
        gradreg.RegularizedOptimizer(
            torch.optim.SGD(model[2].parameters(), lr=0.1), regularizer_of(model, include="0.*")
        )


def test_a_base_that_holds_some_of_the_selected_parameters_is_served():
    model = smooth()
    base = torch.optim.SGD(model[2].parameters(), lr=0.1)
    gradreg.RegularizedOptimizer(base, regularizer_of(model)).step(closure_of(model))
    assert model[2].weight.grad is not None


def test_a_base_that_was_made_before_the_model_was_copied_is_refused():
    """Deepcopy, FSDP, a model that was built again: the base still holds the old parameters."""
    model = smooth()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="base"):
        gradreg.RegularizedOptimizer(base, regularizer_of(copy.deepcopy(model)))


# Steps of the base are seen as before.


def test_hooks_and_schedulers_count_one_step():
    model, seen = smooth(), []
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.register_step_pre_hook(lambda *_: seen.append("pre"))
    base.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer = gradreg.RegularizedOptimizer(base, regularizer_of(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(closure_of(model))
    scheduler.step()
    assert seen == ["pre", "post"]
    assert base.param_groups[0]["lr"] == 0.05


def test_a_pre_hook_of_the_base_sees_and_changes_the_regularized_gradient():
    model, seen = smooth(), []
    by_hand = expected(model, loss_of)
    base = torch.optim.SGD(model.parameters(), lr=0.1)

    def clip(*_):
        seen.append(gradients(model))
        nn.utils.clip_grad_value_(model.parameters(), 0.01)

    base.register_step_pre_hook(clip)
    weights = [p.detach().clone() for p in model.parameters()]
    gradreg.RegularizedOptimizer(base, regularizer_of(model)).step(closure_of(model))
    assert_close(seen[0], by_hand)
    assert_close(list(model.parameters()), [w - 0.1 * g.clamp(-0.01, 0.01) for w, g in zip(weights, by_hand)])


# A momentum by another name.


class OtherName(Base):
    """bitsandbytes, schedule-free: betas, and a momentum under another key."""

    def __init__(self, parameters, key):
        super().__init__(parameters)
        for group in self.param_groups:
            group["betas"] = (0.9, 0.99)
        self.key = key

    def move(self, p, lr, loss):
        momentum = self.state[p].setdefault(self.key, torch.zeros_like(p))
        momentum.lerp_(p.grad, 0.1)
        p.sub_(momentum, alpha=lr)


@pytest.mark.parametrize("key", ["state1", "z", "m"])
def test_a_momentum_by_another_name_is_an_error_once_the_optimizer_has_stepped(key):
    model = smooth()
    optimizer = OtherName(model.parameters(), key)
    regularizer = gradreg.GradientRegularizer(model, 0.05, 0.05, ascent=gradreg.Momentum(optimizer))
    regularizer.backward(lambda: loss_of(model))  # there is none yet
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    with pytest.raises(ValueError, match=key):
        regularizer.backward(lambda: loss_of(model))
    assert_same(list(model.parameters()), before)
    assert regularizer.step == 1


def test_a_momentum_by_another_name_is_an_error_ahead_too():
    model = smooth()
    optimizer = OtherName(model.parameters(), "state1")
    ahead = gradreg.Ahead(gradreg.Momentum(optimizer), rho=0.1)
    regularizer = gradreg.GradientRegularizer(model, 0.1, 0.05, at=ahead)
    regularizer.backward(lambda: loss_of(model))
    optimizer.step()
    with pytest.raises(ValueError, match="state1"):
        regularizer.backward(lambda: loss_of(model))


@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg"])
def test_a_momentum_by_a_known_name_serves(key):
    model = smooth()
    optimizer = OtherName(model.parameters(), key)
    regularizer = gradreg.GradientRegularizer(model, 0.05, 0.05, ascent=gradreg.Momentum(optimizer))
    for _ in range(2):
        model.zero_grad()
        regularizer.backward(lambda: loss_of(model))
        optimizer.step()
    assert regularizer.step == 2
