"""The laboratory: does a method help on a task, at which settings, and at what cost?

`Task`, or a function of a `Run`, is what is trained; `compare` gives a verdict. The commands are the same from a
terminal. Names are looked up where they are made when they are used first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradreg.lab.comparison.api import Choice, Comparison, compare
    from gradreg.lab.folder import BadInput
    from gradreg.lab.loop import Run
    from gradreg.lab.task import Loop, Task

__all__ = ["BadInput", "Choice", "Comparison", "Loop", "Run", "Task", "compare"]

_HOMES = {
    **dict.fromkeys(("Choice", "Comparison", "compare"), "gradreg.lab.comparison.api"),
    **dict.fromkeys(("Loop", "Task"), "gradreg.lab.task"),
    "Run": "gradreg.lab.loop",
    "BadInput": "gradreg.lab.folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradreg.lab' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
