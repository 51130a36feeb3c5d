"""Retention and its interval, the pictures, and the penalties of modes beside the exact one."""

import copy
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradreg.lab import objective
from gradreg.lab.config import RunConfig
from gradreg.lab.data import Part
from gradreg.lab.folder import BadInput
from gradreg.lab.randomness import seeded
from gradreg.lab.stats import Interval, mean_interval, paired_difference
from gradreg.lab.train.trainer import Trainer
from gradreg.studies.frontier import mechanism
from gradreg.studies.frontier.figure import Panel, Point, front, pareto_figure, worst, worst_figure
from gradreg.studies.frontier.mechanism import Alignment, Frozen, alignments, ending, frozen_points, modes, over_seeds
from gradreg.studies.frontier.retention import gain, retention

PLAIN, FULL, MODE = [76.0, 77.5, 75.0, 76.4, 76.1], [80.1, 80.0, 79.0, 81.2, 79.5], [79.0, 79.9, 77.0, 79.5, 78.8]
CHANCE = 10.0


# Retention.


def test_retention_is_a_ratio_of_means_inside_its_interval():
    kept = retention(MODE, FULL, PLAIN, CHANCE)
    assert kept.mean == pytest.approx((np.mean(MODE) - np.mean(PLAIN)) / (np.mean(FULL) - np.mean(PLAIN)))
    assert kept.low < kept.mean < kept.high
    assert retention(PLAIN, FULL, PLAIN, CHANCE) == Interval(0, 0, 0)


def test_the_interval_is_that_of_resampled_seeds():
    rng = np.random.default_rng(7)  # other draws than the module's
    ratios = []
    for _ in range(20_000):
        mode, full, plain = np.array([MODE, FULL, PLAIN])[:, rng.integers(5, size=5)].mean(1)
        ratios.append((mode - plain) / (full - plain))
    kept = retention(MODE, FULL, PLAIN, CHANCE)
    assert (kept.low, kept.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.01)


def test_the_unit_and_what_the_seeds_share_do_not_matter():
    shared = np.array([3.0, -2.0, 8.0, 0.0, 1.0])
    moved = [(0.01 * (np.array(values) + shared)).tolist() for values in (MODE, FULL, PLAIN)]
    expected, found = retention(MODE, FULL, PLAIN, CHANCE), retention(*moved, CHANCE / 100)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_a_diverged_run_counts_as_chance():
    diverged, guessing = [math.nan, *MODE[1:]], [CHANCE, *MODE[1:]]
    assert retention(diverged, FULL, PLAIN, CHANCE) == retention(guessing, FULL, PLAIN, CHANCE)
    assert gain([math.inf, *FULL[1:]], PLAIN, CHANCE) == paired_difference([CHANCE, *FULL[1:]], PLAIN)


def test_a_gain_that_is_not_established_leaves_the_interval_open():
    full = [75.0, 79.0, 74.0, 77.0, 77.0]  # +0.2 on average, of both signs
    kept = retention(MODE, full, PLAIN, CHANCE)
    assert math.isfinite(kept.mean)
    assert (kept.low, kept.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: retention([1.0], [2.0], [0.0], 0.0), "at least 2 seeds, got 1"),
        (lambda: gain([1.0], [2.0], 0.0), "at least 2 seeds, got 1"),
        (lambda: retention(MODE[:4], FULL, PLAIN, CHANCE), "mode 4, full 5, plain 5"),
        (lambda: gain(FULL, PLAIN[:2], CHANCE), "full 5, plain 2"),
        (lambda: retention(MODE, PLAIN, FULL, CHANCE), "gain over plain on average, got -3.76"),
        (lambda: retention(MODE, PLAIN, PLAIN, CHANCE), "got 0:"),
        (lambda: retention(MODE, FULL, PLAIN, math.nan), "chance must be"),
        (lambda: retention(MODE, FULL, PLAIN, CHANCE, num_resamples=10), "num_resamples must be"),
    ],
)
def test_what_has_no_retention_is_refused(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


# Pictures.


def at(mode, cost, mean, half_width=0.1, is_opponent=False):
    return Point(mode, cost, Interval(mean, mean - half_width, mean + half_width), is_opponent)


ONE = Panel("clean & labels", [at("cheap", 1.1, 0.8), at("dear", 1.5, 0.7), at("other", 1.6, 1.2, 0.1, True)], 2.0)
TWO = Panel("noisy", [at("cheap", 1.1, -0.4), at("dear", 1.6, 0.9), at("other", 1.5, 0.3, 0.1, True)], 2.1)


SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_front_is_what_nothing_beats_in_both():
    assert front(ONE) == [(1.0, 0.0), (1.1, 0.8), (1.6, 1.2)]
    assert front(TWO) == [(1.0, 0.0), (1.5, 0.3), (1.6, 0.9), (2.1, 1.0)]
    assert front(Panel("none", [], 2.0)) == [(1.0, 0.0), (2.0, 1.0)]


def test_the_worst_task_of_each_mode_the_best_first():
    found = [(task, point.mode, point.retention.mean) for task, point in worst([ONE, TWO])]
    assert found == [("clean & labels", "dear", 0.7), ("noisy", "other", 0.3), ("noisy", "cheap", -0.4)]


def test_a_mode_that_lacks_a_task_has_no_worst_one():
    with pytest.raises(ValueError, match="'dear' must have one point in each of the 2 tasks, got 1"):
        worst([ONE, replace(TWO, points=[TWO.points[0], TWO.points[2]])])


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (pareto_figure, ["clean & labels", "noisy", *2 * ["cheap", "dear", "other", "plain", "F-GR"]]),
        (worst_figure, ["cheap", "dear", "other", "clean & labels, 1.50×", "noisy, 1.10×", "noisy, 1.50×"]),
    ],
)
def test_a_picture_names_every_point_and_is_reproducible(draw, expected):
    svg = draw([ONE, TWO])
    found = texts(svg)
    assert all(found.count(name) == expected.count(name) for name in expected)
    assert draw([ONE, TWO]) == svg


