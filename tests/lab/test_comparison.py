"""Comparisons: who is tuned first, how long, on what; what is said; what survives."""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradreg
from gradreg import cli
from gradreg.lab import BadInput, Comparison, Loop, Task, compare, objective, stats, tasks
from gradreg.lab.comparison import api, arms, report, run
from gradreg.lab.comparison.arms import BASELINE, LONGER, around
from gradreg.lab.comparison.plan import FIRST_SEED, LADDER, Effort, Plan, Taken, checked_methods
from gradreg.lab.comparison.result import chosen, notes, settings
from gradreg.lab.comparison.schedule import ComparisonSchedule
from gradreg.lab.config import RunConfig
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.page import markdown
from gradreg.lab.records import read_record
from gradreg.lab.study import workers as workers_module
from gradreg.lab.study.storage import Place
from gradreg.lab.study.study import Study
from gradreg.lab.tables import WIDTH

QUICK = {"trials": 6, "seeds": 3, "workers": 1}


def quality(run):
    """Best at a learning rate of 0.01; F-GR adds a little, most at a ratio of 0.3; seeds are noise."""
    found = -((math.log10(run.learning_rate) + 2) ** 2) + 0.01 * ((run.seed * 7919) % 5)
    if run.method == "F-GR":
        found += 0.5 - (math.log10(run.config.ratio or 1e-9) - math.log10(0.3)) ** 2
    return found


class Recorder:
    """A loop that keeps what it was asked."""

    def __init__(self, sign=1.0, on_test=0.0):
        self.runs, self.sign, self.on_test = [], sign, on_test

    def __call__(self, run):
        self.runs.append(run)
        found = self.sign * quality(run)
        return {"validation": found, "test": found + self.on_test}


@pytest.fixture
def recorded(monkeypatch):
    """Loops are not sent anywhere: they are played here."""

    def make(train, **more):
        loop = Loop(train, learning_rate=0.1, weight_decay=0.0, **more)
        source = tasks.Source("loop", "0", pickled=b"")
        tasks.know((source,))
        monkeypatch.setattr(tasks, "_made", lambda source: loop)
        monkeypatch.setattr(tasks, "from_object", lambda task: source)
        return loop

    return make


def of(runs, **fields):
    return [r for r in runs if all(getattr(r, name) == value for name, value in fields.items())]


# The plan.


def test_the_baseline_is_tuned_first_and_all_have_as_many_candidates(recorded):
    train = Recorder()
    found = compare(recorded(train), ["F-GR", "SAM"], **QUICK)
    assert [row["name"] for row in found.rows] == [BASELINE, "F-GR", "SAM", LONGER]
    first = [r.method for r in train.runs if r.scored_on == "validation"]
    assert set(first[: first.index("F-GR")]) == {"SGD"}  # no method begins before
    assert all(row["tried"] == 6 for row in found.rows[1:])
    plain = found.rows[0]
    assert plain["tried"] >= 6
    for row in found.rows[1:3]:
        start = next(r for r in of(train.runs, scored_on="validation") if r.method == row["method"])
        assert (start.learning_rate, start.weight_decay) == (plain["learning_rate"], plain["weight_decay"])


def test_the_choice_is_made_on_validation_rows_and_the_test_is_read_once(recorded):
    train = Recorder(on_test=100.0)
    found = compare(recorded(train), ["F-GR"], **QUICK)
    search, test = of(train.runs, scored_on="validation"), of(train.runs, scored_on="test")
    assert {r.seed for r in test} == {0, 1, 2}
    assert min(r.seed for r in search) == FIRST_SEED
    assert Counter((r.method, r.config.epochs) for r in test) == {("SGD", 30): 3, ("F-GR", 30): 3, ("SGD", 60): 3}
    for row in found.rows:
        tried = {}
        for r in (r for r in search if r.method == row["method"] and r.config.epochs == 30 * row["epochs"]):
            tried.setdefault((r.learning_rate, r.weight_decay, r.config.ratio, r.config.epsilon), []).append(quality(r))
        most = max(map(len, tried.values()))
        best = max((key for key in tried if len(tried[key]) == most), key=lambda key: sum(tried[key]) / most)
        chosen = row["learning_rate"], row["weight_decay"], row["settings"].get("ratio"), row["settings"].get("epsilon")
        assert chosen == best


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_better_is_better_whichever_way_the_score_goes(sign, recorded):
    found = compare(recorded(Recorder(sign), higher_is_better=sign > 0), ["F-GR"], **QUICK)
    row = found.rows[1]
    assert row["verdict"] == stats.BETTER
    assert (row["difference"]["mean"] > 0) == (sign > 0)
    assert found.rows[0]["learning_rate"] == pytest.approx(0.01, rel=0.2)
    assert found.verdict.startswith("F-GR (ratio 0.3")
    assert "is better than tuned plain training" in found.verdict


