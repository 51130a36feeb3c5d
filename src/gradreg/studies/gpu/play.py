"""How a piece is played: what it measured, as JSON."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import gradreg
from gradreg.lab import batched
from gradreg.lab.comparison import folder as comparisons
from gradreg.lab.comparison import report, run
from gradreg.lab.comparison.arms import arm_of
from gradreg.lab.comparison.plan import Plan, example
from gradreg.lab.cost import own
from gradreg.lab.cost.grid import verdict
from gradreg.lab.cost.steps import captured, make_step
from gradreg.lab.data.places import standing_for
from gradreg.lab.folder import BadInput
from gradreg.lab.page import publish
from gradreg.lab.player import on_processes
from gradreg.lab.processes import resolve
from gradreg.lab.study.storage import Place
from gradreg.lab.tasks import trained
from gradreg.studies.gpu.plan import Grid, Piece, Steps, Tests, models

Row = dict[str, Any]
ROOT = Path(gradreg.__file__).parents[2]
"""Of a clone."""


class NotHere(Exception):
    """What a piece needs is not on this machine."""


@dataclass(frozen=True)
class Sitting:
    """One call of the command."""

    folder: Path
    device: str = "auto"
    workers: int = 1
    """Processes that share the device in a comparison."""
    is_quick: bool = False
    path: str | None = None
    """Of Fashion-MNIST."""
    command: str = "gradreg gpu"


def play(name: str, piece: Piece, sitting: Sitting) -> Row:
    """
    Raises:
        NotHere: it cannot be on this machine.
    """
    what = piece.what
    if isinstance(what, Tests):
        return _tests(sitting)
    if isinstance(what, Steps):
        return _steps(what, sitting) if not what.needs_gpu else _apart(what, sitting)
    if isinstance(what, Grid):
        return _grid(what)
    return _comparison(what, name, sitting)


def _tests(sitting: Sitting) -> Row:
    """The files of a clone that have such tests, in a process of their own; what they print is in tests.log."""
    if find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if _is_for_gpus(file)]
    if not files:
        raise NotHere("the tests are in a clone of the repository")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (sitting.folder / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "summary": lines[-1] if lines else "nothing was printed", "failed": failed[:20]}


def has_failed(row: Row) -> bool:
    """Whether a piece raised something, or one of its tests did (5: there is none)."""
    return "failed" in row["why"] or (row["result"] or {}).get("status", 0) not in (0, 5)


def _is_for_gpus(file: Path) -> bool:
    return "pytest.mark.gpu" in file.read_text(encoding="utf-8")


def _apart(steps: Steps, sitting: Sitting) -> Row:
    """In a process of its own: one in which a capture failed may be of no use to the pieces that follow."""
    if resolve(sitting.device).type != "cuda":
        raise NotHere("not on this device, a CPU")
    [(_, row)] = on_processes(partial(_steps, sitting=sitting), [steps], workers=2)
    return row


def _steps(steps: Steps, sitting: Sitting) -> Row:
    is_gpu = resolve(sitting.device).type == "cuda"
    rows = []
    for name, config in models(sitting.is_quick).items():
        path = sitting.path if config.data == "fashion-mnist" else None
        settings: Row = {**steps.settings, "path": path, "device": sitting.device}
        if steps.settings.get("compile"):
            torch.compiler.reset()  # what was compiled for other models counts against these
        plan = own.Plan(replace(config, **settings), rounds=6 if sitting.is_quick else None, budget=steps.seconds)
        way = captured if steps.is_captured else lambda step: step
        rows.append({"name": name, **own.measured(plan, way, has_memory=not steps.needs_gpu)})
        if is_gpu:
            torch.cuda.empty_cache()
    return {"models": rows}


def _grid(grid: Grid) -> Row:
    torch.set_num_threads(1)
    speeds = [batched.grid_speed(width, grid.num_configs, grid.num_steps, grid.rounds) for width in grid.widths]
    return {"grids": [{**asdict(speed), **verdict(speed)} for speed in speeds], "rounds": grid.rounds}


def _comparison(plan: Plan, name: str, sitting: Sitting) -> Row:
    """Begun, or gone on with from its last run that finished."""
    folder = sitting.folder / name
    plan = replace(plan, base=replace(plan.base, path=sitting.path, device=sitting.device))
    if not (folder / "config.json").exists():
        run.check(plan)
        known, said = _borne(plan)
        folder.mkdir(exist_ok=True)
        place = Place("compare", folder.resolve())
        run.begin(known, folder, place, sitting.command, sitting.workers, said)
    else:
        known, place = run.known(folder)
        same = replace(known, base=replace(known.base, path=sitting.path, device=sitting.device), methods=plan.methods)
        if same != plan:
            raise BadInput(f"--resume must hold pieces of this version, and {name} is of another plan: take it away.")
    data = (known.base.path, sitting.path)
    workers = 1 if batched.is_worthwhile(plan.base) else sitting.workers  # one process stacks all runs
    with standing_for(*data):
        results = run.carry_out(known, folder, place, workers, data)
    publish(report.page(results), folder)
    return results


def _borne(plan: Plan) -> tuple[Plan, list[str]]:
    """Without the methods whose step raises something on this device, which else would take the others along."""
    task, device = trained(plan.base), resolve(plan.base.device)
    said: list[str] = []
    methods = []
    for method in plan.methods:
        try:
            make_step(example(plan, arm_of(method, plan.by)), task, device)()
            methods.append(method)
        except Exception as error:  # whatever a backend says
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            said.append(f"Left out: {method}, whose step raised {why}.")
    return replace(plan, methods=tuple(methods)), said


def so_far(name: str, sitting_folder: Path) -> tuple[Row | None, int, int]:
    """Of a comparison that has begun: what it shows with the seeds that are there; runs that are done, and planned."""
    folder = sitting_folder / name
    if not (folder / "config.json").exists():
        return None, 0, 0
    plan, place, _ = comparisons.find(folder, None)
    results, status = comparisons.so_far(folder, place, plan)
    return results, status.done, status.planned
