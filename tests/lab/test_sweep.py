"""`gradreg sweep`: what a configuration may say, how the best is chosen, whole sweeps that are killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from printed import tables_fit

from gradreg.cli import main
from gradreg.lab import stats
from gradreg.lab.config import FIELDS, from_mapping
from gradreg.lab.folder import BadInput
from gradreg.lab.runs import Result
from gradreg.lab.search import Range, propose
from gradreg.lab.study import workers
from gradreg.lab.study.storage import Place
from gradreg.lab.study.study import Study
from gradreg.lab.study.workers import Worker, work
from gradreg.lab.sweep.folder import conclude, find
from gradreg.lab.sweep.plan import best_points, from_plan, read_sweep, summarize
from gradreg.lab.sweep.schedule import SweepSchedule, schedule_of

BASE = {"data": "digits", "model": "mlp", "width": 8, "num_train": 100, "batch_size": 50, "epochs": 40}
GRID = [
    {"method": "SGD", "learning_rate": [0.1, "2e-1"]},
    {"method": "f-gr", "gamma": [0.1, 0.5], "epsilon": 0.1},
]
TOY = {"base": BASE, "grid": GRID, "seeds": 2}
SEARCH = {
    "base": BASE,
    "search": [
        {"method": "SGD"},
        {"method": "F-GR", "gamma": {"low": 1e-3, "high": 1, "scale": "log"}, "epsilon": [0.1, 0.5]},
    ],
    "trials": 3,
    "seeds": 2,
}
NUM_RUNS = (4 + 2) * 2
CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder, content):
    path = folder / "sweep.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def identity(row):
    return json.dumps([row["scored_on"], *(row[name] for name in FIELDS)])


def measured(folder):
    return {identity(row): (row["accuracy"], row["train_loss"], row["grad_norm"]) for row in lines(folder)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("done") / "sweep"
    assert main(["sweep", str(write(folder.parent, TOY)), "--out", str(folder), "--workers", "1", "--single"]) == 0
    return folder


def test_the_points_are_the_product_of_the_lists():
    sweep = from_plan(TOY)
    assert sweep.grid == [
        {"method": "SGD", "learning_rate": 0.1},
        {"method": "SGD", "learning_rate": 0.2},
        {"method": "F-GR", "gamma": 0.1, "epsilon": 0.1},
        {"method": "F-GR", "gamma": 0.5, "epsilon": 0.1},
    ]
    assert sweep.num_runs == NUM_RUNS
    assert from_plan(sweep.plan()) == sweep


def test_a_point_that_is_named_twice_is_run_once():
    assert len(from_plan({**TOY, "grid": [*GRID, GRID[0]]}).grid) == 4


def test_fields_and_methods_are_understood_as_people_write_them(tmp_path):
    short = {
        "base": {**BASE, "wd": 1e-3, "Epochs": 3},
        "grid": [{"Method": "sgd", "lr": [0.1, 0.2]}, {"method": "f_gr", "gamma": 1, "epsilon": 1}],
    }
    del short["base"]["epochs"]
    sweep = read_sweep(write(tmp_path, short), {"epochs": 2})
    assert (sweep.base.weight_decay, sweep.base.epochs) == (1e-3, 2)
    varied = {block.method: set(block.axes) for block in sweep.blocks}
    assert varied == {"SGD": {"learning_rate"}, "F-GR": {"gamma", "epsilon"}}


@pytest.mark.parametrize("name", ["paper-wrn-cifar10", "mnist1d-small"])
def test_the_configurations_that_we_ship_can_be_read(name):
    sweep = read_sweep(CONFIGS / f"{name}.yaml", {})
    assert sweep.trials is None
    if name.startswith("paper"):
        assert (len(sweep.grid), len(sweep.seeds)) == (1 + 4 * 6 + 4 * 6 + 4, 5)
        job = sweep.job(sweep.grid[-1], 0, "test").config
        assert (job.model, job.batch_size, job.weight_decay, job.augment) == ("wideresnet", 128, 1e-4, True)


def without(key):
    return {name: value for name, value in TOY.items() if name != key}


def blocks(*entries):
    return {**TOY, "grid": [{"method": "SGD"}, *entries]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**TOY, "gird": []}, r"unknown key 'gird'.* Did you mean grid\?"),
        ("# nothing", "CONFIG must be a mapping .*, which is empty"),
        (BASE, "CONFIG must be the configuration of a sweep, got .*, that of a run: gradreg train --config"),
        ({**TOY, "base": {**BASE, "lr": 1, "learning-rate": 1}}, "base must have one of 'learning-rate' and 'lr'"),
        (blocks({"method": "SGD", "lr": 1, "learning_rate": 1}), "block 2 must have one of 'learning_rate' and 'lr'"),
        (blocks({"method": "DB", "gama": 1}), r"grid block 2 has the unknown field 'gama'.* Did you mean gamma\?"),
        ({**TOY, "base": {**BASE, "colour": 1}}, "unknown field 'colour'"),
        (
            {**TOY, "base": {**BASE, "epochs": [1, 2]}},
            r"epochs must be a whole number .*, got '\[1, 2\]'",
        ),
        ({**TOY, "base": {**BASE, "gamma": 0.1}}, "base must leave gamma to the blocks"),
        ({**TOY, "base": [1]}, "base must be a mapping"),
        ({**TOY, "grid": []}, "grid must be a list of blocks"),
        ({**TOY, "grid": "SGD"}, "grid must be a list of blocks"),
        (without("grid"), "one of grid and search"),
        ({**TOY, "search": GRID}, "one of grid and search"),
        ({**TOY, "trials": 3}, "trials must be left out without search"),
        ({**TOY, "grid": [GRID[1]]}, "a block with method SGD"),
        (blocks({"gamma": 0.1}), "grid block 2 must be a mapping with a method"),
        (blocks({"method": "magic"}), "grid block 2: method must be one of SGD"),
        (blocks({"method": ["DB"]}), "grid block 2: method must be one of .* got a list"),
        (blocks({"method": "DB", "gamma": []}), "grid block 2: gamma .* empty list"),
        (blocks({"method": "DB", "gamma": [None]}), "grid block 2: gamma .* empty"),
        (blocks({"method": "DB", "gamma": [[0.1]]}), "grid block 2: gamma must be a number"),
        (blocks({"method": "DB", "gamma": -1}), "grid block 2: gamma must be a number from 0"),
        (blocks({"method": "DB", "gamma": {"low": 0, "high": 1}}), "ranges belong in search"),
        (blocks({"method": "DB", "gamma": 0.1, "rho": 0.1}), "grid block 2: rho must be left out with method DB"),
        (blocks({"method": "DB"}), "grid block 2: gamma must be given with method DB"),
        (blocks({"method": "DB", "gamma": 0.1, "depth": [1, 2]}), "'depth' cannot be varied"),
        ({**TOY, "seeds": 1}, "seeds must be a whole number from 2 to 100, got '1'"),
        ({**TOY, "seeds": [1, 2]}, "seeds must be a whole number"),
        ({**TOY, "base": {**BASE, "batch_size": 101}}, "num_train must be a whole number from 101"),
        ({**TOY, "base": {**BASE, "num_train": 10**6}}, "num_train must be a whole number"),
        ("base: [", "CONFIG must be YAML"),
        ("- 1", "CONFIG must be a mapping"),
        ("base: !!python/object/apply:os.getcwd []", "CONFIG must be YAML"),
        ({**SEARCH, "trials": 0}, "trials must be a whole number"),
        ({**SEARCH, "search": [*SEARCH["search"], {"method": "DB", "gamma": {"low": 1}}]}, "low and high"),
        (
            {**SEARCH, "search": [{"method": "SGD", "learning_rate": {"low": 0.2, "high": 0.1}}]},
            "low below high, got 0.2 and 0.1",
        ),
        (
            {**SEARCH, "search": [{"method": "SGD", "weight_decay": {"low": 0, "high": 0.1, "scale": "log"}}]},
            "low above 0",
        ),
        ({**SEARCH, "search": [{"method": "SGD", "ascent": {"low": 0, "high": 1}}]}, "it has no range"),
    ],
)
def test_bad_input_gets_one_line_and_no_folder(content, message, tmp_path, capsys):
    import re

    assert main(["sweep", str(write(tmp_path, content)), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "CONFIG must be given"),
        (["missing.yaml"], "CONFIG must be a YAML file that can be read"),
        (["{config}", "--search", "3"], "--search must be left out"),
        (["{config}", "--study", "a"], "--study must be given with --storage"),
        (["{config}", "--storage", "nonsense"], "--storage must be a URL"),
        (["{config}", "--resume", "a", "--out", "b"], "--out must be left out with --resume"),
        (["--resume", "."], "--resume must be the folder of a sweep"),
        (["--resume", "missing"], "--resume must be the folder of a sweep"),
        (["--resume", ".", "--seeds", "3"], "--seeds must be left out without CONFIG"),
        (["{config}", "--seeds", "1"], "--seeds must be a whole number from 2"),
        (["{config}", "--device", "toaster"], "device must be one of"),
        (["--storage", "sqlite:///{folder}/no.db", "--study", "no"], "--study must be the name of a sweep"),
    ],
)
def test_options_that_do_not_go_together_get_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path, TOY)
    tokens = [option.format(config=config, folder=tmp_path) for option in options]
    assert main(["sweep", *tokens]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_batches_are_refused_where_a_run_cannot_be_a_slice(tmp_path, capsys):
    config = write(tmp_path, {**TOY, "base": {**BASE, "model": "cnn"}})
    assert main(["sweep", str(config), "--batched", "--out", str(tmp_path / "out")]) == 2
    assert "--batched must be left out" in capsys.readouterr().err


def result(accuracy, diverged=False):
    return Result(accuracy, 0.1, 0.1, [], diverged, 1.0)


def test_the_first_among_equals_is_the_best_and_methods_do_not_compete():
    points = [{"method": "SGD", "k": 0}, {"method": "SGD", "k": 1}, {"method": "DB", "k": 2}, {"method": "SGD", "k": 3}]
    assert best_points(points, [[0.5, 0.7], [0.7, 0.5], [0.1, 0.1], [0.6, 0.5]]) == {"SGD": 0, "DB": 2}


def test_the_summary_is_that_of_the_runs():
    points = [{"method": "SGD"}, {"method": "DB", "gamma": 0.1}, {"method": "DB", "gamma": 0.2}]
    nan = float("nan")
    validation = [
        [result(0.5), result(0.6)],
        [result(0.4), result(0.5)],
        [result(1.0), result(nan, diverged=True)],  # counts as 0
    ]
    test = {"SGD": [result(0.5), result(0.7)], "DB": [result(0.6), result(0.9)]}
    summary = summarize(points, validation, test)
    assert summary["best"]["DB"] == summary["points"][2] | {"gamma": 0.2}
    assert [point["diverged"] for point in summary["points"]] == [0, 0, 1]
    assert summary["points"][2]["validation_accuracy"]["mean"] == pytest.approx(0.5)
    difference = summary["test"]["DB"]["difference"]
    assert difference["mean"] == pytest.approx(0.15)
    assert difference["low"] == pytest.approx(stats.paired_difference([0.6, 0.9], [0.5, 0.7]).low)
    assert summary["test"]["DB"]["verdict"] == stats.UNDECIDED
    assert "difference" not in summary["test"]["SGD"]


@pytest.mark.parametrize(
    ("num_scored", "expected"), [(None, stats.BETTER), (1000, stats.BETTER), (50, stats.UNDECIDED)]
)
def test_a_difference_within_a_row_is_none(num_scored, expected):
    def runs(*accuracies):
        return [Result(a, 0.1, 0.1, [], False, 1.0, num_scored=num_scored) for a in accuracies]

    points = [{"method": "SGD"}, {"method": "DB", "gamma": 0.1}]
    test = {"SGD": runs(0.5, 0.6, 0.7), "DB": runs(0.52, 0.62, 0.7201)}  # 0.0199 at the least
    assert summarize(points, [test["SGD"], test["DB"]], test)["test"]["DB"]["verdict"] == expected


def test_the_folder_holds_every_run_once_and_the_results(done):
    rows = lines(done)
    assert Counter(map(identity, rows)).most_common(1)[0][1] == 1
    assert Counter(row["scored_on"] for row in rows) == {"validation": 8, "test": 4}
    results = json.loads((done / "results.json").read_text(encoding="utf-8"))
    assert results["axes"]["gamma"] == [0.1, 0.5]
    assert results["costs"]["SGD"] == 1.0
    assert from_mapping(results["base"]).width == 8
    for point in results["points"]:
        own = {name: value for name, value in point.items() if name in FIELDS}
        accuracies = [
            row["accuracy"] for row in rows if row["scored_on"] == "validation" and own.items() <= row.items()
        ]
        assert point["validation_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
        assert point["num_seeds"] == len(accuracies) == 2
    for method, point in results["best"].items():
        others = [p["validation_accuracy"]["mean"] for p in results["points"] if p["method"] == method]
        assert point["validation_accuracy"]["mean"] == max(others)
        tested = [row for row in rows if (row["scored_on"], row["method"]) == ("test", method)]
        own = {name: value for name, value in point.items() if name in FIELDS}
        assert all(own.items() <= row.items() for row in tested)
        assert results["test"][method]["accuracy"]["mean"] == pytest.approx(sum(r["accuracy"] for r in tested) / 2)


def test_the_table_names_every_method_and_the_report(done, capsys):
    with tables_fit():
        assert main(["sweep", "--resume", str(done)]) == 0
    said = capsys.readouterr()
    assert all(word in said.out for word in ("SGD", "F-GR", "γ", f"gradreg report {done}", "12 runs"))
    assert said.err == ""


def test_a_sweep_that_is_done_is_not_run_again(done, monkeypatch):
    before = (done / "results.json").read_bytes(), (done / "study.log").read_bytes()
    monkeypatch.setattr(workers, "run_all", lambda *_: pytest.fail("a run was repeated"))
    assert main(["sweep", "--resume", str(done), str(done.parent / "sweep.yaml"), "--workers", "1"]) == 0
    assert ((done / "results.json").read_bytes(), (done / "study.log").read_bytes()) == before


def test_another_configuration_is_not_gone_on_with(done, tmp_path, capsys):
    assert main(["sweep", str(write(tmp_path, {**TOY, "seeds": 3})), "--resume", str(done)]) == 2
    assert "CONFIG must be that of the sweep" in capsys.readouterr().err
    assert main(["sweep", str(write(tmp_path, TOY)), "--out", str(done)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_batches_give_what_single_runs_give(done, tmp_path):
    folder = tmp_path / "out"
    assert main(["sweep", str(write(tmp_path, TOY)), "--out", str(folder), "--workers", "1", "--batched"]) == 0
    alone, together = measured(done), measured(folder)
    assert alone.keys() == together.keys()
    for key, values in alone.items():
        assert together[key] == pytest.approx(values, rel=1e-3)


def test_a_database_holds_what_a_journal_holds_and_can_be_joined(done, tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/study.db"
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--storage", url, "--workers", "1", "--single"]
    assert main(["sweep", str(write(tmp_path, TOY)), *options, "--study", "a", "--out", str(first)]) == 0
    assert measured(first) == measured(done)
    assert main(["sweep", *options, "--study", "a", "--out", str(second)]) == 0
    assert measured(second) == measured(done)
    assert main(["sweep", "--resume", str(first), "--workers", "1"]) == 0
    assert len(Study(Place("a", url=url))._study.get_trials()) == NUM_RUNS
    capsys.readouterr()
    other = ["--seeds", "3", "--study", "a", "--out", str(tmp_path / "third")]
    assert main(["sweep", str(write(tmp_path, TOY)), *options, *other]) == 2
    assert "the configuration must be that of the study" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def start(folder, *options):
    command = [sys.executable, "-m", "gradreg", "sweep", *map(str, options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition):
    for _ in range(100_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def num_lines(path):
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def test_kill_and_resume_loses_nothing_and_repeats_nothing(done, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    process = start(tmp_path, write(tmp_path, TOY), "--out", folder, "--workers", 1, "--single")
    until(lambda: num_lines(folder / "runs.jsonl") >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = measured(folder)
    assert 2 <= len(kept) < NUM_RUNS
    assert not (folder / "results.json").exists()

    shown = []
    monkeypatch.setattr(workers, "progress_bar", lambda: nullcontext(lambda *told: shown.append(told)))
    assert main(["sweep", "--resume", str(folder), "--workers", "1"]) == 0
    assert shown[0][0] == "starting"
    assert shown[0][1] >= len(kept)  # or the time that is left would be reckoned from nothing
    assert measured(folder) == measured(done)
    keys = Counter(trial.user_attrs["key"] for trial in Study(Place("sweep", folder))._study.get_trials())
    assert sum(keys.values()) <= NUM_RUNS + 1  # the run that the kill fell into


def test_of_two_workers_one_is_killed_and_the_other_runs_its_run(done, tmp_path):
    folder = tmp_path / "out"
    process = start(tmp_path, write(tmp_path, TOY), "--out", folder, "--workers", 2, "--single")
    place = Place("sweep", folder)
    until(lambda: (folder / "config.json").exists())
    study = Study(place)

    def names():
        return {trial.user_attrs.get("worker") for trial in study.board().running} - {None}

    until(lambda: len(names()) == 2)
    victim = min(names())
    os.kill(int(victim.split("-")[-2]), signal.SIGKILL)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "F-GR" in out
    assert measured(folder) == measured(done)
    assert sum(study.board().attempts.values()) <= 1


def test_ctrl_c_says_what_is_kept_and_gives_back_the_run(tmp_path, capsys):
    content = {**TOY, "base": {**BASE, "epochs": 10**5}}
    folder = tmp_path / "out"

    def interrupt():
        until(lambda: (folder / "study.log").exists() and '"worker"' in (folder / "study.log").read_text())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = main(["sweep", str(write(tmp_path, content)), "--out", str(folder), "--workers", "1", "--single"])
    thread.join()
    said = capsys.readouterr()
    assert (status, said.out) == (130, "")
    assert said.err == f"gradreg: interrupted; finished runs are kept; go on with: gradreg sweep --resume {folder}.\n"
    board = Study(Place("sweep", folder)).board()
    assert not board.running
    assert not board.attempts


def small(monkeypatch, content, folder):
    """A sweep whose runs are not trained: accuracy is a known function of the configuration."""
    asked = []

    def run_all(jobs, workers):
        for k, job in enumerate(jobs):
            asked.append(job)
            gamma = job.config.gamma or 1e-3
            yield k, result(0.9 - abs(gamma - 0.03) + job.config.seed * 1e-3)

    monkeypatch.setattr(workers, "run_all", run_all)
    sweep = from_plan(content)
    place = Place("sweep", folder)
    Study(place, sweep.plan())
    work(Worker(folder, place, schedule_of, is_batched=False))
    return asked, place


def test_a_search_tries_so_many_points_and_tests_the_best(tmp_path, monkeypatch):
    asked, place = small(monkeypatch, {**SEARCH, "trials": 15}, tmp_path)
    validation = Counter(
        (job.config.method, job.config.gamma, job.config.epsilon) for job in asked if job.scored_on == "validation"
    )
    assert set(validation.values()) == {2}
    gammas = [gamma for method, gamma, _ in validation if method == "F-GR"]
    assert len(gammas) == 15
    assert len(set(gammas)) > 10
    assert all(1e-3 <= gamma <= 1 for gamma in gammas)
    tested = [job.config for job in asked if job.scored_on == "test"]
    assert [(c.method, c.seed) for c in tested] == [("SGD", 0), ("F-GR", 0), ("SGD", 1), ("F-GR", 1)]
    assert tested[1].gamma == min(gammas, key=lambda gamma: abs(gamma - 0.03))
    with Study(place) as study:
        assert SweepSchedule(from_plan(study.plan)).status(study.board()).is_finished


def test_the_test_rows_are_read_last_and_once(tmp_path, monkeypatch):
    asked, _ = small(monkeypatch, TOY, tmp_path)
    parts = [job.scored_on for job in asked]
    assert parts == ["validation"] * 8 + ["test"] * 4
    assert [job.config.seed for job in asked[:8]] == [0] * 4 + [1] * 4


def test_a_run_that_fails_is_tried_again_then_named(tmp_path, monkeypatch):
    def run_all(jobs, workers):
        for k, job in enumerate(jobs):
            if job.config.gamma == 0.5:
                tries.append(job)
                raise RuntimeError("out of memory\nby far")
            yield k, result(0.5)

    tries = []
    monkeypatch.setattr(workers, "run_all", run_all)
    place = Place("sweep", tmp_path)
    Study(place, from_plan(TOY).plan())
    with pytest.raises(BadInput, match=r"failed 3 times .*gamma 0\.5, .*RuntimeError: out of memory by far"):
        work(Worker(tmp_path, place, schedule_of, is_batched=False))
    assert Counter(job.config.seed for job in tries) == {0: 3, 1: 3}
    assert len(Study(place).board().results) == 6  # the others are there


def test_the_estimator_finds_where_accuracy_is_high():
    axes = {"gamma": Range(1e-3, 1.0, "log")}
    tried = []
    for k in range(30):
        point = propose(axes, tried, seed=k)
        tried.append((point, -abs(point["gamma"] - 0.03)))
    late = [point["gamma"] for point, _ in tried[-10:]]
    assert sum(0.01 < gamma < 0.1 for gamma in late) >= 6
    assert propose(axes, tried, seed=1) == propose(axes, tried, seed=1)


def test_a_folder_that_was_altered_is_refused(tmp_path, monkeypatch):
    _, place = small(monkeypatch, TOY, tmp_path)
    about = {"plan": from_plan(TOY).plan(), "study": {"name": "sweep", "storage": None, "grace": 120, "batched": False}}
    (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    assert find(tmp_path, None).place.name == place.name
    for spoiled in ({**about, "study": 1}, {**about, "plan": {**about["plan"], "seeds": 0}}, []):
        (tmp_path / "config.json").write_text(json.dumps(spoiled), encoding="utf-8")
        with pytest.raises(BadInput):
            find(tmp_path, None)
    (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    (tmp_path / "study.log").unlink()
    with pytest.raises(BadInput, match=r"study\.log is missing"):
        find(tmp_path, None)


@pytest.fixture
def begun(done, tmp_path):
    """A copy of a sweep that is done but for its results."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "study.log", "runs.jsonl"):
        (folder / name).write_bytes((done / name).read_bytes())
    return folder


