"""The dial: γ that follows a ratio, γ that is measured for one, no γ at all, and a warning where it is too strong."""

import copy
import itertools
import json
import math
import pickle
import re
import warnings
from functools import partial

import pytest
import ranks
import torch
from methods import DOORS
from problems import Trial, assert_same, snapshot
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradreg import (
    Fraction,
    GradientRegularizer,
    LargeGradients,
    Momentum,
    RegularizedOptimizer,
    Split,
    TargetRatio,
    calibrated_gamma,
    every,
    late,
    sam,
    warmup,
)
from gradreg.training.schedule import strength_at
from gradreg.training.target import MEMORY, START, Dial

steady = partial(TargetRatio, ramp=0)


def descend(trial, regularizer, num_steps, door="backward", lr=0.0):
    """γ and the ratio of each step; weights move by `lr` · ĝ."""
    found = []
    for _ in range(num_steps):
        DOORS[door](regularizer, trial.loss)
        told = regularizer.diagnostics()
        found.append((told["gamma"].item(), told["penalty_ratio"].item()))
        with torch.no_grad():
            for p in trial.model.parameters():
                p.sub_(p.grad, alpha=lr)
    return found


# γ follows the ratio.


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_the_ratio_comes_to_the_target_in_every_door(name, door):
    trial = Trial(name)
    found = descend(trial, GradientRegularizer(trial.model, steady(0.02), 0.5, replay_check=False), 15, door)
    assert found[-1][1] == pytest.approx(0.02, rel=0.3)  # dropout changes s from step to step


@pytest.mark.parametrize("options", [{}, {"scheme": "central"}, {"scheme": "backward"}, {"scheme": "exact"}], ids=str)
@pytest.mark.parametrize("ascent", ["gradient", "normalized", "adaptive"])
def test_with_any_scheme_and_ascent(ascent, options):
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, steady(0.01), 0.1, ascent=ascent, **options)
    assert descend(trial, regularizer, 14)[-1][1] == pytest.approx(0.01, rel=1e-9)  # one batch, weights that stay


def test_the_scale_of_the_loss_does_not_matter():
    ratios = []
    for scale in (0.01, 1.0, 100.0):
        trial = Trial("mlp")
        regularizer = GradientRegularizer(trial.model, steady(0.02), 1.0, ascent="normalized")
        loss = trial.loss
        trial.loss = lambda loss=loss, scale=scale: scale * loss()
        ratios.append(descend(trial, regularizer, 14)[-1][1])
    assert ratios == pytest.approx([0.02] * 3, rel=1e-9)


def test_it_begins_small_and_at_most_doubles():
    trial = Trial("mlp")
    gammas = [g for g, _ in descend(trial, GradientRegularizer(trial.model, steady(0.05), 0.5), 14)]
    assert gammas[0] == START * 0.5
    assert all(b <= 2 * a * (1 + 1e-12) for a, b in itertools.pairwise(gammas))
    assert gammas[1] == pytest.approx(2 * gammas[0])


def test_a_start_is_taken_and_corrected():
    trial = Trial("mlp")
    found = descend(trial, GradientRegularizer(trial.model, steady(0.01, start=0.3), 0.5), 3)
    assert found[0][0] == pytest.approx(0.3)
    assert found[0][1] > 0.01
    assert found[1][1] == pytest.approx(0.01)  # falls at once: the ratio is proportional to γ


@pytest.mark.parametrize("limit", [1.0, 0.25])
def test_gamma_never_passes_the_limit(limit):
    trial = Trial("mlp")
    found = descend(trial, GradientRegularizer(trial.model, steady(100.0, limit=limit), 0.1), 15)
    assert max(g for g, _ in found) == found[-1][0] == pytest.approx(limit * 0.1)


def test_an_epsilon_that_changes_moves_the_limit_along():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, steady(100.0, start=1e3), lambda step: 0.1 / (1 + step))
    assert [g for g, _ in descend(trial, regularizer, 3)] == pytest.approx([0.1, 0.05, 0.1 / 3])


def test_readings_are_averaged():
    """A batch of twice the curvature does not halve γ."""
    dial = Dial(steady(0.3, start=0.1))
    for step in range(40):
        strength = dial.strength_at(steady(0.3), 10.0, step)
        dial.follow(torch.tensor(strength.gamma * (2.0 if step % 2 else 0.5)))  # s = 2 and ½: the mean is 1
    assert dial.strength_at(steady(0.3), 10.0, 40).gamma == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf])
