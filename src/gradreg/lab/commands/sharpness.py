"""`gradreg sharpness`: how curved the loss is where a run ended."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gradreg.lab.commands.options import LAST_SEED, Device, app, whole
from gradreg.lab.folder import BadInput
from gradreg.lab.names import one_of
from gradreg.lab.task_names import fields_of

_PARTS = ("train", "validation", "test")


def _part(_: Any, tokens: Sequence[Any]) -> str:
    return one_of("--part", tokens[0].value, _PARTS)


@app.command
def sharpness(
    path: Annotated[Path, Parameter(help="Folder of a run of gradreg train, or one of its checkpoints.")],
    /,
    *,
    part: Annotated[str, Parameter(name="--part", converter=_part, help="train, validation or test rows.")] = "train",
    probes: Annotated[int, whole("--probes", 0, 10**6, "Of Hutchinson's trace, at least 2; 0 leaves it out")] = 32,
    eigenvalues: Annotated[int, whole("--eigenvalues", 0, 1000, "How many; 0 leaves them out")] = 5,
    rows: Annotated[int | None, whole("--rows", 1, 10**9, "The first so many of the part; by default all")] = None,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "Of the probes and the first vector")] = 0,
    device: Device = "auto",
    data: Annotated[
        str | None, Parameter(name="--path", help="Where the data of the run is now, if it was moved.")
    ] = None,
    task: Annotated[
        str | None, Parameter(name="--task", help="FILE.py or FILE.py:NAME, if the run was that of a task of your own.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(name="--out", help="New or empty folder for results.json; by default none is written.")
    ] = None,
) -> None:
    """Measure ‖∇L‖, the trace of the Hessian and its largest eigenvalues at the last checkpoint of a run.

    L is the plain loss over the rows, in evaluation mode. Prints the trace with its standard error and each eigenvalue
    with a bound of its error.
    """
    from gradreg.lab.sharpness import Plan, run_sharpness

    if probes == 1:
        raise BadInput("--probes must be 0 or a whole number from 2 to 1000000, got '1': one has no standard error.")
    fields_of(task)  # makes it known
    plan = Plan(path, part, probes, eigenvalues, rows, seed, device, data)
    try:
        run_sharpness(plan, out, lambda line: print(f"gradreg: {line}", file=sys.stderr))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no result was written") from None
