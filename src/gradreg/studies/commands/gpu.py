"""`gradreg gpu`: all that is to be measured on a GPU, in pieces of minutes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gradreg.lab.commands.options import MOST_WORKERS, Device, Out, Write, app, gone_on_with, switch, whole
from gradreg.lab.folder import BadInput, new_folder
from gradreg.lab.names import one_of

SHARING = 6
"""Processes on one GPU, which a single one leaves idle while the host launches kernels."""


@app.command
def gpu(
    *,
    quick: Annotated[bool, switch("--quick", "A dry run at toy size, on a CPU too: under 4 minutes.")] = False,
    only: Annotated[
        list[str] | None,
        Parameter(name="--only", consume_multiple=True, negative="", help="Some of the pieces, such as bf16 few."),
    ] = None,
    minutes: Annotated[int | None, whole("--minutes", 1, 1440, "Begin no piece that would end later")] = None,
    path: Annotated[
        str | None, Parameter(name="--path", help="Folder of Fashion-MNIST; by default that of Debian's package.")
    ] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None,
        whole("--workers", 1, MOST_WORKERS, "Processes that share the device; by default 6 on a GPU, else 2"),
    ] = None,
    resume: Annotated[Path | None, Parameter(name="--resume", help="Folder to go on with.")] = None,
    out: Out = None,
    write: Write = None,
) -> None:
    """Measure what needs a GPU: its tests, steps of each method in four ways, grids, claims and frontier at full size.

    Ten pieces of 1 to 7 minutes each on an H100, 25 in all. Each is kept as it ends, and of a comparison each run:
    interrupted or killed, it goes on with --resume. The page says in its first sentence what is missing.
    """
    if resume is not None and (out is not None or quick):
        raise BadInput("--resume must be given without --out and --quick, which its folder decides.")

    from gradreg.studies.gpu import run
    from gradreg.studies.gpu.play import Sitting, has_failed

    is_quick = run.is_quick(resume) if resume is not None else quick
    names = _names(only, is_quick)
    place = _data(path, names, is_quick, device)
    if write is not None:
        _check(write, is_quick)
    folder = resume if resume is not None else new_folder(out, "gpu")
    if resume is None:
        run.begin(folder, is_quick)
    sitting = Sitting(folder, device, workers or _workers(device), is_quick, place, _command(is_quick, only, minutes))
    with gone_on_with("gradreg", "gpu", "--resume", folder):
        results = run.run_gpu(sitting, names, minutes, write)
    if any(map(has_failed, results["pieces"])):
        raise SystemExit(1)


def _names(only: list[str] | None, is_quick: bool) -> list[str]:
    from gradreg.studies.gpu.plan import pieces

    known = list(pieces(is_quick))
    if only is None:
        return known
    if not only:
        raise BadInput(f"--only must be one or more of {', '.join(known)}, got nothing.")
    wanted = {one_of("--only", name, known) for name in only}
    return [name for name in known if name in wanted]


def _data(path: str | None, names: list[str], is_quick: bool, device: str) -> str | None:
    """Where the data is.

    Raises:
        BadInput: it is not there, or the device is not.
    """
    from gradreg.lab.data import idx
    from gradreg.lab.processes import resolve
    from gradreg.studies.gpu.run import needs_data

    resolve(device)
    if needs_data(names, is_quick):
        idx.fashion_mnist(path)
    return path if path is not None else str(idx.DEBIAN)


def _check(write: Path, is_quick: bool) -> None:
    from gradreg.lab.page import check_page
    from gradreg.studies.gpu.page import DRY

    check_page(write, "gradreg gpu")
    if is_quick and write.exists() and DRY not in write.read_text(encoding="utf-8"):
        raise BadInput(f"--write must be another page: {write} has measured numbers, which a dry run does not replace.")


def _workers(device: str) -> int:
    from gradreg.lab.player import default_workers
    from gradreg.lab.processes import resolve

    return SHARING if resolve(device).type == "cuda" else default_workers()


def _command(is_quick: bool, only: list[str] | None, minutes: int | None) -> str:
    words = ["gradreg", "gpu", *["--quick"] * is_quick, *(["--only", *only] if only else [])]
    return shlex.join([*words, *(["--minutes", str(minutes)] if minutes else [])])
