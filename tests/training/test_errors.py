"""Bad input: each gets an error that names the argument, the value, the range and the way out, and loses nothing."""

import copy
import math
import re

import pytest
import torch
from methods import closure_of
from problems import Trial, assert_same, copy_of, snapshot
from torch import nn
from torch.nn import functional as F

import gradreg
from gradreg import GradientRegularizer, RegularizedOptimizer
from gradreg.functional import Adaptive, Scheme

nan = math.nan


def build(trial, **options):
    return GradientRegularizer(trial.model, **({"gamma": 0.1, "epsilon": 0.1} | options))


CONSTRUCTION = [
    ({"gamma": -0.1}, ValueError, r"gamma must be a finite number ≥ 0, got -0.1.*γ = 0 trains without"),
    ({"gamma": nan}, ValueError, r"gamma must be a finite number ≥ 0, got nan"),
    ({"gamma": math.inf}, ValueError, r"gamma must be .* got inf"),
    ({"gamma": "0.1"}, TypeError, r"gamma must be a finite number ≥ 0 or a function of the step, got '0.1'"),
    ({"gamma": True}, TypeError, r"gamma must be .*, got True"),
    ({"epsilon": 0.0}, ValueError, r"epsilon must be a finite number > 0, got 0.0.*gamma=0"),
    ({"epsilon": -0.1}, ValueError, r'epsilon must be a finite number > 0, got -0.1.*scheme="backward"'),
    ({"epsilon": nan}, ValueError, r"epsilon must be a finite number > 0, got nan"),
    ({"scheme": "sideways"}, ValueError, r"scheme must be one of .*forward.*exact.*got 'sideways'"),
    ({"scheme": 3}, ValueError, r"scheme must be one of .*got 3"),
    ({"ascent": "up"}, ValueError, r"ascent must be one of .*gradient.*got 'up'"),
    ({"ascent": 3}, TypeError, r"ascent must be one of .* or a callable, got 3"),
    ({"nonfinite": "drop"}, ValueError, r'nonfinite must be "keep" or "first", got \'drop\''),
    ({"cap": 0}, ValueError, r"cap must be a finite number > 0, or None.*got 0"),
    ({"cap": -1.0}, ValueError, r"cap must be a finite number > 0.*got -1.0"),
    ({"cap": nan}, ValueError, r"cap must be a finite number > 0.*got nan"),
    ({"cap": "big"}, ValueError, r"cap must be .*got 'big'"),
    ({"include": "nowhere.*"}, ValueError, r"include: 'nowhere\.\*' matches no parameter.*0\.weight"),
    ({"exclude": ["0.*", "nowhere"]}, ValueError, r"exclude: 'nowhere' matches no parameter"),
    ({"include": nn.Conv2d}, ValueError, r"include: .*Conv2d.* matches no parameter"),
    ({"include": lambda name, p: False}, ValueError, r"include: .*lambda.* matches no parameter"),
    ({"exclude": "*"}, ValueError, r"include and exclude leave no trainable parameter.*loosen"),
    ({"include": [3]}, TypeError, r"include takes shell-style patterns, module types or predicates.*got 3"),
]


@pytest.mark.parametrize(("options", "kind", "message"), CONSTRUCTION)
def test_a_bad_argument_is_refused_at_construction(options, kind, message):
    trial = Trial("mlp")
    before = trial.snapshot()
    with pytest.raises(kind, match=message):
        build(trial, **options)
    assert_same(trial.snapshot(), before)
    assert not trial.model._forward_pre_hooks, "a refused regularizer leaves a hook on the model"