@pytest.mark.parametrize("draw", [pareto_figure, worst_figure])
def test_what_lies_beyond_the_axis_is_written_out(draw):
    lost = Point("lost", 1.02, Interval(-7.0, -math.inf, math.inf))
    found = texts(draw([Panel("task", [lost, at("kept", 0.98, 0.5)], 2.0)]))
    assert "lost (−7.0)" in found
    assert "kept" in found


def test_names_of_a_crowd_do_not_cover_each_other():
    crowd = [at(f"mode {k}", 1.03 + 0.004 * k, 0.5 + 0.02 * (k % 3)) for k in range(12)]
    root = ElementTree.fromstring(pareto_figure([Panel("task", crowd, 2.0)]))
    names = [node for node in root.iter(f"{SVG}text") if node.text in {point.mode for point in crowd}]
    places = [(float(node.get("x", "nan")), float(node.get("y", "nan"))) for node in names]
    assert len(places) == 12
    for k, (x, y) in enumerate(places):
        assert all(abs(x - a) > 30 or abs(y - b) > 7 for a, b in places[:k])  # a name is 35 wide, its letters 7 high


# The mechanism.


def softmax_regression(same_rows):
    """In float64, with the momentum that the gradient of all rows would leave."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 6).double(), torch.randint(3, (24,))
    rows = Part(x[:1].expand(24, 6), y[:1].expand(24)) if same_rows else Part(x, y)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    objective.loss(model, rows).backward()
    optimizer.step()
    return Frozen(1, model, optimizer), rows


def test_with_equal_rows_every_mode_is_the_exact_penalty_up_to_its_sign():
    # Any direction is then ±∇L, any part of a batch the whole, and γ/‖g1‖ of a mode with a length of its own is ρ/‖g1‖.
    point, rows = softmax_regression(same_rows=True)
    found = alignments(point, modes(1e-4, 1e-4, 1e-4, share=0.25), rows, batch_size=8, epsilon=1e-4)
    assert len(found) == 1 + 9 * 3
    for row in found:
        sign = -1 if row.mode in ("MSAM, ahead", "Split, momentum", "Previous, ahead") else 1
        assert row.cosine == pytest.approx(sign, abs=1e-5), row
        assert row.ratio == pytest.approx(1, rel=2e-3), row


def test_references_are_the_mean_over_batches_and_the_penalty_of_all_rows():
    point, rows = softmax_regression(same_rows=False)
    f_gr = modes(1e-5, 1e-5, 1e-5)[:1]
    found = {row.reference: row for row in alignments(point, f_gr, rows, batch_size=6, epsilon=1e-5)[1:]}
    assert (found["exact"].cosine, found["exact"].ratio) == pytest.approx((1, 1), abs=1e-4)
    assert (found["central"].cosine, found["central"].ratio) == pytest.approx((1, 1), abs=1e-4)

    def penalty(part):
        parameters = list(point.model.parameters())
        gradient = torch.autograd.grad(objective.loss(point.model, part), parameters, create_graph=True)
        half_square = sum(g.square().sum() for g in gradient) / 2
        return torch.cat([h.flatten() for h in torch.autograd.grad(half_square, parameters)])

    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).split(6)
    batches, whole = torch.stack([penalty(rows[part]) for part in order]).mean(0), penalty(rows)
    assert found["whole"].cosine == pytest.approx(F.cosine_similarity(batches, whole, dim=0).item(), abs=1e-4)
    assert found["whole"].ratio == pytest.approx((batches.norm() / whole.norm()).item(), rel=1e-4)
    assert found["whole"].ratio > 1.1  # the noise of a batch is penalized too


def test_the_first_row_is_the_noise_of_the_batches_and_the_point_stays():
    point, rows = softmax_regression(same_rows=False)
    before = copy.deepcopy((point.model.state_dict(), point.optimizer.state_dict()))
    (row,) = alignments(point, [], rows, batch_size=6, epsilon=0.1)
    assert (row.mode, row.reference) == ("exact, other batches", "exact")
    assert 0.5 < row.cosine < 0.9999
    torch.testing.assert_close((point.model.state_dict(), point.optimizer.state_dict()), before, rtol=0, atol=0)
    assert alignments(point, [], rows, batch_size=6, epsilon=0.1) == [row]
    with pytest.raises(ValueError, match="batch_size must be from 1 to 24"):
        alignments(point, [], rows, batch_size=25, epsilon=0.1)


def test_a_mode_without_a_direction_has_no_cosine():
    point, rows = softmax_regression(same_rows=False)
    point.optimizer.state.clear()
    ahead = [mode for mode in modes(0.1, 0.1, 0.1) if mode.name == "MSAM, ahead"]
    for row in alignments(point, ahead, rows, batch_size=6, epsilon=0.1)[1:]:
        assert math.isnan(row.cosine)
        assert row.ratio == 0


CONFIG = RunConfig(data="digits", num_train=100, batch_size=20, width=8, epochs=2)


def test_points_are_those_of_the_run_with_its_momentum():
    points, train = frozen_points(CONFIG, shares=(0.0, 0.3, 1.0))
    assert [point.step for point in points] == [1, 3, 10]
    with seeded(CONFIG.seed):
        trainer = Trainer(CONFIG)
        for point in points:
            while trainer.step < point.step:
                trainer.epoch(lambda: True)
            torch.testing.assert_close(point.model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)
            for ours, theirs in zip(point.model.parameters(), trainer.model.parameters()):
                momentum = trainer.optimizer.state[theirs]["momentum_buffer"]
                torch.testing.assert_close(point.optimizer.state[ours]["momentum_buffer"], momentum, rtol=0, atol=0)
    assert len(train) == 100


@pytest.mark.parametrize(
    ("config", "shares", "says"),
    [
        (CONFIG, (), "got none"),
        (CONFIG, (0.5, 0.2), "got 0.5, 0.2"),
        (CONFIG, (0.5, 1.5), "within 0 to 1"),
        (replace(CONFIG, method="SAM", rho=0.1), (1.0,), "method must be SGD"),
    ],
)
def test_other_points_and_runs_are_refused(config, shares, says):
    with pytest.raises(BadInput, match=says):
        frozen_points(config, shares)


def test_over_seeds_is_the_interval_of_each_row():
    runs = [[Alignment("SAM", "exact", c, r), Alignment("SAM", "whole", -c, 1.0)] for c, r in ((0.5, 2.0), (0.7, 3.0))]
    first, second = over_seeds(runs)
    assert (first.mode, first.reference) == ("SAM", "exact")
    assert (first.cosine, first.ratio) == (mean_interval([0.5, 0.7]), mean_interval([2.0, 3.0]))
    assert (second.reference, second.cosine.mean) == ("whole", pytest.approx(-0.6))
    with pytest.raises(ValueError, match="same modes"):
        over_seeds([runs[0], runs[1][::-1]])
    for few in (runs[:1], []):
        with pytest.raises(ValueError, match=f"at least 2 for an interval, got {len(few)}"):
            over_seeds(few)


def test_the_ending_is_that_of_the_hessian(monkeypatch):
    point, rows = softmax_regression(same_rows=False)
    parameters = list(point.model.parameters())
    first = torch.autograd.grad(objective.loss(point.model, rows), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in first])
    trace = 0.0
    for k in range(len(gradient)):
        column = torch.autograd.grad(gradient[k], parameters, retain_graph=True)
        trace += torch.cat([h.flatten() for h in column])[k].item()
    monkeypatch.setattr(mechanism, "batches_of", lambda part: [part[:10], part[10:]])
    found = ending(point.model.train(), rows, num_probes=200)
    assert found.grad_norm == pytest.approx(gradient.norm().item())
    assert found.trace == pytest.approx(trace, abs=4 * found.trace_error)
    assert 0 < found.trace_error < 0.1 * abs(found.trace)
    assert point.model.training
