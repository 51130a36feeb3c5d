"""Modes below two passes, each against its formula written out."""

import copy
import io
import math
import statistics

import pytest
import torch
from problems import assert_close, assert_same
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gradreg
from gradreg.training.schedule import RunningTest

RHO = 0.05


class Problem:
    """A small model in float64 with a batch of ten rows; counts its forwards."""

    def __init__(self, *layers, seed=0):
        torch.manual_seed(seed)
        body = layers or (nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.model = nn.Sequential(*body).double()
        self.batch = torch.randn(10, 4).double(), torch.randint(3, (10,))
        self.forwards = 0

    def loss(self, batch=None):
        self.forwards += 1
        x, y = self.batch if batch is None else batch
        return F.cross_entropy(self.model(x), y)

    def gradient(self, batch=None, displaced_by=None):
        """∇L of a batch at θ + a displacement, on a copy of the model."""
        twin = copy.deepcopy(self)
        parameters = list(twin.model.parameters())
        if displaced_by is not None:
            with torch.no_grad():
                for p, d in zip(parameters, displaced_by):
                    p.add_(d)
        return list(torch.autograd.grad(twin.loss(batch), parameters))

    def rows(self, start, stop):
        x, y = self.batch
        return x[start:stop], y[start:stop]

    @property
    def parameters(self):
        return list(self.model.parameters())

    @property
    def gradients(self):
        return [p.grad for p in self.parameters]

    def train(self, regularizer, optimizer, steps=1):
        for _ in range(steps):
            optimizer.zero_grad()
            regularizer.backward(self.loss, [self.batch])
            optimizer.step()


def norm(vectors):
    return math.sqrt(sum(float(v.square().sum()) for v in vectors))


def scaled(vectors, factor):
    return [factor * v for v in vectors]


def sgd(problem, **options):
    return torch.optim.SGD(problem.parameters, **{"lr": 0.1, "momentum": 0.9, **options})


# One pass: momentum and the previous gradient.

BASES = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
    "SGD, Nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "momentum_buffer"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, momentum=0.9), "momentum_buffer"),
    "Adam": (torch.optim.Adam, "exp_avg"),
    "AdamW": (torch.optim.AdamW, "exp_avg"),
    "NAdam": (torch.optim.NAdam, "exp_avg"),
    "Adamax": (torch.optim.Adamax, "exp_avg"),
}


def by_backward(regularizer, optimizer, problem):
    optimizer.zero_grad()
    return regularizer.backward(problem.loss)


def by_window(regularizer, optimizer, problem):
    optimizer.zero_grad()
    parts = [problem.rows(0, 5), problem.rows(5, 10)]
    return regularizer.backward(lambda batch: problem.loss(batch) / 2, parts)


def by_perturbed(regularizer, optimizer, problem):
    optimizer.zero_grad()
    with regularizer.perturbed():
        problem.loss().backward()


def by_closure(regularizer, optimizer, problem):
    def closure():
        problem.model.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    regularizer.run_closure(closure)


DOORS = {
    "backward": (by_backward, 1),
    "window": (by_window, 2),
    "perturbed": (by_perturbed, 1),
    "closure": (by_closure, 1),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("door", DOORS)
def test_momentum_takes_the_gradient_at_the_displaced_point_in_one_pass(base, sign, door):
    problem = Problem()
    make, key = BASES[base]
    optimizer = make(problem.parameters)
    regularizer = gradreg.msam(problem.model, optimizer, RHO, sign=sign)
    problem.train(regularizer, optimizer, steps=2)
    momentum = [optimizer.state[p][key].clone() for p in problem.parameters]
    expected = problem.gradient(displaced_by=scaled(momentum, sign * RHO / norm(momentum)))
    before, places = copy.deepcopy(problem.model.state_dict()), [p.data_ptr() for p in problem.parameters]
    problem.forwards = 0
    open_door, passes = DOORS[door]
    open_door(regularizer, optimizer, problem)
    assert problem.forwards == passes
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)
    read = regularizer.diagnostics()
    assert float(read["realized"].norm) == pytest.approx(1)
    assert (int(read["active_steps"]), int(read["skipped_steps"])) == (2, 1)
    assert_same(problem.model.state_dict(), before)
    assert [p.data_ptr() for p in problem.parameters] == places


@pytest.mark.parametrize("door", DOORS)
def test_the_first_step_has_no_momentum_and_is_plain(door):
    problem = Problem()
    optimizer = sgd(problem)
    DOORS[door][0](gradreg.msam(problem.model, optimizer, RHO), optimizer, problem)
    assert_close(problem.gradients, problem.gradient(), rtol=1e-12, atol=1e-14)


