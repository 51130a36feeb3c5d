"""The folder of the measurements: pieces are played one by one, and each is kept as it ends.

A finished piece is a file NAME.json; a comparison has a folder besides, in which every finished run is kept.
`left.json` says why the others are not there, `sittings.jsonl` where and when the command was called.
"""

from __future__ import annotations

import errno
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradreg.lab.about import provenance
from gradreg.lab.comparison.plan import Plan
from gradreg.lab.folder import append_line, write_json, write_text
from gradreg.lab.page import markdown, publish, tell
from gradreg.lab.processes import resolve
from gradreg.lab.records import read_record, resumed, sealed
from gradreg.studies.gpu.page import page, told
from gradreg.studies.gpu.plan import PIECES, Piece, Steps, pieces
from gradreg.studies.gpu.play import NotHere, Sitting, play, so_far

KIND = "gpu"
FULL = (errno.ENOSPC, errno.EDQUOT)
Row = dict[str, Any]


def begin(folder: Path, is_quick: bool) -> None:
    """Write what the folder is."""
    write_json(folder / "config.json", sealed({"kind": KIND, "is_quick": is_quick}))


def is_quick(folder: Path) -> bool:
    """Of a folder to go on with.

    Raises:
        BadInput: it is another's.
    """
    return bool(resumed(folder, KIND)["is_quick"])


def needs_data(names: Sequence[str], is_quick: bool) -> bool:
    """Whether one of the pieces reads Fashion-MNIST."""
    known = pieces(is_quick)
    return any(isinstance(known[name].what, Plan | Steps) for name in names)


def run_gpu(sitting: Sitting, names: Sequence[str], minutes: float | None = None, write: Path | None = None) -> Row:
    """Play what is not there yet, then write the page of all that is; return what results.json holds.

    Args:
        sitting: where and how.
        names: of pieces.
        minutes: no piece is begun that would end later, by its plan.
        write: takes the page as Markdown, too; of a dry run without its numbers.
    """
    started = time.monotonic()
    append_line(sitting.folder / "sittings.jsonl", {**provenance(sitting.command, sitting.workers), **_device(sitting)})
    known, folder = pieces(sitting.is_quick), sitting.folder
    try:
        for name in names:
            piece = known[name]
            if _path(folder, name).exists():
                continue
            needed = piece.minutes * _share_left(name, piece, folder)
            if minutes is not None and (time.monotonic() - started) / 60 + needed > minutes:
                _leave(folder, name, "no time was left for it")
                continue
            print(f"gradreg: {name}: {piece.about} (planned: {needed:.2g} min)", file=sys.stderr, flush=True)
            _play(name, piece, sitting)
    finally:  # also of what was there when it was interrupted
        results = gathered(folder, sitting.is_quick)
        write_json(folder / "results.json", results)
        publish(page(results), folder)
        if write is not None:
            write_text(write, markdown(page(results, has_numbers=not sitting.is_quick)))
    tell(told(results), results, folder)
    return results


def _play(name: str, piece: Piece, sitting: Sitting) -> None:
    """Keeps what came out, or why nothing did: one piece that fails takes no other along."""
    started = time.perf_counter()
    try:
        result = play(name, piece, sitting)
    except NotHere as reason:
        _leave(sitting.folder, name, str(reason))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # what comes would be lost too
        write_text(sitting.folder / f"{name}.error.txt", traceback.format_exc())
        _leave(sitting.folder, name, f"failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        print(f"gradreg: {name} failed: see {sitting.folder / name}.error.txt", file=sys.stderr, flush=True)
    else:
        took = round(time.perf_counter() - started, 1)
        about = {"name": name, "took": took, **_device(sitting), "result": result}
        write_json(_path(sitting.folder, name), sealed(about))
        _leave(sitting.folder, name, None)
        (sitting.folder / f"{name}.error.txt").unlink(missing_ok=True)


def gathered(folder: Path, is_quick: bool) -> Row:
    """What there is of each piece, of this call and of earlier ones."""
    left = _left(folder)
    lines = (folder / "sittings.jsonl").read_text(encoding="utf-8").splitlines()
    sittings = [json.loads(line) for line in lines if line.endswith("}")]
    rows = [_gathered(folder, name, piece, left.get(name, "")) for name, piece in pieces(is_quick).items()]
    return {
        **sittings[-1],
        "name": folder.name,
        "is_quick": is_quick,
        "seconds": round(sum(row["took"] for row in rows), 1),
        "sittings": sittings,
        "pieces": rows,
    }


def _gathered(folder: Path, name: str, piece: Piece, why: str) -> Row:
    planned = PIECES[name].minutes
    row: Row = {"name": name, "about": piece.about, "minutes": planned, "took": 0.0, "result": None, "why": why}
    try:
        about = read_record(_path(folder, name))
        return {**row, "why": "", "is_whole": True, **{key: about[key] for key in ("took", "device", "result")}}
    except OSError:
        row |= {"is_whole": False, "device": None}
    except ValueError as error:  # a bit that changed
        return {**row, "is_whole": False, "device": None, "why": f"{name}.json {error}"}
    if isinstance(piece.what, Plan):
        result, done, planned = so_far(name, folder)
        runs = f"{done} of about {planned} runs are there" if done else ""
        seeds = f"{len(result['seeds'])} of {piece.what.effort.seeds} seeds are shown" if result else ""
        row |= {"result": result, "why": ", ".join(part for part in (why, seeds or runs) if part)}
    return row


def _share_left(name: str, piece: Piece, folder: Path) -> float:
    if not isinstance(piece.what, Plan):
        return 1.0
    _, done, planned = so_far(name, folder)
    return 1 - done / planned if planned else 1.0


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _left(folder: Path) -> dict[str, str]:
    path = folder / "left.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _leave(folder: Path, name: str, why: str | None) -> None:
    left = {key: value for key, value in _left(folder).items() if key != name}
    write_json(folder / "left.json", left if why is None else {**left, name: why})


def _device(sitting: Sitting) -> Row:
    """Its name, and what drives it."""
    device = resolve(sitting.device)
    if device.type != "cuda":
        return {"device": "a CPU", "driver": ""}
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    driver = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {memory:.0f} GiB"
    return {"device": torch.cuda.get_device_name(device), "driver": driver}
