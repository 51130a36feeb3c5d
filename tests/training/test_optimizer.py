"""Line 11 of the contract: every optimizer of torch.optim as a base, and whatever torch does with optimizers."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from methods import closure_of
from problems import Trial, assert_same, snapshot
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import gradreg
from gradreg import GradientRegularizer, RegularizedOptimizer

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
REFUSED = {"LBFGS"}  # evaluates its closure several times
BASES = sorted(set(OPTIMIZERS) - REFUSED)
OPTIONS = {"SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "Adafactor": {"lr": 0.1}, "Adadelta": {"lr": 1.0}}


class Matrices(torch.nn.Module):
    """No vectors: Muon takes matrices only."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 8, bias=False)
        self.second = torch.nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def model_for(name):
    """(trial, parameters): matrices for Muon, a sparse table for SparseAdam, everything else for the others."""
    trial = Trial("sparse" if name == "SparseAdam" else "cnn")
    if name == "SparseAdam":
        trial.model.head.requires_grad_(False)
    if name == "Muon":
        trial = Trial("mlp")
        torch.manual_seed(0)
        trial.model = Matrices().double()
    # In float32, since torch casts the float32 state of ASGD and NAdam to the dtype of the weights on loading.
    trial.model.float()
    trial.batch = tuple(x.float() if x.is_floating_point() else x for x in trial.batch)
    return trial, [p for p in trial.model.parameters() if p.requires_grad]


def build(name, gamma=0.1, **options):
    trial, parameters = model_for(name)
    base = OPTIMIZERS[name](parameters, **(OPTIONS.get(name, {"lr": 0.01}) | options))
    optimizer = RegularizedOptimizer(base, GradientRegularizer(trial.model, gamma, 0.1))
    torch.manual_seed(5)
    return trial, optimizer


def train(trial, optimizer, num_steps, scheduler=None):
    for _ in range(num_steps):
        optimizer.step(closure_of(optimizer, trial.loss))
        if scheduler is not None:
            scheduler.step()


def everything(trial, optimizer):
    return [*snapshot(trial.model)[0], list(trial.model.buffers()), optimizer.state_dict()["state"]]


def values(trial, optimizer):
    return [list(trial.model.state_dict().values()), optimizer.state_dict(), torch.get_rng_state()]


each_base = pytest.mark.parametrize("name", BASES)


@each_base
def test_11_steps_take_the_base_along_the_regularized_gradient(name):
    """Against the base alone, handed what the first door leaves in `.grad`."""
    trial, optimizer = build(name)
    train(trial, optimizer, 3)
    other, wrapper = build(name)
    for _ in range(3):
        wrapper.base.zero_grad()
        other.model.zero_grad()
        wrapper.regularizer.backward(other.loss)
        wrapper.base.step()
    assert_same(values(trial, optimizer), values(other, wrapper))


@each_base
def test_11_zero_gamma_is_the_base_bit_for_bit(name):
    trial, optimizer = build(name, gamma=0.0)
    train(trial, optimizer, 3)
    other, wrapper = build(name)
    train(other, wrapper.base, 0)
    for _ in range(3):
        wrapper.base.step(closure_of(wrapper.base, other.loss))
    assert_same(values(trial, optimizer)[0], values(other, wrapper)[0])
    assert_same(optimizer.base.state_dict(), wrapper.base.state_dict())


def save(trial, optimizer, scheduler=None):
    file = io.BytesIO()
    state = {
        "model": trial.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "scheduler": scheduler and scheduler.state_dict(),
    }
    torch.save(state, file)
    file.seek(0)
    return file


def load(file, trial, optimizer, scheduler=None):
    state = torch.load(file, weights_only=True)
    trial.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state_dict=state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])


@each_base
def test_11_saving_and_loading_midway_changes_nothing(name):
    trial, optimizer = build(name, gamma=gradreg.warmup(0.1, 6))
    train(trial, optimizer, 5)
    first, before = build(name, gamma=gradreg.warmup(0.1, 6))
    train(first, before, 3)
    file = save(first, before)
    second, after = build(name, gamma=gradreg.warmup(0.1, 6))
    train(second, after, 1)  # state to be replaced
    load(file, second, after)
    train(second, after, 2)
    assert_same(values(second, after), values(trial, optimizer))
    assert after.regularizer.step == 5