def test_momentum_looks_ahead_where_nesterov_does():
    """At ρ = lr · μ · ‖v‖ the displaced point is Nesterov's."""
    problem = Problem()
    optimizer = sgd(problem)
    plain = gradreg.GradientRegularizer(problem.model, 0, 1)
    problem.train(plain, optimizer, steps=3)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in problem.parameters]
    expected = problem.gradient(displaced_by=scaled(momentum, -0.1 * 0.9))
    optimizer.zero_grad()
    gradreg.msam(problem.model, optimizer, rho=0.1 * 0.9 * norm(momentum)).backward(problem.loss)
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sign", [-1, 1])
def test_previous_takes_the_gradient_of_the_step_before_as_ascent(sign):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.GradientRegularizer(problem.model, RHO, RHO, ascent=gradreg.Previous(sign))
    previous = problem.gradient()
    problem.train(regularizer, optimizer)
    assert_close(problem.gradients, previous, rtol=1e-12, atol=1e-14)
    for _ in range(2):
        expected = problem.gradient(displaced_by=scaled(previous, sign * RHO / norm(previous)))
        problem.train(regularizer, optimizer)
        assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)
        previous = [g.clone() for g in problem.gradients]
        torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-3)  # what is done to .grad later does not matter


def test_a_previous_gradient_that_is_not_finite_is_no_direction():
    problem = Problem()
    optimizer = sgd(problem, lr=0.0)
    regularizer = gradreg.GradientRegularizer(problem.model, RHO, RHO, ascent=gradreg.Previous())
    optimizer.zero_grad()
    regularizer.backward(lambda: problem.loss() * math.inf)
    optimizer.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, problem.gradient(), rtol=1e-12, atol=1e-14)
    counts = regularizer.diagnostics()
    assert (int(counts["active_steps"]), int(counts["skipped_steps"])) == (0, 2)


def test_an_optimizer_that_regularizes_takes_a_one_pass_mode():
    problem = Problem()
    base = sgd(problem)
    optimizer = gradreg.RegularizedOptimizer(base, gradreg.msam(problem.model, base, RHO))

    def closure():
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    twin = copy.deepcopy(problem)
    other = sgd(twin)
    for _ in range(3):
        optimizer.step(closure)
        twin.train(gradreg.msam(twin.model, other, RHO), other)
    assert problem.forwards == 3
    assert_close(problem.parameters, twin.parameters, rtol=1e-12, atol=1e-14)


ONE_PASS = {
    "momentum": lambda problem, optimizer: gradreg.msam(problem.model, optimizer, RHO),
    "previous": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, RHO, RHO, ascent=gradreg.Previous()
    ),
    "split": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, RHO / 2, RHO, ascent=gradreg.Momentum(optimizer), batch=gradreg.Split()
    ),
    "split, own gradient": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, RHO / 2, RHO, batch=gradreg.Split()
    ),
}
CHEAP = {
    **ONE_PASS,
    "fraction": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, 0.1, RHO, batch=gradreg.Fraction(0.3)
    ),
    "large gradients": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, 0.1, RHO, when=gradreg.LargeGradients()
    ),
    "ahead": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model,
        0.1,
        RHO,
        batch=gradreg.Fraction(0.3),
        at=gradreg.Ahead(gradreg.Momentum(optimizer), rho=0.3),
    ),
    "ahead of the previous": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, 0.1, RHO, at=gradreg.Ahead(gradreg.Previous(), rho=0.3)
    ),
    "bernoulli": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, gradreg.bernoulli(0.1, 0.5), RHO
    ),
}
each_mode = pytest.mark.parametrize("mode", CHEAP)


def dropping():
    torch.manual_seed(0)
    return Problem(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


@each_mode
def test_steps_saved_and_resumed_are_the_same_steps_bit_for_bit(mode):
    def start():
        problem = dropping()
        optimizer = sgd(problem)
        return problem, optimizer, CHEAP[mode](problem, optimizer)

    problem, optimizer, regularizer = start()
    torch.manual_seed(3)
    problem.train(regularizer, optimizer, steps=4)
    file = io.BytesIO()
    states = [problem.model.state_dict(), optimizer.state_dict(), regularizer.state_dict(), torch.get_rng_state()]
    torch.save(states, file)
    problem.train(regularizer, optimizer, steps=4)

    file.seek(0)
    weights, of_optimizer, of_regularizer, rng = torch.load(file, weights_only=True)
    resumed, other, again = start()
    resumed.model.load_state_dict(weights)
    other.load_state_dict(of_optimizer)
    again.load_state_dict(of_regularizer)
    torch.set_rng_state(rng)
    resumed.train(again, other, steps=4)
    assert_same(resumed.model.state_dict(), problem.model.state_dict())
    assert str(again.state_dict()) == str(regularizer.state_dict())


@each_mode
def test_copies_go_on_as_the_original_does(mode):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=2)
    twin, other, again = copy.deepcopy((problem, optimizer, regularizer))
    problem.train(regularizer, optimizer, steps=2)
    twin.train(again, other, steps=2)
    assert_same(twin.model.state_dict(), problem.model.state_dict())


@each_mode
def test_zero_gamma_is_plain_training_bit_for_bit(mode):
    if "ahead" in mode:
        pytest.skip("moves the one pass too")
    problem, plain = dropping(), dropping()
    optimizer, other = sgd(problem), sgd(plain)
    regularizer = CHEAP[mode](problem, optimizer)
    regularizer.gamma = 0.0
    for trial, base, method in ((problem, optimizer, regularizer), (plain, other, None)):
        torch.manual_seed(5)
        for _ in range(3):
            base.zero_grad()
            if method is None:
                trial.loss().backward()
            else:
                method.backward(trial.loss, [trial.batch])
            base.step()
    assert_same(problem.model.state_dict(), plain.model.state_dict())
    assert problem.forwards == plain.forwards


