"""When and how strongly: schedules, and the cap."""

import pytest
import torch
from methods import DOORS, SCHEMES
from problems import Trial, assert_close, assert_same

from gradreg import GradientRegularizer, every, gnp, late, sam, warmup
from gradreg.training.schedule import Strength, strength_at, value_at

TABLE = {
    "warmup": (warmup(0.4, 4), [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]),
    "late": (late(0.4, 2), [0.0, 0.0, 0.4, 0.4, 0.4, 0.4]),
    "window": (late(0.4, 2, 4), [0.0, 0.0, 0.4, 0.4, 0.0, 0.0]),
    "every": (every(0.4, 2), [0.0, 0.4, 0.0, 0.4, 0.0, 0.4]),
    "every of warmup": (every(warmup(0.4, 4), 2), [0.0, 0.1, 0.0, 0.3, 0.0, 0.4]),
    "warmup of late": (warmup(late(0.4, 3), 4), [0.0, 0.0, 0.0, 0.3, 0.4, 0.4]),
    "late of every of warmup": (late(every(warmup(0.4, 4), 2), 2), [0.0, 0.0, 0.0, 0.3, 0.0, 0.4]),
    "own": (lambda step: 0.1 * step, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    "number": (0.4, [0.4] * 6),
}


@pytest.mark.parametrize("name", TABLE)
def test_values(name):
    schedule, expected = TABLE[name]
    assert [value_at(schedule, step) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("name", TABLE)
def test_the_second_pass_runs_where_gamma_is_not_zero(name):
    schedule, expected = TABLE[name]
    trial = Trial("mlp")
    regularizer, passes = GradientRegularizer(trial.model, schedule, 0.1, replay_check=False), []
    for _ in expected:
        before = trial.passes
        regularizer.backward(trial.loss)
        passes.append(trial.passes - before)
    assert passes == [1 if gamma == 0 else 2 for gamma in expected]
    assert regularizer.step == 6


@pytest.mark.parametrize("door", DOORS)
def test_each_step_uses_its_own_gamma_and_epsilon(door):
    trial = Trial("mlp")
    scheduled = GradientRegularizer(trial.model, warmup(0.3, 3), lambda step: 0.1 + step)
    for step in range(4):
        trial.model.zero_grad()
        DOORS[door](scheduled, trial.loss)
        other = Trial("mlp")
        DOORS[door](GradientRegularizer(other.model, 0.3 * min(1, step / 3), 0.1 + step), other.loss)
        assert_close(trial.gradients(), other.gradients())


def test_a_restored_state_goes_on_with_the_schedule():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, late(0.1, 3), 0.1, replay_check=False)
    for _ in range(3):
        regularizer.backward(trial.loss)
    other = Trial("mlp")
    restored = GradientRegularizer(other.model, late(0.1, 3), 0.1, replay_check=False)
    restored.load_state_dict(regularizer.state_dict())
    restored.backward(other.loss)
    assert other.passes == 2
    assert restored.state_dict() == {"step": 4, "active_steps": 1, "skipped_steps": 0}


def test_a_step_that_fails_does_not_count():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, 0.1, 0.1)
    with pytest.raises(ZeroDivisionError):
        regularizer.backward(lambda: trial.loss() * (1 / (2 - trial.passes)))  # in the second pass
    assert regularizer.step == 0


def test_equal_gamma_and_epsilon_have_ratio_one():
    assert strength_at(0.1, 0.1, 0) == Strength(0.1, 0.1)
    assert Strength(0.1, 0.1).ratio == 1.0
    assert strength_at(0.0, 0.1, 0) is None


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cap", [1e-3, 1e3])
def test_the_cap_bounds_the_penalty_and_keeps_its_direction(cap, scheme, door):
    if (scheme == "exact" and door != "backward") or (scheme, door) == ("central", "perturbed"):
        pytest.skip("this door does not serve this scheme")

    def penalty(**options):
        trial, other = Trial("mlp"), Trial("mlp")
        regularizer = GradientRegularizer(trial.model, 0.3, 0.1, scheme=scheme, **options)
        DOORS[door](regularizer, trial.loss)
        other.loss().backward()
        first, mixed = (torch.cat([g.flatten() for g in t.gradients()]) for t in (other, trial))
        return mixed - first, first.norm(), regularizer.diagnostics()["penalty_ratio"]

    free, norm, ratio = penalty()
    capped, _, capped_ratio = penalty(cap=cap)
    # ‖ĝ − g1‖ = min(cap, ratio) ‖g1‖, along the same direction
    torch.testing.assert_close(capped, free * min(1, cap / (free.norm() / norm).item()), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(ratio, free.norm() / norm, rtol=1e-7, atol=0)
    torch.testing.assert_close(capped_ratio, capped.norm() / norm, rtol=1e-7, atol=0)


@pytest.mark.parametrize("options", [{"cap": 0.1}, {"nonfinite": "first"}], ids=str)
def test_options_hold_for_a_window_of_micro_batches(options):
    trial, whole = Trial("mlp"), Trial("mlp")
    batches = list(zip(*(part.chunk(2) for part in trial.batch)))

    def loss(batch):
        return torch.nn.functional.cross_entropy(trial.model(batch[0]), batch[1]) / 2

    GradientRegularizer(trial.model, 0.3, 0.1, **options).backward(loss, batches)
    GradientRegularizer(whole.model, 0.3, 0.1, **options).backward(whole.loss)
    assert_close(trial.gradients(), whole.gradients())


def test_presets_are_values_of_the_nouns():
    """GNP with α = 1 is SAM, with α = 0 plain training."""
    results = []
    for make in (lambda m: sam(m, 0.1), lambda m: gnp(m, 0.1, 1.0)):
        trial = Trial("mlp")
        make(trial.model).backward(trial.loss)
        results.append(trial.gradients())
    assert_same(*results)
    trial, other = Trial("mlp"), Trial("mlp")
    gnp(trial.model, 0.1, 0.0).backward(trial.loss)
    other.loss().backward()
    assert_same(trial.gradients(), other.gradients())