@each_base
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_11_a_copy_goes_on_as_the_original(name, copied):
    trial, optimizer = build(name)
    train(trial, optimizer, 2)
    other, _ = model_for(name)
    other.model, twin = copied((trial.model, optimizer))
    assert twin.regularizer.model is other.model
    assert twin.base is not optimizer.base
    state = torch.get_rng_state()
    train(trial, optimizer, 2)
    expected = values(trial, optimizer)
    torch.set_rng_state(state)
    train(other, twin, 2)
    assert_same(values(other, twin), expected)


@each_base
def test_11_add_param_group_and_zero_grad(name):
    trial, optimizer = build(name)
    extra = torch.nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [extra]})
    assert optimizer.param_groups is optimizer.base.param_groups
    assert len(optimizer.param_groups) == 2
    train(trial, optimizer, 1)  # `extra` has no gradient: nothing happens to it
    optimizer.zero_grad()
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    assert_same(extra, torch.ones_like(extra))


@each_base
def test_11_step_hooks_fire_once(name):
    trial, optimizer = build(name)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    train(trial, optimizer, 2)
    assert calls == ["before", "after"] * 2


def test_11_hooks_of_every_optimizer_fire_once():
    trial, optimizer = build("SGD")
    calls = []
    handle = register_optimizer_step_post_hook(lambda *args: calls.append(1))
    train(trial, optimizer, 2)
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_11_multi_closure_optimizers_are_refused(name):
    trial, parameters = model_for(name)
    with pytest.raises(ValueError, match=f"{name} evaluates its closure several times.*first-order"):
        RegularizedOptimizer(OPTIMIZERS[name](parameters), GradientRegularizer(trial.model, 0.1, 0.1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"fused": True}),
        ("SGD", {"foreach": True}),
        ("SGD", {"foreach": False, "weight_decay": 0.1}),
        ("Adam", {"fused": True}),
        ("AdamW", {"amsgrad": True, "maximize": True}),
        ("Adam", {"capturable": False, "foreach": True}),
        ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.0, "nesterov": False}),
    ],
    ids=str,
)
def test_11_options_of_the_base(name, options):
    trial, optimizer = build(name, **options)
    train(trial, optimizer, 2)
    other, wrapper = build(name, **options)
    for _ in range(2):
        wrapper.base.zero_grad()
        wrapper.regularizer.backward(other.loss)
        wrapper.base.step()
    assert_same(values(trial, optimizer)[:2], values(other, wrapper)[:2])


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def rates(make, optimizer, trial):
    scheduler, found = make(optimizer), []
    for _ in range(5):
        train(trial, optimizer, 1, scheduler)
        found.append([(group["lr"], group.get("momentum")) for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_11_schedulers_move_the_base(name):
    trial, optimizer = build("SGD")
    other, wrapper = build("SGD")
    assert rates(SCHEDULERS[name], optimizer, trial) == rates(SCHEDULERS[name], wrapper.base, other)


def test_11_a_plateau_moves_the_base():
    trial, optimizer = build("SGD")
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(3):
        train(trial, optimizer, 1)
        scheduler.step(1.0)  # never better
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "SequentialLR", "ChainedScheduler"])
def test_11_schedulers_resume_bitwise(name):
    trial, optimizer = build("AdamW" if name != "OneCycleLR" else "SGD")
    scheduler = SCHEDULERS[name](optimizer)
    train(trial, optimizer, 3, scheduler)
    file = save(trial, optimizer, scheduler)
    train(trial, optimizer, 3, scheduler)
    expected = values(trial, optimizer)
    second, after = build("AdamW" if name != "OneCycleLR" else "SGD")
    scheduler = SCHEDULERS[name](after)
    load(file, second, after, scheduler)
    train(second, after, 3, scheduler)
    assert_same(values(second, after), expected)