@each_mode
@pytest.mark.parametrize("failing", [1, 2])
def test_weights_come_back_after_an_exception(mode, failing):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=2)
    before, places = copy.deepcopy(problem.model.state_dict()), [p.data_ptr() for p in problem.parameters]
    problem.forwards = 0

    def failing_loss(batch):
        loss = problem.loss(batch)
        if problem.forwards == failing:
            raise KeyboardInterrupt
        return loss

    optimizer.zero_grad()
    try:
        regularizer.backward(failing_loss, [problem.batch])
    except KeyboardInterrupt:
        pass
    else:
        assert problem.forwards < failing  # the mode runs fewer passes
    assert_same(problem.model.state_dict(), before)
    assert [p.data_ptr() for p in problem.parameters] == places
    problem.train(regularizer, optimizer)  # and goes on


@pytest.mark.parametrize("mode", ONE_PASS)
def test_a_state_dict_of_displaced_weights_is_an_error(mode):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=2)
    problem.model.state_dict()  # between steps the weights are the true ones
    seen = []

    def saving(batch):
        try:
            seen.append(problem.model.state_dict())
        except RuntimeError as error:
            seen.append(error)
        return problem.loss(batch)

    optimizer.zero_grad()
    regularizer.backward(saving, [problem.batch])
    assert isinstance(seen[-1], RuntimeError)
    assert "displaced" in str(seen[-1])


@pytest.mark.parametrize("mode", ONE_PASS)
def test_randomness_is_that_of_one_pass_over_the_batch(mode):
    problem = Problem(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer)
    problem.forwards = 0
    torch.manual_seed(1)
    problem.train(regularizer, optimizer)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    parts = [5, 5] if "split" in mode else [10]
    for rows in parts:
        F.dropout(torch.ones(rows, 8).double(), 0.3)
    assert torch.equal(torch.get_rng_state(), after)
    assert problem.forwards == len(parts)


def test_what_is_not_selected_does_not_move_in_one_pass():
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.msam(problem.model, optimizer, RHO, include="0.*")
    problem.train(regularizer, optimizer, steps=2)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in problem.parameters]
    factor = -RHO / norm(momentum[:2])
    expected = problem.gradient(displaced_by=[factor * v if k < 2 else 0 * v for k, v in enumerate(momentum)])
    optimizer.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)


def test_low_precision_weights_that_do_not_move_are_told():
    problem = Problem()
    problem.model.bfloat16()
    problem.batch = problem.batch[0].bfloat16(), problem.batch[1]
    optimizer = sgd(problem)
    regularizer = gradreg.msam(problem.model, optimizer, 1e-5)
    problem.train(regularizer, optimizer)
    with pytest.warns(UserWarning, match="Rounding realized only"):
        problem.train(regularizer, optimizer)


# A tied weight in reentrant checkpoints: its gradient arrives in parts, within the backward pass.


class Tied(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            if self.reentrant:
                x = checkpoint(lambda h: self.shared(h).tanh(), x, use_reentrant=True)
            else:
                x = self.shared(x).tanh()
        return self.last(x)


def _tied(reentrant, steps, make):
    torch.manual_seed(0)
    problem = Problem(Tied(reentrant))
    optimizer = sgd(problem)
    regularizer = make(problem, optimizer)
    problem.train(regularizer, optimizer, steps)
    return problem.parameters


def test_one_pass_through_reentrant_checkpoints_is_the_same():
    make = ONE_PASS["momentum"]
    assert_close(_tied(True, 4, make), _tied(False, 4, make), rtol=1e-12, atol=1e-14)


def test_a_selection_through_reentrant_checkpoints_is_the_same():
    def make(problem, optimizer):
        return gradreg.GradientRegularizer(problem.model, 0.1, RHO, include="*shared*")

    assert_close(_tied(True, 3, make), _tied(False, 3, make), rtol=1e-12, atol=1e-14)


# A fraction of the batch.


@pytest.mark.parametrize(("share", "rows"), [(0.3, 3), (0.01, 1), (0.99, 9)])
@pytest.mark.parametrize("ascent", ["gradient", "normalized"])
def test_fraction_is_its_formula(share, rows, ascent):
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, ascent=ascent, batch=gradreg.Fraction(share))
    loss = regularizer.backward(problem.loss, [problem.batch])
    part = problem.rows(0, rows)
    g_all, g_part = problem.gradient(), problem.gradient(part)
    along = scaled(g_part, RHO / (1 if ascent == "gradient" else norm(g_part)))
    moved = problem.gradient(part, displaced_by=along)
    expected = [g + 0.3 / RHO * (b - a) for g, a, b in zip(g_all, g_part, moved)]
    assert_close(problem.gradients, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, problem.loss().detach())
    read = regularizer.diagnostics()
    penalty = norm([0.3 / RHO * (b - a) for a, b in zip(g_part, moved)])
    assert float(read["grad_norm"]) == pytest.approx(norm(g_part), rel=1e-10)
    assert float(read["penalty_ratio"]) == pytest.approx(penalty / norm(g_part), rel=1e-8)