def refusal(folder, capsys):
    """The one line of a resume that changes nothing and runs nothing."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main(["sweep", "--resume", str(folder), "--workers", "1"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    return said.err


@pytest.mark.parametrize("kept", [0, 2, 20, -2])
def test_a_study_that_lost_finished_runs_is_not_run_again(begun, kept, capsys, monkeypatch):
    monkeypatch.setattr(workers, "run_all", lambda *_: pytest.fail("a run was repeated"))
    log = begun / "study.log"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:kept]))
    said = refusal(begun, capsys)
    if kept in (0, 20, -2):
        assert "runs in runs.jsonl: put back a copy of it, or begin anew in another folder with: gradreg" in said
    else:
        assert "must be one of gradreg sweep" in said  # cut before the plan


def test_a_changed_configuration_of_a_sweep_is_refused(begun, capsys):
    path = begun / "config.json"
    content = path.read_text()
    assert '"width": 8' in content
    path.write_text(content.replace('"width": 8', '"width": 9'))
    assert "config.json' was changed after it was written: its check does not fit" in refusal(begun, capsys)


def test_changed_results_of_a_sweep_are_told_and_made_again(begun, capsys):
    assert main(["sweep", "--resume", str(begun), "--workers", "1"]) == 0
    path = begun / "results.json"
    whole = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"accuracy"', '"accurate"'))
    assert "results.json' was changed after it was written" in refusal(begun, capsys)
    path.unlink()
    assert main(["sweep", "--resume", str(begun), "--workers", "1"]) == 0
    assert json.loads(path.read_text())["test"] == whole["test"]


def test_a_configuration_that_changes_while_a_sweep_runs_loses_nothing(begun):
    (begun / "config.json").write_text("[]")
    with pytest.raises(BadInput, match=r"config\.json' is not a JSON object; put it right"):
        conclude(begun, Place("sweep", begun), from_plan(TOY))


def test_lines_of_runs_that_were_changed_come_back_from_the_study(begun, done):
    path = begun / "runs.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": 0.1'))
    assert main(["sweep", "--resume", str(begun), "--workers", "1"]) == 0
    assert measured(begun) == measured(done)


def test_a_password_is_asked_for_again_and_not_stored(tmp_path):
    study = {"name": "a", "storage": "postgresql://user:***@host/db", "grace": 120, "batched": False}
    (tmp_path / "config.json").write_text(json.dumps({"plan": from_plan(TOY).plan(), "study": study}), encoding="utf-8")
    with pytest.raises(BadInput, match="--storage must be given again"):
        find(tmp_path, None)
    assert find(tmp_path, "postgresql://user:word@host/db").place.url == "postgresql://user:word@host/db"


def test_what_is_concluded_comes_from_the_study(done, tmp_path):
    """Lines of runs.jsonl that were lost or torn come back."""
    for name in ("config.json", "study.log"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    (tmp_path / "runs.jsonl").write_text('{"torn', encoding="utf-8")
    conclude(tmp_path, Place("sweep", tmp_path), from_plan(TOY))
    assert measured(tmp_path) == measured(done)
