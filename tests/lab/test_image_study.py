"""The study on real images: its measures against slow references, its verdicts, its page, and the whole at toy size."""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from idx_files import encoded, write
from torch import nn

from gradreg.cli import main
from gradreg.lab import stats
from gradreg.lab.about import provenance
from gradreg.lab.comparison.plan import Effort, Plan, Taken
from gradreg.lab.config import RunConfig
from gradreg.lab.data import idx
from gradreg.lab.data.parts import Part
from gradreg.lab.page import markdown
from gradreg.lab.records import kept_lines, read_record
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED
from gradreg.studies.frontier.modes import ARMS, FULL, MODES, PLAIN
from gradreg.studies.frontier.page import sentences
from gradreg.studies.frontier.summary import goals, judging
from gradreg.studies.images import flatness, pieces, record, run
from gradreg.studies.images.controls import control_rows, controls, line
from gradreg.studies.images.page import judged, page
from gradreg.studies.images.pieces import PIECES, Piece
from gradreg.studies.images.summary import as_tasks, flatness_rows, piece_row, real_tasks
from gradreg.studies.images.tables import flatness_counts, glance_table

# Measures.


def test_the_calibration_error_is_that_of_the_bins():
    dice = torch.Generator().manual_seed(0)
    sure = torch.rand(500, generator=dice)
    right = torch.rand(500, generator=dice) < sure**2
    slow = 0.0
    for k in range(flatness.BINS):
        inside = (sure > k / flatness.BINS) & (sure <= (k + 1) / flatness.BINS)
        if inside.any():
            slow += inside.float().mean().item() * abs(right[inside].float().mean() - sure[inside].mean()).item()
    assert flatness.calibration_error(sure, right) == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_weights_lie_on_a_lattice_and_near(bits):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    found = flatness.rounded(weight, bits)
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    assert (found - weight).abs().max() <= step / 2 * (1 + 1e-5)
    assert len(found.unique()) <= 2**bits - 1
    assert flatness.rounded(torch.zeros(2, 2), bits).equal(torch.zeros(2, 2))


def test_corruptions_keep_what_they_should():
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    low = flatness.CORRUPTIONS["contrast"](x)
    torch.testing.assert_close(low.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(low.std((2, 3)), x.std((2, 3)) * flatness.CONTRAST)
    blurred = flatness.CORRUPTIONS["blur"](x)
    torch.testing.assert_close(blurred[:, :, 2, 3], x[:, :, 1:4, 2:5].mean((2, 3)))
    assert blurred.shape == x.shape
    flat = torch.full((1, 1, 4, 4), 2.0)
    assert flatness.CORRUPTIONS["blur"](flat).equal(flat)
    torch.manual_seed(0)
    noise = flatness.CORRUPTIONS["noise"](torch.zeros(1, 1, 200, 200))
    assert noise.std().item() == pytest.approx(flatness.NOISE, rel=0.02)


def test_what_is_kept_is_the_accuracy_on_the_other_classes():
    """What one model knows for sure it keeps; another was right by a bias that fine-tuning turns around."""
    x = torch.eye(4).repeat(50, 1)
    part = Part(x, x.argmax(1))
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(5 * torch.eye(4))
    assert flatness.after_fine_tuning(model, part, part, 10, 0) == 1.0
    forgetful = nn.Linear(4, 4)
    with torch.no_grad():
        forgetful.weight.zero_()
        forgetful.bias.copy_(torch.tensor([0.0, 0.0, 0.01, 0.0]))  # right on half of the others, until it has seen more
    assert flatness.after_fine_tuning(forgetful, part, part, 10, 0) == 0.0


def test_a_run_that_diverged_has_no_curvature():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    found = flatness.curvature_of(model, Part(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])))
    assert all(math.isnan(value) for value in found.values())


# Verdicts.


def arm(name, scores, **more):
    differs = {"verdict": "better"} if name == "F-GR" else {}
    return {
        "name": name,
        "about": name,
        "method": name,
        "scores": scores,
        "is_opponent": False,
        "cost": None,
        **differs,
        **more,
    }


def results_of(**scores):
    arms = [arm(name, values) for name, values in scores.items()]
    plain = next(row for row in arms if row["name"] == "SGD")
    for row in arms:
        row |= {"test": None, "validation": 0.5, "settings": {"rho": 0.1}, "learning_rate": 0.1, "weight_decay": 0.0}
        row |= {"failed": [], "diverged": 0, "difference": None, "epochs": 1}
    assert plain is arms[0]
    plan = Plan(PIECES["resnet-14-noisy"].base).as_row() | {"search_epochs": 5}
    return {
        "arms": arms,
        "seeds": [0, 1, 2],
        "training_seconds": 7.0,
        "num_runs": 9,
        **provenance("gradreg images"),
        "plan": plan,
        "metric": {"name": "accuracy", "higher_is_better": True, "is_share": True},
    }


