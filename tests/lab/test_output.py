"""Consoles that lack letters, pipes that were closed and disks that are full."""

import io
import os
import subprocess
import sys

import pytest

from gradreg import cli

TEXT = "‖∇L‖ 0.5 ± 0.1, γ = ε, 猫"


class Full(io.StringIO):
    """Takes so many texts."""

    def __init__(self, error, room=0):
        super().__init__()
        self.error, self.room = error, room

    def write(self, text):
        if self.room == 0:
            raise self.error
        self.room -= 1
        return super().write(text)


def run(monkeypatch, stdout, stderr=None, action=lambda: print(TEXT)):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", io.StringIO() if stderr is None else stderr)
    ends = []

    def command(tokens):
        action()
        ends.append("ended")
        return 0

    monkeypatch.setattr(cli, "_run", command)
    status = cli.main([])
    assert ends == ["ended"]
    return status, sys.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_what_a_console_lacks_is_written_out(monkeypatch, encoding):
    raw = io.BytesIO()
    status, _ = run(monkeypatch, io.TextIOWrapper(raw, encoding=encoding))
    written = raw.getvalue().decode(encoding)
    signs = {"ascii": "+-", "utf-8": "±"}.get(encoding, "±")
    expected = TEXT if encoding == "utf-8" else f"||grad L|| 0.5 {signs} 0.1, gamma = epsilon, ?"
    assert (status, written.strip()) == (0, expected)


def test_a_reader_that_left_is_nothing_to_speak_of(monkeypatch):
    status, stderr = run(monkeypatch, Full(BrokenPipeError(32, "Broken pipe")))
    assert (status, stderr.getvalue()) == (0, "")


def test_a_full_disk_is_said_once_and_the_run_goes_on(monkeypatch):
    stdout = Full(OSError(28, "No space left on device"), room=2)
    status, stderr = run(monkeypatch, stdout, action=lambda: [print(k) for k in range(5)])
    assert status == 0
    assert stdout.getvalue() == "0\n"
    assert stderr.getvalue() == "gradreg: standard output could not be written: No space left on device.\n"


def test_both_may_be_gone(monkeypatch):
    status, _ = run(monkeypatch, Full(OSError(28, "full")), Full(OSError(28, "full")))
    assert status == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_process_ends_without_a_traceback():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from gradreg import cli; raise SystemExit(cli.main(['--help']))"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 0
    assert done.stderr == "gradreg: standard output could not be written: No space left on device.\n"