def test_fraction_of_a_window_cuts_through_micro_batches():
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=gradreg.Fraction(0.6))
    window = [problem.rows(0, 5), problem.rows(5, 10)]
    regularizer.backward(lambda batch: problem.loss(batch) / 2, window)
    whole = Problem()
    gradreg.GradientRegularizer(whole.model, 0.3, RHO, batch=gradreg.Fraction(0.6)).backward(whole.loss, [whole.batch])
    assert_close(problem.gradients, whole.gradients, rtol=1e-10, atol=1e-12)
    assert problem.forwards == 5  # five rows and one, both again displaced, and the other four


def test_fraction_does_not_depend_on_a_loss_scale():
    plain, scaled_up = Problem(), Problem()
    for problem, scale in ((plain, 1.0), (scaled_up, 1024.0)):
        regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=gradreg.Fraction(0.3))
        regularizer.backward(problem.loss, [problem.batch], backward=lambda loss, s=scale: (s * loss).backward())
    assert_close([g / 1024 for g in scaled_up.gradients], plain.gradients, rtol=1e-10, atol=1e-12)


def test_fraction_adds_to_what_is_in_grad():
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=gradreg.Fraction(0.3))
    regularizer.backward(problem.loss, [problem.batch])
    once = [g.clone() for g in problem.gradients]
    regularizer.backward(problem.loss, [problem.batch])
    assert_close(problem.gradients, scaled(once, 2), rtol=1e-10, atol=1e-12)


def test_fraction_caps_the_penalty_against_the_gradient_of_its_rows():
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 30.0, RHO, batch=gradreg.Fraction(0.3), cap=0.5)
    regularizer.backward(problem.loss, [problem.batch])
    gap = [a - b for a, b in zip(problem.gradients, problem.gradient())]
    assert norm(gap) == pytest.approx(0.5 * norm(problem.gradient(problem.rows(0, 3))), rel=1e-8)


def test_fraction_of_dictionaries_and_nested_batches():
    problem = Problem()
    x, y = problem.batch
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, batch=gradreg.Fraction(0.3))
    regularizer.backward(lambda batch: problem.loss((batch["x"][0], batch["y"])), [{"x": [x], "y": y, "epoch": 3}])
    other = Problem()
    gradreg.GradientRegularizer(other.model, 0.3, RHO, batch=gradreg.Fraction(0.3)).backward(other.loss, [other.batch])
    assert_same(problem.gradients, other.gradients)


# A split batch.


@pytest.mark.parametrize(("share", "rows"), [(0.5, 5), (0.3, 3), (0.01, 1), (0.99, 9)])
@pytest.mark.parametrize("ascent", ["momentum", "gradient", "normalized"])
def test_split_is_its_formula_with_each_row_in_one_pass(share, rows, ascent):
    problem = Problem()
    optimizer = sgd(problem)
    choice = gradreg.Momentum(optimizer) if ascent == "momentum" else ascent
    regularizer = gradreg.GradientRegularizer(problem.model, share * RHO, RHO, ascent=choice, batch=gradreg.Split())
    problem.train(regularizer, optimizer, steps=2)
    here, ahead = problem.rows(0, 10 - rows), problem.rows(10 - rows, 10)
    first = problem.gradient(here)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in problem.parameters]
    along = {
        "momentum": scaled(momentum, -RHO / norm(momentum)),
        "gradient": scaled(first, RHO),
        "normalized": scaled(first, RHO / norm(first)),
    }[ascent]
    second = problem.gradient(ahead, displaced_by=along)
    optimizer.zero_grad()
    regularizer.backward(problem.loss, [problem.batch])
    expected = [(1 - share) * a + share * b for a, b in zip(first, second)]
    assert_close(problem.gradients, expected, rtol=1e-10, atol=1e-12)


def test_split_keeps_the_statistics_of_the_rows_at_theta():
    problem = dropping()
    optimizer = sgd(problem)
    regularizer = CHEAP["split, own gradient"](problem, optimizer)
    twin = copy.deepcopy(problem)
    regularizer.backward(problem.loss, [problem.batch])
    twin.loss(twin.rows(0, 5))
    assert_same(dict(problem.model.named_buffers()), dict(twin.model.named_buffers()))


@pytest.mark.parametrize("factor", [math.nan, math.inf, 0.0])
def test_split_displaces_nothing_along_a_gradient_that_cannot_be_used_and_leaves_it_visible(factor):
    problem = Problem()
    seen = []

    def loss(batch):
        seen.append([p.detach().clone() for p in problem.parameters])
        return problem.loss(batch) * (factor if len(seen) == 1 else 1.0)

    regularizer = gradreg.GradientRegularizer(problem.model, RHO / 2, RHO, batch=gradreg.Split())
    regularizer.backward(loss, [problem.batch])
    assert_same(seen[1], seen[0])
    assert all(g.isfinite().all() for g in problem.gradients) == (factor == 0)
    counts = regularizer.diagnostics()
    assert (int(counts["active_steps"]), int(counts["skipped_steps"])) == (0, 1)


