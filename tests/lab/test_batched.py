"""The batched engine against runs of their own: the same results, in float64 to rounding."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from gradreg.lab import batched, data
from gradreg.lab.batched import is_stackable, is_worthwhile, obstacle, plan, run_all_batched, run_batched
from gradreg.lab.batched import speed as grid_speed
from gradreg.lab.batched.models import StackedMLP, StackedModule, linear_layers, stack
from gradreg.lab.batched.rules import rule_of
from gradreg.lab.batched.runs import StackedRuns
from gradreg.lab.batched.training import StackedRegularizer
from gradreg.lab.config import RunConfig
from gradreg.lab.data.parts import Part, Split
from gradreg.lab.runs import Job, run

SETTINGS = {
    "SGD": [{}, {}, {}],
    "F-GR": [{"gamma": g, "epsilon": e} for g, e in ((0.05, 0.1), (0.2, 0.2), (0.3, 0.05))],
    "B-GR": [{"gamma": g, "epsilon": e} for g, e in ((0.05, 0.1), (0.1, 0.2), (0.1, 0.05))],
    "Central": [{"gamma": g, "epsilon": e} for g, e in ((0.05, 0.1), (0.1, 0.2), (0.1, 0.05))],
    "DB": [{"gamma": g} for g in (0.05, 0.1, 0.0)],
    "SAM": [{"rho": r} for r in (0.05, 0.1, 0.2)],
    "ASAM": [{"rho": r} for r in (0.2, 0.5, 1.0)],
    "MSAM": [{"rho": r} for r in (0.05, 0.1, 0.2)],
    "Previous": [{"rho": r} for r in (0.05, 0.1, 0.2)],
    "Previous-down": [{"rho": r} for r in (0.05, 0.1, 0.2)],
    "Split": [{"gamma": g, "epsilon": 2 * g} for g in (0.05, 0.1, 0.2)],
    "Flooding": [{"level": b} for b in (0.0, 1.0, 1.3)],
}
CHEAP = {
    "a fraction": {"fraction": 0.3},
    "a fraction of one row": {"fraction": 0.01},
    "a fraction that rounds to all but one": {"fraction": 0.99},
    "every third": {"period": 3},
    "late": {"start": 0.4},
    "at random": {"probability": 0.5},
    "large gradients": {"threshold": 0.2},
    "ahead": {"lookahead": 0.3},
    "all together": {"fraction": 0.4, "lookahead": 0.3, "period": 2, "start": 0.2, "probability": 0.7},
}
TASK = RunConfig(data="mnist1d", width=7, batch_size=8, epochs=3, learning_rate=0.1, weight_decay=1e-2, device="cpu")


def rows(count, seed):
    """Three overlapping clouds in six dimensions."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64) + torch.nn.functional.one_hot(y, 6)
    return Part(x, y)


@pytest.fixture
def small(monkeypatch):
    """A data set of 43 rows in float64 takes the place of mnist1d: five steps in an epoch, three rows dropped."""
    split = Split(rows(43, 0), rows(20, 1), rows(30, 2), num_classes=3)
    monkeypatch.setitem(data.SOURCES, "mnist1d", lambda config: split)
    batched._outline.cache_clear()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    batched._outline.cache_clear()


def jobs_of(method, task=TASK, **changes):
    """Three runs that differ in everything in which they may."""
    least_momentum = 0.1 if method == "MSAM" or "lookahead" in changes or changes.get("ascent") == "momentum" else 0.0
    own = [
        {"seed": 0, "warmup": 0.0, "momentum": 0.9},
        {"seed": 1, "warmup": 0.3, "momentum": 0.5, "learning_rate": 0.2, "random_labels": 0.25},
        {"seed": 0, "warmup": 1.0, "momentum": least_momentum, "weight_decay": 0.0, "random_labels": 0.5},
    ]
    if changes.get("optimizer", task.optimizer) != "sgd":
        own = [{name: value for name, value in other.items() if name != "momentum"} for other in own]
    return [
        Job(replace(task, method=method, **settings, **other, **changes), scored, num_records=records)
        for settings, other, scored, records in zip(
            SETTINGS[method], own, ("test", "validation", "test"), (10, 0, 1), strict=True
        )
    ]


