"""`gradreg sharpness`: loss, ‖∇L‖, Hessian trace and top eigenvalues of a checkpoint, over rows of its own data.

L is the plain cross-entropy, without penalty, in evaluation mode and full precision; on training rows with the labels
that were trained on, random ones included, and without augmentation.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradreg import curvature
from gradreg.lab import objective
from gradreg.lab.about import provenance
from gradreg.lab.config import RunConfig
from gradreg.lab.data import places
from gradreg.lab.data.parts import Part
from gradreg.lab.folder import BadInput, new_folder, shown, write_json
from gradreg.lab.objective import Objective
from gradreg.lab.processes import resolve
from gradreg.lab.progress import progress_bar
from gradreg.lab.rows import Batch, Rows, TensorRows, moved
from gradreg.lab.tables import console, say
from gradreg.lab.tasks import trained as task_of
from gradreg.lab.train import checkpoint
from gradreg.lab.train.session import read

CHUNK = 2**17
"""Input numbers in a batch: 42 images of 3×32×32; the graph of a gradient holds about three times a training step."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What `gradreg sharpness` measures."""

    path: Path
    """A run of `gradreg train`, or one of its checkpoints."""
    part: str = "train"
    probes: int = 32
    eigenvalues: int = 5
    rows: int | None = None
    """The first so many of the part; by default all."""
    seed: int = 0
    """Of the probes and of the first vector of Lanczos."""
    device: str = "auto"
    data: str | None = None
    """Where the data of the run is, if it was moved."""

    @property
    def command(self) -> str:
        words = ["gradreg", "sharpness", self.path]
        for name in ("part", "probes", "eigenvalues", "rows", "seed", "device", "data"):
            value = getattr(self, name)
            words += [] if value is None else ["--path" if name == "data" else f"--{name}", value]
        return shlex.join(map(str, words))


@dataclass(frozen=True)
class Trained:
    """A model as a checkpoint has it, and the rows to look at."""

    place: Path
    config: RunConfig
    model: nn.Module
    rows: Rows
    objective: Objective


def load_trained(plan: Plan, say: Callable[[str], None]) -> Trained:
    """The last good checkpoint of a run, or the one that is named; `say` is told of damaged ones.

    Raises:
        BadInput: no run, no good checkpoint, or one of another architecture than config.json says.
    """
    run, place = _run_and_checkpoint(plan.path, say)
    try:
        run_plan, about = read(run)
    except BadInput as error:
        raise BadInput(str(error).replace("--resume", "the path", 1)) from error
    config = run_plan.config
    weights = checkpoint.read_model(place)
    with places.standing_for(config.path, places.found(config, about.get("ran_in"), plan.data)):
        task = task_of(config)
    model = task.build(config.seed)
    wrong = checkpoint.differences(model.state_dict(), weights)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise BadInput(f"{str(place)!a} must hold the model of config.json: {wrong[0]}{more}.")
    model.load_state_dict(weights)
    part: Rows = getattr(task, plan.part)
    if plan.rows is not None and plan.rows > len(part):
        raise BadInput(f"--rows must be a whole number from 1 to {len(part)} ({plan.part} rows), got '{plan.rows}'.")
    if plan.rows is not None and not isinstance(part, Part | TensorRows):
        raise BadInput("--rows must be left out with a task whose rows are no tensors: all of them are looked at.")
    rows = part[: plan.rows] if plan.rows and isinstance(part, Part | TensorRows) else part
    return Trained(place, config, model.to(resolve(plan.device)).eval(), rows, task.objective)