def test_the_baseline_is_searched_for_as_long_as_it_finds_better(recorded):
    """From 10 down to 0.01 are six factors of three: the grid has one, the climb goes on."""
    train = Recorder()
    found = compare(recorded(train), ["F-GR"], opponent=False, **{**QUICK, "trials": 12}, learning_rate=10.0)
    plain = found.rows[0]
    assert 12 < plain["tried"] <= 3 * 12
    assert plain["learning_rate"] < 0.05
    lost = compare(recorded(Recorder()), ["F-GR"], opponent=False, **{**QUICK, "trials": 3}, learning_rate=1000.0)
    assert lost.rows[0]["tried"] == 3 * 3  # and no further


@pytest.mark.parametrize("search_epochs", [0, 5])
@pytest.mark.parametrize("favors", [True, False])
def test_the_baseline_is_tried_where_the_others_have_gone(favors, search_epochs, recorded):
    """Beyond a dip that its own search does not cross, plain training is best, or worst, at another weight decay."""

    def train(run):
        run_of.append(run)
        held = run.weight_decay == 0.5
        found = (1.0 if favors else -9.0) * held - (run.weight_decay not in (0.0, 0.5)) - run.learning_rate
        return {"validation": found + 2 * (run.method == "F-GR"), "test": found}

    run_of = []
    words = {"trials": 3, "seeds": 2, "workers": 1, "search_epochs": search_epochs}
    found = compare(recorded(train), ["F-GR:weight_decay=0.5"], **words)
    plain, other, _ = found.rows
    assert plain["weight_decay"] == (0.5 if favors else 0.0)
    there = [r for r in run_of if r.method == "SGD" and r.weight_decay == 0.5 and r.config.epochs == 30]
    on_validation = {r.seed for r in there if r.scored_on == "validation"}
    assert on_validation == {r.seed for r in run_of if r.method == "F-GR" and r.scored_on == "validation"} - (
        {r.seed for r in run_of if r.config.epochs == 5} if search_epochs else set()
    )
    assert {r.seed for r in there if r.scored_on == "test"} == ({0, 1} if favors else set())
    assert (plain["learning_rate"] == other["learning_rate"]) >= favors
    assert any("SGD was tried there too" in note for note in notes(found.results))


@pytest.mark.parametrize("favors", [True, False])
def test_the_others_are_tried_where_the_baseline_has_ended(favors, recorded):
    """One arm draws plain training over a dip; what holds a weight decay stays, what is free comes after."""

    def train(run):
        runs.append(run)
        free = run.method == "SAM" and not favors
        found = (-9.0 if free else 1.0) * (run.weight_decay == 0.5) - (run.weight_decay not in (0.0, 0.5))
        found -= run.learning_rate + abs(math.log10((run.config.rho or 0.05) / 0.05))
        return {"validation": found, "test": found}

    runs = []
    words = {"trials": 3, "seeds": 2, "workers": 1, "opponent": False}
    found = compare(recorded(train), ["F-GR:weight_decay=0.5", "SAM", "F-GR:weight_decay=0.0"], **words)
    plain, _, sam, still = found.rows
    assert (plain["weight_decay"], still["weight_decay"]) == (0.5, 0.0)
    assert (sam["weight_decay"], sam["settings"]) == (0.5 if favors else 0.0, {"rho": 0.05})
    there = [r for r in runs if r.method == "SAM" and r.weight_decay == 0.5 and r.scored_on == "validation"]
    plainly = [r for r in runs if r.method == "SGD" and r.weight_decay == 0.5 and r.scored_on == "validation"]
    assert {r.seed for r in there} == {r.seed for r in plainly}  # no luck of a single seed
    assert {r.config.rho for r in there} == {0.05}
    assert len({r.seed for r in runs if r.method == "SAM" and r.scored_on == "test"}) == 2
    assert any("and the arm where SGD ended" in note for note in notes(found.results))


def test_a_dip_beside_the_start_does_not_end_the_baseline_s_search(recorded):
    """Three times the weight decay is worse, and nine times is best: a climb alone would stay."""

    def train(run):
        found = {0.001: 0.5, 0.003: 0.4, 0.009: 0.9}.get(run.weight_decay, 0.0) - abs(math.log10(run.learning_rate) + 1)
        return {"validation": found, "test": found}

    found = compare(recorded(train), ["F-GR"], opponent=False, **QUICK, weight_decay=0.001)
    assert found.rows[0]["weight_decay"] == 0.009


def test_the_baseline_is_tried_to_the_end_where_its_short_runs_left(recorded):
    """Short runs do not see what a larger weight decay is good for; another arm comes to it."""

    def train(run):
        decays = {0.0: 0.0, 0.01: 1.0 if run.config.epochs >= 30 else -1.0}
        found = decays.get(run.weight_decay, -2.0) - abs(math.log10(run.learning_rate) + 1)
        return {"validation": found + (run.method == "F-GR"), "test": found}

    words = {"trials": 6, "seeds": 2, "workers": 1, "search_epochs": 5, "opponent": False}
    found = compare(recorded(train), ["F-GR:weight_decay=0.01"], **words)
    assert [row["weight_decay"] for row in found.rows] == [0.01, 0.01]
    assert found.rows[0]["scores"] == found.rows[1]["scores"]


