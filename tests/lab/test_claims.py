"""The claims of the paper: the rules of the verdicts, each claim at toy size, the page, and the command."""

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from printed import tables_fit

from gradreg.cli import main
from gradreg.lab.config import RunConfig
from gradreg.lab.cost.measure import PREDICTED_DB_OVER_F_GR, mlp_case
from gradreg.lab.page import markdown
from gradreg.lab.tables import Table, escaped
from gradreg.studies.claims import CLAIMS, cost, flooding, generalization, linear, runner, sam
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED, Above, AtMost, Measured, Plan, Subclaim, holm
from gradreg.studies.claims.generalization import Choice
from gradreg.studies.claims.page import page as page_of
from gradreg.studies.claims.page import summary
from gradreg.studies.claims.runner import judged, run_claims, shown, together

# Verdicts.


@pytest.mark.parametrize(
    ("values", "reference", "verdict"),
    [
        ([1.0, 1.1, 0.9], 0.0, HOLDS),
        ([-1.0, -1.1, -0.9], 0.0, FAILS),
        ([1.0, -1.0, 0.5], 0.0, UNDECIDED),
        ([1.4, 1.5, 1.6], 1.0, HOLDS),
        ([1.4, 1.5, 1.6], 2.0, FAILS),
        ([0.0, 0.0, 0.0], 0.0, UNDECIDED),  # the interval is the reference itself
        ([2.0, 2.0], 0.0, HOLDS),
    ],
)
def test_the_verdict_is_where_the_interval_lies(values, reference, verdict):
    found = Above(reference).judge(values)
    assert found.verdict == verdict
    assert found.number == pytest.approx(sum(values) / len(values))
    assert found.low <= found.number <= found.high
    assert (found.p < 0.05) == (verdict != UNDECIDED)


def test_an_interval_that_touches_the_reference_decides_nothing():
    interval = Above().judge([1.0, 2.0, 3.0])
    assert Above(interval.low).judge([1.0, 2.0, 3.0]).verdict == UNDECIDED
    assert Above(math.nextafter(interval.low, -1)).judge([1.0, 2.0, 3.0]).verdict == HOLDS
    assert Above(interval.high).judge([1.0, 2.0, 3.0]).verdict == UNDECIDED
    assert Above(math.nextafter(interval.high, 9)).judge([1.0, 2.0, 3.0]).verdict == FAILS


def test_p_is_that_of_the_t_test():
    from scipy.stats import ttest_1samp

    values = [0.3, 1.2, 0.7, -0.1]
    assert Above(0.2).judge(values).p == pytest.approx(ttest_1samp(values, 0.2).pvalue)


@pytest.mark.parametrize("rule", [Above(), AtMost(1.0)])
@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_seed_is_refused(rule, values):
    with pytest.raises(ValueError, match="at least 2 seeds"):
        rule.judge(values)


def test_a_seed_without_a_number_is_left_out_and_counted():
    found = Above().judge([1.0, math.nan, 1.1, 0.9])
    assert (found.verdict, found.num_seeds) == (HOLDS, 3)
    found = Above().judge([1.0, math.nan])
    assert (found.verdict, found.num_seeds, found.low) == (UNDECIDED, 1, None)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.0, 1e-13], HOLDS), ([1e-12, 0.0], HOLDS), ([0.0, 2e-12], FAILS), ([0.0, math.nan], FAILS)],
)
def test_an_identity_is_judged_by_its_worst_seed(values, verdict):
    assert AtMost(1e-12).judge(values).verdict == verdict


def test_holm_stops_at_the_first_that_stands():
    assert holm([0.04, 0.01, 0.02]) == [True, True, True]  # 0.01 ≤ 0.05/3, 0.02 ≤ 0.05/2, 0.04 ≤ 0.05
    assert holm([0.04, 0.02, 0.02]) == [False, False, False]  # 0.02 > 0.05/3
    assert holm([]) == []


def test_verdicts_that_do_not_stand_together_are_named():
    parts = [{"key": k, "p": p, "verdict": v} for k, p, v in (("x", 0.001, HOLDS), ("y", 0.04, HOLDS))]
    parts += [{"key": "z", "p": 0.5, "verdict": UNDECIDED}, {"key": "identity", "p": None, "verdict": HOLDS}]
    assert together([{"parts": parts}]) == {"num_intervals": 3, "lost_under_holm": ["y"]}


def test_every_claim_has_a_rule_before_it_is_measured():
    assert list(CLAIMS) == list("abcde")
    keys = [sub.key for claim in CLAIMS.values() for sub in claim.subclaims]
    assert len(keys) == len(set(keys))
    for claim in CLAIMS.values():
        assert claim.letter == claim.subclaims[0].key[0]
        assert claim.says
        assert claim.where
        assert claim.differs


