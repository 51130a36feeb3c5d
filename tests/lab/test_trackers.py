"""Trackers: what they are told, that they go on with the same run, and that none of them costs the run."""

import json
import sys
from types import SimpleNamespace

import pytest

from gradreg import cli
from gradreg._install import how
from gradreg.lab import trackers
from gradreg.lab.folder import BadInput
from gradreg.lab.records import opened
from gradreg.lab.train import session

RUN = "train --data digits --num-train 100 --batch-size 20 --width 8 --epochs 3"


class FakeWandB:
    """Keeps runs by their id."""

    def __init__(self):
        self.runs = {}

    def init(self, *, id, name, config, resume, project, dir):
        assert resume == "allow"
        run = self.runs.setdefault(id, {"name": name, "config": config, "rows": [], "summary": {}, "finished": 0})

        def finish():
            run["finished"] += 1

        return SimpleNamespace(
            log=lambda row, step: run["rows"].append((step, row)),
            summary=run["summary"],
            finish=finish,
        )


class FakeMLflow:
    """The same, in the words of MLflow."""

    def __init__(self):
        self.runs = {}
        self.active = None

    def set_experiment(self, name):
        assert name == "gradreg"

    def start_run(self, run_id=None, run_name=None):
        assert self.active is None
        self.active = run_id or f"run {len(self.runs)}"
        self.runs.setdefault(self.active, {"name": run_name, "params": {}, "rows": [], "status": []})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def log_params(self, params):
        self.runs[self.active]["params"].update(params)

    def log_metrics(self, metrics, step):
        self.runs[self.active]["rows"].append((step, metrics))

    def end_run(self, status):
        self.runs[self.active]["status"].append(status)
        self.active = None


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())
    return sys.modules["wandb"]


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", FakeMLflow())
    return sys.modules["mlflow"]


def status(line, *more):
    try:
        return cli.main([*line.split(), *map(str, more)])
    except SystemExit as leaving:
        return leaving.code


def rows(folder):
    return [opened(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def results(folder):
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("test_loss", "test_accuracy")}


def test_several_trackers_get_each_row_the_configuration_and_the_results(wandb, mlflow, tmp_path):
    out = tmp_path / "run"
    assert status(f"{RUN} --log wandb --log mlflow --out", out) == 0
    (one,), (other,) = wandb.runs.values(), mlflow.runs.values()
    assert one["name"] == other["name"] == "run"
    assert one["config"]["epochs"] == other["params"]["epochs"] == 3
    expected = [(row["step"], row) for row in rows(out)]
    assert one["rows"] == expected
    assert other["rows"] == [*expected, (15, results(out))]
    assert (one["summary"], one["finished"], other["status"]) == (results(out), 1, ["FINISHED"])
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert about["log"] == ["wandb", "mlflow"]
    assert about["command"].endswith("--log wandb --log mlflow")


def test_a_run_that_goes_on_is_the_same_run(wandb, mlflow, tmp_path, monkeypatch):
    out = tmp_path / "run"
    append = session.append_line

    def interrupted(path, line):
        append(path, line)
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "append_line", interrupted)
    assert status(f"{RUN} --log wandb --log mlflow --out", out) == 130
    monkeypatch.setattr(session, "append_line", append)
    assert status("train --resume", out) == 0
    (one,), (other,) = wandb.runs.values(), mlflow.runs.values()
    assert [step for step, _ in one["rows"]] == [5, 10, 15]
    assert [step for step, _ in other["rows"]] == [5, 10, 15, 15]
    assert (one["finished"], other["status"]) == (2, ["KILLED", "FINISHED"])


def test_a_tracker_that_fails_does_not_cost_the_run(wandb, mlflow, tmp_path, monkeypatch, capsys):
    def unreachable(metrics, step):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(mlflow, "log_metrics", unreachable)
    out = tmp_path / "run"
    assert status(f"{RUN} --log wandb --log mlflow --out", out) == 0
    said = capsys.readouterr().err
    assert said == "gradreg: --log mlflow failed, the run goes on without: ConnectionError: no route.\n"
    assert len(next(iter(wandb.runs.values()))["rows"]) == 3