@pytest.mark.parametrize("favors", [True, False])
def test_arms_that_another_comparison_tuned_are_not_searched_for(favors, recorded, monkeypatch):
    """All start from the baseline's; it is tried where one of them ends, and there alone."""
    known = {BASELINE: Taken({"learning_rate": 0.3, "weight_decay": 0.1}, 0.25)}
    known["SAM"] = Taken({"learning_rate": 0.3, "weight_decay": 0.1, "rho": 0.05}, 0.5)
    planned = api._plan
    monkeypatch.setattr(api, "_plan", lambda *words: replace(planned(*words), taken=known))

    def train(run):
        runs.append(run)
        found = (1.0 if favors else -9.0) * (run.weight_decay == 0.5) - abs(math.log10(run.learning_rate / 0.3))
        return {"validation": found + 10 * (run.method == "F-GR"), "test": found}

    runs = []
    words = {"trials": 3, "seeds": 2, "workers": 1, "opponent": False}
    plain, sam, ours = compare(recorded(train), ["SAM", "F-GR"], **words).rows
    assert [plain["tried"], sam["tried"], ours["tried"]] == [0, 0, 3]
    assert (plain["validation"], sam["validation"], sam["settings"]) == (0.25, 0.5, {"rho": 0.05})
    assert {r.method for r in runs if r.scored_on == "validation"} == {"F-GR"}
    assert runs[0].weight_decay == 0.1

    runs.clear()
    found = compare(recorded(train), ["SAM", "F-GR:weight_decay=0.5"], **words)
    plain, sam, ours = found.rows
    assert {r.weight_decay for r in runs if r.method == "SGD" and r.scored_on == "validation"} == {0.1, 0.5}
    assert (plain["weight_decay"], sam["weight_decay"], sam["tried"]) == (0.5 if favors else 0.1, 0.1, 0)
    assert plain["validation"] == (1.0 if favors else 0.0)
    said = " ".join(notes(found.results))
    assert "SGD and SAM have the settings that they came to in another comparison. Each other arm was tuned" in said
    assert "In another comparison: SGD and SAM; the others on validation rows" in markdown(report.page(found.results))


def test_settings_of_another_task_are_tried_at_three_learning_rates(recorded, monkeypatch):
    """And plain training where the others end, these where it ends."""
    point = {"learning_rate": 0.3, "weight_decay": 0.1}
    known = {BASELINE: Taken(point, 0.25), "SAM": Taken({**point, "weight_decay": 0.2, "rho": 0.05}, 0.5)}
    planned = api._plan
    monkeypatch.setattr(api, "_plan", lambda *words: replace(planned(*words), taken=known, tries_rates=True))

    def train(run):
        runs.append(run)
        found = -abs(math.log10(run.learning_rate / (0.1 if run.method == "SGD" else 0.9))) - run.weight_decay
        return {"validation": found, "test": found}

    runs = []
    found = compare(recorded(train), ["SAM"], trials=3, seeds=2, workers=1, opponent=False)
    plain, sam = found.rows
    assert {(r.learning_rate, r.weight_decay) for r in of(runs, method="SAM")} == {
        *((rate, 0.2) for rate in (0.1, 0.3, 0.9)),
        (0.1, 0.1),
    }
    assert {(r.learning_rate, r.weight_decay) for r in of(runs, method="SGD")} == {
        *((rate, 0.1) for rate in (0.1, 0.3, 0.9)),
        (0.9, 0.2),
    }
    assert (plain["learning_rate"], plain["weight_decay"], plain["tried"]) == (0.1, 0.1, 4)
    assert (sam["learning_rate"], sam["settings"], sam["tried"]) == (0.9, {"rho": 0.05}, 4)
    assert sam["validation"] == pytest.approx(-0.2)  # of here
    assert "a third or three times it" in " ".join(notes(found.results))
    assert "In another comparison, but for the learning rate." in markdown(report.page(found.results))
    plan = Plan(RunConfig(data="digits"), ("SAM",), taken=known, tries_rates=True)
    assert Plan.from_row(json.loads(json.dumps(plan.as_row()))) == plan


def test_more_seeds_and_candidates_as_asked(recorded):
    train = Recorder()
    compare(recorded(train), ["SAM"], trials=3, seeds=4, workers=1, opponent=False, first_seed=10)
    assert {r.seed for r in of(train.runs, scored_on="test")} == {10, 11, 12, 13}
    assert len({(r.learning_rate, r.weight_decay, r.config.rho) for r in of(train.runs, method="SAM")}) == 3


def test_a_decay_of_zero_has_a_small_one_beside_it():
    assert {"learning_rate": 0.1, "weight_decay": arms.DECAY} in around(
        {"learning_rate": 0.1, "weight_decay": 0.0}, 3.0
    )


ALL = ("F-GR", "B-GR", "Central", "DB", "SAM", "ASAM", "MSAM", "Split", "Flooding", "cheap", "ahead")