@pytest.mark.parametrize(
    ("rule", "values", "text"),
    [
        (Above(), [1.0, 2.0, 3.0], "+2.00 [−0.48, +4.48]"),
        (Above(1.0), [1.0, 2.0, 3.0], "2.00 [−0.48, 4.48]"),
        (AtMost(1e-12), [2e-13, 1e-13], "2.0e−13"),
        (AtMost(1e-12), [0.0, 0.0], "0"),
        (Above(), [math.nan, 1.0], "–"),
    ],
)
def test_numbers_are_shown_with_their_interval(rule, values, text):
    sub = Subclaim("k", "", "", rule)
    assert shown(sub, rule.judge(values)) == text


# The claims.


def test_sam_without_normalization_is_f_gr_and_only_at_gamma_equal_epsilon():
    config = RunConfig(data="digits", model="cnn", batch_size=20)
    assert sam.difference(config) < 1e-12
    assert sam.difference(config, ratio=0.999) > 1e-6


def test_the_hand_written_step_is_the_formula():
    model = torch.nn.Linear(2, 3, bias=False).double()
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])

    def gradient(w):
        return torch.func.grad(lambda w: torch.nn.functional.cross_entropy(x @ w.T, y))(w)

    before = model.weight.detach().clone()
    sam.sam_step(model, x, y)
    expected = before - sam.RATE * gradient(before + sam.RHO * gradient(before))
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-14, atol=0)


def test_the_gap_is_positive_only_if_the_whole_order_is_as_claimed():
    def at(*scales, converged=True):
        return {p: {"scale": s, "converged": converged} for p, s in zip(linear.ORDER, scales)}

    assert linear.smallest_gap(at(0.5, 0.7, 0.8, 1.1)) == pytest.approx(0.1)
    assert linear.smallest_gap(at(0.5, 0.8, 0.7, 1.1)) == pytest.approx(-0.1)
    assert math.isnan(linear.smallest_gap(at(0.5, 0.7, 0.8, 1.1, converged=False)))


def test_gamma_is_chosen_by_the_best_point_and_by_the_best_at_each_epsilon():
    validation = {(0.1, 0.03): 0.5, (0.1, 1.0): 0.6, (0.5, 0.03): 0.2, (0.5, 1.0): 0.7, (0.9, 1.0): 0.7}
    choice = Choice.on(validation)
    assert choice.gamma == 0.5
    assert choice.own_gamma == {0.03: 0.1, 1.0: 0.5}


def test_on_one_batch_a_flooded_run_does_what_the_identity_says():
    mode = replace(flooding.LABELS["one batch"], batch_size=30, level=1.0, num_steps=300)
    found = flooding.flooded(mode, flooding.start_of(0))
    assert found["num_checked"] > 0
    assert found["explained"] == pytest.approx(1, abs=1e-9)


def small_mlp(depth, width):
    case = mlp_case(depth)
    return replace(case, config=replace(case.config, width=width, batch_size=8), shape=(width,))


def test_counted_work_is_as_predicted():
    counts = cost.flops(small_mlp(20, 32), seed=0)
    assert counts["F-GR"] == 2 * counts["SGD"]
    # The first layer needs no gradient of its input, which takes a little off every count.
    assert counts["DB"] / counts["F-GR"] == pytest.approx(PREDICTED_DB_OVER_F_GR, rel=0.05)


def test_every_round_of_the_cost_gives_ratios():
    found = cost.times(small_mlp(2, 8), seed=0, rounds=3)
    assert set(found) == {"F-GR", "DB", "DB/F-GR"}
    assert all(0 < ratio < math.inf for ratio in found.values())


# The command.


@pytest.fixture
def tiny(monkeypatch):
    """Every claim in a second or so."""
    monkeypatch.setattr(cost, "CASES", dict.fromkeys(list(cost.CASES)[:2], small_mlp(2, 8)))
    monkeypatch.setattr(cost, "QUICK", cost.Size(rounds=2))
    small = replace(generalization.QUICK, epochs=1, num_train=200, epsilons=(0.1, 1.0))
    monkeypatch.setattr(generalization, "QUICK", small)
    monkeypatch.setattr(linear, "SETTINGS", linear.SETTINGS[2:])
    monkeypatch.setattr(sam, "NUM_STEPS", 2)
    monkeypatch.setattr(flooding, "QUICK", flooding.Size({"one batch": 6, "mini-batches": 6}))


def run_command(*arguments):
    return main(["claims", "--quick", "--seeds", "2", "--workers", "1", *arguments])


