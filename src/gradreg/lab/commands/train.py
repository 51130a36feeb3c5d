"""One run: `gradreg train`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gradreg.lab.commands.config_options import with_fields
from gradreg.lab.commands.options import Log, Out, TaskWord, app, switch, trackers, whole
from gradreg.lab.config import FIELDS, RunConfig, by_field, checked, from_mapping
from gradreg.lab.folder import BadInput
from gradreg.lab.task_names import together


@app.command
@with_fields()
def train(
    task: TaskWord = None,
    /,
    *,
    config: Annotated[Path | None, Parameter(name="--config", help="YAML file of fields; options win over it.")] = None,
    out: Out = None,
    resume: Annotated[
        Path | None, Parameter(name="--resume", help="Folder of a run that was stopped; it goes on, bit for bit.")
    ] = None,
    checkpoint_every: Annotated[int | None, whole("--checkpoint-every", 1, 10**6, "Epochs; by default 1")] = None,
    keep: Annotated[int | None, whole("--keep", 1, 10**6, "Checkpoints that are kept; by default 3")] = None,
    log: Log = None,
    tensorboard: Annotated[bool, switch("--tensorboard", "The same as --log tensorboard.")] = False,
    **given: Any,
) -> None:
    """Train one model, with checkpoints; for several processes start it with torchrun.

    Writes a folder: config.json, metrics.jsonl (a line for each epoch), checkpoints/, and results.json at the end, for
    which the test rows are read, once. Ctrl-C and SIGTERM save and leave; `--resume FOLDER` goes on.
    """
    with _refusal_from_one():  # before torch is imported, which takes seconds
        given = {**(_read_yaml(config) if config else {}), **given}
        names = trackers([*(log or ()), *(["tensorboard"] if tensorboard else [])])
        if resume is None:
            fields = from_mapping(together(task, given))
        else:
            together(task, {})
            _refuse_beside_resume(out=out, checkpoint_every=checkpoint_every, keep=keep, log=names)
            fields = None

    from gradreg.lab.processes import leave, processes
    from gradreg.lab.train.session import CannotWrite, Plan, Stopped, read_plan, start
    from gradreg.lab.train.session import resume as go_on

    try:
        with _refusal_from_one():
            if fields is None:
                assert resume is not None
                plan = read_plan(resume)
            else:
                plan = Plan(fields, checkpoint_every or 1, keep or 3, names)
            with processes(plan.config.device) as group, _progress() as show:
                if resume is None:
                    results = start(plan, out, group, show)
                else:
                    results = go_on(resume, given, group, show, lambda line: _say(line) if group.is_first else None)
    except Stopped as stopped:
        if _is_first():
            what = "interrupted" if stopped.signal == signal.SIGINT else "terminated"
            _say(f"{what}; {stopped}.")
        leave(128 + stopped.signal)
    except CannotWrite as error:
        _say(f"{error}.")
        leave(1)
    if results is not None:
        _print_summary(plan.config, results)
    if group.size > 1:
        leave(0)


def _read_yaml(path: Path) -> dict[str, Any]:
    from gradreg.lab.yaml_file import read_mapping

    values = read_mapping("--config", path, "of fields to values")
    if {"base", "grid", "search"} & set(values):
        way_out = shlex.join(["gradreg", "sweep", str(path)])
        raise BadInput(f"--config must be the configuration of a run, got {str(path)!a}, that of a sweep: {way_out}.")
    return {name: checked(FIELDS[name], value) for name, value in by_field(values, "--config").items()}


def _refuse_beside_resume(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise BadInput(f"--{name.replace('_', '-')} must be left out with --resume: a run goes on as it began.")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _refusal_from_one() -> Iterator[None]:
    """Of several processes on a machine one says what is refused."""
    try:
        yield
    except BadInput:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        from gradreg.lab.processes import leave

        leave(2)


def _progress() -> AbstractContextManager[Any]:
    """Of several processes the first one's."""
    from gradreg.lab.progress import progress_bar

    return progress_bar() if _is_first() else nullcontext(lambda what, done, planned: None)


def _say(line: str) -> None:
    print(f"gradreg: {line}", file=sys.stderr)


def _print_summary(config: RunConfig, results: dict[str, Any]) -> None:
    from gradreg.lab.metric import Metric
    from gradreg.lab.tables import console, say

    settings = "".join(f", {name} {value:g}" for name, value in config.settings.items())
    say(console(), f"{config.task}: {config.method}{settings}, {_optimizer(config)}, seed {config.seed}")
    end = "diverged" if results["diverged"] else "ended"
    print(f"{end} after {results['epochs']} epochs, {results['steps']} steps, {results['seconds']:g} s")
    metric = Metric.from_row(results["metric"])
    scores = (
        f"{part} {metric.name} {metric.written(results[f'{part}_{metric.key}'])}" for part in ("test", "validation")
    )
    print(*scores, f"train loss {results['train_loss']:.4f}", f"‖∇L‖ {results['grad_norm']:.4f}", sep="   ")
    if results.get("flooded_steps") == 0:
        print(
            f"No step had a loss below the level {config.level:g}: this is a run of SGD; a higher --level would flood."
        )
    print(f"Everything is in {results['folder']}.")


def _optimizer(config: RunConfig) -> str:
    from gradreg.lab.tasks import trained

    own = config.file is not None and trained(config).optimizer is not None
    return "its own optimizer" if own else config.optimizer