def metrics(result):
    found = asdict(result)
    del found["seconds"]
    return found


def check(jobs, rel):
    for job, result in zip(jobs, run_batched(jobs), strict=True):
        expected = run(job)
        assert [p["step"] for p in result.trace] == [p["step"] for p in expected.trace]
        for point, other in zip(result.trace, expected.trace):
            assert point == pytest.approx(other, rel=rel)
        assert result.score == expected.score
        assert (result.train_loss, result.grad_norm) == pytest.approx((expected.train_loss, expected.grad_norm), rel)
        assert result.diverged == expected.diverged


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_and_optimizer_equals_single_runs(small, method, optimizer):
    check(jobs_of(method, optimizer=optimizer), rel=1e-9)


@pytest.mark.parametrize("ascent", ["normalized", "adaptive"])
@pytest.mark.parametrize("method", ["F-GR", "B-GR", "Central"])
def test_every_ascent_equals_single_runs(small, method, ascent):
    check(jobs_of(method, ascent=ascent), rel=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("ascent", ["normalized", "momentum", "previous"])
def test_a_split_batch_along_every_direction_equals_single_runs(small, ascent, optimizer):
    check(jobs_of("Split", ascent=ascent, optimizer=optimizer), rel=1e-9)


@pytest.mark.parametrize("method", ["F-GR", "B-GR", "Central", "SAM", "ASAM"])
@pytest.mark.parametrize("mode", CHEAP)
def test_every_cheap_mode_of_a_penalty_equals_single_runs(small, mode, method):
    check(jobs_of(method, **CHEAP[mode]), rel=1e-9)


@pytest.mark.parametrize("method", ["DB", "MSAM", "Previous", "Split"])
@pytest.mark.parametrize("mode", ["every third", "late", "at random"])
def test_every_schedule_of_other_methods_equals_single_runs(small, mode, method):
    check(jobs_of(method, **CHEAP[mode]), rel=1e-9)


def test_a_stack_has_runs_of_the_same_schedule_and_share():
    jobs = [job for changes in CHEAP.values() for job in jobs_of("F-GR", **changes)]
    assert sorted(len(places) for places in plan(jobs, workers=1)) == [3] * len(CHEAP)


def test_a_step_is_as_cheap_as_its_passes():
    def passes(**changes):
        return rule_of(replace(TASK, **changes), num_steps=10).passes.count

    assert passes() == passes(method="MSAM", rho=1.0) == passes(method="Split", gamma=0.1, epsilon=0.2) == 1
    assert passes(method="F-GR", gamma=0.1, epsilon=0.1) == 2
    assert passes(method="F-GR", gamma=0.1, epsilon=0.1, fraction=0.25, period=2, start=0.2) == pytest.approx(1.1)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_averaged_weights_equal_those_of_torch(small, share):
    jobs = [replace(job, average=average) for job, average in zip(jobs_of("F-GR"), (share, 0.0, 0.3))]
    check(jobs, rel=1e-9)
    plain, averaged = run(replace(jobs[0], average=0.0)), run(jobs[0])
    assert (plain.train_loss == averaged.train_loss) == (share == 0.01)  # the mean of the last step alone


@pytest.mark.parametrize("model", ["mlp", "mapped"])
def test_the_trace_of_the_hessian_equals_that_of_a_run_of_its_own(small, model, monkeypatch):
    if model == "mapped":
        monkeypatch.setattr("gradreg.lab.batched.runs.stack", StackedModule)
    jobs = [replace(job, num_probes=probes) for job, probes in zip(jobs_of("SGD"), (3, 0, 2))]
    for job, result in zip(jobs, run_batched(jobs)):
        if job.num_probes:
            assert result.hessian_trace == pytest.approx(run(job).hessian_trace, rel=1e-9)
        else:
            assert result.hessian_trace is None


def test_a_carried_penalty_is_used_again_in_proportion_to_the_gradient():
    model = Quartic()
    weights = torch.tensor([[0.5, -1.0], [0.2, 0.3]], dtype=torch.float64)
    config = replace(TASK, method="F-GR", gamma=0.1, epsilon=0.2, period=2, warmup=0.0)
    rule = rule_of(config, num_steps=4, carries=True)
    stacked = StackedRegularizer(model, [rule, rule], weights, num_steps=4)
    x, y = torch.zeros(2, 4, 1), torch.zeros(2, 4, dtype=torch.int64)
    assert torch.equal(stacked.gradient(weights, x, y, 0), weights**3)  # nothing to carry yet
    first = weights**3
    penalty = 0.5 * ((weights + 0.2 * first) ** 3 - first)
    torch.testing.assert_close(stacked.gradient(weights, x, y, 1), first + penalty)
    later = 2 * weights
    expected = later**3 + penalty * 8  # ‖∇L‖ has grown eightfold
    torch.testing.assert_close(stacked.gradient(later, x, y, 2), expected)


def test_a_carried_penalty_is_for_stacks_alone():
    with pytest.raises(ValueError, match="carries must be false"):
        run(Job(TASK, carries=True))


def test_methods_and_ascents_that_share_their_passes_are_one_stack(small):
    jobs = [job for method in ("F-GR", "B-GR", "SAM") for job in jobs_of(method)]
    jobs += jobs_of("B-GR", ascent="normalized")
    assert len(plan(jobs, workers=1)) == 1
    check(jobs, rel=1e-9)


def test_float32_rounding_stays_small_over_an_epoch():
    """Ten steps: each multiplies a rounding error of 1e-7 by little more than 1, so that 1e-5 is far above the error,
    and far below what a wrong formula does.
    """
    task = RunConfig(data="digits", width=64, batch_size=30, epochs=1, device="cpu")
    jobs = [Job(replace(task, method=name, **SETTINGS[name][0]), num_records=0) for name in ("SGD", "F-GR", "SAM")]
    check(jobs, rel=1e-5)


def test_one_slice_equals_the_same_among_others(small):
    jobs = [job for method in ("F-GR", "SAM") for job in jobs_of(method)]
    for job, together in zip(jobs, run_batched(jobs)):
        (alone,) = run_batched([job])
        assert together.score == alone.score
        for point, other in zip(together.trace, alone.trace):
            assert point == pytest.approx(other, rel=1e-12)


def test_a_diverged_slice_leaves_the_others_alone(small):
    job = Job(replace(TASK, method="SAM", rho=0.1, epochs=6))
    wild = Job(replace(job.config, learning_rate=1e3, momentum=0.99, optimizer="sgd", weight_decay=100.0))
    before, broken, after = run_batched([job, wild, job])
    (alone,) = run_batched([job])
    assert metrics(before) == metrics(after)
    assert before.train_loss == pytest.approx(alone.train_loss, rel=1e-12)
    expected = run(wild)
    assert broken.diverged
    assert expected.diverged
    assert [p["step"] for p in broken.trace] == [p["step"] for p in expected.trace]
    assert broken.score == expected.score


def test_a_run_ends_with_the_weights_that_were_found_diverged(small):
    runs = StackedRuns([Job(TASK), Job(TASK)])
    runs.weights[0] = torch.linspace(-1e200, 1e200, runs.weights.shape[1])  # finite, their logits are not
    before = runs.weights[0].clone()
    broken, other = runs.run()
    assert (broken.diverged, other.diverged) == (True, False)
    assert [point["step"] for point in broken.trace] == [0, runs.num_steps]
    assert torch.equal(runs.weights[0], before)


class Quartic:
    """L = ¼ Σ θ⁴, as a stack; `broken` slices have an infinite gradient."""

    def __init__(self, broken=()):
        self.broken = broken

    def gradient(self, weights, x, y, out, with_loss=False):
        out.copy_(weights**3)
        out[list(self.broken)] = math.inf


@pytest.mark.parametrize("method", ["F-GR", "B-GR", "Central", "SAM", "ASAM"])
def test_a_slice_without_a_direction_keeps_its_first_gradient(method):
    """Slices: usual, zero gradient, infinite gradient, γ = 0 where a displacement would overflow, and a gradient whose
    square overflows.
    """
    weights = torch.tensor([1.0, 0.0, 2.0, 1e6, 1e7]).unsqueeze(1).repeat(1, 4)
    rule = rule_of(jobs_of(method)[0].config, num_steps=10)
    rules = [rule, rule, rule, replace(rule, gamma=0.0), rule]
    found = StackedRegularizer(Quartic([2]), rules, weights, num_steps=10).gradient(weights, None, None, step=5)
    assert found.isfinite().all(1).tolist() == [True, True, False, True, True]
    assert torch.equal(found[[1, 3, 4]], weights[[1, 3, 4]] ** 3)
    assert not torch.equal(found[0], weights[0] ** 3)


@pytest.mark.parametrize("model", ["vit", "gpt"])
def test_a_model_mapped_by_torch_func_equals_single_runs(monkeypatch, model):
    torch.set_default_dtype(torch.float64)
    try:
        source = "digits" if model == "vit" else "text"
        config = RunConfig(data=source, model=model, depth=1, width=8, num_train=24, batch_size=12, epochs=1)
        original = data.SOURCES[source](config)
        train, held_out = original.train[:24], original.test[:10]
        small = [Part(p.x.double() if p.x.is_floating_point() else p.x, p.y) for p in (train, held_out)]
        split = Split(small[0], small[1], small[1], original.num_classes)
        monkeypatch.setitem(data.SOURCES, source, lambda config: split)
        methods = {"F-GR": {"gamma": 0.1, "epsilon": 0.1}, "DB": {"gamma": 0.1}, "SGD": {}}
        jobs = [
            Job(replace(config, method=name, seed=seed, warmup=0.0, **settings), num_records=0)
            for name, settings in methods.items()
            for seed in (0, 1)
        ]
        check(jobs, rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_passes_by_hand_equal_those_of_torch_func(depth):
    layers = [nn.Flatten()]
    for fan_in, fan_out in pairwise([*[12, 9, 8, 7][:depth], 5]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    assert isinstance(stack(model), StackedMLP)
    x, y = torch.randn(3, 6, 3, 4, dtype=torch.float64), torch.randint(5, (3, 6))
    weights, along = (torch.randn(3, sum(p.numel() for p in model.parameters())).double() for _ in range(2))
    found = []
    for stacked in (StackedMLP(linear_layers(model)), StackedModule(model)):
        gradient, product = torch.empty_like(weights), torch.empty_like(weights)
        losses = stacked.gradient(weights, x, y, gradient, with_loss=True)
        stacked.curvature_product(weights, x, y, along, product)
        found.append((gradient, product, losses))
    for by_hand, reference in zip(*found):
        torch.testing.assert_close(by_hand, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)],
        [nn.Linear(4, 3, bias=False)],
        [nn.Linear(4, 3), nn.ReLU()],
        [nn.Flatten(2), nn.Linear(4, 3)],
        [],
    ],
)
def test_only_an_mlp_is_taken_for_one(layers):
    assert linear_layers(nn.Sequential(*layers)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "bf16"}, "precision must be fp32"),
        ({"compile": True}, "compile must be False"),
        ({"model": "cnn"}, "no buffers"),
    ],
)
def test_what_cannot_be_stacked_is_said(changes, words):
    config = RunConfig(**{"data": "digits", **changes})
    assert not is_stackable(config)
    assert words in obstacle(config)
    with pytest.raises(ValueError, match=rf"jobs\[1\] must be a run that can be stacked: .*{words}"):
        run_batched([Job(RunConfig(data="digits")), Job(config)])