def test_claims_are_paired_by_seed_and_lie_on_their_side():
    found = results_of(**{"SGD": [0.80, 0.70, 0.60], "F-GR": [0.82, 0.72, 0.621], "DB": [0.83, 0.731, 0.63]})
    row = piece_row(PIECES["resnet-14-noisy"], found, [])
    verdicts = {claim["key"]: claim["verdict"] for claim in row["claims"]}
    assert verdicts == {"gain": HOLDS, "b1": FAILS}
    assert {kept["name"]: round(kept["retention"]["mean"], 2) for kept in row["kept"]} == {"DB": 1.49}
    noisy = piece_row(PIECES["resnet-14-noisy"], results_of(**{"SGD": [0.8, 0.7, 0.6], "F-GR": [0.9, 0.6, 0.7]}), [])
    assert noisy["claims"][0]["verdict"] == UNDECIDED


def test_a_run_that_diverged_is_left_out_of_a_claim():
    found = results_of(**{"SGD": [0.80, 0.70, 0.60], "F-GR": [0.82, None, 0.621]})
    (claim,) = piece_row(PIECES["resnet-14-noisy"], found, [])["claims"]
    assert (claim["seeds"], claim["verdict"]) == (2, HOLDS)


def test_what_an_arm_gains_is_held_against_sgd_at_its_own_weight_decay():
    found = results_of(
        **{"SGD": [0.80, 0.70], "F-GR": [0.82, 0.72], "SAM": [0.83, 0.73], "SGD, twice as long": [0.8, 0.7]}
    )
    plain, _, moved, opponent = found["arms"]
    moved["weight_decay"] = opponent["weight_decay"] = 0.3
    opponent["is_opponent"] = True
    base = RunConfig()
    jobs = controls(base, found["arms"], [0, 1])
    assert [(job.config.method, job.config.weight_decay, job.config.seed) for job in jobs] == [
        ("SGD", 0.3, 0),
        ("SGD", 0.3, 1),
    ]
    lines = [line(job, score) for job, score in zip(jobs, (0.82, 0.719))]
    (row,) = control_rows(found["arms"], lines, [0, 1])
    assert (row["name"], round(row["test"]["mean"], 4), round(row["difference"]["mean"], 4)) == ("SAM", 0.7695, 0.0105)
    assert row["difference"]["low"] < 0.0105 < row["difference"]["high"]
    assert control_rows(found["arms"], lines[:1], [0, 1]) == []  # until all seeds are there
    del moved["scores"]
    moved["test"] = {"mean": 0.78, "low": 0.7, "high": 0.8}
    (row,) = control_rows(found["arms"], lines, [0, 1])
    assert round(row["difference"]["mean"], 4) == 0.0105
    assert math.isnan(row["difference"]["low"])
    assert controls(base, [plain, opponent], [0]) == []


def test_an_arrow_says_on_which_side_of_sgd_a_measure_lies():
    names = list(flatness.MEASURES)
    models = [
        {"arm": name, "seed": seed, **dict.fromkeys(names, value + 0.1 * seed), "top": None if seed == 2 else value}
        for name, value in (("SGD", 1.0), ("SAM", 2.0), ("DB", 0.5))
        for seed in range(3)
    ]
    models[3]["ece"] = -5.0  # of SAM: one seed far away
    rows = {row["name"]: row["measures"] for row in flatness_rows(models, ["SGD", "SAM", "DB", "F-GR"])}
    assert set(rows) == {"SGD", "SAM", "DB"}
    assert [rows[name]["noise"]["side"] for name in ("SGD", "SAM", "DB")] == [0, 1, -1]
    assert rows["SAM"]["ece"]["side"] == 0
    assert rows["SAM"]["top"] == {"mean": 2.0, "side": 1}


def test_the_first_table_has_each_task_once_and_says_what_is_beyond_chance():
    found = results_of(**{"SGD": [0.80, 0.70], "F-GR": [0.82, 0.72], "DB": [0.9, 0.9], "cheap": [0.7, 0.75]})
    for row, low, high in zip(found["arms"][1:], (0.01, 0.1, -0.1), (0.03, 0.3, 0.2)):
        row |= {
            "difference": {"mean": 0.02, "low": low, "high": high},
            "cost": {"median": 2.0, "low": 1.9, "high": 2.1},
        }
        row |= {"verdict": stats.BETTER if low > 0 else stats.UNDECIDED}
    one, again = (piece_row(PIECES[name], found) for name in ("resnet-14-noisy", "resnet-14-scale"))
    other = {**again, "plan": {**again["plan"], "base": {"data": "else"}}}
    other["arms"] = [{**arm, "cost": {"median": 2.5}, "difference": None} for arm in other["arms"]]
    first, second, costs = glance_table([one, again, other]).rows
    assert first[2:] == ("+2.0↑ (+1.0 to +3.0)", "–", "+2.0 (−10.0 to +20.0)", "–")
    assert second[2:] == ("–",) * 4
    assert costs[2:] == ("2.00 to 2.50", "–", "2.00 to 2.50", "–")