def test_names_of_methods_in_any_spelling_each_once():
    assert checked_methods(["fgr", "F-GR", "sam", "CHEAP", "SGD"], "ratio") == ("F-GR", "SAM", "cheap")
    for by in ("ratio", "gamma"):
        plan = Plan(RunConfig(), ALL, by=by)
        run.check(plan)  # each has a run


def test_a_field_of_an_arm_can_be_held():
    names = checked_methods(["fgr:epsilon=0.01", "F-GR:epsilon=1e-2", "ahead:period=1", "F-GR:gamma=0.1"], "ratio")
    assert names == ("F-GR:epsilon=0.01", "ahead:period=1", "F-GR:gamma=0.1")
    assert checked_methods(names, "ratio") == names
    plan = Plan(RunConfig(), names)
    run.check(plan)
    small, every, strong = plan.arms[1:4]
    assert (small.name, every.name) == ("F-GR, ε 0.01", "ahead, period 1")
    assert [set(point) for point in small.settings] == [{"ratio"}] * 3  # the same for either ε is asked once
    assert [set(point) for point in strong.settings] == [{"epsilon"}] * 2  # no ratio beside γ
    config = every.config(plan.base, {"ratio": 0.1, "epsilon": 0.5, "lookahead": 0.3}, 0)
    assert (config.period, config.fraction) == (1, 0.1)
    assert Plan.from_row(json.loads(json.dumps(plan.as_row()))) == plan


@pytest.mark.parametrize("word", ["F-GR:weight_decay=0.3", "SGD:weight_decay=0.3"])
def test_a_weight_decay_that_is_held_is_that_of_every_run(word, recorded):
    train = Recorder()
    found = compare(recorded(train), ["SAM", word], **QUICK)
    row = found.rows[2]
    runs = of(train.runs, method=row["method"], weight_decay=0.3)
    assert len({(r.learning_rate, r.config.ratio, r.config.epsilon) for r in runs}) == row["tried"] > 1
    assert row["weight_decay"] == 0.3
    assert len(of(runs, scored_on="test")) == 3


def test_a_search_asks_for_nothing_that_a_method_does_not_bear():
    """Split displaces a share γ/ε of the batch: a third of ε lies below γ for one of its starts."""
    base = RunConfig(data="digits", weight_decay=0.001)
    arm = arms.arm_of("Split", "ratio")
    search, asked = arm.search(base, arms.center_of(base), 40), []
    while points := search.ask():
        for point in points:
            arm.config(base, point, seed=0)  # raises where there can be no run
            search.tell(point, [-point["epsilon"]])  # the smallest ε is best: it goes where γ is in the way
        asked += points
    assert len(asked) == 40
    assert min(point["epsilon"] for point in asked) < 0.2
    held = arms.arm_of("Split:epsilon=0.3", "ratio")
    assert [point["gamma"] for point in held.search(base, arms.center_of(base), 40).ask()] == [0.1, 0.25]


def test_short_runs_search_and_long_ones_choose(recorded):
    """Short runs mislead here: they are best at the largest learning rate, long ones at 0.01."""

    def train(run):
        short = run.epochs < 20
        found = math.log10(run.learning_rate) if short else quality(run)
        return {"validation": found, "test": found}

    trained = Recorder()
    trained.__class__ = type("Both", (Recorder,), {"__call__": lambda self, run: self.runs.append(run) or train(run)})
    found = compare(recorded(trained, epochs=20), ["F-GR"], search_epochs=5, **{**QUICK, "trials": 9})
    lengths = Counter((r.epochs, r.scored_on) for r in trained.runs if r.method == "SGD")
    assert lengths.pop((5, "validation")) >= 2 * 9  # its search goes on while it finds better
    assert lengths == {(20, "validation"): 6, (20, "test"): 3, (10, "validation"): 18} | {
        (40, "validation"): 6 + 2,  # also at the learning rate that plain training came to
        (40, "test"): 3,
    }
    plain = [r for r in trained.runs if r.method == "SGD" and r.epochs == 20]
    tried = {r.learning_rate for r in plain if r.scored_on == "validation"}
    assert found.rows[0]["learning_rate"] == min(tried, key=lambda rate: abs(math.log10(rate) + 2))
    long = [quality(r) for r in plain if r.learning_rate == found.rows[0]["learning_rate"] and r.seed >= FIRST_SEED]
    assert found.rows[0]["validation"] == pytest.approx(sum(long) / len(long))  # the short ones are not among them
    assert any("for 5 epochs, the best 3 for all" in note for note in notes(found.results))


@pytest.mark.parametrize(
    ("difference", "metric", "expected"),
    [
        ((0.1, 0.05, 0.15), ACCURACY, stats.BETTER),
        ((-0.1, -0.15, -0.05), ACCURACY, stats.WORSE),
        ((-0.1, -0.15, -0.05), Metric("rmse", higher_is_better=False), stats.BETTER),
        ((0.1, -0.05, 0.15), Metric("rmse", higher_is_better=False), stats.UNDECIDED),
    ],
)
def test_a_verdict_is_oriented(difference, metric, expected):
    assert metric.verdict(stats.Interval(*difference)) == expected