def test_a_field_that_the_engine_does_not_know_keeps_a_run_out(monkeypatch):
    monkeypatch.setattr(batched, "OWN", tuple(name for name in batched.OWN if name != "momentum"))
    assert is_stackable(RunConfig(data="digits"))
    assert obstacle(RunConfig(data="digits", momentum=0.5)) == "momentum must be 0.9, got 0.5"


def test_on_the_host_an_mlp_gains_and_a_mapped_model_does_not():
    mlp, vit = (RunConfig(data="digits", model=name, device="cpu") for name in ("mlp", "vit"))
    assert is_stackable(vit)
    assert (is_worthwhile(mlp), is_worthwhile(vit)) == (True, False)


def test_stacks_are_of_equal_passes_balanced_and_complete(small):
    configs = [TASK] * 21 + [replace(TASK, method="SAM", rho=0.1)] * 5 + [replace(TASK, batch_size=4)] * 2
    stacks = plan([Job(config) for config in configs], workers=2)
    assert sorted(k for places in stacks for k in places) == list(range(28))
    for places in stacks:
        assert len({(configs[k].method, configs[k].batch_size) for k in places}) == 1
    of_sgd = [len(places) for places in stacks if places[0] < 21]
    assert len(of_sgd) % 2 == 0
    assert max(of_sgd) - min(of_sgd) <= 1
    assert max(of_sgd) <= batched.MOST_SLICES