def test_measures_are_counted_where_the_learning_rate_is_that_of_sgd():
    def row(name, side):
        return {"name": name, "models": 2, "measures": {"noise": {"mean": 0.5, "side": side}}}

    def piece(rate, *sides):
        arms = [arm("SGD", []), arm("SAM", []), arm("SGD, twice as long", [], is_opponent=True)]
        for k, found in enumerate(arms):
            found |= {"learning_rate": rate if k else 0.1, "weight_decay": 0.0}
        return {"arms": arms, "flatness": [row(found["name"], side) for found, side in zip(arms, sides)]}

    pieces = [piece(0.1, 0, 1, -1), piece(0.1, 0, 1, 0), piece(0.1, 0, -1, 0), piece(0.3, 0, -1, -1)]
    pieces[0]["flatness"].append(row("SGD, lr 0.3, wd 0", 1))
    found = flatness_counts(pieces)
    column = found.headings.index(flatness.MEASURES["noise"])
    assert [(line[0], line[1], line[column]) for line in found.rows] == [
        ("SAM", "3", "2↑ 1↓"),
        ("SGD, twice as long", "4", "2↓"),
    ]


# The plan.


def test_every_piece_can_run_and_the_first_claims_are_all_there():
    for piece in PIECES.values():
        for plan in (piece.plan(), piece.quick_plan()):
            assert {a.name for a in plan.arms} >= {"SGD", "F-GR"}
            assert Plan.from_row(json.loads(json.dumps(plan.as_row()))) == plan
            assert plan.effort.search_epochs < plan.base.epochs
        if piece.settings_of:
            taken = {arm.name: Taken({"learning_rate": 0.1}, 0.8) for arm in PIECES[piece.settings_of].plan().arms}
            plan = piece.plan(None, taken)
            assert set(plan.taken) == {arm.name for arm in plan.arms} & set(taken)
            assert plan.tries_rates == (piece.base != PIECES[piece.settings_of].base)
            assert plan.tries_rates == piece.name.startswith("resnet-28")
            assert len(plan.taken) == len(plan.arms) if plan.tries_rates else len(plan.taken) >= 3
            assert Plan.from_row(json.loads(json.dumps(plan.as_row()))) == plan
            assert list(PIECES).index(piece.settings_of) < list(PIECES).index(piece.name)
    found = [a.name for a in PIECES["resnet-14-clean"].plan().arms]
    compared = ["F-GR", "B-GR", "DB", "SAM", "Split, ascent momentum", "F-GR, ε 0.02", "F-GR, ε 0.5", "cheap"]
    assert found == ["SGD", *compared, "SGD, twice as long"]
    assert set(pieces.QUICK) < set(PIECES)


