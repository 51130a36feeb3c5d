"""Generated data, kept between commands in the user's cache folder; made again where it is missing or damaged.

GRADREG_CACHE names another folder; `off` keeps nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]


def kept(name: str, settings: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
    """What `make` returns, bit for bit, from the file of these settings if there is one.

    Args:
        name: of the generator.
        settings: everything that decides the data, versions included; as JSON.
        make: the generator.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    text = json.dumps(settings, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    found = _read(path, text)
    if found is None:
        found = make()
        with suppress(OSError):  # a full disk, a folder of somebody else's: nothing is kept
            _write(path, text, found)
    return found


def cache_folder() -> Path | None:
    """Where data is kept; None for nowhere."""
    named = os.environ.get("GRADREG_CACHE")
    if named:
        return None if named.lower() == "off" else Path(named)
    with suppress(RuntimeError):  # no home
        home = Path.home()
        if sys.platform == "darwin":
            return home / "Library" / "Caches" / "gradreg"
        if os.name == "nt":
            return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "gradreg"
        return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "gradreg"
    return None


def _read(path: Path, settings: str) -> Tensors | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, ValueError, SafetensorError):
        return None
    return tensors if about == _about(settings, tensors) else None


def _write(path: Path, settings: str, tensors: Tensors) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        partial = Path(file.name)
        try:
            file.write(save(tensors, _about(settings, tensors)))
        except BaseException:
            partial.unlink()
            raise
    partial.replace(path)


def _about(settings: str, tensors: Tensors) -> dict[str, str]:
    """What is written beside the numbers, to know them by."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return {"settings": settings, "sha256": digest.hexdigest()}
