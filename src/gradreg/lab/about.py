"""What a number may depend on: versions, machine, and the state of the repository that the command was run in."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from typing import Any

import torch

import gradreg


def provenance(command: str, processes: int = 1, threads: int | None = None) -> dict[str, Any]:
    """What every file of results says of itself: the command, when and where it ran, and on what."""
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"date": date, "command": command, "machine": machine(processes, threads), "versions": versions()}


def versions() -> dict[str, str]:
    """Of gradreg, Python, torch and the packages that make data."""
    packages = {name: version(name) for name in ("numpy", "scikit-learn", "mnist1d")}
    return {"gradreg": gradreg.__version__, "python": platform.python_version(), "torch": torch.__version__, **packages}


def machine(processes: int = 1, threads: int | None = None) -> str:
    """In words; no name of the machine or of its user. `threads`: by default those of torch."""
    parts = [
        f"CPU cores: {os.cpu_count()}",
        f"processes: {processes}",
        f"threads: {threads or torch.get_num_threads()}",
    ]
    if torch.cuda.is_available():
        parts.append(f"GPU: {torch.cuda.get_device_name()}")
    return ", ".join([platform.system(), platform.machine(), *parts])


def git_state() -> dict[str, Any] | None:
    """`commit` and `dirty` (uncommitted changes) of the current folder; None where there is no repository."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], capture_output=True, text=True, check=True, timeout=20).stdout
