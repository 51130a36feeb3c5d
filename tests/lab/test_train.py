"""`gradreg train`: what it writes, what it refuses, and that nothing which ends it early changes its outcome."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradreg import cli
from gradreg.lab import objective
from gradreg.lab.config import FIELDS, RunConfig
from gradreg.lab.data import load
from gradreg.lab.models import build
from gradreg.lab.runs import Job, run
from gradreg.lab.train import checkpoint
from gradreg.lab.train import session as train
from gradreg.lab.train.trainer import Trainer

SMALL = {"data": "digits", "model": "mlp", "num_train": 100, "batch_size": 20, "width": 8, "epochs": 4}
CONFIG = RunConfig(**SMALL, method="F-GR", gamma=0.1, epsilon=0.5)  # 5 steps in an epoch
LAST = "checkpoints/epoch-000004"


def words(config=CONFIG, *more):
    """The command line of a run."""
    return [*train.command(train.Plan(config)).split()[1:], *map(str, more)]


def status(line):
    """Of the command, in this process."""
    try:
        return cli.main([str(word) for word in line])
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    assert status(words(CONFIG, "--out", folder)) == 0
    return folder


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "check")} for line in lines]


def results(folder):
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in ("seconds", "date", "git", "check")}


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_run(folder, whole):
    assert (folder / LAST / checkpoint.MODEL).read_bytes() == (whole / LAST / checkpoint.MODEL).read_bytes()
    assert rows(folder) == rows(whole)
    assert results(folder) == results(whole)


def play(line, patch):
    """The command in a process of its own, after a patch."""
    code = f"import os, signal, sys\n{textwrap.dedent(patch)}\nfrom gradreg.cli import main\nsys.exit(main({line!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


# What a run writes.


def test_a_run_writes_its_configuration_a_line_for_each_epoch_and_its_results(whole):
    about = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert RunConfig(**about["config"]) == CONFIG
    assert about["command"] == " ".join(["gradreg", *words()])
    described = {"command", "date", "machine", "versions", "git", "ran_in", "check"}
    assert set(about) == described | {"checkpoint_every", "keep", "log", "threads", "config"}
    lines = rows(whole)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 5), (2, 10), (3, 15), (4, 20)]
    assert lines[-1]["learning_rate"] == 0 < lines[0]["learning_rate"] < CONFIG.learning_rate
    assert all(line["penalty_ratio"] > 0 for line in lines)
    assert names(whole) == ["epoch-000002", "epoch-000003", "epoch-000004"]


def test_the_results_are_those_of_the_last_weights(whole):
    data = load(CONFIG)
    model = build(CONFIG, data)
    model.load_state_dict(checkpoint.read_model(whole / LAST))
    found = results(whole)
    assert found["test_accuracy"] == objective.evaluate(model, data.test).score
    assert found["test_loss"] == objective.evaluate(model, data.test).loss
    assert (found["train_loss"], found["grad_norm"]) == objective.gradient_norm(model, data.train)
    assert rows(whole)[-1]["validation_accuracy"] == objective.evaluate(model, data.validation).score
    assert rows(whole)[-1]["train_loss"] == found["train_loss"]  # 100 rows are fewer than are measured
    assert (found["epochs"], found["steps"], found["diverged"]) == (4, 20, False)


def test_a_run_on_disk_is_the_run_in_memory(whole):
    in_memory = run(Job(CONFIG))
    found = results(whole)
    assert (found["train_loss"], found["grad_norm"]) == (in_memory.train_loss, in_memory.grad_norm)
    assert found["test_accuracy"] == in_memory.score


def test_a_summary_is_printed_and_the_default_folder_is_named_after_the_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status(words(replace(CONFIG, epochs=1))) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "digits, MLP, clean labels: F-GR, gamma 0.1, epsilon 0.5, sgd, seed 0" in captured.out
    assert "test accuracy" in captured.out
    (folder,) = (tmp_path / "results").iterdir()
    assert captured.out.endswith(f"Everything is in results/{folder.name}.\n")
    assert folder.name.startswith("train-")


def test_checkpoints_are_as_many_and_as_rare_as_asked(tmp_path):
    out = tmp_path / "run"
    assert status(words(replace(CONFIG, epochs=7), "--checkpoint-every", 3, "--keep", 2, "--out", out)) == 0
    assert names(out) == ["epoch-000006", "epoch-000007"]


@pytest.mark.parametrize(("level", "said"), [(0.0, True), (2.3, False)])
def test_a_level_that_is_never_reached_is_said(level, said, tmp_path, capsys):
    config = RunConfig(**{**SMALL, "epochs": 2}, method="Flooding", level=level)
    assert status(words(config, "--out", tmp_path / "run")) == 0
    assert (results(tmp_path / "run")["flooded_steps"] == 0) is said
    line = f"No step had a loss below the level {level:g}: this is a run of SGD; a higher --level would flood.\n"
    assert (line in capsys.readouterr().out) is said


def test_the_count_of_flooded_steps_goes_on_with_the_run(tmp_path):
    config = RunConfig(**SMALL, method="Flooding", level=2.25)
    trainer, half = Trainer(config), Trainer(config)
    for _ in range(4):
        trainer.epoch()
    half.epoch()
    half.epoch()
    other = Trainer(config)
    other.load_state_dict(half.state_dict())
    other.epoch()
    other.epoch()
    assert other.flooded.steps == trainer.flooded.steps > half.flooded.steps
    assert "flooded_steps" not in results_of_sgd(tmp_path)


def results_of_sgd(folder):
    assert status(words(RunConfig(**{**SMALL, "epochs": 1}), "--out", folder / "sgd")) == 0
    return results(folder / "sgd")


def test_a_run_that_diverges_ends_and_says_so(tmp_path, capsys):
    config = RunConfig(**{**SMALL, "epochs": 30}, learning_rate=1e3, weight_decay=10)
    assert status(words(config, "--out", tmp_path / "run")) == 0
    found = results(tmp_path / "run")
    assert found["diverged"] is True
    assert found["train_loss"] is None
    assert found["epochs"] < 30
    assert "diverged after" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_metrics_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert status(words(CONFIG, "--tensorboard", "--out", out)) == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    read = [(event.step, event.value) for event in events.Scalars("validation_loss")]
    assert read == [(row["step"], pytest.approx(row["validation_loss"])) for row in rows(out)]


def test_without_tensorboard_there_is_an_install_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert status(words(CONFIG, "--tensorboard", "--out", str(tmp_path / "run"))) == 2
    assert capsys.readouterr().err.strip().endswith("pip install '.[tensorboard]'")
    assert not (tmp_path / "run").exists()


# Options and the file.

EVERY_FIELD = {
    "data": "cifar10",
    "path": "some where",
    "num_train": 500,
    "random_labels": 0.2,
    "augment": True,
    "shrink": 2,
    "model": "wideresnet",
    "depth": 28,
    "width": 10,
    "activation": "silu",
    "patch": 7,
    "method": "B-GR",
    "gamma": 0.1,
    "epsilon": 0.3,
    "ascent": "normalized",
    "warmup": 0.2,
    "fraction": 0.25,
    "lookahead": 1.5,
    "period": 4,
    "start": 0.1,
    "probability": 0.9,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "momentum": 0.5,
    "batch_size": 50,
    "epochs": 3,
    "precision": "bf16",
    "compile": True,
    "channels_last": True,
    "device": "cpu",
    "seed": 7,
}


@pytest.fixture
def plans(monkeypatch):
    """The plans that were started."""
    found = []
    monkeypatch.setattr(train, "start", lambda plan, *rest: found.append(plan))
    return found


@pytest.mark.parametrize(
    "plan",
    [train.Plan(RunConfig(**EVERY_FIELD), 4, 7), train.Plan(RunConfig(method="SAM", rho=0.1)), train.Plan(RunConfig())],
    ids=["every field", "SAM", "defaults"],
)
def test_the_command_of_a_plan_gives_the_plan(plan, plans):
    assert cli.main(shlex.split(train.command(plan))[1:]) == 0
    assert plans == [plan]


def test_a_file_gives_the_plan_and_options_win_over_it(tmp_path, plans):
    assert set(EVERY_FIELD) | {"file", "ratio", "rho", "level", "threshold"} == set(FIELDS)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(EVERY_FIELD), encoding="utf-8")  # JSON is YAML
    assert cli.main(["train", "--config", str(file)]) == 0
    assert cli.main(["train", "--config", str(file), "--gamma", "0.7", "--no-augment", "--seed", "8"]) == 0
    assert plans[0].config == RunConfig(**EVERY_FIELD)
    assert plans[1].config == RunConfig(**{**EVERY_FIELD, "gamma": 0.7, "augment": False, "seed": 8})


def test_names_are_understood_as_people_write_them(tmp_path, plans):
    file = tmp_path / "run.yaml"
    file.write_text("{lr: 0.3, wd: 1e-4, Batch-Size: 20, method: f_gr, gamma: 1, epsilon: 1}", encoding="utf-8")
    assert cli.main(["train", "--config", str(file)]) == 0
    line = "train --lr 0.3 --wd 1e-4 --batch-size 20 --method fgr --gamma 1 --epsilon 1"
    assert cli.main(line.split()) == 0
    assert cli.main(["train", "--config", str(file), "--lr", "0.2", "--method", "f gr"]) == 0
    expected = RunConfig(learning_rate=0.3, weight_decay=1e-4, batch_size=20, method="F-GR", gamma=1, epsilon=1)
    assert [plan.config for plan in plans] == [expected, expected, replace(expected, learning_rate=0.2)]


def test_the_help_names_every_field(capsys):
    assert cli.main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    options = {"file": "TASK"}  # a word
    assert all(options.get(name, f"--{name.replace('_', '-')}") in printed for name in FIELDS)


REFUSED = [
    ("--gamma -1 --method f-gr", "--gamma must be a number from 0 to 1e+06, got '-1'"),
    ("--epochs 2.5", "--epochs must be a whole number from 1 to 1000000, got '2.5'"),
    ("--method nonsense", "--method must be one of SGD, F-GR"),
    ("--learning-rate nan", "--learning-rate must be a number above 0"),
    ("--method f-gr --gamma 0.1", "epsilon must be given with method F-GR"),
    (
        "--gamma 0.1",
        "SGD, which needs none of these settings; method F-GR (--method F-GR) has it, and needs gamma, epsilon",
    ),
    ("--epsilon 0.1", "epsilon must be left out with method SGD, which needs none of these settings; method F-GR"),
    ("--rho 0.1", "rho must be left out with method SGD, which needs none of these settings; method SAM"),
    ("--level 0.1", "level must be left out with method SGD, which needs none of these settings; method Flooding"),
    ("--method fgrr", "got 'fgrr'. Did you mean F-GR?"),
    ("--ascent normalised", "got 'normalised'. Did you mean normalized?"),
    ("--gama 1", "Unknown option: --gama. Did you mean --gamma?"),
    ("--lr 0", "--lr must be a number above 0"),
    ("--lr 1 --learning-rate 2", "--learning-rate specified multiple times"),
    ("--fraction 0", "--fraction must be a number above 0 and at most 1, got '0'"),
    ("--method msam --rho 1 --fraction 0.1", "fraction must be left out with method MSAM, got '0.1'; methods"),
    ("--period 4", "period must be left out with method SGD, got '4'; methods with it: F-GR"),
    ("--method split --gamma 1 --epsilon 1", "gamma must be below epsilon with method Split"),
    (
        "--method sam --rho 0.1 --ascent adaptive",
        "ascent must be gradient with method SAM, got 'adaptive'; methods with",
    ),
    ("--method DB --gamma 0.1 --ascent normalized", "ascent must be gradient with method DB, got 'normalized'"),
    ("--optimizer adamw --momentum 0.5", "momentum must be left out with optimizer adamw, got '0.5'; sgd has it"),
    ("--method split --gamma 1 --epsilon 2 --ascent adaptive", "ascent must be one of gradient, normalized, momentum"),
    ("--method f-gr --gamma 1 --epsilon 1 --ascent momentum", "ascent must be one of gradient, normalized, adaptive"),
    ("--method f-gr --gamma 1 --epsilon 1 --fraction 0.5 --threshold 0", "threshold must be left out with a fraction"),
    ("--method msam --rho 1 --momentum 0", "momentum must be above 0 for a direction along it"),
    ("--checkpoint-every 0", "--checkpoint-every must be a whole number from 1"),
    ("--keep none", "--keep must be a whole number from 1"),
    ("--compile --method db --gamma 0.1", "compile must be false with method DB"),
    ("--num-train 50", "num_train must be a whole number from 100"),
    ("--nonsense 1", "Unknown option: --nonsense"),
    ("--config nowhere.yaml", "--config must be a YAML file that can be read, got 'nowhere.yaml': No such file"),
    ("--config list.yaml", "--config must be a mapping"),
    ("--config unknown.yaml", "--config has the unknown field 'gama'; the fields are file, data, path"),
    ("--config unknown.yaml", "seed. Did you mean gamma?"),
    ("--config twice.yaml", "--config must have one of 'lr' and 'learning_rate', which are the same field"),
    ("--config empty.yaml", "--config must be a mapping of fields to values, got 'empty.yaml', which is empty"),
    ("--config sweep.yaml", "got 'sweep.yaml', that of a sweep: gradreg sweep sweep.yaml"),
    ("--config torn.yaml", "--config must be YAML, got 'torn.yaml'"),
    ("--config code.yaml", "--config must be YAML, got 'code.yaml'"),
    (
        "--config binary.yaml",
        "--config must be a YAML file that can be read, got 'binary.yaml': 'utf-8' codec can't decode",
    ),
    ("--config value.yaml", "epochs must be a whole number from 1 to 1000000, got 'many'"),
    ("--out full", "--out must be a new or empty folder, got 'full'"),
    ("--out a\x1bb", "--out must be a path of printable characters, got 'a\\x1bb'"),
    ("--resume nowhere", "--resume must be the folder of a run of gradreg train, got 'nowhere': no config.json"),
    ("--resume full", "'full/config.json' has the unknown field 'gama'"),
    ("--resume full --out b", "--out must be left out with --resume"),
    ("--resume full --keep 2", "--keep must be left out with --resume"),
]
FILES = {
    "list.yaml": b"- 1",
    "unknown.yaml": b"gama: 1",
    "twice.yaml": b"lr: 1\nlearning_rate: 1",
    "empty.yaml": b"# nothing",
    "sweep.yaml": b"base: {epochs: 3}\ngrid: [{method: SGD}]",
    "torn.yaml": b"data: [",
    "code.yaml": b"data: !!python/object/apply:os.system ['touch hacked']",
    "binary.yaml": b"\xff\xfe\x00",
    "value.yaml": b"epochs: many",
    "full/config.json": b'{"config": {"gama": 3}}',
}


@pytest.mark.parametrize(("line", "expected"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_input_is_refused_in_one_line_before_any_work(line, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    assert cli.main(["train", *line.split(" ")]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"full", *FILES}


# Killed, stopped, and gone on.

AFTER_AN_EPOCH = """
    from gradreg.lab.train import session as train
    append = train.append_line
    def then_die(path, line):
        append(path, line)
        if line["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    train.append_line = then_die
"""
WHILE_SAVING = """
    from gradreg.lab.train import checkpoint
    write = checkpoint._write_file
    def then_die(path, content):
        if "epoch-000003" in str(path) and path.name == "state.safetensors":
            path.write_bytes(content[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)
    checkpoint._write_file = then_die
"""
BEFORE_THE_RESULTS = """
    from gradreg.lab.train import session as train
    train._Run._results = lambda self: os.kill(os.getpid(), signal.SIGKILL)
"""
AT_A_STEP = """
    from gradreg.lab.train.trainer import Trainer
    step = Trainer._step
    def then_signal(self, batch):
        if self.step == 12 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, batch)
    Trainer._step = then_signal
"""


@pytest.mark.parametrize(
    ("patch", "left"),
    [(AFTER_AN_EPOCH, "epoch-000002"), (WHILE_SAVING, "epoch-000002"), (BEFORE_THE_RESULTS, "epoch-000004")],
    ids=["after an epoch", "while saving", "before the results"],
)
def test_kill_9_and_resume_is_the_run_that_was_not_killed(patch, left, whole, tmp_path, capsys):
    out = tmp_path / "run"
    assert play(words(CONFIG, "--out", out), patch).returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    assert checkpoint.last_good(out / "checkpoints", pytest.fail).name == left
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert capsys.readouterr().err == ""
    assert_same_run(out, whole)
    assert names(out) == names(whole)  # what was half-made is gone


def interrupt_at(step_number, signals, monkeypatch):
    """Signals to this process while that step is under way."""
    step = Trainer._step

    def then_signal(self, batch):
        for number in signals if self.step == step_number else ():
            os.kill(os.getpid(), number)
        step(self, batch)

    monkeypatch.setattr(Trainer, "_step", then_signal)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_within_the_epoch_and_the_run_goes_on_bit_for_bit(
    number, code, whole, tmp_path, monkeypatch, capsys
):
    out, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_at(12, [number], patch)
        assert status(words(CONFIG, "--out", out)) == code
    assert signal.getsignal(number) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "saved after 13 of 20 steps" in captured.err  # the step that was under way has ended
    assert f"go on with: gradreg train --resume {out}" in captured.err
    assert names(out)[-1] == "epoch-000002-step-000000003"
    assert status(["train", "--resume", out, "--gamma", "0.1"]) == 0  # the same value may be named
    assert_same_run(out, whole)


def test_a_second_ctrl_c_does_not_wait(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(12, [signal.SIGINT, signal.SIGINT], patch)
        assert status(words(CONFIG, "--out", out)) == 130
    assert f"go on with: gradreg train --resume {out}" in capsys.readouterr().err
    assert names(out) == ["epoch-000001", "epoch-000002"]
    assert status(["train", "--resume", out]) == 0
    assert_same_run(out, whole)


@pytest.fixture(scope="module")
def stopped_once(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(14, [signal.SIGTERM], patch)
        assert status(words(CONFIG, "--out", out)) == 143
    assert names(out) == ["epoch-000001", "epoch-000002", "epoch-000003"]
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that was stopped after its third epoch."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped, whole, capsys):
    path = stopped / "checkpoints/epoch-000003" / checkpoint.MODEL
    path.write_bytes(path.read_bytes()[:-8])
    assert cli.main(["train", "--resume", str(stopped)]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "epoch-000003/model.safetensors' is damaged" in said
    assert "Falling back to" in said
    assert "epoch-000002'" in said
    assert_same_run(stopped, whole)
    assert all(checkpoint.is_whole(path) for path in checkpoint.all_in(stopped / "checkpoints"))


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(stopped, whole):
    torch.set_num_threads(2)
    assert status(["train", "--resume", stopped]) == 0
    assert torch.get_num_threads() == 1
    assert_same_run(stopped, whole)


def test_a_line_that_was_torn_off_is_made_again(stopped, whole):
    path = stopped / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"epoch": 4, "st', encoding="utf-8")
    assert cli.main(["train", "--resume", str(stopped)]) == 0
    assert_same_run(stopped, whole)


def refusal(line, capsys):
    capsys.readouterr()
    assert cli.main(line) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_resumed_is_refused_and_left_as_it_is(stopped, whole, capsys, tmp_path):
    def snapshot():
        return {path: path.read_bytes() for path in sorted(stopped.rglob("*")) if path.is_file()}

    before = snapshot()
    again = ["train", "--resume", str(stopped)]
    assert "that has not ended" in refusal(["train", "--resume", str(whole)], capsys)
    assert "epochs must stay '4' with --resume, as the run began, got '9'" in refusal([*again, "--epochs", "9"], capsys)
    (tmp_path / "other.yaml").write_text("seed: 3", encoding="utf-8")
    assert "seed must stay '0'" in refusal([*again, "--config", str(tmp_path / "other.yaml")], capsys)
    assert snapshot() == before

    about = json.loads((stopped / "config.json").read_text(encoding="utf-8"))
    about["config"]["width"] = 9
    del about["check"]
    (stopped / "config.json").write_text(json.dumps(about), encoding="utf-8")
    before = snapshot()
    assert "the checkpoint is that of another model: 1.weight is (8, 64) float32" in refusal(again, capsys)
    assert snapshot() == before


def replaced(path, old, new):
    """One change in a file."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


SPOILED_METRICS = {
    "a digit": (b'"train_loss": ', b'"train_loss": 1', "line 1 of .* was changed after it was written"),
    "NUL": (b'{"epoch": 2', b'\0"epoch": 2', "line 2 of .* is not JSON"),
    "not UTF-8": (b'"epoch": 3', b'"ep\xffch": 3', "line 3 of .* is not JSON"),
    "another line": (b'"epoch": 2', b'"epoch": 1', "line 2 of .* was changed"),
    "a blank line": (b'{"epoch": 2', b'\n{"epoch": 2', "line 2 of .* is not JSON"),
}


@pytest.mark.parametrize(("old", "new", "message"), SPOILED_METRICS.values(), ids=SPOILED_METRICS)
def test_a_changed_line_of_metrics_is_named_and_left(old, new, message, stopped, capsys):
    replaced(stopped / "metrics.jsonl", old, new)
    before = (stopped / "metrics.jsonl").read_bytes()
    said = refusal(["train", "--resume", str(stopped)], capsys)
    assert re.search(message, said), said
    assert f"start again in a new folder with: gradreg {' '.join(words())}." in said
    assert (stopped / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_what_an_earlier_version_wrote_is_gone_on_with(name, stopped, whole):
    path = stopped / name
    path.write_text(re.sub(r',\s*"check": "[0-9a-f]+"', "", path.read_text(encoding="utf-8")), encoding="utf-8")
    assert '"check"' not in path.read_text(encoding="utf-8")
    assert status(["train", "--resume", stopped]) == 0
    assert_same_run(stopped, whole)


def test_a_changed_configuration_is_refused_with_a_way_out(stopped, capsys):
    again = ["train", "--resume", str(stopped)]
    with_a_command = f"or start again in a new folder with: gradreg {' '.join(words())}."
    replaced(stopped / "config.json", b'"date": "2', b'"date": "3')
    assert with_a_command in refusal(again, capsys)
    replaced(stopped / "config.json", b'"date": "3', b'"date": "2')
    replaced(stopped / "config.json", b'"gamma": 0.1', b'"gamma": 0.3')
    said = refusal(again, capsys)  # which of the two is right, configuration or command, cannot be told
    assert "config.json' was changed after it was written: its check does not fit" in said
    assert "or start the run again in a new folder." in said


@pytest.mark.parametrize("content", [b"[]", b"", b"null", b"\xff", b'{"config": []}', b'{"config": {}, "keep": 3}'])
def test_a_configuration_of_another_kind_is_one_line(content, stopped, capsys):
    (stopped / "config.json").write_bytes(content)
    said = refusal(["train", "--resume", str(stopped)], capsys)
    assert "config.json" in said


def test_a_run_without_a_good_checkpoint_is_refused(stopped, capsys):
    for path in (stopped / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    assert "no checkpoint that can be used" in refusal(["train", "--resume", str(stopped)], capsys)


def test_a_run_without_its_metrics_is_refused(stopped, capsys):
    path = stopped / "metrics.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    assert "must hold a line for each of the 3 epochs" in refusal(["train", "--resume", str(stopped)], capsys)


def test_a_run_that_is_running_is_refused(stopped, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (stopped / "config.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "of a run that is not running" in refusal(["train", "--resume", str(stopped)], capsys)


# A full disk.


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_saving_keeps_what_is_there(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        write = checkpoint._write_file
        patch.setattr(
            checkpoint,
            "_write_file",
            lambda path, content: (no_space if "000003" in str(path) else write)(path, content),
        )
        assert status(words(CONFIG, "--out", out)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left on device; epoch-000001, epoch-000002 kept" in said
    assert f"gradreg train --resume {out}" in said
    assert names(out) == ["epoch-000001", "epoch-000002"]
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("name", ["append_line", "write_json"])
def test_a_full_disk_elsewhere_is_one_line_too(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, name, no_space)
    assert status(words(CONFIG, "--out", str(tmp_path / "run"))) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left on device; nothing was kept" in said


# Several processes.

SECOND_ONE_FAILS = """
    from gradreg.lab.train.trainer import Trainer
    step = Trainer._step
    def then_fail(self, batch):
        if self.step == 7 and self.processes.rank == 1:
            raise RuntimeError("rank 1 fell over")
        step(self, batch)
    Trainer._step = then_fail
"""


def torchrun(line, folder, patch=""):
    """Two processes on this machine; `patch` runs in each of them before the command."""
    script = folder / "patched.py"
    script.write_text(
        f"import os, signal, sys\n{textwrap.dedent(patch)}\nfrom gradreg.cli import main\nsys.exit(main())\n",
        encoding="utf-8",
    )
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    target = [str(script)] if patch else ["-m", "gradreg"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *started, *target, *line]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1500)


def test_two_processes_are_one_to_rounding_also_when_stopped_and_resumed(whole, tmp_path):
    out = tmp_path / "run"
    stopped = torchrun(words(CONFIG, "--out", out), tmp_path, AT_A_STEP)
    assert stopped.returncode != 0
    assert names(out)[-1] == "epoch-000002-step-000000003"
    assert stopped.stderr.count("saved after 13 of 20 steps") == 1
    resumed = torchrun(["train", "--resume", str(out)], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("test accuracy") == 1
    mine, reference = (checkpoint.read_model(folder / LAST) for folder in (out, whole))
    for name in reference:
        torch.testing.assert_close(mine[name], reference[name], rtol=0, atol=1e-6)
    for mine, reference in zip(rows(out), rows(whole), strict=True):
        assert mine == pytest.approx(reference, rel=1e-4, abs=1e-6)


def test_a_process_that_fails_ends_all_and_nothing_is_lost(tmp_path):
    out = tmp_path / "run"
    failed = torchrun(words(CONFIG, "--out", out), tmp_path, SECOND_ONE_FAILS)
    assert failed.returncode != 0
    assert "rank 1 fell over" in failed.stderr
    assert not (out / "results.json").exists()
    assert checkpoint.last_good(out / "checkpoints", pytest.fail).name == "epoch-000001"