def test_11_a_copy_under_a_scheduler_still_steps():
    trial, optimizer = build("SGD")
    lr_scheduler.ExponentialLR(optimizer, 0.9)
    other, _ = model_for("SGD")
    other.model, twin = copy.deepcopy((trial.model, optimizer))
    before = snapshot(trial.model)
    train(other, twin, 1)
    assert_same(snapshot(trial.model), before)
    assert not torch.equal(other.model[0].weight, trial.model[0].weight)


# Without a closure.


def test_11_a_step_without_gradients_regularized_says_what_to_do():
    trial, optimizer = build("SGD")
    trial.loss().backward()
    before = everything(trial, optimizer)
    with pytest.raises(ValueError, match=r"step\(\) needs a closure.*step\(closure\).*regularizer.backward"):
        optimizer.step()
    assert_same(everything(trial, optimizer), before)


def test_11_a_step_without_closure_follows_either_other_door_and_only_once():
    trial, optimizer = build("SGD")
    optimizer.regularizer.backward(trial.loss)
    optimizer.step()
    optimizer.zero_grad()
    trial.loss().backward()
    with optimizer.regularizer.perturbed():
        trial.loss().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()


def test_11_a_fresh_wrapper_needs_gradients_regularized_since_it_was_loaded():
    trial, optimizer = build("SGD")
    train(trial, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    _, other = build("SGD")
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="needs a closure"):
        other.step()


def test_11_a_step_that_moves_nothing_needs_no_closure():
    """torch.distributed.checkpoint makes optimizer state by a step with lr = 0 and zero gradients."""
    trial, optimizer = build("AdamW")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in trial.model.parameters():
        p.grad = torch.zeros_like(p)
    before = snapshot(trial.model)
    optimizer.step(closure=None)
    assert_same(snapshot(trial.model), before)
    assert len(optimizer.state) == len(list(trial.model.parameters()))


@pytest.mark.parametrize("call", [lambda s, o, c: s.step(o, c), lambda s, o, c: s.step(o, closure=c)])
def test_11_a_gradient_scaler_with_a_closure_is_refused(call):
    trial, optimizer = build("SGD")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(trial.loss()).backward()
    before = everything(trial, optimizer)
    with pytest.raises((ValueError, RuntimeError), match=r"[Cc]losure"):
        call(scaler, optimizer, closure_of(optimizer, trial.loss))
    assert_same(everything(trial, optimizer), before)


def test_11_parameters_outside_the_model_keep_the_first_gradient():
    trial, optimizer = build("SGD")
    offset = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [offset], "lr": 0.0})
    loss = trial.loss
    trial.loss = lambda: loss() + offset.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trial, optimizer, 1)
    assert_same(offset.grad, torch.ones_like(offset))


def test_state_of_the_base_is_read_through():
    trial, optimizer = build("Adam")
    train(trial, optimizer, 1)
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults is optimizer.base.defaults
    optimizer.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))  # a plain state dict
    assert optimizer.param_groups is optimizer.base.param_groups
    assert "SGD" not in repr(optimizer)
    assert "Adam" in repr(optimizer)


def test_an_optimizer_over_a_part_of_the_model_says_whose_gradients_to_clear():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = gradreg.RegularizedOptimizer(
        torch.optim.SGD(model[0].parameters(), lr=0.1), gradreg.GradientRegularizer(model, 0.1, 0.1)
    )

    def closure(clear):
        clear.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(lambda: closure(model))
    optimizer.step(lambda: closure(model))
    with pytest.raises(
        ValueError, match=r"2 selected parameters that this optimizer does not own: call model\.zero_grad"
    ):
        optimizer.step(lambda: closure(optimizer))


def test_an_optimizer_over_a_part_keeps_to_what_is_selected():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    regularizer = gradreg.GradientRegularizer(model, 0.1, 0.1, include="0.*")
    optimizer = gradreg.RegularizedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), regularizer)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert regularizer.step == 2