# The whole.


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Four files that pass for Fashion-MNIST, and two pieces of a few runs."""
    dice = np.random.default_rng(0)
    files, digests = {}, {}
    for half, part, count in (("train", "train", 144), ("test", "t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (dice.integers(0, 60, (count, 8, 8)) + 19 * labels[:, None, None]).astype(np.uint8)
        for what, kind, array in (("images", "idx3", images), ("labels", "idx1", labels)):
            files[f"{part}-{what}-{kind}-ubyte"] = array
            digests[f"{half} {what}"] = hashlib.sha256(encoded(array)).hexdigest()
    write(tmp_path / "clothes", files)
    monkeypatch.setattr(idx, "FASHION_MNIST", digests)
    idx._read.cache_clear()
    small = {
        name: Piece(name, name, replace(PIECES[name].base, num_train=132), ("F-GR",))
        for name in ("resnet-14-noisy", "resnet-14-clean")
    }
    effort = Effort(1, 2, 1, 1, 1, 1)

    def quick(piece, path=None, taken=None):
        base = replace(piece.base, path=path, shrink=2, width=2, batch_size=33, epochs=2)
        return piece._taking(Plan(base, piece.methods, effort, has_opponent=False, keeps_models=True), taken)

    monkeypatch.setattr(Piece, "quick_plan", quick)
    for module in (pieces, run, record):
        monkeypatch.setattr(module, "PIECES", small)
    for module in (pieces, run):
        monkeypatch.setattr(module, "QUICK", tuple(small))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    idx._read.cache_clear()


def test_pieces_are_kept_and_gone_on_with(clothes, capsys):
    words = ["images", "--quick", "--path", "clothes", "--workers", "1"]
    assert main([*words, "--only", "resnet-14-noisy", "--out", "a"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 pieces are here; not yet played: resnet-14-clean" in " ".join(printed.split())
    first = (clothes / "a" / "resnet-14-noisy" / "results.json").read_bytes()
    assert {path.name for path in (clothes / "a" / "resnet-14-noisy" / "models").iterdir()} == {
        f"{name}-{seed}.safetensors" for name in ("SGD", "F-GR") for seed in (0, 1)
    }
    assert main(["images", "--resume", "a", "--workers", "1", "--write", "images.md"]) == 0
    assert "All 2 pieces are here." in " ".join(capsys.readouterr().out.split())
    assert (clothes / "a" / "resnet-14-noisy" / "results.json").read_bytes() == first
    results = json.loads((clothes / "a" / "results.json").read_text(encoding="utf-8"))
    assert (results["missing"], [piece["name"] for piece in results["pieces"]]) == ([], list(run.QUICK))
    for piece in results["pieces"]:
        assert [row["models"] for row in piece["flatness"]] == [2, 2]
        own = read_record(clothes / "a" / piece["name"] / "results.json")
        assert piece["claims"][0]["difference"]["mean"] == pytest.approx(own["arms"][1]["difference"]["mean"])
    text = (clothes / "images.md").read_text(encoding="utf-8")
    assert text == markdown(page(results, "images.json"), "figures/images-")
    assert (clothes / "figures" / "images-gains.svg").is_file()


def test_a_page_keeps_the_pieces_that_were_played_elsewhere(clothes, capsys):
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--write", "images.md", "--only"]
    assert main([*words, "resnet-14-noisy", "--out", "a"]) == 0
    first = read_record(clothes / "images.json")
    shutil.rmtree(clothes / "a")  # as folders of runs get lost
    assert main([*words, "resnet-14-clean", "--out", "b"]) == 0
    held = read_record(clothes / "images.json")
    assert [piece["name"] for piece in held["pieces"]] == ["resnet-14-noisy", "resnet-14-clean"]
    assert held["pieces"][0] == first["pieces"][0]
    assert held["training_seconds"] == sum(piece["seconds"] for piece in held["pieces"])
    text = (clothes / "images.md").read_text(encoding="utf-8")
    assert "All 2 pieces are here." in text
    assert "[images.json](images.json), with each seed's score. " in text
    assert text == markdown(page(held, "images.json"), "figures/images-")
    assert "1 of 2 pieces are here" in (clothes / "b" / "images.md").read_text(encoding="utf-8")
    assert read_record(clothes / "b" / "results.json")["missing"] == ["resnet-14-noisy"]


def test_a_piece_takes_the_settings_of_another(clothes, monkeypatch, capsys):
    larger = replace(run.PIECES["resnet-14-noisy"], name="resnet-28-noisy", settings_of="resnet-14-noisy")
    larger = replace(larger, base=replace(larger.base, channels_last=True))
    monkeypatch.setitem(run.PIECES, larger.name, larger)
    monkeypatch.setattr(run, "QUICK", ("resnet-14-noisy", larger.name))
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--write", "images.md", "--only"]
    assert main([*words, larger.name, "--out", "a"]) == 2
    error = capsys.readouterr().err
    assert "resnet-28-noisy takes its settings from resnet-14-noisy, which is neither of this study nor in" in error
    assert "play that first, with --only resnet-14-noisy" in error
    assert not (clothes / "a").exists()
    assert main([*words, "resnet-14-noisy", larger.name, "--out", "a"]) == 0
    assert main(["images", "--resume", "a", "--workers", "1", "--write", "images.md"]) == 0
    first, second = read_record(clothes / "images.json")["pieces"]
    assert second["name"] == larger.name
    for there, here in zip(first["arms"], second["arms"]):
        assert [there[key] for key in ("name", "weight_decay", "settings")] == [
            here[key] for key in ("name", "weight_decay", "settings")
        ]
        assert here["tried"] >= 3
        assert round(here["learning_rate"] / there["learning_rate"], 2) in (0.33, 1.0, 3.0)
    text = (clothes / "images.md").read_text(encoding="utf-8")
    assert "the settings of `resnet-14-noisy`, each at the best of three learning rates; 2 test seeds" in text
    assert main([*words, larger.name, "--out", "b"]) == 0  # from the record beside the page
    again = read_record(clothes / "b" / larger.name / "results.json")["arms"]
    assert [arm["scores"] for arm in again] == [arm["scores"] for arm in second["arms"]]


def test_settings_of_an_earlier_plan_are_not_taken(clothes, monkeypatch, capsys):
    larger = replace(run.PIECES["resnet-14-noisy"], name="resnet-28-noisy", settings_of="resnet-14-noisy")
    monkeypatch.setitem(run.PIECES, larger.name, larger)
    monkeypatch.setattr(run, "QUICK", ("resnet-14-noisy", larger.name))
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--write", "images.md", "--only"]
    assert main([*words, "resnet-14-noisy", "--out", "a"]) == 0
    quick = Piece.quick_plan
    monkeypatch.setattr(Piece, "quick_plan", lambda piece, *args: replace(quick(piece, *args), is_thorough=False))
    for where in (["--out", "b"], ["--resume", "a"]):
        line = [*words, larger.name, *where] if where[0] == "--out" else ["images", *where, "--only", larger.name]
        assert main(line) == 2
        assert "by the plan of this version: play that first" in capsys.readouterr().err
    assert not (clothes / "b").exists()
    assert not (clothes / "a" / larger.name).exists()


def test_a_piece_searches_only_for_the_arms_that_another_lacks(clothes, monkeypatch, capsys):
    more = replace(run.PIECES["resnet-14-noisy"], name="resnet-14-scale", methods=("F-GR", "MSAM"))
    more = replace(more, settings_of="resnet-14-noisy", measures_flatness=False)
    monkeypatch.setitem(run.PIECES, more.name, more)
    monkeypatch.setattr(run, "QUICK", ("resnet-14-noisy", more.name))
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--write", "images.md", "--out", "a"]
    assert main(words) == 0
    first, second = read_record(clothes / "images.json")["pieces"]
    assert [arm["name"] for arm in second["arms"]] == ["SGD", "F-GR", "MSAM"]
    assert [arm["tried"] for arm in second["arms"]] == [0, 0, 1]
    assert [arm["scores"] for arm in second["arms"][:2]] == [arm["scores"] for arm in first["arms"]]
    assert not second["is_earlier"]
    text = (clothes / "images.md").read_text(encoding="utf-8")
    assert "; SGD and F-GR with the settings of `resnet-14-noisy`, whose validation this is; 1 candidate for" in text


def test_what_another_plan_gave_does_not_stay_on_the_page(clothes, monkeypatch):
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--write", "images.md", "--only"]
    assert main([*words, "resnet-14-noisy", "--out", "a"]) == 0
    quick = Piece.quick_plan
    monkeypatch.setattr(Piece, "quick_plan", lambda piece, *args: replace(quick(piece, *args), first_seed=7))
    assert main([*words, "resnet-14-clean", "--out", "b"]) == 0
    assert read_record(clothes / "images.json")["missing"] == ["resnet-14-noisy"]


def test_what_was_searched_for_otherwise_stays_apart(clothes, monkeypatch):
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--write", "images.md", "--only"]
    assert main([*words, "resnet-14-noisy", "--out", "a"]) == 0
    quick = Piece.quick_plan

    def longer(piece, *args):
        plan = quick(piece, *args)
        return replace(plan, effort=replace(plan.effort, trials=2))

    monkeypatch.setattr(Piece, "quick_plan", longer)
    assert main([*words, "resnet-14-clean", "--out", "b"]) == 0
    held = read_record(clothes / "images.json")
    assert [piece["is_earlier"] for piece in held["pieces"]] == [True, False]
    assert held["missing"] == ["resnet-14-noisy"]
    text = (clothes / "images.md").read_text(encoding="utf-8")
    assert "1 of 2 pieces are here by the plan of this version; not yet played: resnet-14-noisy" in text
    assert "**Read this first.** resnet-14-noisy † were played by an earlier plan" in text
    assert "Of 1 reading of the claims 0 hold, 0 fail and 1 is undecided: *gain* holds in 0 of 1.\n" in text
    assert "### resnet-14-noisy †" in text
    assert main([*words, "resnet-14-noisy", "--out", "c"]) == 0
    assert "†" not in (clothes / "images.md").read_text(encoding="utf-8")
    assert main(["images", "--resume", "a", "--only", "resnet-14-clean", "--workers", "1", "--write", "images.md"]) == 0
    held = read_record(clothes / "a" / "results.json")
    assert [piece["is_earlier"] for piece in held["pieces"]] == [True, False]  # what the folder has
    assert "†" not in (clothes / "images.md").read_text(encoding="utf-8")  # the record has a better one


def test_a_piece_that_was_played_before_an_arm_was_planned_stays_and_says_so(clothes, monkeypatch):
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--write", "images.md", "--only"]
    assert main([*words, "resnet-14-noisy", "--out", "a"]) == 0
    for name, piece in run.PIECES.items():
        monkeypatch.setitem(run.PIECES, name, replace(piece, methods=(*piece.methods, "MSAM")))
    assert main([*words, "resnet-14-clean", "--out", "b"]) == 0
    held = read_record(clothes / "images.json")
    assert [piece["is_earlier"] for piece in held["pieces"]] == [False, False]
    lacking = "All 2 pieces are here. Arms not yet played: resnet-14-noisy (MSAM)."
    assert lacking in (clothes / "images.md").read_text(encoding="utf-8")
    assert main([*words, "resnet-14-noisy", "--out", "c"]) == 0
    assert main(["images", "--resume", "a", "--only", "resnet-14-clean", "--workers", "1", "--write", "images.md"]) == 0
    assert "not yet played" not in (clothes / "images.md").read_text(encoding="utf-8")  # the record has one with more


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ('{"command": "gradreg images", "is_quick": false, "pieces": []}', "is the record of a full study"),
        ('{"command": "gradreg images", "is_quick": true, "check": "0"}', "must be its record, and was changed after"),
        ('{"command": "gradreg claims"}', "must be its record, and is of something else"),
        ("no", "must be its record, and is not JSON"),
    ],
)
def test_a_record_that_would_be_lost_is_refused(held, message, clothes, capsys):
    (clothes / "images.json").write_text(held)
    assert main(["images", "--quick", "--path", "clothes", "--write", "images.md", "--out", "a"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (clothes / "images.json").read_text() == held
    assert not (clothes / "a").exists()


def test_where_single_seeds_are_lost_the_page_says_so():
    row = piece_row(PIECES["resnet-14-noisy"], results_of(**{"SGD": [0.8, 0.7], "F-GR": [0.9, 0.6]}), [])
    kept = {"pieces": [row], "missing": [], "is_quick": False, "training_seconds": 1.0, **provenance("gradreg images")}
    assert page(kept, "a.json").blocks[-1].startswith("Every number of this page is in [a.json](a.json), with each")
    for found in row["arms"]:
        del found["scores"]
    assert "(not of resnet-14-noisy: there, as this page has them)" in page(kept, "a.json").blocks[-1]


def test_the_controls_are_played_once_and_are_on_the_page(clothes, monkeypatch):
    name, other = "resnet-14-noisy", "F-GR, weight_decay 0.5"
    methods = ("F-GR", "F-GR:weight_decay=0.5")
    monkeypatch.setitem(run.PIECES, name, replace(run.PIECES[name], methods=methods, measures_flatness=False))
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--only", name, "--write", "a.md"]
    assert main([*words, "--out", "a"]) == 0
    path = clothes / "a" / name / run.CONTROLS
    lines = kept_lines(path)
    (piece,) = read_record(clothes / "a.json")["pieces"]
    row = next(row for row in piece["controls"] if row["name"] == other)
    arm = next(arm for arm in piece["arms"] if arm["name"] == other)
    there = [row["score"] for row in lines if row["weight_decay"] == 0.5]
    assert len(there) == 2
    difference = sum(a - b for a, b in zip(arm["scores"], there)) / 2
    assert row["difference"]["mean"] == pytest.approx(difference)
    text = (clothes / "a.md").read_text(encoding="utf-8")
    assert "| F-GR, weight\\_decay 0.5 | 0.1, 0.5 |" in text
    path.write_text("".join(f"{json.dumps(row)}\n" for row in lines[1:]), encoding="utf-8")
    assert main(["images", "--resume", "a", "--only", name, "--workers", "1"]) == 0
    assert kept_lines(path) == [*lines[1:], lines[0]]


def test_the_models_of_the_controls_are_measured_beside_the_arms(clothes, monkeypatch):
    """Also those of a folder that an earlier version began, which kept no such model and had fewer measures."""
    name, there, other = "resnet-14-noisy", "SGD, lr 0.1, wd 0.5", "F-GR:weight_decay=0.5"
    monkeypatch.setitem(run.PIECES, name, replace(run.PIECES[name], methods=("F-GR", other)))
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--only", name, "--write", "a.md"]
    assert main([*words, "--out", "a"]) == 0
    (piece,) = read_record(clothes / "a.json")["pieces"]
    rows = {row["name"]: row for row in piece["flatness"]}
    assert {"SGD", "F-GR", "F-GR, weight_decay 0.5", there} <= set(rows)
    lengths = {name: row["measures"]["length"] for name, row in rows.items()}
    assert lengths[there]["side"] == -1  # shorter, by weight decay alone
    assert lengths[there]["mean"] == pytest.approx(lengths["F-GR, weight_decay 0.5"]["mean"], rel=0.2)
    assert "another learning rate or weight decay than SGD, compare it with the row" in (clothes / "a.md").read_text()
    place = clothes / "a" / name / run.FLATNESS
    lines = [{key: value for key, value in row.items() if key not in ("length", "loss")} for row in kept_lines(place)]
    place.write_text("".join(f"{json.dumps(row)}\n" for row in lines if row["arm"] != there), encoding="utf-8")
    for path in (clothes / "a" / name / "models").glob("*wd*"):
        path.unlink()
    assert main(["images", "--resume", "a", "--only", name, "--workers", "1", "--write", "a.md"]) == 0
    assert read_record(clothes / "a.json")["pieces"][0]["flatness"] == piece["flatness"]


def test_what_was_measured_is_not_measured_again(clothes, monkeypatch):
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--only", "resnet-14-noisy", "--out", "a"]
    calls = []

    def stopped(kept):
        calls.append(kept)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return flatness.measure(kept)

    monkeypatch.setattr(run, "measure", stopped)
    assert main(words) == 130
    assert main(["images", "--resume", "a", "--only", "resnet-14-noisy", "--workers", "1"]) == 0
    assert len(calls) == 3 + 2
    assert len((clothes / "a" / "resnet-14-noisy" / run.FLATNESS).read_text(encoding="utf-8").splitlines()) == 4


def test_a_model_of_other_settings_is_measured_anew(clothes):
    """The file of an arm's model has the same name whatever its settings; of two lines the later one counts."""
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--only", "resnet-14-noisy", "--out", "a"]
    assert main(words) == 0
    place = clothes / "a" / "resnet-14-noisy" / run.FLATNESS
    true = kept_lines(place)
    before = [{**row, "length": 99.0, "point": {**row["point"], "weight_decay": 0.7}} for row in true]
    before = [row if row["arm"] == "F-GR" else old for row, old in zip(before, true)]
    place.write_text("".join(f"{json.dumps(row)}\n" for row in before), encoding="utf-8")
    assert main(["images", "--resume", "a", "--only", "resnet-14-noisy", "--workers", "1", "--write", "a.md"]) == 0
    lines = kept_lines(place)
    assert [row["arm"] for row in lines[len(true) :]] == ["F-GR"] * 2
    (piece,) = read_record(clothes / "a.json")["pieces"]
    lengths = {row["name"]: row["measures"]["length"]["mean"] for row in piece["flatness"]}
    assert lengths["F-GR"] == pytest.approx(sum(row["length"] for row in true if row["arm"] == "F-GR") / 2)