def test_threads_change_nothing_and_the_progress_is_shown(small):
    jobs = [Job(replace(TASK, seed=k), num_records=0) for k in range(6)]
    alone = dict(run_all_batched(jobs, workers=1))
    together = dict(run_all_batched(jobs, workers=2))
    for k in range(6):
        assert together[k].train_loss == pytest.approx(alone[k].train_loss, rel=1e-12)
    shown = []
    run_batched(jobs, lambda *args: shown.append(args))
    assert shown[-1] == ("training", 6, 6)


def test_the_global_random_state_is_left_alone(small):
    before = torch.get_rng_state()
    run_batched(jobs_of("F-GR"))
    assert torch.equal(torch.get_rng_state(), before)


def test_leaving_early_ends_the_threads(small, monkeypatch):
    train, asked, before = StackedRuns.run, [], set(threading.enumerate())

    def noted(runs, should_stop):
        asked.append(should_stop)
        return train(runs, should_stop)

    monkeypatch.setattr(StackedRuns, "run", noted)
    results = run_all_batched([Job(replace(TASK, seed=k, epochs=50)) for k in range(40)], workers=2)
    next(results)
    assert set(threading.enumerate()) > before
    assert not any(stops() for stops in asked)
    results.close()
    assert set(threading.enumerate()) == before
    assert all(stops() for stops in asked)


