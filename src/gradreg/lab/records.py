"""Records: JSON objects that carry a check of the rest of them, so that a bit that has changed is seen.

The check is the start of a SHA-256 over the object in sorted JSON. Records of earlier versions have none, and are taken
as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradreg.lab.folder import BadInput, Hopeless, finite, shown

CHECK = "check"
CHANGED = "was changed after it was written: its check does not fit"

Record = dict[str, Any]


class Damaged(ValueError):
    """A record that is not what was written; `record` is what is there."""

    def __init__(self, record: Record) -> None:
        super().__init__(CHANGED)
        self.record = record


def sealed(record: Mapping[str, Any]) -> Record:
    """With its check, as JSON will give it back.

    Example:
        >>> opened(json.dumps(sealed({"gamma": 0.2})).encode())
        {'gamma': 0.2}
        >>> opened(json.dumps({**sealed({"gamma": 0.2}), "gamma": 0.6}).encode())
        Traceback (most recent call last):
        gradreg.lab.records.Damaged: was changed after it was written: its check does not fit
    """
    plain = json.loads(json.dumps(finite(record)))
    return {**plain, CHECK: check_of(plain)}


def opened(text: bytes) -> Record:
    """The record that a text holds, without its check.

    Raises:
        ValueError: no JSON object.
        Damaged: one whose check does not fit.
    """
    return checked(text)[0]


def checked(text: bytes, after: str = "") -> tuple[Record, str | None]:
    """The record and its check; raises as `opened`.

    Args:
        text: JSON in UTF-8.
        after: the check of the record before it, in a file where each one vouches for the one before.
    """
    try:
        record = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    check = record.pop(CHECK, None)
    if check is not None and check != check_of(record, after):
        raise Damaged(record)
    return record, check


def check_of(record: Record, after: str = "") -> str:
    return hashlib.sha256((after + json.dumps(record, sort_keys=True)).encode()).hexdigest()[:16]


def resumed(folder: Path, kind: str) -> Record:
    """config.json of a folder to go on with.

    Raises:
        BadInput: it is none of `gradreg KIND`, or its record was changed.
    """
    try:
        about = read_record(folder / "config.json")
        if about.get("kind") != kind:
            raise ValueError("is of something else")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"config.json {error}"
        raise BadInput(f"--resume must be a folder of gradreg {kind}, got {shown(folder)}: {why}.") from None
    return about


def kept_lines(path: Path) -> list[Record]:
    """The sealed lines of a file that a study goes on from; none where there is no file.

    Half a line, as a kill or a full disk leaves it, is passed over: what it was to say is done again.

    Raises:
        BadInput: a line that was changed after it was written.
    """
    found = []
    for k, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            found.append(opened(line))
        except Damaged as error:
            raise BadInput(f"line {k} of {shown(path)} {error}: take that line away, and it is made again.") from None
        except ValueError:
            continue
    return found


def read_results(path: Path) -> Record:
    """What a study left that has ended.

    Raises:
        OSError: there is none.
        Hopeless: it was changed after it was written, or is no record.
    """
    try:
        return read_record(path)
    except ValueError as error:
        raise Hopeless(f"{shown(path)} {error}: take it away, and it is made again from the study.") from None


def read_record(path: Path) -> Record:
    """Raises as `opened`, and OSError."""
    return opened(path.read_bytes())
