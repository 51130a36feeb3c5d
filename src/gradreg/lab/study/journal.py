"""Optuna's journal file, made to survive what happens to files: a torn line, a dead holder of the lock, a full disk.

Each line carries a check of itself and of the check before it, so that one that was changed, lost or put in is found.
Lines of earlier versions, and of Optuna itself, have none: they are taken as they are, as long as no line with a check
precedes them.

The locks are the operating system's (`flock`): they are free again as soon as their holder is gone, however it went.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from gradreg.lab.folder import BadInput
from gradreg.lab.records import CHECK, Damaged, check_of, checked

_CHECK_AT_END = re.compile(rb'"check":"([0-9a-f]{16})"\}\n$')


class Spoiled(ValueError):
    """A journal that cannot be read; the message says which line is to blame."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made if need be; waits for whoever holds it."""
    handle = hold(path, wait=True)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def hold(path: Path, wait: bool = False) -> int | None:
    """Take the lock of a file and keep it until the handle is closed or this process ends; None if another holds it."""
    try:
        import fcntl
    except ImportError:
        raise BadInput("--storage must be the URL of a database on this system, which has no flock.") from None
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


class Journal(JournalFileBackend):
    """A journal of whole lines.

    A writer that is killed leaves half a line, and what is appended to that would be lost with it. So half a line is
    cut off before the next one is written: what it was to record has not happened. If the disk is full, the part
    that was written is taken back.
    """

    def __init__(self, path: Path, lock: Path) -> None:
        super().__init__(str(path))
        self._path, self._file_lock = path, lock
        self.num_read, self._offset, self._check = 0, 0, ""
        """Where reading goes on: after so many lines, at this byte, after a line with this check."""

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The records after the first so many; half a line at the end is none.

        Raises:
            Spoiled: a line that is not the one that was written there.
        """
        if self.num_read != log_number_from:
            self.num_read, self._offset, self._check = 0, 0, ""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                log, check = self._verified(line)
                self.num_read += 1
                self._offset += len(line)
                self._check = check or ""
                if self.num_read > log_number_from:
                    yield log

    def _verified(self, line: bytes) -> tuple[dict[str, Any], str | None]:
        name = f"line {self.num_read + 1}"
        try:
            log, check = checked(line, self._check)
        except Damaged:
            raise Spoiled(f"{name} was changed, or a line before it is missing: its check does not fit") from None
        except ValueError as error:
            raise Spoiled(f"{name} {error}") from None
        if check is None and self._check:
            raise Spoiled(f"{name} has no check, as those before it have")
        return log, check

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with locked(self._file_lock), self._path.open("r+b", buffering=0) as file:
            end = _end_of_last_line(file)
            lines = _sealed(logs, after=_check_before(file, end))
            file.truncate(end)
            file.seek(end)
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _sealed(logs: list[dict[str, Any]], after: str) -> bytes:
    lines = []
    for log in logs:
        plain = json.loads(json.dumps(log))
        after = check_of(plain, after)
        lines.append(json.dumps({**plain, CHECK: after}, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


def _check_before(file: FileIO, end: int) -> str:
    """Of the line that ends there; empty if it has none."""
    file.seek(max(0, end - 64))
    found = _CHECK_AT_END.search(file.read(min(end, 64)))
    return found[1].decode() if found else ""


def _end_of_last_line(file: FileIO, block: int = 4096) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
