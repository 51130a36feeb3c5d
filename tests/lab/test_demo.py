import json
import math
from copy import deepcopy
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from printed import tables_fit

from gradreg.lab import stats
from gradreg.lab.config import configure
from gradreg.lab.cost.steps import step_costs
from gradreg.lab.folder import BadInput, new_folder, write_json
from gradreg.lab.page import html, tell
from gradreg.studies import runs
from gradreg.studies.demo import run as demo
from gradreg.studies.demo.report import page, told
from gradreg.studies.demo.run import Plan, run_demo, sentence
from gradreg.studies.demo.tasks import TASKS
from gradreg.studies.demo.tune import GRIDS

TOY = Plan(tasks=tuple(replace(task, epochs=1, num_train=200) for task in list(TASKS.values())[:2]), seeds=(0, 1))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Results and folder of a demo at toy size."""
    torch.set_num_threads(1)  # before the fixture of every test, which comes after this one
    folder = tmp_path_factory.mktemp("demo")
    return run_demo(TOY, folder, workers=1), folder


def test_the_folder_holds_what_was_measured(toy):
    _, folder = toy
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "runs.jsonl",
        "results.json",
        "accuracy.svg",
        "gradient_norm.svg",
        "report.html",
    }
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert results["runs"] == lines
    assert len(lines) == len(TOY.tasks) * len(TOY.seeds) * len(GRIDS)
    assert {"torch", "gradreg", "python"} <= results["versions"].keys()


def test_the_table_can_be_read_whatever_it_says(toy, capsys):
    results, folder = toy
    wide = deepcopy(results)
    for row in wide["tasks"][0]["methods"]:
        row["accuracy"] |= {"low": 0.6, "high": 0.8}
        row["diverged"] = 2
        if row["name"] != "SGD":
            row["difference"] |= {"mean": -0.1, "low": -0.125, "high": 0.101}
            row["verdict"] = stats.UNDECIDED
    with tables_fit():
        tell(told(wide), wide, folder)
    printed = capsys.readouterr().out
    assert "−10.0 (−12.5 to +10.1)  none shown" in printed
    assert str(folder) in printed  # not broken, so that it can be copied


def test_the_table_is_the_mean_of_the_runs(toy):
    results, _ = toy
    for task in results["tasks"]:
        for row in task["methods"]:
            runs = [r for r in results["runs"] if (r["task"], r["method"]) == (task["name"], row["name"])]
            assert row["accuracy"]["mean"] == pytest.approx(sum(r["accuracy"] for r in runs) / len(runs))
            assert row["grad_norm"] == pytest.approx(sum(r["grad_norm"] for r in runs) / len(runs))


def test_the_figures_are_svg_and_the_page_loads_nothing(toy):
    _, folder = toy
    for name in ("accuracy.svg", "gradient_norm.svg"):
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    for loading in ("<script", "<link", "<img", "src=", "@import", 'href="http'):
        assert loading not in text


def test_a_hostile_name_stays_text(toy):
    hostile = "<script>alert('$x$')</script>"
    results = {**toy[0], "name": hostile, "tasks": [{**task, "name": hostile} for task in toy[0]["tasks"]]}
    text = html(page(results))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_run_that_diverged_is_counted(toy):
    results, _ = toy
    runs = [
        {**r, "diverged": True, "train_loss": float("nan"), "grad_norm": float("nan")} if r["method"] == "B-GR" else r
        for r in results["runs"]
    ]
    task = demo.summarize(TOY.tasks[0], runs, dict.fromkeys(GRIDS, 1.0))
    assert "2 diverged" in html(page({**results, "tasks": [task]}))


def test_a_folder_that_holds_something_is_left_alone(toy):
    _, folder = toy
    with pytest.raises(BadInput, match="new or empty folder"):
        new_folder(folder, "demo")


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_folder(None, "demo") != new_folder(None, "demo")


def test_a_number_that_is_not_finite_is_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": [float("nan"), 1.0]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"loss": [None, 1.0]}


def test_every_method_has_a_cost_relative_to_sgd():
    task = TOY.tasks[1]
    chosen = {name: {"learning_rate": 0.1, "weight_decay": 0.0, "settings": grid[0]} for name, grid in GRIDS.items()}
    costs = step_costs({n: configure(task, n, values, seed=0) for n, values in chosen.items()}, rounds=3)
    assert set(costs) == set(GRIDS)
    assert costs["SGD"].median == 1.0
    assert all(0 < cost.low <= cost.median <= cost.high < math.inf for cost in costs.values())


def row(name, mean, verdict):
    return {"name": name, "accuracy": {"mean": 0.5}, "difference": {"mean": mean}, "verdict": verdict}


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("no difference shown", "no difference shown"), "No method is shown to differ from SGD (50.0%)."),
        (("better", "worse"), "Better than SGD: A (+2.0); worse than SGD: B (−1.0) (points over 50.0%)."),
        (
            ("no difference shown", "worse"),
            "Worse than SGD: B (−1.0); no difference shown: A (points over 50.0%).",
        ),
    ],
)
def test_the_sentence_says_what_the_verdicts_say(verdicts, expected):
    rows = [row("SGD", 0, None), row("A", 0.02, verdicts[0]), row("B", -0.01, verdicts[1])]
    assert sentence(rows) == expected


def test_an_interrupted_demo_keeps_what_finished(tmp_path, monkeypatch):
    def run_all(jobs, workers):
        yield from real([jobs[0]], workers)
        raise KeyboardInterrupt

    real = runs.run_all
    monkeypatch.setattr(runs, "run_all", run_all)
    with pytest.raises(KeyboardInterrupt):
        run_demo(TOY, tmp_path, workers=1)
    assert len((tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert not (tmp_path / "results.json").exists()
