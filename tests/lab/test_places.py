"""Data of a run that is gone on with, or looked at, from elsewhere."""

import json
import shutil

import numpy as np
import pytest
import yaml

from gradreg.cli import main
from gradreg.lab.config import RunConfig
from gradreg.lab.data import places
from gradreg.lab.folder import BadInput

CONFIG = RunConfig(data="idx", path="data")
TRAIN = ["--data", "idx", "--path", "data", "--width", "4", "--batch-size", "4", "--epochs", "2", "--device", "cpu"]


def write_data(folder):
    """Four IDX files of random images."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(0)
    for part, count in (("train", 48), ("t10k", 10)):
        images = dice.integers(0, 256, (count, 6, 6), dtype=np.uint8)
        labels = (np.arange(count) % 4).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(bytes((0, 0, 8, array.ndim)) + shape + array.tobytes())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with data, from which commands run."""
    write_data(tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another folder, and the way there."""
    (tmp_path / "elsewhere").mkdir()
    return lambda: monkeypatch.chdir(tmp_path / "elsewhere")


def test_data_is_found_where_the_command_ran_before_it_is_looked_for_here(here, elsewhere, tmp_path):
    assert places.found(CONFIG, None) == "data"
    elsewhere()
    assert places.found(CONFIG, str(here)) == str(here / "data")
    write_data(tmp_path / "elsewhere" / "data")
    assert places.found(CONFIG, str(here)) == str(here / "data")
    shutil.rmtree(here / "data")
    assert places.found(CONFIG, str(here)) == "data"
    assert places.found(CONFIG, str(here), "new") == "new"


def test_data_that_is_gone_names_the_option(here):
    shutil.rmtree(here / "data")
    with pytest.raises(BadInput, match=r"--path must say where the data of the run is now: .* at '.*/here/data'"):
        places.found(CONFIG, str(here))
    assert places.found(RunConfig(data="hub", path="user/name"), str(here)) == "user/name"
    assert places.found(RunConfig(), None) is None


def test_a_path_stands_for_a_place_for_a_while_only():
    with places.standing_for("data", "/new"):
        assert places.now("data") == "/new"
    assert places.now("data") == "data"


def refusal(line, capsys):
    capsys.readouterr()
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_run_is_gone_on_with_and_looked_at_from_elsewhere(here, elsewhere, capsys):
    run = here / "run"
    assert main(["train", *TRAIN, "--out", "run"]) == 0
    whole = (run / "checkpoints/epoch-000002/model.safetensors").read_bytes()
    about = json.loads((run / "config.json").read_text())
    assert (about["config"]["path"], about["ran_in"]) == ("data", str(here))
    assert "--path data" in about["command"]
    shutil.rmtree(run / "checkpoints/epoch-000002")
    (run / "results.json").unlink()

    elsewhere()
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "checkpoints/epoch-000002/model.safetensors").read_bytes() == whole
    look = ["sharpness", str(run), "--probes", "0", "--eigenvalues", "0"]
    assert main(look) == 0

    (here / "data").rename(here / "moved")
    assert "--path must say where the data of the run is now" in refusal(look, capsys)
    assert main([*look, "--path", str(here / "moved"), "--out", str(here / "sharp")]) == 0
    sharp = json.loads((here / "sharp" / "results.json").read_text())
    assert sharp["command"].endswith(f" --device auto --path {here / 'moved'}")
    shutil.rmtree(run / "checkpoints/epoch-000002")
    (run / "results.json").unlink()
    assert "--path must say" in refusal(["train", "--resume", str(run)], capsys)
    assert main(["train", "--resume", str(run), "--path", str(here / "moved")]) == 0
    assert (run / "checkpoints/epoch-000002/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_sweep_is_gone_on_with_from_elsewhere(workers, here, elsewhere, capsys):
    base = {"data": "idx", "path": "data", "width": 4, "batch_size": 4, "epochs": 1, "device": "cpu"}
    grid = [{"method": "SGD"}, {"method": "DB", "gamma": 0.1}]
    (here / "sweep.yaml").write_text(yaml.safe_dump({"base": base, "grid": grid, "seeds": 2}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradreg.lab.study.workers.work_together", stop)
        assert main(["sweep", "sweep.yaml", "--out", "out", "--workers", workers]) == 130
    elsewhere()
    again = ["sweep", "--resume", str(here / "out"), "--workers", workers]
    (here / "data").rename(here / "moved")
    assert "--path must say where the data of the run is now" in refusal(again, capsys)
    assert main([*again, "--path", str(here / "moved")]) == 0
    rows = [json.loads(line) for line in (here / "out" / "runs.jsonl").read_text().splitlines()]
    assert {row["path"] for row in rows} == {"data"}
    assert len(rows) == 8
    (here / "moved").rename(here / "data")
    (here / "out" / "results.json").unlink()
    assert main(again) == 0


def stop(*_):
    raise KeyboardInterrupt
