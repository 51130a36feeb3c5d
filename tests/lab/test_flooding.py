"""Flooding as gradient regularization: the identity, the count of pairs, and the command at toy size."""

import json
from dataclasses import replace

import pytest
from printed import tables_fit

from gradreg.cli import main
from gradreg.studies.implicit_bias import flooding
from gradreg.studies.implicit_bias.flooding import MODES, Plan, compare, count, identity, start_of

TINY = replace(MODES[0], batch_size=30, level=1.0, num_steps=300)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_steps_across_the_level_are_one_step_of_the_penalty(seed):
    rows = identity(seed)
    assert [r["scheme"] for r in rows] == ["forward", "backward"]
    for row in rows:
        assert row["straddles"]
        assert row["relative_error"] < 5 * row["rounding"] < 1e-10


@pytest.mark.parametrize(
    ("steps", "forward", "backward", "net"),
    [
        ("↓↓↓↓", 0, 0, 4),
        ("↓↓↑↓", 0, 1, 2),  # ↓ (↓↑) ↓
        ("↓↑↑↓↑↓", 2, 1, 0),  # (↓↑) (↑↓) (↑↓)
        ("↑↑", 0, 0, -2),
    ],
)
def test_pairs_are_counted_once(steps, forward, backward, net):
    found = count([step == "↓" for step in steps], rate=0.1)
    assert (found["forward"], found["backward"]) == (forward, backward)
    assert found["descents"] - found["ascents"] == net
    assert found["gamma"] == pytest.approx(0.1 * (forward + backward) / max(net, 1))


def test_on_one_batch_every_checked_pair_is_a_penalty_step_and_nearly_all_steps_are_pairs():
    run = compare(TINY, start_of(0))
    found = run["Flooding"]
    assert found["num_checked"] > 0
    assert found["explained"] == pytest.approx(1, abs=1e-9)
    assert found["counts"]["pair_share_after_level"] > 0.9
    assert run["F-GR"]["gamma"] == found["counts"]["gamma"] > 0


def test_above_its_level_flooding_is_sgd():
    run = compare(replace(TINY, level=0.0, num_steps=40), start_of(0))
    assert run["Flooding"]["counts"]["ascents"] == 0
    assert run["Flooding"]["trace"] == run["SGD"]["trace"]
    assert run["F-GR"]["trace"] == run["SGD"]["trace"]  # γ = 0


def test_with_mini_batches_pairs_are_explained_in_part_only():
    found = compare(replace(MODES[1], level=2.28, num_steps=300), start_of(0))["Flooding"]
    assert found["num_checked"] > 0
    assert found["explained"] < 0.95


def test_the_command_writes_its_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flooding, "MODES", (TINY, replace(MODES[1], level=2.28, num_steps=90)))
    out = tmp_path / "result"
    with tables_fit():
        assert main(["flooding", "--seeds", "2", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["flooding.svg", "report.html", "results.json"]
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == Plan((0, 1)).command == "gradreg flooding --seed 0 --seeds 2"
    printed = capsys.readouterr()
    assert "pairs across the level" in printed.out
    assert printed.err == ""
    assert main(["flooding", "--out", str(out)]) == 2
    # Bit for bit the same again, in threads too.
    assert main(["flooding", "--seeds", "2", "--workers", "1", "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["modes"] == results["modes"]
    assert again["identity"] == results["identity"]