def test_a_tracker_that_cannot_be_opened_is_refused_and_leaves_nothing(wandb, mlflow, tmp_path, monkeypatch, capsys):
    def nobody(**_):
        raise RuntimeError("log in first.")

    monkeypatch.setattr(wandb, "init", nobody)
    assert status(f"{RUN} --log mlflow --log wandb --out", tmp_path / "run") == 2
    assert capsys.readouterr().err == "gradreg: --log wandb must be ready to take a run: RuntimeError: log in first.\n"
    assert not (tmp_path / "run").exists()
    assert mlflow.active is None


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_one_line_with_the_command(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, trackers._MODULES.get(name, name), None)
    assert status(f"{RUN} --log {name} --out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said == f"gradreg: --log {name} needs the package {name}: {how(name)}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--log wnadb", "--log must be one of tensorboard, wandb, mlflow, got 'wnadb'. Did you mean wandb?"),
        ("--log", "--log requires an argument"),
        ("--resume x --log wandb", "--log must be left out with --resume"),
        ("--resume x --tensorboard", "--log must be left out with --resume"),
    ],
)
def test_bad_input_gets_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status(f"train {options}") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_older_run_goes_on_with_its_tensorboard(tmp_path):
    about = {"config": {}, "checkpoint_every": 1, "keep": 3, "tensorboard": True, "threads": 1}
    (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    assert session.read_plan(tmp_path).log == ("tensorboard",)


def test_a_run_whose_trackers_are_unknown_is_refused(tmp_path):
    about = {"config": {}, "checkpoint_every": 1, "keep": 3, "log": ["nonsense"], "threads": 1}
    (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(BadInput, match="log must be one of"):
        session.read_plan(tmp_path)


# The packages themselves, where they are installed.


@pytest.mark.filterwarnings("ignore")
def test_wandb_takes_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert status(f"{RUN} --log wandb --out", tmp_path / "run") == 0
    (own,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert own.name.endswith(trackers._known(tmp_path / "run", "wandb"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_takes_it_in_a_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert status(f"{RUN} --log mlflow --out", tmp_path / "run") == 0
    found = mlflow.MlflowClient().get_run(trackers._known(tmp_path / "run", "mlflow"))
    assert found.data.metrics["test_accuracy"] == results(tmp_path / "run")["test_accuracy"]
    assert (found.info.status, found.data.params["epochs"]) == ("FINISHED", "3")


GRID = """
base: {data: digits, num_train: 100, batch_size: 20, width: 8, epochs: 2}
grid: [{method: SGD}, {method: SAM, rho: [0.05, 0.1]}]
seeds: 2
"""


def sweep(folder):
    (folder / "grid.yaml").write_text(GRID, encoding="utf-8")
    return f"sweep {folder / 'grid.yaml'} --workers 1 --out {folder / 'out'}"


def test_each_test_run_of_a_sweep_is_a_run_of_the_tracker(wandb, mlflow, tmp_path):
    assert status(f"{sweep(tmp_path)} --log wandb --log mlflow") == 0
    lines = [opened(line) for line in (tmp_path / "out" / "runs.jsonl").read_bytes().splitlines()]
    tested = {(line["method"], line["seed"]): line for line in lines if line["scored_on"] == "test"}
    assert len(tested) == len(wandb.runs) == len(mlflow.runs) == 4
    for run in wandb.runs.values():
        line = tested[run["config"]["method"], run["config"]["seed"]]
        assert run["summary"]["test_accuracy"] == line["accuracy"]
        assert [step for step, _ in run["rows"]] == [moment["step"] for moment in line["trace"]]
        assert run["rows"][0][1]["train_loss"] == line["trace"][0]["train_loss"]
        assert run["finished"] == 1
    assert {run["name"] for run in wandb.runs.values()} == {f"out-{m}-{s}" for m in ("SGD", "SAM") for s in (0, 1)}
    assert all(run["status"] == ["FINISHED"] for run in mlflow.runs.values())
    assert status(f"sweep --resume {tmp_path / 'out'} --log wandb") == 0
    assert len(wandb.runs) == 4  # the same runs again


def test_each_test_run_of_a_comparison_names_its_arm(wandb, tmp_path):
    line = "compare digits --num-train 100 --batch-size 20 --width 8 --epochs 2 --trials 1 --seeds 2 --methods SAM"
    assert status(f"{line} --workers 1 --out {tmp_path / 'out'} --log wandb") == 0
    arms = [run["config"]["arm"] for run in wandb.runs.values()]
    assert sorted(arms) == ["SAM"] * 2 + ["SGD"] * 2 + ["SGD, twice as long"] * 2


def test_a_tracker_that_is_not_ready_at_the_end_costs_nothing(wandb, tmp_path, monkeypatch, capsys):
    def nobody(**given):
        raise RuntimeError("nobody is logged in")

    monkeypatch.setattr(wandb, "init", nobody)
    assert status(f"{sweep(tmp_path)} --log wandb") == 2
    out, err = capsys.readouterr()
    assert "read once" in out
    last = err.splitlines()[-1]
    assert last.startswith("gradreg: --log wandb must be ready to take a run: RuntimeError: nobody is logged in")
    assert last.endswith(f"gradreg sweep --resume {tmp_path / 'out'} --log wandb.")
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("command", ["sweep", "compare digits"])
def test_studies_refuse_a_tracker_that_is_none_or_not_there(command, tmp_path, monkeypatch, capsys):
    words = sweep(tmp_path) if command == "sweep" else f"{command} --out {tmp_path / 'out'}"
    assert status(f"{words} --log wandbb") == 2
    assert "--log must be" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert status(f"{words} --log wandb") == 2
    assert "--log wandb needs the package wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
