"""The experiment on diagonal networks: its pieces, and the command as a whole at toy size."""

import json
import math
from dataclasses import replace

import pytest
import torch
from printed import tables_fit

from gradreg.cli import main
from gradreg.lab.jobs import run_jobs
from gradreg.studies.implicit_bias import dln
from gradreg.studies.implicit_bias.dln import SETTINGS, Setting, sweep
from gradreg.studies.implicit_bias.large_steps import descend
from gradreg.studies.implicit_bias.points import EXACT, LARGE, PLAIN, POINTS
from gradreg.theory import flow, sparse_regression

AGREEMENT = dln.agreement
SHIFTED, BY_ROW, CENTERED = (replace(s, n=15, d=30, num_active=2) for s in SETTINGS)


@pytest.mark.parametrize("setting", [SHIFTED, BY_ROW, CENTERED], ids=lambda s: s.name)
def test_a_sweep_holds_every_point_and_what_converged_is_the_flow(setting):
    rows = sweep(setting, seed=0)
    assert [(r["scheme"], r["gamma"], r["epsilon"]) for r in rows] == [(p.scheme, p.gamma, p.epsilon) for p in POINTS]
    data, row = setting.data(0), rows[POINTS.index(EXACT)]
    end = flow(data.X, data.y, alpha=setting.alpha, gamma=setting.gamma, scheme="exact", per_sample=setting.per_sample)
    assert row["converged"]
    assert row["test_error"] == pytest.approx(data.test_error(end.beta).item(), rel=1e-3)
    assert row["scale"] == pytest.approx((end.alpha_gr / setting.alpha).mean().item(), rel=1e-4)
    assert row["l1"] == pytest.approx(end.beta.abs().sum().item(), rel=1e-4)


def test_without_penalty_nothing_shrinks():
    row = sweep(CENTERED, seed=0)[POINTS.index(PLAIN)]
    assert (row["scale"], row["active"], row["log2_over_plain"]) == (1.0, 1.0, 0.0)
    assert row["even_test_error"] == pytest.approx(row["test_error"], rel=1e-3)


def test_the_scale_is_uneven_in_the_centered_setting_and_nearly_even_row_by_row():
    """Row by row the pull is the mean of x² r r̄, and x² is alike in all coordinates; in the full batch it is g ḡ."""
    uneven, even = (sweep(s, seed=0)[POINTS.index(LARGE)]["unevenness"] for s in (CENTERED, BY_ROW))
    assert uneven > 3
    assert 0.5 < even < 2


def test_a_map_cell_compares_with_db_at_the_same_strength():
    cells = dln.map_column(shift=2.0, seed=0)
    assert len(cells) == len(dln.MAP_ALPHAS) * len(dln.MAP_RATIOS)
    (cell,) = (c for c in cells if (c["alpha"], c["ratio"]) == (0.2, 1.0))
    n, d, k = dln.MAP_SHAPE
    data = sparse_regression(n, d, k, shift=2.0)
    # λ_max of the Hessian at w = α by autograd
    w = torch.full((2 * d,), 0.2, dtype=torch.float64)

    def loss(w):
        return (data.X @ (w[:d] ** 2 - w[d:] ** 2) - data.y).square().sum() / (4 * n)

    hessian = torch.autograd.functional.hessian(loss, w)
    curved = hessian - torch.diag(torch.cat([data.X.T @ -data.y, data.X.T @ data.y]) / n)  # without ±g
    gamma = dln.MAP_STRENGTH / torch.linalg.eigvalsh(curved)[-1].item()
    errors = [
        data.test_error(flow(data.X, data.y, alpha=0.2, gamma=gamma, epsilon=gamma, scheme=s).beta)
        for s in ("forward", "exact")
    ]
    assert cell["log2_error_ratio"] == pytest.approx(math.log2(errors[0] / errors[1]), abs=1e-3)


# Finite steps.