def test_a_step_without_a_ratio_says_nothing(nothing):
    dial = Dial(steady(0.3, start=0.1))
    before = dial.strength_at(steady(0.3), 10.0, 0)
    dial.follow(torch.tensor(nothing))
    assert dial.strength_at(steady(0.3), 10.0, 1) == before
    assert dial.state_dict()["num_readings"] == 0


def test_it_reads_every_step_at_first_and_then_by_its_period():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, steady(0.02, period=5), 0.1)
    counts = []
    for _ in range(MEMORY + 11):
        regularizer.backward(trial.loss)
        counts.append(regularizer.state_dict()["target"]["num_readings"])
    assert counts == [*range(1, 11), 10, 10, 10, 10, 11, 11, 11, 11, 11, 12, 12]


def test_what_the_user_reads_does_not_change_it():
    ends = []
    for reads in (True, False):
        trial = Trial("cnn")
        regularizer = GradientRegularizer(trial.model, steady(0.05), 0.1)
        for _ in range(25):
            regularizer.backward(trial.loss)
            if reads:
                regularizer.diagnostics()
        ends.append([regularizer.state_dict(), trial.gradients()])
    assert_same(*ends)


# With the helpers of a schedule, and the other modes.


def test_helpers_apply_to_the_target():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, warmup(steady(0.02), 40), 0.5, replay_check=False)
    passes = []
    for step in range(45):
        before = trial.passes
        trial.model.zero_grad()
        regularizer.backward(trial.loss)
        passes.append(trial.passes - before)
        ratio = regularizer.diagnostics()["penalty_ratio"].item()
        if step >= 15:
            assert ratio == pytest.approx(0.02 * min(1, step / 40), rel=1e-6)
    assert passes == [1] + [2] * 44


def test_the_target_rises_over_its_ramp():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, TargetRatio(0.02, ramp=40), 0.5, replay_check=False)
    ratios = [ratio for _, ratio in descend(trial, regularizer, 45)]
    assert ratios[15:] == pytest.approx([0.02 * min(1, (step + 1) / 40) for step in range(15, 45)], rel=1e-6)
    assert TargetRatio().ramp > 0


@pytest.mark.parametrize("wrap", [lambda g: every(g, 3), lambda g: late(g, 4)])
def test_steps_without_a_penalty_stay_without(wrap):
    trial = Trial("mlp")
    regularizer, passes = GradientRegularizer(trial.model, wrap(steady(0.02)), 0.1, replay_check=False), []
    for _ in range(8):
        before = trial.passes
        regularizer.backward(trial.loss)
        passes.append(trial.passes - before)
    assert passes == [2 if wrap(1.0)(step) else 1 for step in range(8)]
    assert regularizer.state_dict()["target"]["num_readings"] == sum(p == 2 for p in passes)


def test_on_a_fraction_of_the_batch():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, steady(0.02), 0.5, batch=Fraction(0.5))
    for _ in range(14):
        trial.model.zero_grad()
        regularizer.backward(lambda b: nn.functional.cross_entropy(trial.model(b[0]), b[1]), [trial.batch])
    assert regularizer.diagnostics()["penalty_ratio"].item() == pytest.approx(0.02, rel=1e-6)


def test_steps_that_a_test_leaves_out_are_not_read():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, steady(0.02), 0.5, when=LargeGradients(threshold=100.0))
    for k in range(6):
        trial.model.zero_grad()
        regularizer.backward(lambda k=k: trial.loss() / (k + 1))  # ever smaller: only the first is large
    told = regularizer.state_dict()
    assert told["target"]["num_readings"] == told["active_steps"] == 1


@pytest.mark.parametrize("options", [{"batch": Split()}, {"ascent": "momentum"}], ids=str)
@pytest.mark.parametrize("gamma", [steady(0.1), every(steady(0.1), 2), None], ids=str)
def test_a_single_pass_has_no_ratio(gamma, options):
    trial = Trial("mlp")
    if "ascent" in options:
        options = {"ascent": Momentum(torch.optim.SGD(trial.model.parameters(), 0.1, momentum=0.9))}
    with pytest.raises(ValueError, match=r"gamma must be a number or a function .*no ratio to measure"):
        GradientRegularizer(trial.model, gamma, 0.1, **options)


