"""The folder of a result: new, never overwritten, each file whole or absent."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any


class BadInput(Exception):
    """What the user passed cannot be used; the message is one line that names field, value and allowed range."""


def new_folder(out: Path | None, command: str) -> Path:
    """Create the folder of a result: `out`, or one named after the command and the time under results/."""
    if out is None:
        stem = Path("results") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
        out = next(p for k in range(1000) if not (p := stem.with_name(stem.name + (f"-{k}" if k else ""))).exists())
    shown = ascii(str(out))
    if not str(out).isprintable():
        raise BadInput(f"--out must be a path of printable characters, got {shown}.")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise BadInput(f"--out must be a new or empty folder, got {shown}, which exists; nothing is overwritten.")
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"--out must be a folder that can be written to, got {shown}: {reason}.") from error
    return out


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """As JSON proper: what is not finite becomes null."""
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """One more line of a JSON-lines file: finished runs are kept whatever happens next."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