def words_of(recorded, test):
    found = compare(recorded(lambda run: {"validation": 1.0, "test": test(run) + 1e-3 * run.seed}), ["SAM"], **QUICK)
    return found.verdict


def test_the_words_of_every_end(recorded):
    """Worse, undecided, and against the opponent."""
    assert "best on validation rows, is worse than tuned plain training" in words_of(
        recorded, lambda run: -(run.method == "SAM")
    )
    noise = words_of(recorded, lambda run: (run.seed * (2 + len(run.method))) % 3)
    assert noise.startswith(
        "No difference is shown between SAM (ρ 0.02), best on validation rows, and tuned plain training on"
    )
    longer = words_of(recorded, lambda run: run.config.epochs / 30)
    assert f"{LONGER} reaches" in longer
    assert "SAM is worse than that" in longer


def test_cheap_is_told_in_the_arguments_of_its_function():
    row = {"name": "cheap", "settings": {"gamma": 0.5, "epsilon": 2.0}, "learning_rate": 0.1, "weight_decay": 0.0}
    assert settings(row) == "ρ 2, share 0.25"
    assert chosen(row) == "lr 0.1, wd 0, ρ 2, share 0.25"
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    named = gradreg.cheap(model, optimizer, 10, rho=2, share=0.25)
    assert (named.gamma(10), named.epsilon(10)) == (0.5, 2.0)
    sixth = row | {"settings": {"gamma": 1000.0, "epsilon": 6000.0}}
    assert settings(sixth) == "ρ 6000, share 0.167"
    held = row | {"name": "cheap, γ 0.5", "settings": {"epsilon": 2.0}}
    assert settings(held) == "ε 2"


# What fails.


def test_runs_that_raise_are_kept_and_the_others_go_on(recorded):
    def train(run):
        if run.method == "SAM" and run.config.rho > 0.1:
            raise ZeroDivisionError("too far")
        return {"validation": quality(run), "test": quality(run)}

    found = compare(recorded(train), ["SAM"], **QUICK)
    row = found.rows[1]
    assert row["settings"]["rho"] <= 0.1
    assert row["failed"]
    assert row["failed"][0].startswith("ZeroDivisionError: too far (test_comparison.py, line")
    assert re.search(r"SAM: \d runs? failed, the last with ZeroDivisionError", " ".join(notes(found.results)))
    assert "failed" in str(found)


def test_where_everything_fails_it_is_said_at_once(recorded):
    train = Recorder()

    def broken(run):
        train.runs.append(run)
        raise ZeroDivisionError("no rows")

    with pytest.raises(BadInput, match="every run of SGD has failed, the last with ZeroDivisionError: no rows"):
        compare(recorded(broken), ["SAM"], **QUICK)
    assert len(train.runs) <= 2 * 12  # the first round on both seeds, and no other arm


def test_a_score_that_is_no_number_has_no_interval(recorded):
    def train(run):
        return {"validation": quality(run), "test": math.nan if run.method == "SAM" else 1.0 + run.seed}

    found = compare(recorded(train), ["SAM"], **QUICK)
    assert found.rows[1]["test"] is None
    assert "nothing can be said: SAM has test runs that failed or diverged" in found.verdict


# Folders.


def ended(folder):
    """What does not depend on time."""
    results = read_record(folder / "results.json")
    return [{k: v for k, v in row.items() if k not in ("seconds", "cost")} for row in results["arms"]]


@pytest.mark.parametrize("at", [1, 7, 19, 31])
def test_what_was_stopped_goes_on_and_comes_to_the_same(at, recorded, tmp_path, monkeypatch):
    whole = Recorder()
    compare(recorded(whole), ["F-GR"], folder=tmp_path / "whole", **QUICK)
    count = 0
    play = workers_module.run_all

    def stopping(jobs, workers):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        yield from play(jobs, workers)

    monkeypatch.setattr(workers_module, "run_all", stopping)
    train = Recorder()
    with pytest.raises(KeyboardInterrupt):
        compare(recorded(train), ["F-GR"], folder=tmp_path / "parts", **QUICK)
    compare(recorded(train), ["F-GR"], folder=tmp_path / "parts", **QUICK)
    assert ended(tmp_path / "parts") == ended(tmp_path / "whole")
    assert len(train.runs) == len(whole.runs)  # nothing twice


def test_another_plan_is_not_gone_on_with(recorded, tmp_path):
    loop = recorded(Recorder())
    compare(loop, ["F-GR"], folder=tmp_path / "a", **QUICK)
    with pytest.raises(BadInput, match="folder must be that of the same comparison, or a new one"):
        compare(loop, ["SAM"], folder=tmp_path / "a", **QUICK)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thing").write_text("mine")
    with pytest.raises(BadInput, match="must be a new or empty folder"):
        compare(loop, ["SAM"], folder=tmp_path / "b", **QUICK)


def test_a_record_that_was_changed_is_named(recorded, tmp_path):
    compare(recorded(Recorder()), ["F-GR"], folder=tmp_path / "a", **QUICK)
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"trials": 6', '"trials": 7'), encoding="utf-8")
    with pytest.raises(BadInput, match="was changed after it was written"):
        compare(recorded(Recorder()), ["F-GR"], folder=tmp_path / "a", **QUICK)