def _run_and_checkpoint(path: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    if os.path.isfile(path / checkpoint.MANIFEST):
        return path.absolute().parent.parent, path
    if not os.path.isfile(path / "config.json"):
        raise BadInput(
            f"the path must be the folder of a run of gradreg train or one of its checkpoints, got {shown(path)}."
        )
    return path, checkpoint.last_good(path / "checkpoints", say)


def run_sharpness(plan: Plan, out: Path | None, say: Callable[[str], None]) -> Row:
    """Measure, print, and write `out` if there is one; return what results.json holds."""
    trained = load_trained(plan, say)
    model, rows = trained.model, trained.rows
    num_parameters = sum(p.numel() for p in model.parameters())
    if plan.eigenvalues > num_parameters:
        raise BadInput(
            f"--eigenvalues must be a whole number from 0 to {num_parameters} (the parameters), got "
            f"'{plan.eigenvalues}'."
        )
    evaluation = objective.evaluate(model, rows, of=trained.objective)
    if not math.isfinite(evaluation.loss):
        raise BadInput(f"{str(trained.place)!a} must have a finite loss, got {evaluation.loss}: the run diverged.")
    folder = new_folder(out, "sharpness") if out is not None else None

    results: Row = {
        "name": trained.place.name,
        **provenance(plan.command),
        "device": str(next(model.parameters()).device),
        "checkpoint": str(trained.place),
        "config": asdict(trained.config),
        "part": plan.part,
        "rows": len(rows),
        "parameters": num_parameters,
        "loss": evaluation.loss,
        trained.objective.metric.key: evaluation.score,
        "metric": trained.objective.metric.as_row(),
        **measure(model, rows, plan, trained.objective),
    }
    print_summary(trained, results)
    if folder is not None:
        write_json(folder / "results.json", results)
        print(f"Everything is in {folder / 'results.json'}.")
    return results


def measure(model: nn.Module, rows: Rows, plan: Plan, of: Objective) -> Row:
    """‖∇L‖, tr H and the top eigenvalues, each with what it took."""
    batches = batches_of(rows)
    device = next(model.parameters()).device

    def loss_fn(batch: Batch) -> torch.Tensor:
        return of.loss(model, moved(batch, device))

    seconds = {}
    with progress_bar() as show:

        def timed(what: str, call: Callable[..., Any]) -> Any:
            started = time.perf_counter()
            found = call(progress=lambda done, planned: show(what, done, planned))
            seconds[what] = round(time.perf_counter() - started, 3)
            return found

        norm = timed("gradient", lambda **on: curvature.gradient_norm(loss_fn, model, batches, **on))
        trace = top = None
        if plan.probes:
            trace = timed(
                "trace",
                lambda **on: curvature.hessian_trace(
                    loss_fn, model, batches, num_probes=plan.probes, seed=plan.seed, **on
                ),
            )
        if plan.eigenvalues:
            top = timed(
                "eigenvalues",
                lambda **on: curvature.top_eigenvalues(loss_fn, model, batches, plan.eigenvalues, seed=plan.seed, **on),
            )
    return {
        "grad_norm": norm,
        "trace": asdict(trace) if trace else None,
        "eigenvalues": asdict(top) if top else None,
        "seconds": seconds,
    }


def batches_of(rows: Rows) -> list[Batch]:
    """The rows, so many at a time that the graph of one batch stays small; of tensors these are views."""
    return [batch for batch, _ in rows.chunks(None, CHUNK)]


def print_summary(trained: Trained, results: Row) -> None:
    """What was measured, with errors and seconds."""
    config, seconds = trained.config, results["seconds"]
    settings = "".join(f", {name} {value:g}" for name, value in config.settings.items())
    say(
        console(),
        f"{_relative(trained.place)}: {config.task}; {config.method}{settings}, seed {config.seed}",
        f"{results['rows']} {results['part']} rows, {results['parameters']:,} parameters, evaluation mode, "
        f"{results['device']}; {results['machine']}",
    )
    metric = trained.objective.metric
    print(f"\nL            {results['loss']:.6g}   {metric.name} {metric.shown(results[metric.key])}{metric.unit}")
    print(f"‖∇L‖         {results['grad_norm']:.6g}   {seconds['gradient']:.1f} s")
    trace, top = results["trace"], results["eigenvalues"]
    if trace:
        error = f"± {trace['standard_error']:.2g} (standard error, {len(trace['samples'])} probes)"
        print(f"tr H         {trace['mean']:.5g} {error}   {seconds['trace']:.1f} s")
    if top:
        print(
            f"λ of H       largest by magnitude, each ± ‖Hu − λu‖; {top['num_products']} products"
            f"   {seconds['eigenvalues']:.1f} s"
        )
        for k, (value, residual) in enumerate(zip(top["values"], top["residuals"]), start=1):
            print(f"  {k:<4}{value:>12.6g} ± {residual:.1g}")


def _relative(path: Path) -> Path:
    with suppress(ValueError):
        return path.absolute().relative_to(Path.cwd())
    return path