def test_gamma_may_be_another_one_from_some_step_on():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, 0.05, 0.1)
    regularizer.backward(trial.loss)
    regularizer.gamma = steady(0.01)
    found = descend(trial, regularizer, 12)
    assert found[0][0] == START * 0.1  # begins anew, and is a ratio and not γ
    assert found[-1][1] == pytest.approx(0.01)
    regularizer.gamma = 0.05
    trial.model.zero_grad()
    regularizer.backward(trial.loss)
    assert "gamma" not in regularizer.diagnostics()
    other = Trial("mlp")
    GradientRegularizer(other.model, 0.05, 0.1).backward(other.loss)
    assert_same(trial.gradients(), other.gradients())


@pytest.mark.parametrize("make", [lambda m, t: GradientRegularizer(m, 0.1, t), sam], ids=["epsilon", "rho"])
def test_a_length_is_not_found_by_a_ratio(make):
    with pytest.raises(ValueError, match="epsilon must be a number or a function of the step, got TargetRatio"):
        make(Trial("mlp").model, steady(0.1))


# Its state.


def run(trial, regularizer, num_steps):
    optimizer = torch.optim.SGD(trial.model.parameters(), lr=0.05)
    for _ in range(num_steps):
        trial.model.zero_grad()
        regularizer.backward(trial.loss)
        optimizer.step()
    return [list(trial.model.parameters()), trial.gradients(), regularizer.state_dict()]


@pytest.mark.parametrize("before", [0, 1, 5, 13, 17])
def test_a_run_that_is_saved_and_loaded_is_the_run_that_was_not(before):
    def make(trial):
        return GradientRegularizer(trial.model, warmup(steady(0.05, period=4), 6), 0.2)

    whole, first, second = Trial("cnn"), Trial("cnn"), Trial("cnn")
    torch.manual_seed(2)
    expected = run(whole, make(whole), before + 9)
    regularizer, resumed = make(first), make(second)
    torch.manual_seed(2)
    run(first, regularizer, before)
    generator = torch.get_rng_state()
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(json.loads(json.dumps(regularizer.state_dict())))
    torch.set_rng_state(generator)
    assert_same(run(second, resumed, 9), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_copy_goes_on_by_itself_and_the_value_is_shared_unharmed(copied):
    rule = steady(0.05)
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, rule, 0.2)
    run(trial, regularizer, 4)
    other = copied(regularizer)
    assert other.state_dict() == regularizer.state_dict()
    other.backward(lambda: nn.functional.cross_entropy(other.model(trial.batch[0]), trial.batch[1]))
    assert other.state_dict() != regularizer.state_dict()
    assert rule == steady(0.05)
    fresh = GradientRegularizer(Trial("mlp").model, rule, 0.2)
    assert fresh.state_dict()["target"]["num_readings"] == 0


def test_the_wrapper_saves_it_too():
    trial = Trial("mlp")
    optimizer = RegularizedOptimizer(
        torch.optim.SGD(trial.model.parameters(), 0.1), GradientRegularizer(trial.model, steady(0.05), 0.1)
    )
    optimizer.regularizer.backward(trial.loss)
    assert optimizer.state_dict()["regularizer"]["target"]["num_readings"] == 1


DAMAGED = [
    (lambda s: s.pop("target"), "must have the keys"),
    (lambda s: s.update(target=None), r"state_dict\['target'\] must have the keys"),
    (lambda s: s["target"].pop("since"), r"state_dict\['target'\] must have the keys"),
    (lambda s: s["target"].update(gamma=-1.0), r"\['gamma'\] must be a finite number ≥ 0, got -1.0"),
    (lambda s: s["target"].update(log_s=math.nan), r"\['log_s'\] must be a finite number, got nan"),
    (lambda s: s["target"].update(num_readings=1.5), r"\['num_readings'\] must be an integer ≥ 0, got 1.5"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, message):
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, steady(0.05), 0.1)
    regularizer.backward(trial.loss)
    before = regularizer.state_dict()
    state = copy.deepcopy(before)
    state["step"] = 7
    damage(state)
    with pytest.raises(ValueError, match=message):
        regularizer.load_state_dict(state)
    assert regularizer.state_dict() == before