def test_nothing_gives_nothing():
    assert run_batched([]) == []


def test_the_speed_of_a_grid_is_measured(small, monkeypatch):
    monkeypatch.setattr(grid_speed, "BATCH_SIZE", 8)
    monkeypatch.setattr(grid_speed, "_train_alone", lambda jobs, threads: 0.5 * len(jobs) / threads)
    monkeypatch.setattr(grid_speed, "_processes", ThreadPoolExecutor)
    speed = batched.grid_speed(width=8, num_configs=4, num_steps=2, rounds=3)
    assert speed.baseline == grid_speed.ALL_THREADS
    assert speed.configs_per_second[grid_speed.ALL_THREADS] == 2.0
    assert speed.low <= speed.ratio <= speed.high
    assert speed.ratio == pytest.approx(speed.configs_per_second[grid_speed.BATCHED] / 2.0, rel=0.01)


def test_the_grid_has_the_four_methods_and_the_steps_that_are_asked_for():
    configs = grid_speed.grid(width=64, num_configs=6, num_steps=30)
    assert [config.method for config in configs] == ["SGD", "F-GR", "B-GR", "DB", "SGD", "F-GR"]
    assert {(c.num_train, c.epochs, c.warmup) for c in configs} == {(3000, 1, 0.0)}
    assert {(c.num_train, c.epochs) for c in grid_speed.grid(64, 1, num_steps=80)} == {(4000, 2)}
    with pytest.raises(ValueError, match="num_steps must be from 1 to 40 or a multiple of 40, got 50"):
        grid_speed.grid(64, 1, num_steps=50)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_host_gives(small):
    jobs = [job for method in SETTINGS for job in jobs_of(method)]
    on_device = run_batched([replace(job, config=replace(job.config, device="cuda")) for job in jobs])
    for here, there in zip(run_batched(jobs), on_device):
        assert there.train_loss == pytest.approx(here.train_loss, rel=1e-6)
        assert math.isfinite(there.grad_norm)
