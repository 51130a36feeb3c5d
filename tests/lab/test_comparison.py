"""Comparisons: what is said; what survives; as a user types it."""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparing import QUICK, Recorder, quality
from torch import nn

import gradreg
from gradreg import cli
from gradreg.lab import BadInput, Comparison, Task, compare, objective, stats, tasks
from gradreg.lab.attach import attach
from gradreg.lab.comparison import run
from gradreg.lab.comparison.arms import BASELINE, LONGER, arm_of
from gradreg.lab.comparison.plan import LADDER, Effort, Plan
from gradreg.lab.comparison.result import chosen, notes, settings
from gradreg.lab.comparison.schedule import ComparisonSchedule
from gradreg.lab.config import RunConfig
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.records import read_record
from gradreg.lab.study import workers as workers_module
from gradreg.lab.study.storage import Place
from gradreg.lab.study.study import Study
from gradreg.lab.tables import WIDTH


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


def test_cheap_is_the_function_of_that_name():
    point = {"learning_rate": 0.1, "weight_decay": 0.0, "ratio": 0.3, "epsilon": 0.2}
    base = replace(RunConfig(data="digits"), warmup=0.0)
    arm = arm_of("cheap", "ratio")
    assert set(point) == {"learning_rate", "weight_decay", *arm.settings[0]}
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    played = attach(model, 100, arm.config(base, point, 0), optimizer)
    named = gradreg.cheap(model, gradreg.TargetRatio(0.3, ramp=0), 0.2)
    assert repr(played.regularizer) == repr(named)
    row = {"name": "cheap", "settings": {"ratio": 0.3, "epsilon": 0.2}, "learning_rate": 0.1, "weight_decay": 0.0}
    assert (settings(row), chosen(row)) == ("ratio 0.3, ε 0.2", "lr 0.1, wd 0, ratio 0.3, ε 0.2")


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


def test_what_a_later_version_asks_besides_is_played_and_told(recorded, tmp_path, monkeypatch):
    """The same plan, of which an earlier version had ended without the last of its runs."""

    def train(run):
        held = run.weight_decay == 0.5
        found = 1.0 * held - (run.weight_decay not in (0.0, 0.5)) - run.learning_rate
        return {"validation": found + 2 * (run.method == "F-GR"), "test": found}

    words = {**QUICK, "folder": tmp_path / "a", "opponent": False}
    with monkeypatch.context() as earlier:
        earlier.setattr(ComparisonSchedule, "_again", lambda self, found, results: found)
        first = compare(recorded(train), ["F-GR:weight_decay=0.5"], **words)
    again = compare(recorded(train), ["F-GR:weight_decay=0.5"], **words)
    assert [found.rows[0]["weight_decay"] for found in (first, again)] == [0.0, 0.5]
    results = read_record(tmp_path / "a" / "results.json")
    assert results["num_runs"] == len((tmp_path / "a" / "runs.jsonl").read_text(encoding="utf-8").splitlines())
    assert results["arms"][0]["weight_decay"] == 0.5
    written = (tmp_path / "a" / "results.json").stat().st_mtime_ns
    compare(recorded(train), ["F-GR:weight_decay=0.5"], **words)
    assert (tmp_path / "a" / "results.json").stat().st_mtime_ns == written


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
    point = {"learning_rate": 0.1, "weight_decay": 0.0, "gamma": 0.1, "epsilon": 0.5}
    what = {"arm": 1, "point": point, "seed": 0, "scored_on": "test"}
    with pytest.raises(BadInput, match="cheap of an earlier version, with gamma, does not go on in this one"):
        schedule.job(what)
    point = {"learning_rate": 0.1, "weight_decay": 0.0, "ratio": 0.1, "epsilon": 0.5}
    assert schedule.job({**what, "point": point}).config.period == 4


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
