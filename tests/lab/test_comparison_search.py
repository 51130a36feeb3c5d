"""The search of a comparison: who is tuned first, how long, on what, and where each is tried again."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from comparing import QUICK, Recorder, of, quality

from gradreg.lab import compare, stats
from gradreg.lab.comparison import api, arms, report, run
from gradreg.lab.comparison.arms import BASELINE, LONGER, around
from gradreg.lab.comparison.plan import FIRST_SEED, Plan, Taken, checked_methods
from gradreg.lab.comparison.result import notes
from gradreg.lab.config import RunConfig
from gradreg.lab.page import markdown


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
