"""`gradreg report`: what sweeps and train runs found, as one page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gradreg.lab.commands.options import app
from gradreg.lab.folder import BadInput, shown, write_text


@app.command
def report(
    folder: Annotated[
        Path,
        Parameter(name="DIR", help="Folder of a sweep, a train run or a comparison, or of several sweeps and runs."),
    ],
    /,
    *,
    out: Annotated[
        Path | None, Parameter(name="--out", help="File that ends in .html; by default DIR/report.html.")
    ] = None,
) -> None:
    """Make one HTML page of a sweep or of train runs: maps, curves, costs, every run, and the best one to copy.

    The page of a comparison is written anew. A page stands alone: it loads nothing and needs no server. That of an
    earlier report is replaced; nothing else is.
    """
    from gradreg.lab.comparison.again import comparison
    from gradreg.lab.report.page import is_ours, page

    target = folder / "report.html" if out is None else out
    if not str(target).isprintable():
        raise BadInput(f"--out must be a path of printable characters, got {shown(target)}.")
    if target.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"--out must end in .html, got {shown(target)}.")
    if out is not None and not os.path.isdir(target.parent):
        raise BadInput(f"--out must lie in a folder that exists, got {shown(target)}.")
    html = comparison(folder)
    html = page(folder) if html is None else html
    if os.path.lexists(target) and not is_ours(target, html):
        raise BadInput(
            f"--out must be a new file, got {shown(target)}, which gradreg report did not make; pass another --out."
        )
    try:
        write_text(target, html)
    except OSError as error:
        raise BadInput(f"--out must be a file that can be written, got {shown(target)}: {error.strerror}.") from error
    print(f"{target}: {len(html.encode()) / 1024:.0f} KB, one page that stands alone.")