def test_models_are_kept_where_flatness_is_measured():
    for piece in PIECES.values():
        assert piece.plan().keeps_models == piece.measures_flatness
    assert {name for name, piece in PIECES.items() if not piece.measures_flatness} == {
        "resnet-14-few-noisy",
        "resnet-14-few-smooth",
        "resnet-14-modes",
        "resnet-14-scale",
        "vit-28-modes",
    }


def test_the_models_of_a_piece_of_modes_are_not_kept_and_not_measured(clothes, monkeypatch):
    name = "resnet-14-noisy"
    monkeypatch.setitem(run.PIECES, name, replace(run.PIECES[name], measures_flatness=False))
    monkeypatch.setattr(run, "measure", None)
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--only", name, "--out", "a"]
    assert main(words) == 0
    assert not (clothes / "a" / name / run.FLATNESS).exists()
    (row,) = json.loads((clothes / "a" / "results.json").read_text(encoding="utf-8"))["pieces"]
    assert row["flatness"] == []


REFUSED = [
    ("images --only resnet", "--only must be one or more of resnet-14-noisy, "),
    ("images --only", "--only"),
    ("images --resume nowhere", "--resume must be a folder of gradreg images, got 'nowhere': No such file"),
    ("images --resume a --quick", "--quick must be left out with --resume"),
    ("images --resume a --out b", "--out must be left out with --resume"),
    ("images --path nowhere", "path must be a folder with IDX files, got 'nowhere'"),
    ("images --write page.html", "--write must be the path of a page that ends in .md"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_words_are_refused_in_one_line(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_where_the_data_is_not_there_both_ways_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "none")
    assert main(["images"]) == 2
    error = capsys.readouterr().err
    assert "apt install dataset-fashion-mnist" in error
    assert "--path" in error
    assert not list(tmp_path.iterdir())


def test_a_piece_of_another_version_is_not_mixed_in(clothes, monkeypatch, capsys):
    words = ["images", "--quick", "--path", "clothes", "--workers", "1", "--only", "resnet-14-noisy", "--out", "a"]
    assert main(words) == 0
    quick = Piece.quick_plan
    monkeypatch.setattr(Piece, "quick_plan", lambda piece, *args: replace(quick(piece, *args), first_seed=7))
    assert main(["images", "--resume", "a", "--workers", "1"]) == 2
    assert "resnet-14-noisy must be that of this version" in capsys.readouterr().err
    shutil.rmtree(clothes / "a")


def test_a_goal_is_held_against_the_modes_of_every_piece():
    """Pieces have modes of their own: one that is in the second alone counts where it is."""

    def piece(name, **kept):
        cost = {"median": 2.0, "low": 2.0, "high": 2.0}
        rows = [
            {"name": arm, "cost": {**cost, "median": c}, "retention": {"mean": m, "low": low, "high": 2.0}}
            for arm, (c, m, low) in kept.items()
        ]
        ends = {"cost": cost, "difference": DIFFERENCE, "verdict": stats.BETTER}
        arms = [{"name": arm, **ends} for arm in ("SGD", "F-GR")]
        return {"about": name, "arms": arms, "kept": rows, "plan": {"base": {"about": name}, "methods": [*kept]}}

    first = piece("a", cheap=(1.05, 0.95, 0.92))
    second = piece("b", cheap=(1.05, 0.95, 0.8), MSAM=(1.05, 1.0, 0.95), SAM=(2.0, 1.5, 1.2))
    least, _, _ = goals(as_tasks([first, second, {**second, "kept": []}]))
    assert (least["reached"], least["nearly"]) == (["MSAM"], ["cheap"])


def kept(arms, base, methods):
    cost = {"median": 1.5, "low": 1.5, "high": 1.5}
    rows = [{"name": name, "cost": cost, "retention": {"mean": 1.0, "low": 0.9, "high": 1.1}} for name in arms]
    verdict = stats.BETTER if arms else stats.UNDECIDED
    ends = [{"name": name, "cost": cost, "difference": DIFFERENCE, "verdict": verdict} for name in ("SGD", "F-GR")]
    return {"about": "clothes", "arms": ends, "kept": rows, "plan": {"base": base, "methods": list(methods)}}


def test_pieces_of_one_task_are_one_task_of_the_frontier():
    claims = kept(["SAM", "DB", "cheap"], {"data": "fashion-mnist"}, pieces.CLAIMED)  # kept before a field came
    modes = kept([arm for arm in ARMS if arm != "SAM"], asdict(PIECES["resnet-14-few"].base), pieces.MODES)
    modes["plan"]["base"] = asdict(RunConfig(data="fashion-mnist"))
    few = kept(["cheap"], asdict(PIECES["resnet-14-few"].base), pieces.CHEAPER)
    (found,) = real_tasks({"pieces": [claims, modes, few]})
    names = [row["name"] for row in found["modes"]]
    assert sorted(names) == sorted({PLAIN.name, FULL.name, *ARMS.values()})
    assert found["gain"]["mean"] == pytest.approx(-0.4)
    assert real_tasks({"pieces": [claims, few]}) == []


def test_the_frontier_is_told_of_a_real_task_on_which_nothing_is_gained():
    """It does not judge, and it is not passed over in silence."""
    gains = kept([arm for arm in ARMS if arm != "SAM"], asdict(PIECES["resnet-14-few"].base), pieces.MODES)
    nothing = {**kept([], asdict(PIECES["vit-28-modes"].base), pieces.MODES), "about": "more clothes"}
    diverged = {**nothing, "arms": [{**row, "difference": None} for row in nothing["arms"]]}
    fewer = kept([], asdict(PIECES["vit-28-few"].base), pieces.CHEAPER)
    found = real_tasks({"pieces": [nothing, diverged, gains, fewer]})
    assert [(task["name"], task["verdict"]) for task in found] == [
        ("clothes", stats.BETTER),
        ("more clothes", stats.UNDECIDED),
    ]
    assert [task["name"] for task in judging(found)] == ["clothes"]
    assert "not beyond noise" in " ".join(sentences({"real": found, "tasks": [], "goals": []}))


def test_the_frontier_knows_the_arms_of_the_modes():
    arms = {arm.name: arm for arm in PIECES["resnet-14-modes"].plan().arms}
    assert set(arms) - {"SGD", "F-GR"} == set(ARMS) - {"SAM"}
    assert set(ARMS.values()) <= set(MODES)
    for name, mode in ARMS.items():
        if name not in ("SAM", "SGD, twice as long"):
            fixed = {**arms[name].fixed, **arms[name].settings[0]}
            assert arms[name].method == MODES[mode].method
            assert {key: fixed.get(key) for key in MODES[mode].fixed if key != "epsilon"} == {
                key: value for key, value in MODES[mode].fixed.items() if key != "epsilon"
            }


def test_claims_that_do_not_hold_are_named():
    def claim(key, verdict):
        return {"key": key, "first": "F-GR", "second": "B-GR", "verdict": verdict, "difference": DIFFERENCE}

    pieces = [{"name": "resnet", "claims": [claim("b1", "holds"), claim("b2", "does not hold here")]}]
    said = judged({"pieces": pieces})
    assert "1 holds, 1 fails and 0 are undecided" in said
    assert "**Does not hold here:** b2 on resnet (F-GR − B-GR −0.4 (−0.7 to −0.1))" in said
    assert "Does not hold" not in judged({"pieces": [{"name": "resnet", "claims": [claim("b1", "holds")]}]})
    assert judged({"pieces": []}) == "No claim has been judged yet."


def test_where_training_for_longer_harms_is_said():
    def piece(verdict, longer):
        claims = [{"key": "equal time", "first": "F-GR", "second": "SGD", "verdict": verdict, "difference": DIFFERENCE}]
        return {
            "name": "vit",
            "claims": claims,
            "arms": [arm("SGD, twice as long", [], is_opponent=True, verdict=longer)],
        }

    pieces = [piece(HOLDS, stats.WORSE), piece(HOLDS, stats.UNDECIDED), piece(UNDECIDED, stats.WORSE)]
    said = judged({"pieces": pieces})
    assert (
        "*equal time* holds in 2 of 3. In 1 of the 2 at equal time training for twice as long is itself worse" in said
    )
    assert "itself worse" not in judged({"pieces": pieces[1:]})


DIFFERENCE = {"mean": -0.004, "low": -0.007, "high": -0.001}


def test_lines_of_before_a_measure_came_leave_it_open():
    models = [
        {"arm": arm, "seed": seed, **dict.fromkeys(flatness.MEASURES, 0.5)} for arm in ("SGD", "SAM") for seed in (0, 1)
    ]
    for model in models:
        del model["sure"]
    rows = flatness_rows(models, ["SGD", "SAM"])
    assert all(row["measures"]["sure"] == {"mean": None, "side": 0} for row in rows)
    assert all(row["measures"]["ece"]["mean"] == 0.5 for row in rows)