@each_mode
def test_nothing_is_read_by_the_host(mode):
    """A tensor on the meta device has no values: whatever asks for one raises."""
    if mode == "large gradients":
        pytest.skip("decides on the host, and says so")
    problem = Problem()
    problem.model.to("meta")
    problem.batch = tuple(t.to("meta") for t in problem.batch)
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer, steps=4)
    assert regularizer.step == 4
    assert all(g.device.type == "meta" for g in problem.gradients)


def test_split_does_not_depend_on_a_loss_scale():
    plain, scaled_up = Problem(), Problem()
    for problem, scale in ((plain, 1.0), (scaled_up, 1024.0)):
        regularizer = gradreg.GradientRegularizer(problem.model, RHO / 2, RHO, batch=gradreg.Split())
        regularizer.backward(problem.loss, [problem.batch], backward=lambda loss, s=scale: (s * loss).backward())
    assert_close([g / 1024 for g in scaled_up.gradients], plain.gradients, rtol=1e-10, atol=1e-12)


# At a point ahead.


@pytest.mark.parametrize("batch", [None, gradreg.Fraction(0.3)], ids=str)
@pytest.mark.parametrize("scheme", ["forward", "backward", "central"])
@pytest.mark.parametrize("direction", ["momentum", "previous"])
def test_ahead_is_the_regularized_gradient_at_the_displaced_point(batch, scheme, direction):
    problem = Problem()
    optimizer = sgd(problem)
    known = gradreg.Momentum(optimizer) if direction == "momentum" else gradreg.Previous()
    regularizer = gradreg.GradientRegularizer(
        problem.model, 0.3, RHO, scheme=scheme, batch=batch, at=gradreg.Ahead(known, rho=0.7)
    )
    problem.train(regularizer, optimizer, steps=2)
    if direction == "momentum":
        vectors = scaled([optimizer.state[p]["momentum_buffer"] for p in problem.parameters], -1)
    else:
        vectors = [g.clone() for g in problem.gradients]
    moved = copy.deepcopy(problem)
    with torch.no_grad():
        for p, v in zip(moved.parameters, vectors):
            p.add_(v, alpha=0.7 / norm(vectors))
            p.grad = None
    gradreg.GradientRegularizer(moved.model, 0.3, RHO, scheme=scheme, batch=batch).backward(moved.loss, [moved.batch])
    before, places = copy.deepcopy(problem.model.state_dict()), [p.data_ptr() for p in problem.parameters]
    optimizer.zero_grad()
    regularizer.backward(problem.loss, [problem.batch])
    assert_close(problem.gradients, moved.gradients, rtol=1e-9, atol=1e-12)
    assert_same(problem.model.state_dict(), before)
    assert [p.data_ptr() for p in problem.parameters] == places
    assert float(regularizer.diagnostics()["realized"].norm) == pytest.approx(1)


def test_ahead_comes_back_bitwise_where_weights_are_views_that_must_stay_in_place():
    problem, flat = Problem(), Problem()
    buffer = torch.cat([p.detach().flatten() for p in flat.parameters])
    for p, part in zip(flat.parameters, buffer.split([p.numel() for p in flat.parameters])):
        p.data = part.view_as(p)
    for trial in (problem, flat):
        optimizer = sgd(trial)
        trial.train(CHEAP["ahead"](trial, optimizer), optimizer, steps=3)
        before = copy.deepcopy(trial.model.state_dict())
        CHEAP["ahead"](trial, optimizer).backward(trial.loss, [trial.batch])
        assert_same(trial.model.state_dict(), before)
    assert_same(flat.parameters, problem.parameters)
    assert torch.equal(buffer, torch.cat([p.detach().flatten() for p in flat.parameters]))


def test_cheap_is_a_fraction_ahead_that_rises_over_the_first_steps():
    problem, other = Problem(), Problem()
    optimizer, base = sgd(problem), sgd(other)
    numbers = {"gamma": 0.3, "epsilon": RHO, "rho": 0.7, "share": 0.3, "period": 2}
    problem.train(gradreg.cheap(problem.model, optimizer, 10, **numbers), optimizer, 5)
    ahead = gradreg.Ahead(gradreg.Momentum(base), gradreg.warmup(0.7, 3))
    by_hand = gradreg.GradientRegularizer(
        other.model, gradreg.every(gradreg.warmup(0.3, 3), 2), RHO, batch=gradreg.Fraction(0.3), at=ahead
    )
    other.train(by_hand, base, steps=5)
    assert_same(problem.parameters, other.parameters)


def test_ahead_without_a_penalty_is_msam():
    problem, other = Problem(), Problem()
    optimizer, base = sgd(problem), sgd(other)
    ahead = gradreg.Ahead(gradreg.Momentum(optimizer), rho=RHO)
    problem.train(gradreg.GradientRegularizer(problem.model, 0, 1, at=ahead), optimizer, steps=4)
    other.train(gradreg.msam(other.model, base, RHO), base, steps=4)
    assert_same(problem.parameters, other.parameters)


