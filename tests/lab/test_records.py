"""Records that carry a check: what was changed is seen, what an earlier version wrote is read."""

import json

import pytest

from gradreg.lab.folder import append_line, write_json, write_text
from gradreg.lab.records import Damaged, opened, read_record, sealed

RECORD = {"gamma": 0.2, "name": "ε", "trace": [1, 2.5e-7, None], "config": {"seed": 3, "compile": False}}


def test_no_flipped_bit_changes_a_value_unseen():
    text = json.dumps(sealed(RECORD), ensure_ascii=False).encode()
    for place in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[place // 8] ^= 1 << place % 8
        try:
            found = opened(bytes(flipped))
        except ValueError:
            continue
        assert {name: found.get(name) for name in RECORD} == RECORD


def test_a_record_comes_back_from_a_file_with_null_for_what_is_not_finite(tmp_path):
    record = {**RECORD, "pair": (1, float("nan")), "loss": float("inf")}
    write_json(tmp_path / "a.json", sealed(record))
    assert read_record(tmp_path / "a.json") == {**RECORD, "pair": [1, None], "loss": None}


def test_records_of_earlier_versions_have_no_check():
    assert opened(json.dumps(RECORD).encode()) == RECORD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"\0\0\0", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
    ],
)
def test_what_is_no_record_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        opened(text)


def test_what_is_there_can_be_looked_at():
    with pytest.raises(Damaged, match="its check does not fit") as error:
        opened(json.dumps({**sealed(RECORD), "gamma": 0.6}).encode())
    assert error.value.record == {**RECORD, "gamma": 0.6}


def test_half_a_line_stays_a_line_of_its_own(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_line(path, {"k": 1})
    path.write_bytes(path.read_bytes() + b'{"k": 2, "tor')
    append_line(path, {"k": 3})
    append_line(path, {"k": 4})
    assert path.read_bytes() == b'{"k": 1}\n{"k": 2, "tor\n{"k": 3}\n{"k": 4}\n'


def test_a_file_that_could_not_be_written_leaves_nothing_and_the_old_one(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "page.html", "old")
    with monkeypatch.context() as patch:
        patch.setattr("gradreg.lab.folder.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_text(tmp_path / "page.html", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"