@pytest.mark.parametrize("one_row", [False, True], ids=["GD", "SGD"])
def test_a_finite_step_acts_as_a_penalty_of_half_its_size(one_row):
    """log(scale/α) of plain descent is that of the exact penalty's flow with γ = η/2, up to a share of order η."""
    data = [sparse_regression(6, 12, 2, seed=s) for s in range(2)]

    def ratio(rate):
        end = descend(data, alpha=0.3, rate=rate, one_row=one_row, seed=0)
        assert end.converged.all()
        found = torch.log(end.scale / 0.3).mean(1)
        flows = [flow(d.X, d.y, alpha=0.3, gamma=rate / 2, scheme="exact", per_sample=one_row).alpha_gr for d in data]
        return (found / torch.log(torch.stack(flows) / 0.3).mean(1) - 1).abs().max().item()

    assert ratio(0.01) < 0.1
    assert ratio(0.01) < ratio(0.04)


def test_descent_that_diverges_or_is_cut_short_has_not_converged():
    data = [sparse_regression(6, 12, 2)]
    assert not descend(data, alpha=0.3, rate=10.0, one_row=False, seed=0).converged.any()
    short = descend(data, alpha=0.3, rate=0.01, one_row=False, seed=0, max_steps=20)
    assert short.num_steps == 20
    assert not short.converged.any()


# Jobs.


def test_jobs_come_back_by_key_and_an_error_ends_them():
    assert run_jobs({k: lambda k=k: k**2 for k in range(5)}, 2, "squares") == {k: k**2 for k in range(5)}
    with pytest.raises(ZeroDivisionError):
        run_jobs({0: lambda: 1 / 0}, 1, "wrong")


# The whole command.


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(dln, "SETTINGS", (SHIFTED, BY_ROW, CENTERED))
    monkeypatch.setattr(dln, "MAP_SHIFTS", (0.0, 1.0))
    monkeypatch.setattr(dln, "MAP_ALPHAS", (0.2,))
    monkeypatch.setattr(dln, "MAP_SHAPE", (6, 12, 2))
    monkeypatch.setattr(dln, "STEP_RATIOS", (0.125, 0.25))
    monkeypatch.setattr(dln, "agreement", lambda: AGREEMENT((0.02,)))


def test_the_command_writes_its_folder_and_overwrites_nothing(toy, tmp_path, capsys):
    out = tmp_path / "result"
    with tables_fit():
        assert main(["dln", "--seeds", "2", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "dln_bias.svg",
        "dln_map.svg",
        "dln_steps.svg",
        "report.html",
        "results.json",
    ]
    assert "<image" not in (out / "report.html").read_text(encoding="utf-8")  # which the policy would not load
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == "gradreg dln --seed 0 --seeds 2"
    assert [s["name"] for s in results["settings"]] == [s.name for s in SETTINGS]
    assert all(row["converged"] and row["invariant_error"] < 1e-8 for row in results["agreement"])
    assert all(row["argmin_error"] < 1e-6 for row in results["agreement"])
    printed = capsys.readouterr()
    assert "centered data, full batch" in printed.out
    assert "argmin" in printed.out
    assert printed.err == ""  # quiet in a pipe
    assert main(["dln", "--out", str(out)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [["--seeds", "1"], ["--seed", "-1"], ["--workers", "0"], ["--seeds", "many"]])
@pytest.mark.parametrize("command", ["dln", "flooding"])
def test_bad_input_is_one_line_and_status_2(command, tokens, capsys, tmp_path):
    assert main([command, *tokens, "--out", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert tokens[0] in message
    assert not (tmp_path / "x").exists()


def test_a_setting_is_reproducible():
    setting = Setting("tiny", 6, 12, 2, 0.0, 1.0, alpha=0.3, gamma=0.1, per_sample=False)
    assert sweep(setting, 3) == sweep(setting, 3)
    assert sweep(setting, 3) != sweep(setting, 4)
