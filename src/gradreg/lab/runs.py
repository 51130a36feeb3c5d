"""One training run in memory, and what is measured in it. The loop itself is in trainer.py.

The model of the last step is the one that is scored; nothing is picked along the way.

Defined as: *training loss* L and *gradient norm* ‖∇L‖₂ over all parameters, both of the plain cross-entropy (no
penalty, no flooding) on all training rows with the labels that were trained on, in evaluation mode, so that
BatchNorm uses its running statistics and the measurement leaves no trace. *Accuracy* is the share of rows whose
largest logit is the label; a task of the user's own has its own loss and score.
"""

from __future__ import annotations

import math
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gradreg import curvature
from gradreg.lab import objective
from gradreg.lab.config import RunConfig
from gradreg.lab.folder import BadInput
from gradreg.lab.loop import Run
from gradreg.lab.objective import Objective
from gradreg.lab.randomness import seeded
from gradreg.lab.rows import Rows
from gradreg.lab.task import Loop, Task
from gradreg.lab.tasks import last_line, task_of, trained
from gradreg.lab.train.trainer import Trainer, make_optimizer

_ROWS = 500  # of the data, whose graph is kept at a time for the Hessian

__all__ = ["Job", "Result", "accuracy", "make_optimizer", "measure", "record", "run"]


@dataclass(frozen=True)
class Job:
    """A run, and what is looked at in it."""

    config: RunConfig
    scored_on: str = "test"
    """`test`, or `validation` while tuning: a run looks at one of the two."""
    num_records: int = 10
    """About how often the training loss and ‖∇L‖ are recorded on the way; 0 for the last step only."""
    average: float = 0.0
    """Share of the steps, the last ones, after which weights go into a mean; that mean is what is measured last."""
    num_probes: int = 0
    """Random vectors to estimate the trace of the Hessian with, at the end; 0 does not."""
    carries: bool = False
    """Use the last penalty again in the steps between, in proportion to ‖∇L‖; in a stack only."""
    weights: Path | None = None
    """Takes what the model holds at the end, a safetensors file; not in a stack."""


@dataclass(frozen=True)
class Result:
    """What a run measured; NaN where it diverged."""

    score: float
    """On the rows that the job names: accuracy, or what the task is judged by."""
    train_loss: float
    grad_norm: float
    trace: list[dict[str, float]]
    """`step`, `train_loss`, `grad_norm`, evenly spaced; the last step included."""
    diverged: bool
    seconds: float
    hessian_trace: float | None = None
    """tr H of the training loss, if it was asked for."""
    error: str = ""
    """What code of the user's raised, in a line; such a run has no numbers."""
    num_scored: int | None = None
    """Labels of which the accuracy is a share."""


def run(job: Job) -> Result:
    """Train and measure. Bitwise the same for the same configuration on the same machine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The penalty is")  # a search tries strong ones too
        return _guarded(job) if job.config.file is not None else _run(job, trained(job.config))


def _guarded(job: Job) -> Result:
    """A run of the user's code, which may raise anything; where to, the traceback says in the log of this process."""
    started = time.perf_counter()
    try:
        task = task_of(job.config)
        return _play(job, task) if isinstance(task, Loop) else _run(job, task)
    except BadInput:
        raise
    except Exception as error:
        seconds = time.perf_counter() - started
        lines = "".join(traceback.format_exception(error)).rstrip() + f"\n{last_line(error)}\n"
        return Result(math.nan, math.nan, math.nan, [], True, seconds, error=lines)


def _play(job: Job, loop: Loop) -> Result:
    """A loop of the user's own: nothing is measured but its scores."""
    started = time.perf_counter()
    with seeded(job.config.seed):
        scores = loop.scores(Run(job.config, job.scored_on))
    score = scores[job.scored_on]
    return Result(score, math.nan, math.nan, [], not math.isfinite(score), time.perf_counter() - started)


def _run(job: Job, task: Task) -> Result:
    if job.carries:
        raise ValueError("carries must be false in a run of its own, got True: it is a study's, use run_batched.")
    started = time.perf_counter()
    epochs = job.config.epochs
    with seeded(job.config.seed):
        trainer = Trainer(job.config, task)
        model, of = trainer.model, task.objective
        averaged = AveragedModel(model) if job.average else None

        def average() -> bool:
            """After a step; never ends the run."""
            if averaged is not None and trainer.step > first_averaged(job.average, trainer.num_steps):
                averaged.update_parameters(model)
            return False

        trace: list[dict[str, float]] = []
        record_every = max(1, epochs // job.num_records) if job.num_records else epochs + 1
        for epoch in range(epochs):
            if epoch % record_every == 0 and job.num_records:
                trace.append({"step": trainer.step, **measure(model, task.train, of)})
                if not math.isfinite(trace[-1]["train_loss"]):
                    break
            trainer.epoch(average)
        else:
            if averaged is not None:
                model.load_state_dict(averaged.module.state_dict())

    last = measure(model, task.train, of)
    trace.append({"step": trainer.num_steps, **last})
    if job.weights is not None:
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, job.weights)
    scored = {"test": task.test, "validation": task.validation}[job.scored_on]
    diverged = not math.isfinite(last["train_loss"])
    found = objective.evaluate(model, scored, of=of)
    return Result(
        found.score,
        last["train_loss"],
        last["grad_norm"],
        trace=trace,
        diverged=diverged,
        seconds=time.perf_counter() - started,
        hessian_trace=_hessian_trace(model, task.train, of, job.num_probes) if job.num_probes else None,
        num_scored=found.count,
    )


def _hessian_trace(model: nn.Module, part: Rows, of: Objective, num_probes: int) -> float:
    model.eval()
    batches = [batch for batch, _ in part.chunks(_ROWS, 0)]
    return curvature.hessian_trace(lambda batch: of.loss(model, batch), model, batches, num_probes=num_probes).mean


def first_averaged(share: float, num_steps: int) -> float:
    """The first step whose weights go into the mean."""
    return num_steps - max(1, round(share * num_steps)) if share else math.inf


def measure(model: nn.Module, part: Rows, of: Objective = objective.PLAIN) -> dict[str, float]:
    """Loss and ‖∇L‖ of the plain objective on all rows, in evaluation mode."""
    loss, norm = objective.gradient_norm(model, part, of=of)
    return {"train_loss": loss, "grad_norm": norm}


def accuracy(model: nn.Module, part: Rows) -> float:
    """Share of rows whose largest logit is the label, in evaluation mode."""
    return objective.evaluate(model, part).score


def record(job: Job, result: Result) -> dict[str, Any]:
    """A line of runs.jsonl."""
    measured = {name: value for name, value in asdict(result).items() if value not in (None, "")}
    score = {"accuracy" if job.config.file is None else "score": measured.pop("score")}
    own = {name: value for name in ("average", "carries") if (value := getattr(job, name))}
    return {**asdict(job.config), "task": job.config.task, "scored_on": job.scored_on, **own, **score, **measured}
