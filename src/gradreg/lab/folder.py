"""The folder of a result: new, never overwritten, each file whole or absent."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class BadInput(Exception):
    """What the user passed cannot be used; the message is one line that names field, value and allowed range."""


class Hopeless(BadInput):
    """Going on would come to the same."""


def shown(path: Path | str) -> str:
    """A path in a message: in quotes, escaped, and cut where it is longer than a line bears."""
    text = str(path)
    return ascii(text) if len(text) <= 300 else f"{text[:60]!a}... ({len(text)} characters)"


def new_folder(out: Path | None, command: str) -> Path:
    """Create the folder of a result: `out`, or one named after the command and the time under results/."""
    if out is None:
        stem = Path("results") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
        out = next(p for k in range(1000) if not (p := stem.with_name(stem.name + (f"-{k}" if k else ""))).exists())
    if not str(out).isprintable():
        raise BadInput(f"--out must be a path of printable characters, got {shown(out)}.")
    missing = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise BadInput(
                f"--out must be a new or empty folder, got {shown(out)}, which exists; nothing is overwritten."
            )
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        for path in missing:
            with suppress(OSError, ValueError):
                path.rmdir()
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"--out must be a folder that can be written to, got {shown(out)}: {reason}.") from error
    return out


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """As JSON proper: what is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """One more line of a JSON-lines file: finished runs are kept whatever happens next.

    Half a line, as a kill or a full disk leaves it, stays a line of its own.
    """
    line = json_line(value).encode()
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]


def json_line(value: Any) -> str:
    """Of a JSON-lines file; what is not finite is null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """With null in the place of every number that is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
