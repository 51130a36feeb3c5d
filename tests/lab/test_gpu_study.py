"""`gradreg gpu`: its pieces on the CPU at toy size, what survives, and what the page says is missing.

The data is made here: four IDX files of random pixels, whose digests stand for those of Fashion-MNIST.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import encoded, write

from gradreg import cli
from gradreg.lab import batched
from gradreg.lab.comparison.plan import example
from gradreg.lab.cost import own, steps
from gradreg.lab.data import idx
from gradreg.lab.study import workers as workers_module
from gradreg.studies.gpu import page, play, run
from gradreg.studies.gpu.plan import PIECES, Plan, pieces

SIDE, TRAIN, TEST = 28, 120, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder, and the digests of what is in it."""
    folder, dice = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    files, digests = {}, {}
    for half, word, count in (("train", "train", TRAIN), ("t10k", "test", TEST)):
        images = dice.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            files[f"{half}-{what}-ubyte"] = array
            digests[f"{word} {what.split('-')[0]}"] = hashlib.sha256(encoded(array)).hexdigest()
    write(folder, files)
    return folder, digests


@pytest.fixture(autouse=True)
def _known_data(data, monkeypatch):
    idx._read.cache_clear()
    monkeypatch.setattr(idx, "FASHION_MNIST", data[1])
    yield
    idx._read.cache_clear()


@pytest.fixture
def quick(data, tmp_path, monkeypatch):
    """`gradreg gpu --quick` with some pieces; or with --resume, what is left of them."""
    monkeypatch.setattr(steps, "MOST_ROUNDS", 6)

    def call(*words, resume=False):
        where = ["--resume" if resume else "--out", str(tmp_path / "gpu"), *([] if resume else ["--quick"])]
        return cli.main(["gpu", *where, "--path", str(data[0]), "--workers", "1", "--device", "cpu", *words])

    return call


def results(tmp_path):
    return json.loads((tmp_path / "gpu" / "results.json").read_text(encoding="utf-8"))


def state(tmp_path):
    return {row["name"]: "whole" if row["is_whole"] else row["why"] for row in results(tmp_path)["pieces"]}


def first(folder):
    text = (folder / "gpu.md").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line and not line.startswith(("#", "<!--")))


# The plan.


def test_all_of_it_is_planned_for_25_minutes_in_pieces_of_8():
    assert sum(piece.minutes for piece in PIECES.values()) <= 25.5
    assert max(piece.minutes for piece in PIECES.values()) <= 8
    full = [piece.what.base for piece in PIECES.values() if isinstance(piece.what, Plan)]
    assert {config.data for config in full} == {"fashion-mnist"}
    assert [config.precision for config in full] == ["bf16", "fp32", "bf16", "bf16"]
    assert [piece.what.num_records for piece in PIECES.values() if isinstance(piece.what, Plan)] == [0] * 4


@pytest.mark.parametrize("is_quick", [False, True])
def test_the_batched_engine_takes_every_arm_of_the_mlp_and_no_network_with_batch_norm(is_quick, data, monkeypatch):
    task = batched.task_of
    smaller = {"path": str(data[0]), "num_train": 64, "batch_size": 16}  # the data of the tests is small
    monkeypatch.setattr(batched, "task_of", lambda config: task(replace(config, **smaller)))
    monkeypatch.setattr(batched, "trained", lambda config: task(replace(config, **smaller)))
    found = {}
    for name, piece in pieces(is_quick).items():
        if isinstance(piece.what, Plan):
            found[name] = {batched.is_worthwhile(example(piece.what, arm)) for arm in piece.what.arms}
    assert found == {"few": {False}, "mlp": {True}, "resnet-18": {False}, "wrn-16-4": {False}}


def test_a_dry_run_has_the_same_pieces():
    assert list(pieces(True)) == list(PIECES)
    for name, piece in pieces(True).items():
        assert type(piece.what) is type(PIECES[name].what)
        if isinstance(piece.what, Plan):
            assert piece.what.methods == PIECES[name].what.methods


# The command.