def test_results_that_were_changed_are_named_and_made_again(here, capsys):
    words = ["compare", "mine.py:train", "--trials", "1", "--seeds", "2", "--workers", "1"]
    assert cli.main([*words, "--out", "a"]) == 0
    place = here / "a" / "results.json"
    whole = place.read_text(encoding="utf-8")
    for changed in (whole.replace('"tried": 1', '"tried": 2'), whole[:40]):
        place.write_text(changed, encoding="utf-8")
        capsys.readouterr()
        assert cli.main(["compare", "mine.py:train", "--resume", "a", "--workers", "1"]) == 2
        error = capsys.readouterr().err
        assert "take it away, and it is made again" in error
        assert error.count("\n") == 1
    place.unlink()
    assert cli.main(["compare", "mine.py:train", "--resume", "a", "--workers", "1"]) == 0
    assert json.loads(place.read_text(encoding="utf-8"))["verdict"] == json.loads(whole)["verdict"]


def test_a_study_that_lost_its_runs_is_not_run_again_in_silence(recorded, tmp_path):
    compare(recorded(Recorder()), ["F-GR"], folder=tmp_path / "a", **QUICK)
    (tmp_path / "a" / "results.json").unlink()
    (tmp_path / "a" / "study.log").write_text("", encoding="utf-8")
    train = Recorder()
    with pytest.raises(BadInput, match=r"has lost \d+ of the \d+ finished runs in runs.jsonl"):
        compare(recorded(train), ["F-GR"], folder=tmp_path / "a", **QUICK)
    assert train.runs == []


# From Python.


def test_a_comparison_prints_saves_and_comes_back(recorded, tmp_path):
    found = compare(recorded(Recorder()), ["F-GR", "SAM"], **QUICK)
    text = str(found)
    assert repr(found) == text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(name in text for name in ("SGD", "F-GR", "SAM", "twice as long"))
    html = found._repr_html_()
    assert "<table" in html
    assert "<html" not in html
    page = found.save(tmp_path / "saved")
    assert "default-src 'none'" in page.read_text(encoding="utf-8")
    assert Comparison.load(tmp_path / "saved").rows == found.rows
    with pytest.raises(BadInput, match="new or empty folder"):
        found.save(tmp_path / "saved")
    with pytest.raises(BadInput, match="must be that of a finished comparison"):
        Comparison.load(tmp_path)


def test_the_best_is_a_method_to_copy(recorded):
    found = compare(recorded(Recorder()), ["F-GR", "SAM"], **QUICK)
    best = found.best()
    assert best.method == "F-GR"
    model, loss = nn.Linear(2, 1), []
    optimizer = torch.optim.SGD(model.parameters(), best.learning_rate, momentum=0.9)
    names = {"model": model, "optimizer": optimizer, "num_steps": 10}
    names["loss_fn"] = lambda: model(torch.ones(1, 2)).square().mean()
    exec(best.snippet(), names)
    assert names["regularizer"].gamma.target == best.settings["ratio"]
    assert found.best("sam").settings.keys() == {"rho"}
    with pytest.raises(BadInput, match="method must be one of 'SGD', 'F-GR', 'SAM'"):
        found.best("adam")
    del loss


def test_a_frame_has_a_row_for_each_arm(recorded):
    pytest.importorskip("pandas")
    frame = compare(recorded(Recorder()), ["F-GR"], **QUICK).to_frame()
    assert list(frame.index) == [BASELINE, "F-GR", LONGER]
    assert frame.loc["F-GR", "verdict"] == stats.BETTER
    assert frame.loc["F-GR", "difference"] == pytest.approx(0.5, abs=0.3)


