"""Checkpoints: what is written comes back exactly, and what is not whole does not count."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gradreg.lab.folder import BadInput
from gradreg.lab.train import checkpoint
from gradreg.lab.train.checkpoint import MANIFEST, MODEL, STATE, TENSORS, Damaged

FILES = (MODEL, TENSORS, STATE, MANIFEST)


def state(value=0.0):
    tied = torch.full((2, 3), value)
    return {
        "model": {"a.weight": tied, "b.weight": tied, "count": torch.tensor(3), "half": torch.ones(2).bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(4.0), "momentum_buffer": torch.rand(3, 2).t()}, 1: {}},
            "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "nesterov": False}],
        },
        "random": (3, (1, 2, 2**32 - 1), None),
        "odd": {"inf": float("inf"), "nan": [float("nan")], "$x": 1, "empty": torch.zeros(0)},
    }


def assert_equal(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert_equal(a, b)
    else:
        assert found == expected or (found != found and expected != expected)


def test_a_state_comes_back_exactly(tmp_path):
    written = state()
    checkpoint.write(tmp_path / "epoch-000001", written)
    found = checkpoint.read(tmp_path / "epoch-000001")
    assert_equal(
        {key: found[key] for key in written if key != "model"}, {k: v for k, v in written.items() if k != "model"}
    )
    for model in (found["model"], checkpoint.read_model(tmp_path / "epoch-000001")):
        assert_equal(dict(sorted(model.items())), dict(sorted(written["model"].items())))


def test_the_weights_are_plain_safetensors_and_the_rest_is_strict_json(tmp_path):
    checkpoint.write(tmp_path / "epoch-000001", state(2.0))
    assert sorted(p.name for p in (tmp_path / "epoch-000001").iterdir()) == sorted(FILES)
    assert torch.equal(load_file(tmp_path / "epoch-000001" / MODEL)["a.weight"], torch.full((2, 3), 2.0))

    def refuse(constant):
        raise AssertionError(constant)

    for name in (STATE, MANIFEST):
        json.loads((tmp_path / "epoch-000001" / name).read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_a_checkpoint_cannot_hold_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"cannot hold object \(state.optimizer.x\)"):
        checkpoint.write(tmp_path / "epoch-000001", {"model": {}, "optimizer": {"x": object()}})
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


DAMAGES = [(damage, name) for name in FILES for damage in (cut, flip, remove)]


@pytest.mark.parametrize(("damage", "name"), DAMAGES, ids=[f"{damage.__name__} {name}" for damage, name in DAMAGES])
def test_damage_names_its_file_and_falls_back_to_the_last_good_one(damage, name, tmp_path):
    for epoch in (1, 2, 3):
        checkpoint.write(tmp_path / checkpoint.name_of(epoch), state(epoch))
    damage(tmp_path / "epoch-000003" / name)
    if damage is flip and name == MANIFEST and checkpoint.is_whole(tmp_path / "epoch-000003"):
        pytest.skip("the bit is in the spelling of no file's entry")
    said = []
    assert checkpoint.last_good(tmp_path, said.append).name == "epoch-000002"
    assert len(said) == 1
    assert "epoch-000003" in said[0]
    assert "Falling back to" in said[0]
    assert "epoch-000002" in said[0]
    if name != MANIFEST:
        assert name in said[0]
    with pytest.raises(Damaged, match="epoch-000003"):
        checkpoint.read(tmp_path / "epoch-000003")


def test_without_a_good_one_all_damages_are_told(tmp_path):
    for epoch in (1, 2):
        checkpoint.write(tmp_path / checkpoint.name_of(epoch), state())
        cut(tmp_path / checkpoint.name_of(epoch) / MODEL)
    with pytest.raises(BadInput, match=r"no checkpoint that can be used.*epoch-000002.*epoch-000001") as error:
        checkpoint.last_good(tmp_path, lambda line: None)
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="no checkpoint that can be used"):
        checkpoint.last_good(tmp_path / "nowhere", lambda line: None)


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"files": {}}', '{"files": {"model.safetensors": 3}}', "\x00", '{"files": null}'],
)
def test_a_manifest_of_another_kind_is_damage(manifest, tmp_path):
    checkpoint.write(tmp_path / "epoch-000001", state())
    (tmp_path / "epoch-000001" / MANIFEST).write_text(manifest, encoding="utf-8")
    with pytest.raises(Damaged, match=r"manifest\.json' is not the manifest of a checkpoint"):
        checkpoint.read(tmp_path / "epoch-000001")


@pytest.mark.parametrize("tree", ["{", '{"format": 2}', '{"format": 1, "state": {"x": {"$tensor": "nowhere"}}}', "[]"])
def test_a_state_of_another_kind_under_a_right_manifest_is_damage(tree, tmp_path):
    """A hash proves that a file is what was written, not that we wrote it."""
    place = tmp_path / "epoch-000001"
    checkpoint.write(place, state())
    manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][STATE] = checkpoint._write_file(place / STATE, tree.encode())
    (place / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert checkpoint.is_whole(place)
    with pytest.raises(Damaged, match="epoch-000001"):
        checkpoint.read(place)


def test_a_damaged_one_is_written_again_and_a_whole_one_is_left(tmp_path):
    place = tmp_path / "epoch-000001"
    checkpoint.write(place, state(1.0))
    checkpoint.write(place, state(2.0))
    assert checkpoint.read_model(place)["a.weight"][0, 0] == 1
    cut(place / MODEL)
    checkpoint.write(place, state(2.0))
    assert checkpoint.read_model(place)["a.weight"][0, 0] == 2


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_last_ones_are_kept(keep, tmp_path):
    (tmp_path / ".epoch-000009.partial").mkdir()
    for epoch, position in ((1, 0), (1, 5), (2, 0), (10, 0)):
        checkpoint.write(tmp_path / checkpoint.name_of(epoch, position), state())
        checkpoint.rotate(tmp_path / checkpoint.name_of(epoch, position), keep)
    names = ["epoch-000001", "epoch-000001-step-000000005", "epoch-000002", "epoch-000010"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names[-keep:]


def test_a_damaged_later_one_does_not_count_as_kept(tmp_path):
    for epoch in (8, 10):
        checkpoint.write(tmp_path / checkpoint.name_of(epoch), state())
    cut(tmp_path / "epoch-000010" / MODEL)
    checkpoint.write(tmp_path / "epoch-000009", state())
    checkpoint.rotate(tmp_path / "epoch-000009", keep=1)
    assert checkpoint.last_good(tmp_path, lambda line: None).name == "epoch-000009"


@pytest.mark.parametrize("failing", range(1, 8))
def test_a_full_disk_leaves_the_earlier_ones_and_nothing_half_made(failing, tmp_path, monkeypatch):
    checkpoint.write(tmp_path / "epoch-000001", state(1.0))
    calls = iter(range(1, 100))

    def full(descriptor):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    names = {"epoch-000001"}
    if failing > 6:  # 4 files, the folder, its parent
        checkpoint.write(tmp_path / "epoch-000002", state(2.0))
        names.add("epoch-000002")
    else:
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(tmp_path / "epoch-000002", state(2.0))
        if failing == 6:  # after the rename: it is there, and whole
            names.add("epoch-000002")
    assert {p.name for p in tmp_path.iterdir()} == names
    assert all(checkpoint.is_whole(tmp_path / name) for name in names)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import torch
from gradreg.lab.train import checkpoint
calls, real = iter(range(1, 100)), os.fsync
def kill(descriptor):
    real(descriptor)
    if next(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
checkpoint.write(Path(sys.argv[1]) / "epoch-000002", {"model": {"w": torch.ones(3)}, "x": torch.ones(2)})
"""


@pytest.mark.parametrize("moment", [1, 5])
def test_a_kill_while_writing_leaves_the_earlier_ones(moment, tmp_path):
    checkpoint.write(tmp_path / "epoch-000001", state(1.0))
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path, str(moment)], check=False)
    assert done.returncode == -9
    assert (tmp_path / ".epoch-000002.partial").exists()
    said = []
    assert checkpoint.last_good(tmp_path, said.append).name == "epoch-000001"
    assert said == []
    checkpoint.write(tmp_path / "epoch-000002", state(2.0))
    checkpoint.rotate(tmp_path / "epoch-000002", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-000001", "epoch-000002"]


def test_differences_are_told_in_words():
    one = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1)}
    other = {"a": torch.zeros(2), "b": torch.zeros(3, 3), "d": torch.zeros(1)}
    assert checkpoint.differences(one, one) == []
    assert checkpoint.differences(one, other) == [
        "c is missing",
        "d is not in the model",
        "b is (3, 3) float32 instead of (2, 3) float32",
    ]
    assert checkpoint.differences({"a": torch.zeros(2)}, {"a": torch.zeros(2).half()}) == [
        "a is (2,) float16 instead of (2,) float32"
    ]