def test_a_state_of_a_fixed_gamma_and_one_of_a_target_do_not_mix():
    fixed = GradientRegularizer(Trial("mlp").model, 0.1, 0.1)
    target = GradientRegularizer(Trial("mlp").model, steady(0.1), 0.1)
    for here, there in ((fixed, target), (target, fixed)):
        with pytest.raises(ValueError, match="must have the keys"):
            here.load_state_dict(there.state_dict())


BAD = [
    ({"target": 0}, ValueError, "target must be > 0, got 0"),
    ({"target": -0.3}, ValueError, "target must be a number ≥ 0, got -0.3"),
    ({"target": "0.3"}, TypeError, "target must be a number, got '0.3'"),
    ({"limit": 0.0}, ValueError, "limit must be > 0"),
    ({"start": math.inf}, ValueError, "start must be a number"),
    ({"ramp": -1}, ValueError, "ramp must be an integer ≥ 0, got -1"),
    ({"period": 0}, ValueError, "period must be an integer ≥ 1, got 0"),
    ({"period": 2.0}, ValueError, "period must be an integer ≥ 1, got 2.0"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=str)
def test_a_bad_target_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        TargetRatio(**options)


# Several ranks.


def on_one_rank(rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    found = {}
    for sync in ("global", "local"):
        regularizer = GradientRegularizer(model, steady(0.02), 0.5, ascent_sync=sync)
        torch.manual_seed(10 + rank)  # a batch of its own
        x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
        gammas = []
        for _ in range(14):
            model.zero_grad()
            regularizer.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
            gammas.append(regularizer.diagnostics()["gamma"].item())
        found[sync] = gammas, regularizer.state_dict()
    return found


def test_all_ranks_have_one_gamma():
    here, there = ranks.on_two_ranks(on_one_rank)
    assert here == there
    assert here["global"][0][-1] > 5 * here["global"][0][0]


# γ that is measured.


def loss_of(trial):
    return lambda batch: nn.functional.cross_entropy(trial.model(batch[0]), batch[1])


@pytest.mark.parametrize("ascent", ["gradient", "normalized"])
@pytest.mark.parametrize("target", [0.05, 5.0])
def test_a_calibrated_gamma_gives_the_ratio(target, ascent):
    trial = Trial("mlp")
    options = {"epsilon": 0.1, "ascent": ascent}
    gamma = calibrated_gamma(trial.model, loss_of(trial), [trial.batch], target=target, **options)
    regularizer = GradientRegularizer(trial.model, gamma, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regularizer.backward(trial.loss)
        assert regularizer.diagnostics()["penalty_ratio"].item() == pytest.approx(target, rel=1e-6)


def test_it_is_the_median_over_the_batches():
    trial = Trial("mlp")
    x, y = trial.batch
    batches = [(factor * x, y) for factor in (0.1, 1.0, 3.0)]
    single = [calibrated_gamma(trial.model, loss_of(trial), [batch], epsilon=0.1) for batch in batches]
    low, middle, high = sorted(range(3), key=lambda k: single[k])
    shuffled = (batches[k] for k in (high, low, middle))
    assert calibrated_gamma(trial.model, loss_of(trial), shuffled, epsilon=0.1) == pytest.approx(single[middle])


@pytest.mark.parametrize("door", DOORS)
def test_calibrating_leaves_no_trace(door):
    """Also between the steps of another regularizer."""
    ends = []
    for calibrates in (False, True):
        trial = Trial("cnn")
        regularizer = GradientRegularizer(trial.model, 0.1, 0.1)
        torch.manual_seed(3)
        DOORS[door](regularizer, trial.loss)
        kept = [p.grad for p in trial.model.parameters()]
        if calibrates:
            calibrated_gamma(trial.model, loss_of(trial), [trial.batch] * 2)
            assert all(p.grad is g for p, g in zip(trial.model.parameters(), kept))
        seen = [snapshot(trial.model)[0], list(trial.model.buffers()), trial.gradients(), torch.get_rng_state()]
        ends.append([[[w[2] for w in seen[0]], *seen[1:]], len(trial.model._forward_pre_hooks)])
        DOORS[door](regularizer, trial.loss)
        ends[-1].append(trial.gradients())
    assert_same(*ends)


def test_calibrating_leaves_no_trace_when_the_loss_fails():
    trial = Trial("cnn")
    trial.loss().backward()
    before, gradients, state = snapshot(trial.model), [p.grad for p in trial.model.parameters()], torch.get_rng_state()

    def failing(batch):
        loss = loss_of(trial)(batch)
        raise ZeroDivisionError(loss)

    with pytest.raises(ZeroDivisionError):
        calibrated_gamma(trial.model, failing, [trial.batch])
    assert_same(snapshot(trial.model), before)
    assert all(p.grad is g for p, g in zip(trial.model.parameters(), gradients))
    assert_same(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batches": []}, ValueError, "batches must hold at least one batch"),
        ({"target": 0}, ValueError, "target must be > 0, got 0"),
        ({"epsilon": -0.1}, ValueError, "epsilon must be a finite number > 0"),
        ({"epsilon": lambda step: 0.1}, ValueError, "epsilon must be a number, got a function"),
        ({"cap": 1.0}, ValueError, "cap cannot be given"),
        ({"batch": Split()}, ValueError, "no ratio to measure"),
        ({"loss_fn": lambda batch: batch[0].sum() * 0 + 1.0}, ValueError, "loss"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_a_calibration(options, kind, message):
    trial = Trial("mlp")
    arguments = {"loss_fn": loss_of(trial), "batches": [trial.batch]} | options
    with pytest.raises(kind, match=message):
        calibrated_gamma(trial.model, **arguments)


def test_a_loss_that_is_linear_has_no_gamma():
    model = nn.Linear(3, 1).double()
    with pytest.raises(ValueError, match="linear in the selected parameters"):
        calibrated_gamma(model, lambda x: model(x).sum(), [torch.ones(2, 3).double()])


# No number.


@pytest.mark.parametrize("ascent", ["gradient", "normalized", "adaptive"])
def test_without_a_number_it_is_a_target_and_a_length_of_the_ascent(ascent):
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, ascent=ascent)
    assert regularizer.gamma == TargetRatio()
    regularizer.step = 490
    for _ in range(20):
        DOORS["backward"](regularizer, trial.loss)
        told = regularizer.diagnostics()
    assert 0.01 < told["penalty_ratio"] <= 1.001 * TargetRatio().target
    assert strength_at(told["gamma"].item(), regularizer.epsilon, 0).ratio <= TargetRatio().limit


def test_without_a_number_an_ascent_of_ones_own_needs_epsilon():
    with pytest.raises(ValueError, match="epsilon must be given with ascent"):
        GradientRegularizer(Trial("mlp").model, ascent=lambda p, g, s=1.0: (g, 1.0))


# The warning.


def strong(gamma, **options):
    trial = Trial("mlp")
    return trial, GradientRegularizer(trial.model, gamma, 0.01, **options)


def test_a_ratio_above_three_is_warned_of_once():
    trial, regularizer = strong(1e3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            regularizer.backward(trial.loss)
            regularizer.diagnostics()
    [warning] = caught
    assert re.search(r"penalty_ratio.*> 3.*lower gamma.*TargetRatio.*cap", str(warning.message))


@pytest.mark.parametrize("options", [{"gamma": 1e-4}, {"gamma": 1e3, "cap": 2.0}, {"gamma": steady(0.1)}], ids=str)
def test_nothing_is_warned_of_where_the_ratio_is_small(options):
    trial, regularizer = strong(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            regularizer.backward(trial.loss)
            regularizer.diagnostics()


def test_on_an_accelerator_the_warning_waits_for_a_reading(masked):
    trial, regularizer = strong(1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.backward(trial.loss)
    with pytest.warns(UserWarning, match="penalty_ratio"):
        regularizer.diagnostics()


def test_on_an_accelerator_the_dial_reads_at_the_beginning_of_the_next_step(masked, monkeypatch):
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, steady(0.02), 0.5, replay_check=False)
    reads = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: reads.append(trial.passes) or t.item())
    for _ in range(3):
        regularizer.backward(trial.loss)
    assert reads == [2, 4]  # before the first pass of the second step, and of the third