def test_the_command_measures_every_claim_and_writes_its_page(tiny, tmp_path, capsys):
    page = tmp_path / "docs" / "claims.md"
    page.parent.mkdir()
    with tables_fit():
        assert run_command("--out", str(tmp_path / "out"), "--write", str(page)) == 0
    folder = tmp_path / "out"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "claims.jsonl").read_text(encoding="utf-8").splitlines()]
    assert results["claims"] == lines
    assert [claim["letter"] for claim in lines] == list("abcde")
    assert results["command"] == "gradreg claims --quick --seed 0 --seeds 2"
    by_key = {part["key"]: part for claim in lines for part in claim["parts"]}
    assert by_key["d1, MLP"]["verdict"] == HOLDS
    assert by_key["e1, up then down"]["verdict"] == HOLDS
    assert all(len(part["values"]) == 2 for part in by_key.values())
    assert "b1, clean labels" in lines[1]["not_measured"]

    text = page.read_text(encoding="utf-8")
    assert text == (folder / "claims.md").read_text(encoding="utf-8")
    for part in by_key.values():
        assert escaped(part["key"]) in text
        assert part["verdict"] in text
    for name in ("intervals", "b"):
        figure = page.parent / "figures" / f"claims-{name}.svg"
        assert ElementTree.parse(figure).getroot().tag.endswith("svg")
        assert f"(figures/{figure.name})" in text
    assert (folder / "report.html").read_text(encoding="utf-8").count("<svg") == 2
    printed = capsys.readouterr()
    assert "(e) Flooding performs F-GR" in printed.out
    assert str(folder / "report.html") in printed.out.replace("\n", "")
    assert printed.err == ""  # no progress in a pipe

    # On top of its own page it may write, into its own folder it may not.
    assert run_command("--only", "d", "--out", str(tmp_path / "again"), "--write", str(page)) == 0
    assert "Generalization" not in page.read_text(encoding="utf-8")
    assert "svg" not in page.read_text(encoding="utf-8")  # an identity has no interval
    assert run_command("--only", "d", "--out", str(folder)) == 2


def test_what_is_finished_is_kept_when_interrupted(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(plan, folder):
        raise KeyboardInterrupt

    monkeypatch.setitem(CLAIMS, "e", replace(CLAIMS["e"], measure=interrupted))
    assert run_command("--only", "d", "e", "--out", str(tmp_path / "out")) == 130
    kept = (tmp_path / "out" / "claims.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["letter"] for line in kept] == ["d"]
    assert not (tmp_path / "out" / "results.json").exists()
    assert "claims.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--only", "f"), "--only"),
        (("--only", "a,b"), "--only"),
        (("--seeds", "1"), "--seeds"),
        (("--seed", "999999"), "--seed"),
        (("--workers", "0"), "--workers"),
        (("--write", "page.html"), "--write"),
        (("--write", "nowhere/page.md"), "--write"),
        (("--write", "mine.md"), "--write"),
    ],
)
def test_bad_input_gets_one_line_and_no_folder(arguments, field, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.md").write_text("a page of mine\n")
    assert main(["claims", *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert field in error
    assert not Path("out").exists()
    assert Path("mine.md").read_text() == "a page of mine\n"


# The page.


def results_of(*claims, **more):
    about = {"date": "today", "machine": "any", "command": "gradreg claims", "is_quick": False, "seeds": [0, 1]}
    versions = {"torch": "2", "gradreg": "0"}
    return {**about, "versions": versions, "seconds": 1.0, "claims": claims, **together(claims), **more}


def test_what_comes_from_outside_stays_text_on_the_page():
    hostile = "<script>alert(1)</script> | `x` **y** [z](w)\n# h"
    table = Table(hostile, ("", "x"), [("hostile", hostile)])
    measured = Measured({"d1, MLP": [0.0, 0.0]}, {hostile: hostile}, [table])
    claim = {**judged(CLAIMS["d"], measured), "seconds": 1.0}
    text = markdown(page_of(results_of(claim, machine=hostile, date=hostile)))
    assert "<script" not in text
    assert "](w)" not in text.replace("\\](w)", "")
    assert "\n# h" not in text
    assert "Made by `gradreg claims`: edit the command" in text
    assert [line.count("|") for line in text.splitlines() if line.startswith("| hostile")] == [3]


def test_a_sub_claim_that_was_not_measured_is_said_to_be_so():
    claim = judged(CLAIMS["d"], Measured({"d1, MLP": [0.0, 1.0]}, {}))
    assert summary(claim) == "0 of 1 holds; does not hold here: d1, MLP; not measured: d2, CNN with BatchNorm."


def test_the_seeds_are_in_the_results_and_decide_them(tiny, tmp_path):
    def values(seed, name):
        folder = tmp_path / name
        folder.mkdir()
        plan = Plan(("c",), (seed, seed + 1), is_quick=True, workers=1)
        return [part["values"] for part in run_claims(plan, folder)["claims"][0]["parts"]]

    assert values(0, "a") == values(0, "b") != values(5, "c")


def test_the_default_is_all_claims_with_ten_seeds(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(runner, "run_claims", lambda plan, folder, write: plans.append(plan))
    assert main(["claims", "--out", str(tmp_path / "a")]) == 0
    assert main(["claims", "--quick", "--only", "b", "a", "--out", str(tmp_path / "b")]) == 0
    assert plans[0].letters == tuple("abcde")
    assert plans[0].seeds == tuple(range(10))
    assert (plans[1].letters, plans[1].seeds, plans[1].is_quick) == (("a", "b"), (0, 1, 2, 3), True)
    assert plans[1].command == "gradreg claims --quick --only a b --seed 0 --seeds 4"
