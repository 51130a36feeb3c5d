"""The study behind the defaults, at toy size: it ends in a table, and what was run is not run again."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
FILE = Path(__file__).parents[1] / "benchmarks" / "defaults.py"


@pytest.fixture
def study(monkeypatch):
    spec = importlib.util.spec_from_file_location("defaults_study", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "defaults_study", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TASKS", {"toy": module.Task(module.friedman, lambda: module.mlp(10, 1, 4), 12)})
    monkeypatch.setattr(module, "RATES", {"SGD": (0.01, 0.03), "AdamW": (1e-3,)})
    return module


def test_it_ends_in_a_table_and_is_resumable(study, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["defaults.py", "--quick", "--out", str(tmp_path)])
    study.main()
    table, lines = capsys.readouterr().out, (tmp_path / "runs.jsonl").read_text()
    assert table.count("| toy |") == 2
    assert len(lines.splitlines()) == (2 + 1) * len(study.TUNING_SEEDS) + 2 * 2 * len(study.QUICK)
    monkeypatch.setattr(study, "train", None)  # nothing is left to run
    study.main()
    assert capsys.readouterr().out == table
    assert (tmp_path / "runs.jsonl").read_text() == lines


def test_a_method_that_is_plain_differs_by_nothing(study):
    task = study.TASKS["toy"]
    plain = study.train(task, "SGD", 0.01, study.METHODS["plain"], 0)
    zero = study.train(task, "SGD", 0.01, study.fixed(0.0, 0.1), 0)
    other = study.train(task, "SGD", 0.01, study.METHODS["γ = ε = 1"], 0)
    assert zero["score"] == plain["score"] != other["score"]


def test_the_default_is_one_of_the_methods(study):
    model = torch.nn.Linear(2, 1)
    methods = [
        make(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 10) for make in study.METHODS.values()
    ]
    without = study.gradreg.cheap(model)
    target = without.gamma.value.target
    made = study.METHODS[f"cheap, ratio {target:g}"](model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 10)
    assert (without.gamma, without.epsilon) == (made.gamma, made.epsilon)
    default = study.gradreg.GradientRegularizer(model)
    assert any((m.gamma, m.epsilon) == (default.gamma, default.epsilon) for m in methods if m is not None)
