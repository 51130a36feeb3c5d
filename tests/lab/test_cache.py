"""Generated data that is kept: the same bits, and never in the way."""

import os
import sys
from pathlib import Path

import pytest
import torch

from gradreg.lab import data
from gradreg.lab.config import RunConfig
from gradreg.lab.data import text
from gradreg.lab.data.cache import cache_folder, kept

TENSORS = {"x": torch.linspace(0, 1, 12).reshape(4, 3), "y": torch.arange(4)}


class Generator:
    """Counts how often it is asked."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return TENSORS


@pytest.fixture
def make():
    return Generator()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_same(found):
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], TENSORS[key]) and found[key].dtype == TENSORS[key].dtype for key in TENSORS)


def test_data_is_made_once_for_the_same_settings(folder, make):
    assert_same(kept("toy", {"rows": 4}, make))
    assert_same(kept("toy", {"rows": 4}, make))
    assert make.calls == 1
    kept("toy", {"rows": 5}, make)
    kept("other", {"rows": 4}, make)
    assert make.calls == 3
    assert len(list(folder.iterdir())) == 3  # and no partial file


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "text", "another's"])
def test_a_damaged_file_is_made_again(folder, make, damage):
    kept("toy", {"rows": 4}, make)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "another's":
        kept("toy", {"rows": 5}, make)
        (other,) = set(folder.iterdir()) - {path}
        wrong = other.read_bytes()
    else:
        wrong = {
            "a bit": content[:-1] + bytes([content[-1] ^ 1]),
            "cut": content[:40],
            "empty": b"",
            "text": b"x" * 99,
        }[damage]
    path.write_bytes(wrong)
    calls = make.calls
    assert_same(kept("toy", {"rows": 4}, make))
    assert make.calls == calls + 1
    assert_same(kept("toy", {"rows": 4}, make))
    assert make.calls == calls + 1  # whole again


def test_a_folder_that_cannot_be_written_to_is_done_without(tmp_path, monkeypatch, make):
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    monkeypatch.setenv("GRADREG_CACHE", str(tmp_path / "file" / "below"))
    assert_same(kept("toy", {}, make))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


def test_a_full_disk_leaves_no_half_file(folder, monkeypatch, make):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    assert_same(kept("toy", {}, make))
    assert list(folder.iterdir()) == []


def test_off_keeps_nothing(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADREG_CACHE", "off")
    kept("toy", {}, make)
    kept("toy", {}, make)
    assert make.calls == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "darwin" or os.name == "nt", reason="other folders there")
def test_the_folder_is_the_users(monkeypatch):
    monkeypatch.delenv("GRADREG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/gradreg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/gradreg")


def test_the_generated_signals_are_the_same_from_the_file(folder, monkeypatch):
    monkeypatch.setattr(data, "_BLOCK", 6000)  # of its own, to have no other test's
    fresh = data._mnist1d_block(3)
    monkeypatch.setattr("mnist1d.data.make_dataset", lambda _: pytest.fail("it was generated again"))
    again = data._mnist1d_block(3)
    assert torch.equal(fresh.x, again.x)
    assert torch.equal(fresh.y, again.y)
    monkeypatch.setenv("GRADREG_CACHE", "off")
    with pytest.raises(pytest.fail.Exception):
        data._mnist1d_block(3)


def test_a_run_keeps_its_data(folder):
    data._mnist1d.cache_clear()
    data.load(RunConfig(data="mnist1d"))
    assert [path.name.split("-")[0] for path in folder.iterdir()] == ["mnist1d"]


def test_the_generated_text_is_the_same_from_the_file(folder, monkeypatch):
    text.make.cache_clear()
    fresh = text.make(50)
    text.make.cache_clear()
    monkeypatch.setattr(text, "rows", lambda *_: pytest.fail("it was generated again"))
    again = text.make(50)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(fresh, part).x, getattr(again, part).x)
        assert torch.equal(getattr(fresh, part).y, getattr(again, part).y)
    text.make.cache_clear()
    with pytest.raises(pytest.fail.Exception):
        text.make(51)  # other rows are another file
    text.make.cache_clear()
