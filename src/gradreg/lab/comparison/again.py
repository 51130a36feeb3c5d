"""The page of a comparison, made anew from the folder that `gradreg compare` left."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradreg.lab.folder import BadInput, shown
from gradreg.lab.page import html
from gradreg.lab.records import read_record


def comparison(folder: Path) -> str | None:
    """Its page; None where the folder is not that of a comparison.

    Raises:
        BadInput: one that has not ended, or whose results were changed.
    """
    about, _ = _record(folder / "config.json")
    results, why = _record(folder / "results.json")
    if "compare" not in (about.get("kind"), results.get("kind")):
        return None
    if results:
        try:
            from gradreg.lab.comparison.report import page  # brings torch

            return html(page(results))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            why = "lacks what a comparison writes"
    spoiled = f", whose results.json {why}: take it away, and" if why else ":"
    raise BadInput(
        f"DIR must be a comparison that has ended, got {shown(folder)}{spoiled} go on with: {_again(folder, about)}"
    )


def _record(path: Path) -> tuple[dict[str, Any], str]:
    """What is there, and what is wrong with it."""
    try:
        return read_record(path), ""
    except OSError:
        return {}, ""
    except ValueError as error:
        return {}, str(error)


def _again(folder: Path, about: Mapping[str, Any]) -> str:
    """A file is named as the command did that began."""
    try:
        words = shlex.split(str(about.get("command")))[2:3] if ".py:" in str(about.get("task")) else []
    except ValueError:  # a quotation mark without its other
        words = []
    line = shlex.join(["gradreg", "compare", *words, "--resume", str(folder)])
    return line if line.isprintable() else shown(line)
