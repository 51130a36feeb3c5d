"""Optuna's journal file, made to survive what happens to files: a torn line, a dead holder of the lock, a full disk.

The locks are the operating system's (`flock`): they are free again as soon as their holder is gone, however it went.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from gradreg.lab.folder import BadInput


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

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with locked(self._file_lock), self._path.open("r+b", buffering=0) as file:
            end = _end_of_last_line(file)
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
