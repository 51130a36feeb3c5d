"""`gradreg images`: the claims, cheaper modes and what flatness buys, on real images and real networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gradreg.lab.commands.options import Out, Workers, Write, app, gone_on_with, switch
from gradreg.lab.folder import BadInput, new_folder


@app.command
def images(
    *,
    quick: Annotated[bool, switch("--quick", "Three pieces at tiny sizes: that all of it runs, in minutes.")] = False,
    only: Annotated[
        list[str] | None,
        Parameter(name="--only", consume_multiple=True, negative="", help="Some of the pieces, by name."),
    ] = None,
    resume: Annotated[
        Path | None, Parameter(name="--resume", help="Folder of a study to go on with, with all that it has.")
    ] = None,
    path: Annotated[
        str | None, Parameter(name="--path", help="Folder of Fashion-MNIST's files; by default Debian's package.")
    ] = None,
    out: Out = None,
    workers: Workers = None,
    write: Write = None,
) -> None:
    """Compare methods on Fashion-MNIST with a ResNet and a ViT: hours on two cores, in pieces that are kept.

    Each piece is a comparison: the baseline tuned first, equal budgets, test rows read once over paired seeds. Writes a
    folder for each, and over all results.json, report.html and images.md. May be stopped at any time; --resume goes on.
    """
    from gradreg.lab.player import default_workers
    from gradreg.lab.records import resumed
    from gradreg.studies.images.run import KIND, Plan, begin, check, pieces_of, run_images

    if resume is not None:
        for name, given in (("--out", out is not None), ("--quick", quick), ("--path", path is not None)):
            if given:
                raise BadInput(f"{name} must be left out with --resume, whose folder decides it.")
        about = resumed(resume, KIND)
        quick, path = about["is_quick"], about["path"]
    if write is not None:
        from gradreg.lab.page import check_page

        check_page(write, "gradreg images")
    plan = Plan(_names(only, pieces_of(quick)), quick, path, workers or default_workers())
    check(plan, resume, write)
    if resume is None:
        _check_data(path)
    folder = resume or new_folder(out, "images")
    if resume is None:
        begin(plan, folder)
    with gone_on_with("gradreg", "images", "--resume", folder):
        run_images(plan, folder, write)


def _check_data(path: str | None) -> None:
    from gradreg.lab.data.idx import fashion_mnist

    fashion_mnist(path)


def _names(only: list[str] | None, pieces: tuple[str, ...]) -> tuple[str, ...]:
    wanted = pieces if only is None else tuple(only)
    for name in wanted:
        if name not in pieces:
            raise BadInput(f"--only must be one or more of {', '.join(pieces)}, with spaces between, got {name!a}.")
    if not wanted:
        raise BadInput(f"--only must be one or more of {', '.join(pieces)}, got nothing.")
    return tuple(name for name in pieces if name in wanted)