BAD = [
    ({"methods": []}, "--methods must name at least one method besides SGD"),
    ({"methods": ["fgrr"]}, "Did you mean F-GR"),
    ({"trials": 0}, "trials must be a whole number from 1, got 0"),
    ({"seeds": 1}, "seeds must be a whole number from 2, got 1"),
    ({"by": "value"}, "by must be ratio or gamma, got 'value'"),
    ({"search_epochs": -1}, "search_epochs must be a whole number from 0, got -1"),
    ({"search_epochs": 30}, "--search-epochs must be from 1 to 29, less than the epochs of a run, got '30'"),
    ({"methods": ["F-GR:epsilon"]}, "must hold fields of a method, such as F-GR:epsilon=0.01, got 'epsilon'"),
    ({"methods": ["F-GR:model=cnn"]}, "must hold fields of a method, such as F-GR:epsilon=0.01, got 'model=cnn'"),
    ({"methods": ["F-GR:epsilon=0"]}, "epsilon must be a number above 0"),
    ({"methods": ["SAM:gamma=1"]}, "gamma must be left out with method SAM"),
    ({"budget": "soon"}, "--budget must be a time with its unit, such as 90s, 30m or 2h, got 'soon'"),
    ({"nonsense": 3}, "unknown field 'nonsense'"),
    ({"epochs": 0}, "epochs must be a whole number from 1"),
    ({"data": "digits"}, "data must be left out with a task of your own"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_compared_is_refused(changes, message, recorded, tmp_path):
    with pytest.raises(BadInput, match=re.escape(message)):
        compare(recorded(Recorder()), **{**QUICK, "methods": ["F-GR"], "folder": tmp_path / "new", **changes})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("given", ["nowhere.py", 5, "digitz"])
def test_what_is_no_task_is_refused(given):
    with pytest.raises(BadInput, match=r"TASK must be|task must be a Task, or a function of a run, got int"):
        compare(given)


# A budget.


def test_a_budget_decides_and_says_what_it_does_not_pay_for(monkeypatch):
    plan = Plan(RunConfig(data="digits", width=8, epochs=10), ("F-GR",))

    def run_(job):
        return type("R", (), {"seconds": 1.0 * job.config.epochs, "error": ""})()

    monkeypatch.setattr(run, "run", run_)
    plenty = run.afforded(plan, 10 * 86400, 2)
    assert plenty.effort == LADDER[0]
    assert "Not afforded" not in plenty.not_afforded[0]
    some = run.afforded(plan, 20 * 60, 2)
    assert some.effort in LADDER[1:]
    said = r"The budget of 20 min pays for \d+ candidates and \d+ seeds of each arm: about .* Not afforded:"
    assert re.match(said, some.not_afforded[0])
    faster = run.afforded(plan, 20 * 60, 8)
    assert faster.effort.runs > some.effort.runs
    with pytest.raises(BadInput, match=r"--budget must be at least .* for 3 arms of this task with 2 workers"):
        run.afforded(plan, 5, 2)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("30 min", 1800), ("2h", 7200), ("1.5 h", 5400)]
)
def test_times_as_they_are_typed(text, seconds):
    assert run.seconds_of(text) == seconds


def test_the_least_effort_is_the_last_of_the_ladder():
    runs = [effort.runs for effort in LADDER]
    assert runs == sorted(runs, reverse=True)
    assert all(effort.seeds >= 3 for effort in LADDER)
    assert Effort().runs == 12 * 2 + 3 * 2 + 5


# As a user types it.