def test_ahead_serves_a_closure():
    problem, other = Problem(), Problem()
    base, optimizer = sgd(problem), sgd(other)
    options = [{"at": gradreg.Ahead(gradreg.Momentum(o), rho=lambda step: 0.1 * step)} for o in (base, optimizer)]
    wrapped = gradreg.RegularizedOptimizer(base, gradreg.GradientRegularizer(problem.model, 0.3, RHO, **options[0]))

    def closure():
        wrapped.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    regularizer = gradreg.GradientRegularizer(other.model, 0.3, RHO, **options[1])
    for _ in range(3):
        wrapped.step(closure)
        other.train(regularizer, optimizer)
    assert_close(problem.parameters, other.parameters, rtol=1e-12, atol=1e-14)


def test_ahead_moves_parameters_without_a_momentum_by_nothing():
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.GradientRegularizer(
        problem.model, 0.3, RHO, at=gradreg.Ahead(gradreg.Momentum(optimizer), rho=0.7)
    )
    problem.train(regularizer, optimizer, steps=2)
    del optimizer.state[problem.parameters[0]]["momentum_buffer"]
    moved = copy.deepcopy(problem)
    vectors = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in problem.parameters]
    with torch.no_grad():
        for p, v in zip(moved.parameters, vectors):
            p.sub_(v, alpha=0.7 / norm(vectors))
            p.grad = None
    gradreg.GradientRegularizer(moved.model, 0.3, RHO).backward(moved.loss)
    optimizer.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, moved.gradients, rtol=1e-9, atol=1e-12)


# When.


def test_the_running_test_is_that_of_ae_sam():
    squares = torch.rand(50).square().tolist()
    test = RunningTest(gradreg.LargeGradients(threshold=0.3, decay=0.8))
    mean, variance = squares[0], 0.0
    for step, n in enumerate(squares):
        mean = 0.8 * mean + 0.2 * n if step else n
        variance = 0.8 * variance + 0.2 * (n - mean) ** 2
        assert test.is_large(n, step) == (n >= mean + 0.3 * math.sqrt(variance))
    assert not test.is_large(math.nan, 0)
    assert test.mean == pytest.approx(mean)


def test_a_threshold_may_change_with_the_step():
    never = RunningTest(gradreg.LargeGradients(threshold=lambda step: -100.0 if step == 3 else 100.0))
    never.is_large(1.0, 0)
    assert [never.is_large(1.1, step) for step in range(1, 5)] == [False, False, True, False]


@pytest.mark.parametrize("door", ["backward", "perturbed", "closure"])
def test_the_second_pass_runs_only_where_the_gradient_is_large(door):
    problem = Problem()
    regularizer = gradreg.GradientRegularizer(problem.model, 0.3, RHO, when=gradreg.LargeGradients())
    optimizer = sgd(problem, lr=0.0)

    def run(factor):
        if door == "perturbed":
            optimizer.zero_grad()
            (factor * problem.loss()).backward()
            with regularizer.perturbed():
                (factor * problem.loss()).backward()
        elif door == "backward":
            optimizer.zero_grad()
            regularizer.backward(lambda: factor * problem.loss())
        else:

            def closure():
                problem.model.zero_grad()
                loss = factor * problem.loss()
                loss.backward()
                return loss

            regularizer.run_closure(closure)
        return [g / factor for g in problem.gradients]

    first = problem.gradient()
    run(1.0)
    assert_close(run(0.1), first, rtol=1e-12, atol=1e-14)  # small beside the first: g1
    large = run(10.0)
    assert norm([a - b for a, b in zip(large, first)]) > 1e-3 * norm(first)
    counts = regularizer.diagnostics()
    assert (int(counts["active_steps"]), int(counts["skipped_steps"])) == (2, 1)


def test_bernoulli_draws_its_share_of_the_steps():
    gamma = gradreg.bernoulli(gradreg.warmup(0.2, 10), probability=0.3, seed=4)
    values = [gamma(step) for step in range(20_000)]
    assert statistics.fmean(v > 0 for v in values[10:]) == pytest.approx(0.3, abs=0.015)
    assert set(values[10:]) == {0.0, 0.2}
    assert values == [gamma(step) for step in range(20_000)]
    other = gradreg.bernoulli(0.2, probability=0.3, seed=5)
    assert values[10:100] != [other(step) for step in range(10, 100)]


def test_sharpness_aware_every_third_step_with_a_scaled_radius():
    problem = Problem()
    regularizer = gradreg.sam(problem.model, gradreg.every(RHO, 3, scale=3))
    first = problem.gradient()
    for step in range(3):
        problem.model.zero_grad()
        regularizer.backward(problem.loss)
        if step < 2:
            assert_close(problem.gradients, first, rtol=1e-12, atol=1e-14)
    along = scaled(first, 3 * RHO / norm(first))
    assert_close(problem.gradients, problem.gradient(displaced_by=along), rtol=1e-12, atol=1e-14)


# Selection: the second pass makes no gradient that nobody wants.


