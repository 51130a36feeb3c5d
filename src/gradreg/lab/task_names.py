"""The word for a task, on the command line and in Python: a file of the user's, or the name of a built-in task."""

from __future__ import annotations

from typing import Any

from gradreg.lab.config import DATA
from gradreg.lab.folder import BadInput, shown
from gradreg.lab.names import meant, suggestion


def fields_of(word: str | None) -> dict[str, Any]:
    """The fields of a configuration that a task decides; those of a file are its defaults besides its name.

    Raises:
        BadInput: no such file or built-in task, or a file that holds no task.
    """
    if word is None:
        return {}
    if word.endswith(".py") or ".py:" in word:
        from gradreg.lab.tasks import find, from_file

        reference = from_file(word).reference
        return {"file": reference, **find(reference).defaults}
    data = meant(word, DATA)
    if data is None:
        names = f"FILE.py, FILE.py:NAME, or one of {', '.join(DATA)}"
        raise BadInput(f"TASK must be {names}, got {shown(word)}.{suggestion(word, DATA)}")
    return {"data": data}


def together(word: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a task with those that were given, which win.

    Raises:
        BadInput: both name a task, and not the same.
    """
    fields = fields_of(word)
    for name in ("file", "data"):
        if name in given and name in fields and given[name] not in (fields[name], fields[name].split(":")[0]):
            raise BadInput(f"{name} must be left out with TASK, or be the same, got {shown(str(given[name]))}.")
    if given.get("file") is not None and word is None:
        raise BadInput(f"file must be named on the command line too: TASK {shown(str(given['file']))}.")
    return {**fields, **given, **({"file": fields["file"]} if "file" in fields else {})}
