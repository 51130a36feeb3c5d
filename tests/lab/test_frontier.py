"""The study below two passes: its modes, their tuning, the times, what is said of them, the page and the command."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from printed import tables_fit

from gradreg.cli import main
from gradreg.lab.batched import obstacle
from gradreg.lab.commands import LAST_SEED
from gradreg.lab.page import markdown
from gradreg.lab.stats import Ratio
from gradreg.lab.tasks import trained
from gradreg.studies.frontier import cost, page, run, tune
from gradreg.studies.frontier.modes import FULL, MODES, PLAIN, TASKS, Candidate, job
from gradreg.studies.frontier.summary import GOALS, goals, panels, price, task_row, worst
from gradreg.studies.frontier.tune import (
    CANDIDATES,
    CANDIDATES_OF_FULL,
    FINAL_SEEDS,
    FINALISTS,
    SEEDS,
    SHIPPED,
    START,
    moved,
    search_of,
    shipped,
    starts,
)
from gradreg.studies.frontier.tune import candidate as candidate_at

AT = Candidate(0.1, 1e-3, {})
TASK = replace(TASKS["tiny noisy data"], epochs=2, width=8)


def candidate(mode):
    return replace(AT, settings=mode.start[0])


# Modes.


def test_every_mode_of_every_task_fits_a_stack():
    for task in TASKS.values():
        jobs = {name: job(task, mode, candidate(mode), 0, "test") for name, mode in MODES.items()}
        assert [obstacle(j.config) for j in jobs.values()] == [None] * len(jobs)
        assert len({(j.config, j.average, j.carries) for j in jobs.values()}) == len(jobs) - 1  # larger rate is a rate


def test_a_mode_says_what_it_changes():
    made = job(TASK, MODES["Ahead + Fraction(1/20)"], candidate(MODES["Ahead + Fraction(1/20)"]), 7, "validation")
    assert (made.config.fraction, made.config.lookahead, made.config.seed) == (0.05, 0.5, 7)
    assert made.scored_on == "validation"
    assert job(TASK, MODES["plain, twice as long"], AT, 0, "test").config.epochs == 2 * TASK.epochs
    averaged = MODES["plain, averaged"]
    assert job(TASK, averaged, candidate(averaged), 0, "test").average == 0.1


def test_a_split_batch_keeps_its_share_and_an_average_ends_at_all_steps():
    split = Candidate(0.1, 1e-3, {"gamma": 0.5, "epsilon": 1.0})
    assert moved(split, "epsilon", 2, MODES["Split, momentum"]).settings == {"gamma": 1.0, "epsilon": 2.0}
    assert (
        moved(replace(AT, settings={"average": 0.7}), "average", 2, MODES["plain, averaged"]).settings["average"] == 1
    )
    assert moved(split, "gamma", 2, FULL).settings == {"gamma": 1.0, "epsilon": 1.0}
    assert moved(split, "learning_rate", 0.5, FULL) == replace(split, learning_rate=0.05)


# Tuning.


def play(search, score):
    tried = []
    while asked := search.ask():
        for point in asked:
            search.tell(point, [score(candidate_at(point))] * SEEDS)
        tried += map(candidate_at, asked)
    return tried


@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.rate is None and name != PLAIN.name])
def test_every_mode_has_as_many_candidates_none_twice(name):
    search = search_of(MODES[name], starts(MODES[name], AT), CANDIDATES)
    tried = play(search, lambda c: -sum(math.log(v) ** 2 for v in c.values().values()))
    assert len(tried) == CANDIDATES
    assert len(set(tried)) == len(tried)


def test_the_climb_goes_on_from_the_best():
    search = search_of(PLAIN, START, 200)
    play(search, lambda c: -abs(math.log(c.learning_rate / 0.002)) - abs(math.log(c.weight_decay / 0.03)))
    assert search.best["learning_rate"] == pytest.approx(0.002, rel=0.2)
    assert search.best["weight_decay"] == pytest.approx(0.03, rel=0.2)


def test_a_rate_that_belongs_to_the_mode_is_not_tuned():
    mode = MODES["plain, larger rate"]
    tried = play(search_of(mode, starts(mode, AT), CANDIDATES), lambda c: -c.weight_decay)
    assert {c.learning_rate for c in tried} == {2 * AT.learning_rate}


def test_the_choice_is_the_best_of_the_finalists():
    search = search_of(PLAIN, START, 9)
    play(search, lambda c: c.learning_rate)
    first, second = search.finalists(2)
    search.tell(first, [0.0] * 4)
    search.tell(second, [1.0] * 4)
    assert first != search.choice() == second


def test_what_is_shipped_covers_every_task_and_mode_at_equal_cost():
    found = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert found["command"].startswith("gradreg frontier --tune")
    assert min(found["seeds"]) > LAST_SEED
    assert found["tasks"].keys() == TASKS.keys()
    for modes in found["tasks"].values():
        assert modes.keys() == MODES.keys()
        for name, chosen in modes.items():
            most = CANDIDATES_OF_FULL if name == FULL.name else CANDIDATES
            has_few = MODES[name].rate is not None  # one number to tune, with few points between its neighbors
            assert chosen["candidates"] == most or (has_few and chosen["candidates"] < most)
            assert chosen["runs"] == chosen["candidates"] * SEEDS + FINALISTS * FINAL_SEEDS
    for task, row in shipped().items():
        for name, chosen in row.items():
            assert obstacle(job(TASKS[task], MODES[name], chosen, 0, "test").config) is None


def test_a_tuning_plays_by_the_rule_and_keeps_every_run(monkeypatch, tmp_path):
    modes = {name: MODES[name] for name in (PLAIN.name, FULL.name)}
    monkeypatch.setattr(tune, "CANDIDATES", 13)
    monkeypatch.setattr(tune, "CANDIDATES_OF_FULL", 15)
    choice = tune.tune({"tiny": TASK}, modes, tmp_path, 1, lambda *_: None, seed=3)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    assert json.loads((tmp_path / "frontier.json").read_text(encoding="utf-8")) == choice
    assert len(lines) == (13 + 15) * SEEDS + 2 * FINALISTS * FINAL_SEEDS
    assert {line["scored_on"] for line in lines} == {"validation"}
    assert {line["seed"] for line in lines} == set(choice["seeds"])
    assert min(choice["seeds"]) > LAST_SEED


# Times.


def test_the_share_of_the_steps_is_that_of_the_schedule():
    modes = {
        name: MODES[name] for name in ("every 4th", "last quarter", "one in four", "large gradients", "full", "MSAM")
    }
    found = cost.shares(TASK, {name: candidate(mode) for name, mode in modes.items()}, modes)
    assert (found["every 4th"], found["last quarter"], found["one in four"], found["full"]) == (0.25, 0.25, 0.25, 1)
    assert 0 < found["large gradients"] < 1
    averaged = {"plain, averaged": MODES["plain, averaged"]}
    assert cost.shares(TASK, {name: candidate(mode) for name, mode in averaged.items()}, averaged) == {
        "plain, averaged": 0.1
    }


def test_steps_with_and_without_a_penalty_are_weighted():
    seconds = {("plain", 0): [1.0, 2.0], ("every 4th", 0): [3.0, 6.0], ("every 4th", 1): [1.0, 2.0]}
    found = cost.ratios(seconds, {"every 4th": 0.25, "plain": 0.0})
    assert found["every 4th"].median == pytest.approx(1.5)
    assert found["plain"] == Ratio(1.0, 1.0, 1.0)


def test_the_steps_that_are_timed_do_what_the_mode_does():
    """Counted, not timed: forward passes of the real engine, in a step with and one without."""
    task = trained(TASK)
    passes = {"full": [2], "every 4th": [2, 1], "large gradients": [2, 1], "MSAM": [1], "plain, averaged": [1, 1]}
    for name, expected in passes.items():
        variants = cost.variants(job(TASK, MODES[name], candidate(MODES[name]), 0, "test"))
        found = []
        for variant in variants:
            step = cost.engine_step(variant, task)
            step(), step()  # from the third step on a test has a past to compare with
            with pytest.MonkeyPatch.context() as patch:
                calls = []
                loss = cost.objective.loss
                patch.setattr(cost.objective, "loss", lambda *a, loss=loss, calls=calls: calls.append(1) or loss(*a))
                step()
            found.append(len(calls))
        assert found == expected, name


# What is said.


def runs_of(accuracies, **more):
    row = {"grad_norm": 0.5, "diverged": False, **more}
    return [{**row, "accuracy": a} for a in accuracies]


@pytest.fixture
def task():
    """Full gains 10 points; MSAM keeps all of it, every 4th half; SAM diverged once."""
    plain = [0.70, 0.71, 0.69, 0.70]
    runs = {
        "plain": runs_of(plain),
        "full": runs_of([a + 0.1 for a in plain]),
        "SAM": [*runs_of([0.8, 0.8, 0.8]), *runs_of([0.1], diverged=True)],
        "every 4th": runs_of([a + 0.05 for a in plain]),
        "MSAM": runs_of([a + 0.101 for a in plain], hessian_trace=4.0),
        "full, half as long": runs_of(plain),
    }
    costs = {"larger": {name: Ratio(1.0, 1.0, 1.0) for name in runs}, "batched": {}, "engine": {}}
    costs["larger"]["full"] = costs["larger"]["full, half as long"] = Ratio(2.0, 1.9, 2.1)
    costs["larger"]["every 4th"] = Ratio(1.25, 1.2, 1.3)
    return task_row("t", "about", runs, costs, {name: candidate(MODES[name]) for name in runs})


def test_a_row_holds_retention_cost_and_where_it_ends(task):
    rows = {row["name"]: row for row in task["modes"]}
    assert task["gain"]["mean"] == pytest.approx(10)
    assert rows["MSAM"]["retention"]["mean"] == pytest.approx(1.01)
    assert rows["every 4th"]["retention"]["mean"] == pytest.approx(0.5)
    assert rows["MSAM"]["hessian_trace"] == 4.0
    assert rows["SAM"]["diverged"] == 1
    assert rows["SAM"]["accuracy"]["mean"] == pytest.approx((3 * 80 + 10) / 4)  # a diverged run guesses
    assert price(rows["full, half as long"]) == pytest.approx(1.0)  # twice as dear a step, half as many
    assert "difference" not in rows["plain"]


def test_goals_are_judged_by_price_and_interval_on_every_task(task):
    found = goals([task])
    assert [goal["reached"] for goal in found] == [["MSAM"], ["MSAM"], ["MSAM"]]
    half = json.loads(json.dumps(task).replace('"MSAM"', '"x"'))
    msam = next(row for row in half["modes"] if row["name"] == "x")
    msam["name"], msam["retention"] = "MSAM", {"mean": 0.95, "low": 0.85, "high": 1.05}
    found = goals([task, half])
    assert [goal["reached"] for goal in found] == [[], ["MSAM"], []]
    assert [goal["nearly"] for goal in found] == [["MSAM"], [], []]
    assert worst([task, half], "MSAM")["mean"] == 0.95
    assert len(GOALS) == 3


def test_without_a_gain_there_is_no_retention_and_no_picture(task):
    flat = task_row(
        "flat",
        "about",
        {"plain": runs_of([0.7, 0.71]), "full": runs_of([0.7, 0.7]), "MSAM": runs_of([0.8, 0.8])},
        {"larger": {name: Ratio(1.0, 1.0, 1.0) for name in ("plain", "full", "MSAM")}},
        {name: candidate(MODES[name]) for name in ("plain", "full", "MSAM")},
    )
    assert [row["retention"] for row in flat["modes"]] == [None] * 3
    assert panels([flat]) == []
    assert goals([flat])[0]["reached"] == []
    assert len(panels([task])) == 1


def test_the_page_has_every_number_its_figures_and_no_markup_from_outside(task):
    hostile = "<script>alert(1)</script> | `x`\n# h"
    bound = {"mean": 0.5, "low": 0.4, "high": 0.6}
    points = [{"step": 3, "rows": [{"mode": hostile, "reference": "exact", "cosine": bound, "ratio": bound}]}]
    results = {
        "command": "gradreg frontier",
        "date": hostile,
        "machine": hostile,
        "seconds": 60.0,
        "is_quick": True,
        "versions": {"torch": "2", "gradreg": "0"},
        "seeds": [0, 1, 2, 3],
        "tasks": [task],
        "real": [],
        "goals": goals([task]),
        "mechanism": {"t": points},
    }
    made = page.page(results)
    for figure in made.figures:
        assert ElementTree.fromstring(figure.svg).tag.endswith("svg")
        assert "every 4th" in figure.svg
    text = markdown(made)
    assert "| MSAM | 1.00 | 1.01" in text
    assert "(figures/pareto.svg)" in text
    assert "beyond noise" in text
    assert "0.50 ± 0.10" in text
    assert "above the full method, by its interval on each judged task. Reached by: MSAM." in text
    assert "<script" not in text
    assert "\n# h" not in text


@pytest.fixture
def results(task):
    return {
        "name": "f",
        "command": "gradreg frontier",
        "date": "2026-01-01",
        "machine": "",
        "seconds": 60.0,
        "seconds_of": {"runs": 60.0},
        "is_quick": False,
        "versions": {"torch": "2", "gradreg": "0"},
        "seeds": [0, 1, 2, 3],
        "tasks": [task],
        "mechanism": {},
    }


def real_task(**kept):
    rows = [(PLAIN.name, 1.0, None), (FULL.name, 2.0, None), *((name, *row) for name, row in kept.items())]
    modes = [
        {
            "name": name,
            "is_opponent": False,
            "cost": {"larger": {"median": price_, "low": price_, "high": price_}},
            "retention": None if mean is None else {"mean": mean, "low": mean - 0.2, "high": mean + 0.2},
        }
        for name, price_, mean in rows
    ]
    return {"name": "clothes", "verdict": "better", "gain": {"mean": 1.2, "low": 0.5, "high": 1.9}, "modes": modes}


def test_real_tasks_judge_what_was_played_on_all(results, tmp_path):
    real = [real_task(**{"every 4th": (1.27, 0.4), "Split, momentum": (1.36, 1.0)})]
    text = markdown(page.page(run.show(results, tmp_path, None, real)))
    assert "**clothes**: full − plain +1.2 ± 0.7 points" in text
    assert "worst of 2 tasks, best of those at no more than 1.5× on any: every 4th 0.40" in text
    assert "| every 4th | 1.25 | 0.40 \\[0.20, 0.60\\] at 1.27 | 0.50 \\[0.50, 0.50\\] |" in text
    assert "| MSAM | 1.00 |  | 1.01 " in text  # not judged, and below what is, but shown
    assert text.index("| every 4th") < text.index("| MSAM")
    assert "1.10×, above 0.9 of the gain, by its interval on each judged task. Reached by: none.\n" in text
    assert page.SMALL not in text
    alone = markdown(page.page(run.show(results, tmp_path, None, [])))
    assert page.SMALL in alone
    assert "1.10×, above 0.9 of the gain, by its interval on each judged task. Reached by: MSAM.\n" in alone


def test_a_mode_that_fails_on_real_images_is_named_on_top(results, tmp_path):
    real = [real_task(MSAM=(1.0, 0.1), SAM=(2.0, -0.1), **{"every 4th": (1.27, 0.4)})]
    text = markdown(page.page(run.show(results, tmp_path, None, real)))
    first, *_ = text[text.index("\n- ") :].strip().splitlines()
    said = "- **Fails on real images**, where nothing of the gain is shown to be kept: "
    assert first == said + "MSAM (0.10 \\[−0.10, 0.30\\] on clothes)."
    assert "Made by `gradreg frontier --images FOLDER` on" in text
    alone = markdown(page.page(run.show(results, tmp_path, None, [])))
    assert "Fails on real" not in alone
    assert "Made by `gradreg frontier` on" in alone


def test_the_page_of_an_earlier_call_is_made_anew(results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert main(["frontier", "--from", "f", "--write", "frontier.md"]) == 0
    assert "MSAM" in capsys.readouterr().out
    assert (tmp_path / "frontier.md").read_text(encoding="utf-8") == (folder / "frontier.md").read_text(
        encoding="utf-8"
    )


# The command.


@pytest.fixture
def tiny(monkeypatch):
    """One task of two epochs, five modes, few rounds."""
    kept = ("plain", "full", "every 4th", "every 4th, carried", "MSAM", "plain, averaged")
    monkeypatch.setattr(run, "QUICK_TASKS", ("tiny noisy data",))
    monkeypatch.setitem(TASKS, "tiny noisy data", TASK)
    monkeypatch.setattr(run, "MODES", {name: MODES[name] for name in kept})
    monkeypatch.setattr(run.Plan, "rounds", 2)
    monkeypatch.setattr(run.Plan, "rounds_larger", 1)
    monkeypatch.setattr(cost, "LARGER", replace(cost.LARGER, batch_size=4, num_train=8, depth=1, width=16))
    monkeypatch.setattr("gradreg.studies.frontier.mechanism.SHARES", (0.5, 1.0))
    choices = {"tiny noisy data": {name: candidate(mode) for name, mode in MODES.items()}}
    monkeypatch.setattr(run, "shipped", lambda: choices)


def test_the_command_writes_its_folder_and_page(tiny, tmp_path, capsys):
    target = tmp_path / "docs" / "frontier.md"
    target.parent.mkdir()
    arguments = ["frontier", "--quick", "--seeds", "2", "--workers", "1", "--write", str(target)]
    with tables_fit():
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "out" / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert results["command"] == "gradreg frontier --quick --seed 0 --seeds 2"
    (found,) = results["tasks"]
    assert len(lines) == 2 * len(found["modes"]) == 12
    by_name = {row["name"]: row for row in found["modes"]}
    assert by_name["MSAM"]["cost"].keys() == {"larger", "batched", "engine"}
    assert by_name["every 4th, carried"]["cost"].keys() == {"batched"}
    assert by_name["plain"]["hessian_trace"] is not None
    assert {row["mode"] for row in results["mechanism"]["tiny noisy data"][0]["rows"]} >= {"F-GR", "MSAM, ahead"}

    text = target.read_text(encoding="utf-8")
    assert text == (tmp_path / "out" / "frontier.md").read_text(encoding="utf-8")
    assert "Made by `gradreg frontier`: edit the command" in text
    assert (tmp_path / "out" / "report.html").exists()
    printed = capsys.readouterr()
    assert "every 4th, carried" in printed.out
    assert printed.err == ""  # no progress in a pipe
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2  # never over a result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 1", "--seeds must be a whole number from 2"),
        ("--seed 999999", "--seed must be a whole number from 0 to 999984 with 16 seeds"),
        ("--tune --quick", "--quick must be left out with --tune"),
        ("--tune --seeds 3", "--seeds must be left out with --tune"),
        ("--replace", "--replace must be left out without --tune"),
        ("--write page.html", "--write must be the path of a page that ends in .md"),
        ("--write mine.md", "or one that gradreg frontier made"),
        ("--tune --images a", "--images must be left out with --tune"),
        ("--from a", "--out must be left out with --from"),
        ("--from a --seeds 3", "--seeds must be left out with --from"),
        (
            "--images a",
            "--images must be a folder of gradreg images with its results, or its record, got 'a': No such file",
        ),
        (
            "--images bare",
            "--images must hold a piece with all modes (resnet-14-modes, resnet-14-few-noisy, resnet-14-few-smooth, "
            "vit-28-modes) in which",
        ),
        ("--images bare/results.json", "--images must hold a piece with all modes"),
        ("--images other", "--images must be a folder of gradreg images with its results, or its record, got 'other'"),
    ],
)
def test_bad_input_gets_one_line_and_no_folder(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.md").write_text("a page of mine\n")
    for name, held in (
        ("other", '{"command": "gradreg claims"}'),
        ("bare", '{"command": "gradreg images", "pieces": []}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(held)
    assert main(["frontier", *arguments.split(), "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
