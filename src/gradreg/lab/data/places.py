"""Where the data of a stored run lies now.

A configuration keeps the path that it was given, which may be relative to where its command ran. While a stored run is
gone on with, that path stands for the place that was found here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradreg.lab.config import RunConfig
from gradreg.lab.folder import BadInput, shown

_NOW: dict[str, str] = {}


def found(config: RunConfig, ran_in: Any, given: str | None = None) -> str | None:
    """The place of a configuration's data: `given`, or seen from where its command ran, or the path as it stands.

    Raises:
        BadInput: it is not there; names the option that says where it is.
    """
    if config.path is None and given is not None:
        raise BadInput(f"--path must be left out: data {config.data} of this run has no path, got {shown(given)}.")
    if config.path is None or given is not None:
        return given
    places = [os.path.join(ran_in, config.path)] if isinstance(ran_in, str) else []
    for place in (*places, config.path):
        if os.path.exists(place):
            return place
    if config.data == "hub":  # a name
        return config.path
    where = shown((*places, config.path)[0])
    raise BadInput(f"--path must say where the data of the run is now: it is no longer at {where}.")


@contextmanager
def standing_for(path: str | None, place: str | None) -> Iterator[None]:
    """Meanwhile the data of configurations with this path is read from that place."""
    if path is None or place is None:
        yield
        return
    _NOW[path] = place
    try:
        yield
    finally:
        del _NOW[path]


def now(path: str | None) -> str | None:
    """The place that a path stands for."""
    return path if path is None else _NOW.get(path, path)