FILE = """
import torch
from torch import nn
import torch.nn.functional as F
from gradreg.lab import Task

class Rows(torch.utils.data.Dataset):
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, k): return {"x": self.x[k], "y": self.y[k]}

def rmse(model, loader):
    return torch.cat([(model(b["x"]) - b["y"]).square() for b in loader]).mean().sqrt()

def task():
    x = torch.randn(90, 4)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(90, 1)
    parts = [Rows(x[a:b], y[a:b]) for a, b in ((0, 50), (50, 70), (70, 90))]
    return Task(model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)),
                train=parts[0], validation=parts[1], test=parts[2],
                loss=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]),
                score=rmse, higher_is_better=False, epochs=3, batch_size=10, learning_rate=0.05)

def train(run):
    return {"validation": run.learning_rate, "test": run.learning_rate + 1e-3 * run.seed}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(FILE), encoding="utf-8")
    return tmp_path


def test_the_command_compares_a_file_and_leaves_a_page(here, capsys):
    words = ["compare", "mine.py", "--methods", "F-GR", "SAM", "--trials", "2", "--seeds", "2", "--out", "a"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "tuned plain training on mine.py:task: rmse" in printed
    assert max(map(len, printed.splitlines())) <= WIDTH
    results = read_record(here / "a" / "results.json")
    lines = [json.loads(line) for line in (here / "a" / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == results["num_runs"] == sum(row["runs"] for row in results["arms"])
    assert {line["arm"] for line in lines} == {row["name"] for row in results["arms"]}
    assert all(row["cost"]["median"] > 0 for row in results["arms"])  # how much is for the machine to say
    assert (here / "a" / "report.html").is_file()
    assert cli.main(["compare", "mine.py", "--resume", "a"]) == 0  # it has ended: shown again
    assert cli.main([*results["command"].split()[1:], "--out", "b"]) == 0
    assert ended(here / "a") == ended(here / "b")


def test_a_script_without_a_guard_compares_with_processes(here):
    script = here / "script.py"
    ask = "print(compare(task(), ['SAM'], trials=2, seeds=2, workers=2).verdict)"
    script.write_text(f"{FILE}\nfrom gradreg.lab import compare\n{ask}\n", encoding="utf-8")
    own = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=own)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("tuned plain training on task") == 1


REFUSED = [
    ("compare", "TASK must be given: FILE.py, FILE.py:NAME, or a built-in task such as digits"),
    ("compare digits --methods", "--methods"),
    ("compare digits --methods fgrr", "--methods must be one of"),
    ("compare digits --trials 0", "--trials must be a whole number from 1 to 1000, got '0'"),
    ("compare digits --budget 30m --trials 3", "--budget must be left out with --trials, --seeds and"),
    ("compare digits --budget never", "--budget must be a time with its unit"),
    ("compare digits --resume nowhere", "--resume must be the folder of a comparison, got 'nowhere': No such file"),
    ("compare digits --resume x --out y", "--out must be left out with --resume"),
    ("compare digits --resume x --epochs 3", "--resume must stand alone but for TASK, --storage, --workers and --log"),
    ("compare digits --study x", "--study must be given with --storage"),
    ("compare digits --by value", "--by must be one of ratio, gamma"),
    ("compare digits --gamma 3", "Unknown option: --gamma"),
    (
        "compare mine.py:train --methods Flooding --model mlp --data digits",
        "data must be left out with a task of your own",
    ),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_words_are_refused_in_one_line(line, message, here, capsys):
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["mine.py"]


def test_a_file_that_has_changed_is_not_gone_on_with(here, capsys):
    assert cli.main(["compare", "mine.py:train", "--trials", "1", "--seeds", "2", "--workers", "1", "--out", "a"]) == 0
    (here / "a" / "results.json").unlink()
    with (here / "mine.py").open("a", encoding="utf-8") as file:
        file.write("# more\n")
    capsys.readouterr()
    assert cli.main(["compare", "mine.py:train", "--resume", "a"]) == 2
    assert "mine.py:train has changed" in capsys.readouterr().err


def test_others_join_by_a_database(here, capsys):
    pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{here}/shared.db"
    words = ["compare", "mine.py:train", "--storage", url, "--study", "s", "--workers", "1"]
    assert cli.main([*words, "--trials", "2", "--seeds", "2", "--out", "a"]) == 0
    assert cli.main([*words, "--out", "b"]) == 0  # joins what has ended: the same, nothing run again
    assert ended(here / "a") == ended(here / "b")
    assert cli.main([*words, "--trials", "3", "--out", "c"]) == 2
    assert "trials differs" in capsys.readouterr().err


def test_what_an_earlier_version_began_goes_on(tmp_path):
    """It knew fewer fields."""
    plan = Plan(RunConfig(data="digits"))
    row = json.loads(json.dumps(plan.as_row()))
    del row["base"]["shrink"], row["base"]["activation"]
    assert not {"search_epochs", "keeps_models"} & set(row)
    assert Plan.from_row(row) == plan
    place = Place("compare", tmp_path)
    with Study(place, row):
        pass
    run.open_study(place, plan)
    with pytest.raises(BadInput, match="base differs"):
        run.open_study(place, Plan(RunConfig(data="digits", activation="silu")))


def test_an_arm_that_an_earlier_version_searched_elsewhere_is_refused():
    """`cheap` was another mode."""
    schedule = ComparisonSchedule(Plan(RunConfig(data="digits"), ("cheap",)), ACCURACY)
    point = {"learning_rate": 0.1, "weight_decay": 0.0, "ratio": 0.1, "epsilon": 0.5, "lookahead": 0.03}
    what = {"arm": 1, "point": point, "seed": 0, "scored_on": "test"}
    with pytest.raises(BadInput, match="cheap of an earlier version, with lookahead, ratio, does not go on in this"):
        schedule.job(what)
    point = {"learning_rate": 0.1, "weight_decay": 0.0, "gamma": 0.1, "epsilon": 0.5}
    assert schedule.job({**what, "point": point}).config.ascent == "momentum"


def test_models_of_the_test_are_kept(here, capsys):
    words = ["compare", "mine.py", "--methods", "F-GR:epsilon=0.1", "--trials", "1", "--seeds", "2", "--keep-models"]
    assert cli.main([*words, "--out", "a"]) == 0
    files = {path.name for path in (here / "a" / "models").iterdir()}
    assert files == {
        f"{arm}-{seed}.safetensors" for arm in ("SGD", "F-GR-epsilon-0.1", "SGD-twice-as-long") for seed in (0, 1)
    }
    from safetensors.torch import load_file

    made = tasks.find(tasks.from_file("mine.py").reference)
    row = read_record(here / "a" / "results.json")["arms"][1]
    for seed, score in enumerate(row["scores"]):
        model = made.build(99)
        model.load_state_dict(load_file(here / "a" / "models" / f"F-GR-epsilon-0.1-{seed}.safetensors"))
        assert objective.evaluate(model, made.test, of=made.objective).score == pytest.approx(score)


def test_tensors_of_an_mlp_are_stacked(monkeypatch, tmp_path):
    """By value of γ; the same numbers as one by one."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()

    def make():
        return Task(
            model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            train=(x[:30], y[:30]),
            validation=(x[30:45], y[30:45]),
            test=(x[45:], y[45:]),
            epochs=2,
            batch_size=10,
        )

    stacked = []
    batched = workers_module.play
    monkeypatch.setattr(workers_module, "play", lambda jobs, n: stacked.extend(jobs) or batched(jobs, n))
    together = compare(make(), ["F-GR"], by="gamma", **QUICK)
    assert stacked
    monkeypatch.setattr(run, "is_worthwhile", lambda config: False)
    alone = compare(make(), ["F-GR"], by="gamma", **QUICK)
    for a, b in zip(together.rows, alone.rows):
        assert a["scores"] == pytest.approx(b["scores"])
        assert a["settings"] == b["settings"]
    assert F is not None