CALLS = {
    "model": (lambda: GradientRegularizer(3, 0.1, 0.1), TypeError, r"model must be a torch.nn.Module, got int"),
    "parameters": (
        lambda: GradientRegularizer(nn.ReLU(), 0.1, 0.1),
        ValueError,
        r"leave no trainable parameter .* out of 0 in ReLU",
    ),
    "frozen": (
        lambda: GradientRegularizer(nn.Linear(2, 1).requires_grad_(False), 0.1, 0.1),
        ValueError,
        r"no trainable parameter.*unfreeze",
    ),
    "rho": (lambda: gradreg.sam(nn.Linear(2, 1), rho=0.0), ValueError, r"rho must be a finite number > 0, got 0.0"),
    "rho of asam": (lambda: gradreg.asam(nn.Linear(2, 1), rho=-1), ValueError, r"rho must be .* > 0, got -1"),
    "eta": (lambda: gradreg.asam(nn.Linear(2, 1), 0.5, eta=-1), ValueError, r"eta must be a finite number ≥ 0, got -1"),
    "eta nan": (lambda: Adaptive(nan), ValueError, r"eta must be a finite number ≥ 0, got nan"),
    "radius": (lambda: gradreg.gnp(nn.Linear(2, 1), 0.0, 0.5), ValueError, r"radius must be .* > 0, got 0.0"),
    "alpha": (lambda: gradreg.gnp(nn.Linear(2, 1), 0.1, -1.0), ValueError, r"alpha must be .* ≥ 0, got -1.0.*1 is SAM"),
    "level": (lambda: gradreg.Flooding(-0.1), ValueError, r"level must be a finite number ≥ 0, got -0.1"),
    "level nan": (lambda: gradreg.Flooding(nan), ValueError, r"level must be .* got nan"),
    "stencil": (lambda: Scheme("odd", ((1.0, 2.0),)), ValueError, r"stencil must have Σ node · weight = 1, got 2.0"),
    "num_steps": (lambda: gradreg.warmup(0.1, 0), ValueError, r"num_steps must be an integer ≥ 1, got 0"),
    "start": (lambda: gradreg.late(0.1, start=-1), ValueError, r"start must be an integer ≥ 0, got -1"),
    "stop": (lambda: gradreg.late(0.1, start=3, stop=3), ValueError, r"stop must be an integer ≥ 4, got 3"),
    "period": (lambda: gradreg.every(0.1, 1.5), ValueError, r"period must be an integer ≥ 1, got 1.5"),
    "base": (
        lambda: RegularizedOptimizer(torch.optim.SGD, build(Trial("mlp"))),
        TypeError,
        r"base must be a built torch.optim.Optimizer, got <class",
    ),
    "regularizer": (
        lambda: RegularizedOptimizer(torch.optim.SGD(nn.Linear(2, 1).parameters()), 0.1),
        TypeError,
        r"regularizer must be a GradientRegularizer, got 0.1",
    ),
    "LBFGS": (
        lambda: RegularizedOptimizer(torch.optim.LBFGS(nn.Linear(2, 1).parameters()), build(Trial("mlp"))),
        ValueError,
        r"base must take one gradient a step, and LBFGS evaluates.*use a first-order optimizer",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_refused(name):
    call, kind, message = CALLS[name]
    with pytest.raises(kind, match=message):
        call()


def test_an_optimizer_is_wrapped_once():
    trial = Trial("mlp")
    optimizer = RegularizedOptimizer(torch.optim.SGD(trial.model.parameters()), build(trial))
    with pytest.raises(ValueError, match=r"base is a RegularizedOptimizer already.*base\.base"):
        RegularizedOptimizer(optimizer, build(trial))


# Bad losses and closures, in a state that has something to lose.


class Laboratory:
    """A model with buffers and a momentum, one step into its training."""

    def __init__(self, **options):
        self.trial = Trial("cnn")
        self.regularizer = build(self.trial, **options)
        base = torch.optim.SGD(self.trial.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = RegularizedOptimizer(base, self.regularizer)
        self.regularizer.backward(self.trial.loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def output(self):
        return self.trial.model(self.trial.batch[0])

    def snapshot(self):
        return [snapshot(self.trial.model, self.optimizer), torch.get_rng_state(), self.regularizer.state_dict()]

    def closure(self, loss_fn, zero=True, backward=True):
        def closure():
            if zero:
                self.optimizer.zero_grad()
            loss = loss_fn()
            if backward:
                loss.sum().backward()
            return loss

        return closure


LOSSES = {
    "vector": (lambda lab: lambda: lab.output().sum(1), ValueError, r"scalar, got shape \(8,\).*loss\.mean\(\)"),
    "without graph": (lambda lab: lambda: lab.output().sum().detach(), ValueError, r"without a graph.*no_grad"),
    "number": (lambda lab: lambda: lab.output().sum().item(), TypeError, r"loss as a tensor, got float"),
    "nothing": (lambda lab: lambda: lab.output() and None, (TypeError, RuntimeError), r"NoneType|ambiguous"),
    "tuple": (lambda lab: lambda: (lab.output().sum(), 1), TypeError, r"loss as a tensor, got tuple"),
}


@pytest.mark.parametrize("scheme", ["forward", "backward", "central", "exact"])
@pytest.mark.parametrize("gamma", [0.1, 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_loss_is_refused_and_nothing_lost(name, gamma, scheme):
    make, kind, message = LOSSES[name]
    lab = Laboratory(scheme=scheme)
    lab.regularizer.gamma = gamma
    before = lab.snapshot()
    with pytest.raises(kind, match=message):
        lab.regularizer.backward(make(lab))
    if gamma:  # plain training leaves what the forward pass did
        assert_same(lab.snapshot(), before)
    assert_same(lab.snapshot()[0][0], before[0][0])
    assert all(p.grad is None for p in lab.trial.model.parameters())


@pytest.mark.parametrize("scheme", ["forward", "backward", "central"])
def test_a_loss_of_another_batch_is_refused_and_nothing_lost(scheme):
    """In the first step: later ones are not compared by value."""
    trial = Trial("cnn")
    regularizer = build(trial, scheme=scheme)
    before = trial.snapshot()
    images = iter(torch.randn(9, 8, 2, 5, 5).double())
    with pytest.raises(ValueError, match=r"another batch.*Draw the batch once"):
        regularizer.backward(lambda: F.cross_entropy(trial.model(next(images)), trial.batch[1]))
    assert_same(trial.snapshot(), before)
    assert all(p.grad is None for p in trial.model.parameters())


CLOSURES = {
    "without backward": (lambda lab: lab.closure(lab.trial.loss, backward=False), r"left no gradient.*loss\.backward"),
    "vector": (lambda lab: lab.closure(lambda: lab.output().sum(1)), r"scalar loss, got shape \(8,\)"),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_a_bad_closure_is_refused_and_nothing_lost(name):
    make, message = CLOSURES[name]
    lab = Laboratory()
    before = lab.snapshot()
    with pytest.raises(ValueError, match=message):
        lab.optimizer.step(make(lab))
    assert_same(lab.snapshot(), before)


def test_a_closure_that_keeps_gradients_is_refused_and_nothing_lost():
    lab = Laboratory()
    lab.trial.loss().backward()
    before = lab.snapshot()
    with pytest.raises(ValueError, match=r"closure added to gradients.*zero_grad\(\)"):
        lab.optimizer.step(lab.closure(lab.trial.loss, zero=False))
    assert_same(lab.snapshot(), before)


def test_a_closure_without_zero_grad_is_refused_although_it_could_not_see_a_gradient_the_first_time():
    lab = Laboratory()
    closure = lab.closure(lab.trial.loss, zero=False)
    lab.optimizer.step(closure)
    with pytest.raises(ValueError, match=r"zero_grad\(\)"):
        lab.optimizer.step(closure)


def test_a_closure_with_another_batch_is_refused_and_nothing_lost():
    trial = Trial("cnn")
    optimizer = RegularizedOptimizer(torch.optim.SGD(trial.model.parameters(), momentum=0.9), build(trial))
    before = snapshot(trial.model, optimizer)
    images = iter(torch.randn(9, 8, 2, 5, 5).double())
    with pytest.raises(ValueError, match="another batch"):
        optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(trial.model(next(images)), trial.batch[1])))
    assert_same(snapshot(trial.model, optimizer), before)


def test_another_shape_is_refused_in_any_step():
    lab = Laboratory()
    before = lab.snapshot()
    images = iter([lab.trial.batch[0], lab.trial.batch[0][:4]])

    def loss():
        x = next(images)
        return F.cross_entropy(lab.trial.model(x), lab.trial.batch[1][: len(x)])

    with pytest.raises(ValueError, match="another batch"):
        lab.regularizer.backward(loss)
    assert_same(lab.snapshot(), before)


def test_no_batches_is_an_error():
    lab = Laboratory()
    before = lab.snapshot()
    with pytest.raises(ValueError, match=r"batches must hold at least one micro-batch"):
        lab.regularizer.backward(lambda batch: lab.trial.loss(), [])
    assert_same(lab.snapshot(), before)


def test_existing_gradients_survive_an_error():
    lab = Laboratory()
    lab.trial.loss().backward()
    before = copy_of(lab.trial.gradients())
    for loss in (lambda: lab.output().sum(1), lambda: 1 / 0):
        with pytest.raises((ValueError, ZeroDivisionError)):
            lab.regularizer.backward(loss)
        assert_same(lab.trial.gradients(), before)


# The second door.


def test_perturbed_needs_a_first_gradient():
    lab = Laboratory()
    before = lab.snapshot()
    with (
        pytest.raises(ValueError, match=r"starts from the gradient of the first pass.*run loss\.backward\(\) before"),
        lab.regularizer.perturbed(),
    ):
        raise AssertionError("the block must not run")
    assert_same(lab.snapshot(), before)


@pytest.mark.parametrize("scheme", ["central", "exact"])
def test_perturbed_serves_one_displaced_pass_only(scheme):
    lab = Laboratory(scheme=scheme)
    before = lab.snapshot()
    with (
        pytest.raises(ValueError, match=rf'perturbed\(\) runs its block once.*scheme="{scheme}".*backward\(loss_fn\)'),
        lab.regularizer.perturbed(),
    ):
        raise AssertionError("the block must not run")
    assert_same(lab.snapshot(), before)


def test_perturbed_warns_of_a_block_that_calls_the_model_less_often():
    lab = Laboratory()
    lab.trial.loss().backward()
    lab.trial.loss().backward()
    with (
        pytest.warns(UserWarning, match=r"called the model 2 times and the block 1 times"),
        lab.regularizer.perturbed(),
    ):
        lab.trial.loss().backward()


def test_a_block_with_another_batch_is_refused_and_weights_come_back():
    trial = Trial("mlp")
    regularizer = build(trial)
    before = trial.snapshot()
    trial.loss().backward()
    with pytest.raises(ValueError, match="another batch"), regularizer.perturbed():
        trial.model(trial.batch[0] + 1).sum().backward()
    assert_same(trial.snapshot(), before)


@pytest.mark.parametrize("scheme", ["forward", "backward", "central"])
def test_doors_do_not_nest(scheme):
    lab = Laboratory(scheme=scheme)
    before = lab.snapshot()
    with pytest.raises(RuntimeError, match="doors do not nest"):
        lab.regularizer.backward(lambda: lab.regularizer.backward(lab.trial.loss))
    assert_same(lab.snapshot()[0], before[0])


def test_a_closure_cannot_serve_the_exact_scheme():
    lab = Laboratory(scheme="exact")
    before = lab.snapshot()
    with pytest.raises(ValueError, match=r'scheme="exact" needs the loss before.*backward\(loss_fn\)'):
        lab.optimizer.step(lab.closure(lab.trial.loss))
    assert_same(lab.snapshot(), before)


# Schedules that go wrong on the way.

SCHEDULES = [
    ({"gamma": lambda step: 0.1 - step}, ValueError, r"gamma must be a finite number ≥ 0, got -0.9 at step 1"),
    ({"gamma": lambda step: nan if step else 0.1}, ValueError, r"gamma must be .* got nan at step 1"),
    ({"gamma": lambda step: None if step else 0.1}, TypeError, r"gamma must be .* got None at step 1"),
    ({"epsilon": lambda step: 0.1 * (1 - step)}, ValueError, r"epsilon must be a finite number > 0, got 0.0 at step 1"),
]


@pytest.mark.parametrize("door", ["backward", "perturbed", "closure"])
@pytest.mark.parametrize(("options", "kind", "message"), SCHEDULES)
def test_a_schedule_that_becomes_invalid_is_refused_and_nothing_lost(options, kind, message, door):
    lab = Laboratory(**options)
    if door == "perturbed":
        lab.trial.loss().backward()
    before = lab.snapshot()
    open_door = {
        "backward": lambda: lab.regularizer.backward(lab.trial.loss),
        "perturbed": lambda: lab.regularizer.perturbed().__enter__(),
        "closure": lambda: lab.optimizer.step(lab.closure(lab.trial.loss)),
    }
    with pytest.raises(kind, match=message):
        open_door[door]()
    assert_same(lab.snapshot(), before)


# State dicts.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("step"), r"must have the keys .*'step'"),
        (lambda state: state.update(extra=1), r"must have the keys .*got .*'extra'"),
        (lambda state: state.update(step=-1), r"state_dict\['step'\] must be an integer ≥ 0, got -1"),
        (lambda state: state.update(step=1.5), r"must be an integer ≥ 0, got 1.5"),
        (lambda state: state.update(active_steps=True), r"must be an integer ≥ 0, got True"),
    ],
)
def test_a_bad_state_dict_changes_nothing(change, message):
    lab = Laboratory()
    before, state = lab.regularizer.state_dict(), lab.regularizer.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        lab.regularizer.load_state_dict(state)
    assert lab.regularizer.state_dict() == before


def test_a_bad_state_dict_of_the_base_leaves_the_step_alone():
    lab = Laboratory()
    before = lab.snapshot()
    state = copy.deepcopy(lab.optimizer.state_dict())
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
    state["regularizer"]["step"] = 99
    with pytest.raises(ValueError, match=re.escape("parameter groups")):
        lab.optimizer.load_state_dict(state)
    assert_same(lab.snapshot(), before)


def test_the_loss_names_trainable_tensors_outside_the_model():
    trial = Trial("mlp")
    regularizer = build(trial)
    offset = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"1 trainable tensors outside the model \(shapes \[\(3,\)\]\)"):
        regularizer.backward(lambda: trial.loss() + offset.sum())


def test_a_loss_in_the_place_of_its_function_is_refused():
    trial = Trial("mlp")
    regularizer = build(trial)
    with pytest.raises(TypeError, match=r"loss_fn must be a function .* got Tensor.*not what it returned"):
        regularizer.backward(trial.loss())
    assert regularizer.step == 0