class Product(nn.Module):
    """A linear layer of torch's own product: DeepSpeed, once imported, puts a function of its own behind nn.Linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return x @ self.weight


def test_the_second_pass_skips_weight_gradients_outside_the_selection():
    problem = Problem(Product(), nn.LayerNorm(8), nn.Tanh(), Product())
    problem.batch = torch.randn(10, 8).double(), problem.batch[1]
    regularizer = gradreg.sam(problem.model, RHO, include=nn.LayerNorm)
    with FlopCounterMode(display=False) as counter:
        regularizer.backward(problem.loss)
    # Products of equal size: forward, two; backward, two for weights and one for the inputs of the last layer.
    assert counter.get_total_flops() == (5 + 3) * 2 * 10 * 8 * 8
    first = problem.gradient()
    along = [RHO / norm(first[1:3]) * g if k in (1, 2) else 0 * g for k, g in enumerate(first)]
    second = problem.gradient(displaced_by=along)
    expected = [second[k] if k in (1, 2) else first[k] for k in range(4)]
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)


# Refusals: at construction, or before anything happens.


def _refusals():
    def build(problem, *args, **options):
        return gradreg.GradientRegularizer(problem.model, *args, **options)

    momentum = lambda problem, **options: gradreg.Momentum(sgd(problem, **options))  # noqa: E731
    yield "no momentum", lambda p: gradreg.msam(p.model, sgd(p, momentum=0), 1.0), "momentum=0.9"
    yield "no momentum in Adagrad", lambda p: gradreg.msam(p.model, torch.optim.Adagrad(p.parameters), 1.0), "Adagrad"
    yield "not an optimizer", lambda p: gradreg.msam(p.model, None, 1.0), "optimizer must be a built"
    yield (
        "a parameter that the optimizer lacks",
        lambda p: gradreg.msam(p.model, torch.optim.Adam(p.parameters[:2]), 1.0),
        "'2.weight'",
    )
    yield "rho", lambda p: gradreg.msam(p.model, sgd(p), -1.0), "rho must be"
    yield "sign", lambda p: gradreg.msam(p.model, sgd(p), 1.0, sign=0), "sign must be"
    yield "γ ≠ ε", lambda p: build(p, 0.1, 0.2, ascent=momentum(p)), "gamma=epsilon=0.2"
    yield "γ ≠ ε, previous", lambda p: build(p, 0.1, 0.2, ascent=gradreg.Previous()), "gamma=epsilon=0.2"
    yield "by name", lambda p: build(p, 0.1, 0.1, ascent="momentum"), "gradreg.Momentum(optimizer)"
    yield "previous by name", lambda p: build(p, 0.1, 0.1, ascent="previous"), "gradreg.Previous()"
    yield "backward", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), scheme="backward"), "other sign"
    yield "cap", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), cap=1.0), "one pass"
    yield "first", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), nonfinite="first"), "one pass"
    yield "when", lambda p: gradreg.msam(p.model, sgd(p), 1.0, when=gradreg.LargeGradients()), "bernoulli"
    yield "when, exact", lambda p: build(p, 0.1, 0.1, scheme="exact", when=gradreg.LargeGradients()), "when needs"
    yield "when, type", lambda p: build(p, 0.1, 0.1, when="large"), "when must be"
    yield "batch, type", lambda p: build(p, 0.1, 0.1, batch=0.1), "batch must be"
    yield "fraction 0", lambda p: gradreg.Fraction(0), "share must"
    yield "fraction 1", lambda p: gradreg.Fraction(1), "whole batch"
    yield "fraction nan", lambda p: gradreg.Fraction(math.nan), "from 0 to 1"
    yield "fraction text", lambda p: gradreg.Fraction("0.1"), "must be a number"
    yield "exact", lambda p: build(p, 0.1, 0.1, scheme="exact", batch=gradreg.Fraction(0.1)), "exact"
    yield "split γ ≥ ε", lambda p: build(p, 0.2, 0.2, batch=gradreg.Split()), "gamma=0.1"
    yield "split, central", lambda p: build(p, 0.1, 0.2, batch=gradreg.Split(), scheme="central"), "convex"
    yield "split, cap", lambda p: build(p, 0.1, 0.2, batch=gradreg.Split(), cap=1.0), "one pass"
    ahead = lambda problem, **options: gradreg.Ahead(momentum(problem, **options), 1.0)  # noqa: E731
    yield "ahead, type", lambda p: build(p, 0.1, 0.1, at=momentum(p)), "at must be"
    yield "ahead, direction", lambda p: gradreg.Ahead("momentum", 1.0), "direction must be"
    yield "ahead, rho", lambda p: gradreg.Ahead(gradreg.Previous(), -1.0), "rho must be"
    yield "ahead, no momentum", lambda p: build(p, 0.1, 0.1, at=ahead(p, momentum=0)), "momentum=0.9"
    yield "ahead, twice", lambda p: build(p, 0.1, 0.1, ascent=momentum(p), at=ahead(p)), "moved its pass already"
    yield "ahead, split", lambda p: build(p, 0.1, 0.2, batch=gradreg.Split(), at=ahead(p)), "moved its pass already"
    yield "ahead, block", lambda p: build(p, 0.1, 0.2, at=ahead(p)).perturbed().__enter__(), "backward(loss_fn)"
    yield "cheap, steps", lambda p: gradreg.cheap(p.model, sgd(p), 0), "num_steps must be"
    yield "cheap, momentum", lambda p: gradreg.cheap(p.model, sgd(p, momentum=0), 10), "momentum=0.9"
    yield "cheap, share", lambda p: gradreg.cheap(p.model, sgd(p), 10, share=1.0), "share must"
    yield "cheap, rho", lambda p: gradreg.cheap(p.model, sgd(p), 10, rho=-1.0), "rho must"
    yield "probability", lambda p: gradreg.bernoulli(0.1, 1.5), "from 0 to 1"
    yield "seed", lambda p: gradreg.bernoulli(0.1, 0.5, seed=-1), "seed"
    yield "scale", lambda p: gradreg.every(0.1, 2, scale=-1), "scale"
    yield "decay", lambda p: gradreg.LargeGradients(decay=1), "decay"
    yield "threshold", lambda p: gradreg.LargeGradients(threshold=math.inf), "threshold"


REFUSALS = list(_refusals())


@pytest.mark.parametrize(("name", "make", "says"), REFUSALS, ids=[name for name, _, _ in REFUSALS])
def test_what_means_nothing_is_refused_with_the_nearest_choice(name, make, says):
    with pytest.raises((ValueError, TypeError)) as caught:
        make(Problem())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["fraction", "split"])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r, p: r.backward(p.loss), "batches must be given"),
        (lambda r, p: r.backward(p.loss, [p.rows(0, 1)]), "at least 2 rows"),
        (lambda r, p: r.backward(p.loss, [(p.batch[0], p.batch[1][:4])]), "same number of rows"),
        (lambda r, p: r.backward(p.loss, ["text"]), "without tensors"),
        (lambda r, p: r.backward(p.loss, [(p.batch[0], p.batch[1].numpy())]), "got an array"),
        (lambda r, p: r.perturbed().__enter__(), "cannot divide the batch"),
        (lambda r, p: r.run_closure(p.loss), "cannot divide the batch"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_and_nothing_is_lost(mode, call, says):
    problem = dropping()
    optimizer = sgd(problem)
    regularizer = CHEAP[mode](problem, optimizer)
    problem.train(regularizer, optimizer)
    before = copy.deepcopy((problem.model.state_dict(), problem.gradients, regularizer.state_dict()))
    with pytest.raises(ValueError, match=says):
        call(regularizer, problem)
    assert_same(problem.model.state_dict(), before[0])
    assert_same(problem.gradients, before[1])
    assert regularizer.state_dict() == before[2]


@pytest.mark.parametrize("ascent", ["momentum", "previous"])
def test_a_one_pass_block_after_a_first_pass_is_refused(ascent):
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = CHEAP[ascent](problem, optimizer)
    problem.loss().backward()
    before = copy.deepcopy((problem.model.state_dict(), problem.gradients))
    with pytest.raises(ValueError, match="run no pass before"), regularizer.perturbed():
        problem.loss().backward()
    assert_same(problem.model.state_dict(), before[0])
    assert_same(problem.gradients, before[1])
    assert regularizer.step == 0


def test_a_schedule_that_parts_gamma_from_epsilon_is_refused_at_its_step():
    problem = Problem()
    optimizer = sgd(problem)
    regularizer = gradreg.GradientRegularizer(
        problem.model, gradreg.warmup(0.1, 2), 0.1, ascent=gradreg.Momentum(optimizer)
    )
    problem.train(regularizer, optimizer)  # γ = 0
    with pytest.raises(ValueError, match="at step 1"):
        problem.train(regularizer, optimizer)


def test_a_previous_gradient_of_another_model_is_refused():
    problem, other = Problem(), Problem(nn.Linear(4, 3))
    make = CHEAP["previous"]
    one, two = make(problem, sgd(problem)), make(other, sgd(other))
    problem.train(one, sgd(problem))
    before = two.state_dict()
    with pytest.raises(ValueError, match="no selected parameter"):
        two.load_state_dict(one.state_dict())
    assert two.state_dict() == before


# Memory.


@pytest.mark.parametrize("mode", ["momentum", "split", "ahead"])
def test_a_known_direction_takes_no_memory_beyond_the_base_optimizer(mode):
    from contract import UNIT, usual_peak

    def step(regularized):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(10)))
        batch = torch.randn(4, 256), torch.randint(256, (4,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

        def loss(pair):
            return F.cross_entropy(model(pair[0]), pair[1])

        if not regularized:
            return lambda: loss(batch).backward()
        if mode == "momentum":
            regularizer = gradreg.msam(model, optimizer, RHO)
        elif mode == "ahead":
            ahead = gradreg.Ahead(gradreg.Momentum(optimizer), RHO)
            regularizer = gradreg.GradientRegularizer(model, RHO / 2, RHO, batch=gradreg.Fraction(0.5), at=ahead)
        else:
            momentum = gradreg.Momentum(optimizer)
            regularizer = gradreg.GradientRegularizer(model, RHO / 2, RHO, ascent=momentum, batch=gradreg.Split())
        return lambda: regularizer.backward(loss, [batch])

    extra = (usual_peak(lambda: step(True)) - usual_peak(lambda: step(False))) / UNIT
    assert extra < {"momentum": 2.5, "split": 12.5, "ahead": 13.5}[mode]  # of ten; a first step measures
