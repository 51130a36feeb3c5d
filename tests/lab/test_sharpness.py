import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from gradreg.cli import main
from gradreg.lab import sharpness
from gradreg.lab.data.parts import Part
from gradreg.lab.sharpness import Plan, load_trained, run_sharpness
from gradreg.lab.train import checkpoint

OPTIONS = "--width 8 --num-train 200 --random-labels 0.25 --epochs 2 --method f-gr --gamma 0.1 --epsilon 0.3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run, small enough for its whole Hessian."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *OPTIONS.split(), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def command(*options):
    return main(["sharpness", *map(str, options)])


def test_the_numbers_are_those_of_the_whole_hessian(trained, capsys):
    results = run_sharpness(Plan(trained, eigenvalues=3, probes=64), None, print)
    model, rows = load_trained(Plan(trained), print).model, load_trained(Plan(trained), print).rows
    values = {name: p.detach().double() for name, p in model.named_parameters()}

    def loss(flat):
        parts = flat.split([p.numel() for p in values.values()])
        own = {name: part.view(p.shape) for part, (name, p) in zip(parts, values.items())}
        return F.cross_entropy(functional_call(model, own, (rows.x.double(),)), rows.y)

    flat = torch.cat([p.flatten() for p in values.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    exact = torch.linalg.eigvalsh(hessian)
    exact = exact[exact.abs().argsort(descending=True)][:3].tolist()
    assert results["eigenvalues"]["values"] == pytest.approx(exact, rel=1e-4)
    assert max(results["eigenvalues"]["residuals"]) < 1e-3 * exact[0]
    trace = results["trace"]
    assert abs(trace["mean"] - hessian.trace().item()) < 4 * trace["standard_error"]
    printed = capsys.readouterr().out
    assert f"{trace['mean']:.5g} ± {trace['standard_error']:.2g} (standard error, 64 probes)" in printed
    assert f"{exact[0]:.3f}" in printed


def test_loss_and_gradient_are_those_that_training_ended_with(trained):
    """On the labels that were trained on, random ones included."""
    ended = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    results = run_sharpness(Plan(trained, probes=0, eigenvalues=0), None, print)
    assert results["grad_norm"] == pytest.approx(ended["grad_norm"], rel=1e-5)
    assert results["loss"] == pytest.approx(ended["train_loss"], rel=1e-6)
    assert results["trace"] is None
    assert results["eigenvalues"] is None
    on_test = run_sharpness(Plan(trained, part="test", probes=0, eigenvalues=0), None, print)
    assert on_test["accuracy"] == pytest.approx(ended["test_accuracy"], rel=1e-6)


def test_rows_in_many_batches_are_the_same_rows(trained, monkeypatch):
    whole = run_sharpness(Plan(trained, eigenvalues=2), None, print)
    monkeypatch.setattr(sharpness, "CHUNK", 40 * 64)
    cut = run_sharpness(Plan(trained, eigenvalues=2), None, print)
    assert len(sharpness.batches_of(load_trained(Plan(trained), print).rows)) == 4  # 64, 64, 64, 8
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert cut["trace"]["samples"] == pytest.approx(whole["trace"]["samples"], rel=1e-3)
    assert cut["eigenvalues"]["values"] == pytest.approx(whole["eigenvalues"]["values"], rel=1e-3)


def test_rows_of_characters_count_by_their_vectors():
    text = Part(torch.zeros(100, 64, dtype=torch.long), torch.zeros(100, 64, dtype=torch.long))
    assert len(sharpness.batches_of(text)[0][0]) == sharpness.CHUNK // 64**2


def test_a_named_checkpoint_and_the_first_rows(trained, capsys):
    assert command(trained / "checkpoints" / "epoch-000001", "--rows", 50, "--probes", 0, "--eigenvalues", 1) == 0
    printed = capsys.readouterr().out
    assert "epoch-000001: mnist1d" in " ".join(printed.split())
    assert "50 train rows" in printed
    assert "tr H" not in printed


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(run, tmp_path, capsys):
    last = run / "checkpoints" / "epoch-000002"
    with (last / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    out = tmp_path / "out"
    assert command(run, "--probes", 0, "--eigenvalues", 0, "--out", out) == 0
    error = capsys.readouterr().err
    assert "model.safetensors" in error
    assert "Falling back" in error
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["name"] == "epoch-000001"


def test_the_same_seed_gives_the_same_numbers(trained):
    def numbers(seed):
        results = run_sharpness(Plan(trained, seed=seed), None, print)
        return results["trace"]["samples"], results["eigenvalues"]["values"]

    assert numbers(3) == numbers(3)
    assert numbers(3)[0] != numbers(4)[0]


def test_another_architecture_is_refused(run, tmp_path, capsys):
    about = json.loads((run / "config.json").read_text(encoding="utf-8"))
    about["config"]["width"] = 9
    del about["check"]
    (run / "config.json").write_text(json.dumps(about), encoding="utf-8")
    refused(capsys, "must hold the model of config.json: 0.weight is (8, 40)", run, "--out", tmp_path / "out")


def test_a_run_that_diverged_is_refused(run, tmp_path, capsys):
    place = run / "checkpoints" / "epoch-000002"
    state = checkpoint.read(place)
    state["model"]["0.weight"].fill_(float("nan"))
    shutil.rmtree(place)
    checkpoint.write(place, state)
    refused(capsys, "must have a finite loss, got nan", run, "--out", tmp_path / "out")


def refused(capsys, message, *options):
    capsys.readouterr()
    assert command(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "--out" not in options or not options[options.index("--out") + 1].exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "all"], "--part must be one of train, validation, test, got 'all'"),
        (["--rows", "201"], "--rows must be a whole number from 1 to 200 (train rows), got '201'"),
        (["--rows", "0"], "--rows must be a whole number from 1"),
        (["--probes", "1"], "--probes must be 0 or a whole number from 2"),
        (["--eigenvalues", "491"], "--eigenvalues must be a whole number from 0 to 490 (the parameters), got '491'"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda"),
    ],
)
def test_bad_options_are_one_line_and_make_no_folder(options, message, trained, tmp_path, capsys):
    refused(capsys, message, trained, *options, "--out", tmp_path / "out")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    refused(capsys, "the path must be the folder of a run of gradreg train", tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"model": "mlp"}}', encoding="utf-8")
    refused(capsys, "has no checkpoint that can be used", tmp_path)
    refused(capsys, "the path must be", tmp_path / "nowhere")


def test_a_folder_that_holds_something_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert command(trained, "--out", tmp_path) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