def test_a_dry_run_of_every_kind_of_piece(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(play, "ROOT", tmp_path)  # no clone: the tests of this one are run by the one who tests
    assert quick("--write", str(tmp_path / "gpu.md")) == 0
    left = {"tests": "the tests are in a clone of the repository"}
    left |= dict.fromkeys(("graph", "compiled"), "not on this device, a CPU")
    assert state(tmp_path) == {name: left.get(name, "whole") for name in PIECES}

    said = first(tmp_path)
    assert said.startswith("**This is a dry run at toy size, which shows that the command works and says nothing")
    assert "made of 7 of 10 pieces on a CPU; not whole: tests (the tests are in a clone of the repository)" in said
    written = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert page.NO_NUMBERS in written
    assert "| resnet-18 | claim (b): ResNet-18 on all rows | 7 |" in written
    assert "over SGD's" not in written
    shown = (tmp_path / "gpu" / "report.html").read_text(encoding="utf-8")
    for text in ("Time of a step, over SGD", "Peak memory of a step", "F-GR, ε 0.5 − F-GR, ε 0.02", "b2"):
        assert text in shown

    found = {row["name"]: row["result"] for row in results(tmp_path)["pieces"]}
    for way in ("eager", "bf16"):
        assert [m["name"] for m in found[way]["models"]] == ["MLP, 10 layers", "ResNet-18", "GPT, 4 layers"]
        assert all(row["time"]["low"] > 0 for m in found[way]["models"] for row in m["methods"])
    arms = {name: [row["name"] for row in found[name]["arms"]] for name in ("few", "mlp", "resnet-18", "wrn-16-4")}
    assert arms["few"][:5] == ["SGD", "F-GR", "DB", "SAM", "cheap"]
    assert arms["mlp"][-1] == "F-GR, ε 0.5"
    assert arms["resnet-18"] == arms["wrn-16-4"] == ["SGD", "F-GR", "B-GR", "SAM", "cheap"]
    assert found["resnet-18"]["plan"]["base"]["precision"] == "bf16"
    assert found["resnet-18"]["plan"]["base"]["channels_last"]
    assert {len(found[name]["seeds"]) for name in arms} == {2}
    assert found["grid"]["grids"][0]["verdict"] in ("reached", "missed", "undecided")

    def nothing(*_):
        raise AssertionError("a finished piece was played again")

    for kind in ("_steps", "_grid", "_comparison"):
        monkeypatch.setattr(play, kind, nothing)
    assert quick("--only", "eager", "grid", "few", resume=True) == 0
    assert len(results(tmp_path)["sittings"]) == 2


def stopping_at(count, monkeypatch, error=KeyboardInterrupt):
    """Runs are played, until so many have been begun."""
    begun, played = [], workers_module.run_all

    def stopping(jobs, workers):
        begun.extend(jobs)
        if len(begun) >= count:
            raise error
        yield from played(jobs, workers)

    monkeypatch.setattr(workers_module, "run_all", stopping)
    return begun


def test_an_interrupted_piece_shows_the_seeds_that_are_there_and_goes_on(quick, tmp_path, monkeypatch, capsys):
    toy = pieces(True)["wrn-16-4"]
    what = replace(toy.what, methods=("F-GR",), effort=replace(toy.what.effort, seeds=3), is_thorough=False)
    monkeypatch.setattr(run, "pieces", lambda is_quick: {**pieces(is_quick), "wrn-16-4": replace(toy, what=what)})
    with monkeypatch.context() as patch:
        stopping_at(9, patch)  # of 10: 2 candidates, each again for all epochs, and 3 seeds of both
        assert quick("--only", "wrn-16-4", "--write", str(tmp_path / "gpu.md")) == 130
    assert "finished runs are kept; go on with: gradreg gpu --resume" in capsys.readouterr().err
    assert state(tmp_path)["wrn-16-4"] == "2 of 3 seeds are shown"
    assert "made of 0 of 10 pieces" in first(tmp_path)
    assert "wrn-16-4 (2 of 3 seeds are shown)" in first(tmp_path)
    row = next(row for row in results(tmp_path)["pieces"] if row["name"] == "wrn-16-4")
    assert row["result"]["seeds"] == [0, 1]
    assert [arm["name"] for arm in row["result"]["arms"]] == ["SGD", "F-GR"]

    with monkeypatch.context() as patch:
        begun = stopping_at(99, patch)
        assert quick("--only", "wrn-16-4", resume=True) == 0
    assert {(job.config.method, job.config.seed) for job in begun} == {("SGD", 2), ("F-GR", 2)}
    assert len(begun) == 2  # nothing twice
    assert state(tmp_path)["wrn-16-4"] == "whole"
    again = next(row for row in results(tmp_path)["pieces"] if row["name"] == "wrn-16-4")["result"]
    assert [arm["scores"][:2] for arm in again["arms"]] == [arm["scores"] for arm in row["result"]["arms"]]


def test_a_piece_that_fails_takes_no_other_along(quick, tmp_path, monkeypatch, capsys):
    def broken(plan, way, has_memory):
        raise RuntimeError("device-side assert\ntriggered")

    monkeypatch.setattr(own, "measured", broken)
    monkeypatch.setattr(play, "_tests", lambda sitting: {"summary": "1 passed", "failed": []})
    with pytest.raises(SystemExit, match="1"):
        quick("--only", "bf16", "tests")
    assert state(tmp_path)["bf16"] == "failed with RuntimeError: device-side assert triggered"
    assert state(tmp_path)["tests"] == "whole"
    assert "bf16 failed: see" in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "gpu" / "bf16.error.txt").read_text(encoding="utf-8")


def test_a_full_disk_ends_it_and_says_what_is_kept(quick, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(play, "_steps", full)
    assert quick("--only", "eager", "few") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("gradreg: No space left on device; finished runs are kept; go on with: gradreg gpu")
    assert state(tmp_path)["few"] == ""


def test_a_compiler_that_may_not_write_its_cache_takes_no_other_along(quick, tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied", "cache")

    monkeypatch.setattr(play, "_steps", forbidden)
    monkeypatch.setattr(play, "_tests", lambda sitting: {"summary": "1 passed", "failed": []})
    with pytest.raises(SystemExit, match="1"):
        quick("--only", "tests", "eager")
    assert state(tmp_path)["eager"].startswith("failed with PermissionError")
    assert state(tmp_path)["tests"] == "whole"


def _whose(steps, sitting):
    return {"process": os.getpid()}


@pytest.mark.parametrize(("name", "is_apart"), [("graph", True), ("compiled", True), ("eager", False), ("bf16", False)])
def test_what_may_break_a_device_for_its_process_has_one_of_its_own(name, is_apart, tmp_path, monkeypatch):
    monkeypatch.setattr(play, "resolve", lambda device: torch.device("cuda"))
    monkeypatch.setattr(play, "_steps", _whose)
    found = play.play(name, PIECES[name], play.Sitting(tmp_path, is_quick=True))
    assert (found["process"] != os.getpid()) == is_apart


def test_a_method_that_the_device_does_not_bear_is_left_out(quick, tmp_path, monkeypatch):
    made = play.make_step

    def make(config, task, device):
        if config.method == "SAM":
            raise RuntimeError("not implemented for 'BFloat16'")
        return made(config, task, device)

    monkeypatch.setattr(play, "make_step", make)
    assert quick("--only", "wrn-16-4") == 0
    found = next(row for row in results(tmp_path)["pieces"] if row["name"] == "wrn-16-4")["result"]
    assert [row["name"] for row in found["arms"]] == ["SGD", "F-GR", "B-GR", "cheap"]
    said = "Left out: SAM, whose step raised RuntimeError: not implemented for &#39;BFloat16&#39;."
    assert said in (tmp_path / "gpu" / "report.html").read_text(encoding="utf-8")


def test_what_does_not_fit_into_the_minutes_is_not_begun(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "play", lambda name, piece, sitting: {"summary": "1 passed", "failed": []})
    monkeypatch.setattr(run, "pieces", lambda is_quick: PIECES)
    assert quick("--minutes", "3") == 0
    ended = [name for name, why in state(tmp_path).items() if why == "whole"]
    assert ended == [name for name, piece in PIECES.items() if piece.minutes < 3]
    assert state(tmp_path)["few"] == "no time was left for it"


def test_a_changed_bit_is_seen(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "play", lambda name, piece, sitting: {"summary": "1 passed", "failed": []})
    assert quick("--only", "tests") == 0
    file = tmp_path / "gpu" / "tests.json"
    file.write_text(file.read_text(encoding="utf-8").replace("1 passed", "2 passed"), encoding="utf-8")
    assert quick("--only", "tests", resume=True) == 0
    assert state(tmp_path)["tests"] == "tests.json was changed after it was written: its check does not fit"


KILLED = """
    import json, sys
    from gradreg.lab.data import idx
    from gradreg.cli import main
    idx.FASHION_MNIST = json.loads(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
"""


def test_a_kill_loses_no_finished_run(data, quick, tmp_path, monkeypatch):
    words = ["--quick", "--out", str(tmp_path / "gpu"), "--path", str(data[0]), "--workers", "1", "--only", "wrn-16-4"]
    code = [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(data[1]), "gpu", "--device", "cpu", *words]
    process = subprocess.Popen(code, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs, until = tmp_path / "gpu" / "wrn-16-4" / "runs.jsonl", time.monotonic() + 120
    while time.monotonic() < until and (not runs.exists() or runs.read_text(encoding="utf-8").count("\n") < 3):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = runs.read_text(encoding="utf-8").count("\n")
    assert 3 <= finished < 20
    begun = stopping_at(99, monkeypatch)
    assert quick("--only", "wrn-16-4", resume=True) == 0
    assert len(begun) <= runs.read_text(encoding="utf-8").count("\n") - finished
    assert state(tmp_path)["wrn-16-4"] == "whole"


# What is refused.


def refused(words, capsys):
    assert cli.main(["gpu", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_where_the_data_is_not_there_both_ways_to_get_it_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "nowhere")
    out = tmp_path / "gpu"
    said = refused(["--quick", "--out", str(out)], capsys)
    assert "data fashion-mnist was not found. Two ways to get it: on Debian and Ubuntu: apt install" in said
    assert "put the four files of https://github.com/zalandoresearch/fashion-mnist into a folder" in said
    assert not out.exists()
    said = refused(["--quick", "--path", str(tmp_path / "no")], capsys)
    assert "path must be a folder with IDX files" in said
    assert "Two ways to get Fashion-MNIST: on Debian and Ubuntu" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "resnet"], "--only must be one of tests, eager, bf16, graph, compiled, grid, few, mlp, resnet-18"),
        (["--only"], "--only must be one or more of tests"),
        (["--minutes", "0"], "--minutes must be a whole number from 1 to 1440, got '0'"),
        (["--resume", "results/gpu", "--quick"], "--resume must be given without --out and --quick"),
        (["--resume", "nowhere"], "--resume must be a folder of gradreg gpu, got 'nowhere': No such file or directory"),
        (["--device", "cuda"], "device must be cpu where 1 CUDA devices are needed and 0 found"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, says, capsys, tmp_path, monkeypatch):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    assert says in refused(words, capsys)


def test_a_dry_run_does_not_replace_what_a_gpu_measured(data, tmp_path, capsys):
    written = tmp_path / "gpu.md"
    written.write_text("# On a GPU\n\n<!-- Made by `gradreg gpu`: edit the command, not this page. -->\n\n**All**")
    said = refused(["--quick", "--path", str(data[0]), "--write", str(written)], capsys)
    assert "which a dry run does not replace" in said


def test_pieces_of_another_plan_are_not_gone_on_with(quick, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping_at(2, patch)
        assert quick("--only", "wrn-16-4") == 130
    toy = pieces(True)["wrn-16-4"]
    other = replace(toy, what=replace(toy.what, base=replace(toy.what.base, epochs=3)))
    monkeypatch.setattr(run, "pieces", lambda is_quick: {**pieces(is_quick), "wrn-16-4": other})
    with pytest.raises(SystemExit):
        quick("--only", "wrn-16-4", resume=True)
    assert "wrn-16-4 is of another plan: take it away" in state(tmp_path)["wrn-16-4"]


# The page of a GPU.


def test_the_first_sentence_of_a_page_says_what_is_missing():
    whole = {"is_whole": True, "device": "NVIDIA H100", "why": "", "name": "eager"}
    part = {"is_whole": False, "device": None, "why": "2 of 3 seeds are shown", "name": "few"}
    rows = {"is_quick": False, "pieces": [whole, part]}
    assert page.first(rows) == (
        "**This page is not whole**: made of 1 of 2 pieces on NVIDIA H100; not whole: few (2 of 3 seeds are shown)."
    )
    assert (
        page.first({**rows, "pieces": [whole]}) == "**All of it was measured**: made of 1 of 1 pieces on NVIDIA H100."
    )
    other = {**whole, "device": "NVIDIA H200"}
    assert "pieces on NVIDIA H100 and NVIDIA H200." in page.first({**rows, "pieces": [whole, other]})


def test_a_way_that_refuses_a_method_says_why(quick, tmp_path, monkeypatch):
    def capture(step):
        seen.append(step)
        if len(seen) % 9 == 5:
            raise RuntimeError("capture failed")
        return step

    seen = []
    monkeypatch.setattr(play, "captured", capture)
    monkeypatch.setattr(play.Steps, "needs_gpu", property(lambda self: False))
    assert quick("--only", "graph") == 0
    shown = (tmp_path / "gpu" / "report.html").read_text(encoding="utf-8")
    assert "DB with ResNet-18: RuntimeError: capture failed." in shown
    assert len(seen) == 27  # 6 methods, two kinds of steps of cheap, and Split, of 3 models


def test_the_page_of_the_repository_is_honest():
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    if page.DRY in text:
        assert page.NO_NUMBERS in text
