"""One run: `gradreg train`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gradreg.lab.commands.config_options import with_fields
from gradreg.lab.commands.options import Out, app, switch, whole
from gradreg.lab.config import FIELDS, RunConfig, checked, from_mapping
from gradreg.lab.folder import BadInput


@app.command
@with_fields
def train(
    *,
    config: Annotated[Path | None, Parameter(name="--config", help="YAML file of fields; options win over it.")] = None,
    out: Out = None,
    resume: Annotated[
        Path | None, Parameter(name="--resume", help="Folder of a run that was stopped; it goes on, bit for bit.")
    ] = None,
    checkpoint_every: Annotated[int | None, whole("--checkpoint-every", 1, 10**6, "Epochs; by default 1")] = None,
    keep: Annotated[int | None, whole("--keep", 1, 10**6, "Checkpoints that are kept; by default 3")] = None,
    tensorboard: Annotated[bool, switch("--tensorboard", "Also write the metrics for TensorBoard.")] = False,
    **given: Any,
) -> None:
    """Train one model, with checkpoints; for several processes start it with torchrun.

    Writes a folder: config.json, metrics.jsonl (a line for each epoch), checkpoints/, and results.json at the end, for
    which the test rows are read, once. Ctrl-C and SIGTERM save and leave; `--resume FOLDER` goes on.
    """
    from gradreg.lab.progress import progress_bar
    from gradreg.lab.train.processes import leave, processes
    from gradreg.lab.train.session import CannotWrite, Plan, Stopped, read_plan, start
    from gradreg.lab.train.session import resume as go_on

    try:
        if resume is None:
            fields = from_mapping({**(_read_yaml(config) if config else {}), **given})
            plan = Plan(fields, checkpoint_every or 1, keep or 3, tensorboard)
        else:
            _refuse_beside_resume(out=out, checkpoint_every=checkpoint_every, keep=keep, tensorboard=tensorboard)
            given = {**(_checked_values(_read_yaml(config)) if config else {}), **given}
            plan = read_plan(resume)
        with processes(plan.config.device) as group, progress_bar() as show:
            if resume is None:
                results = start(plan, out, group, show)
            else:
                results = go_on(resume, given, group, show, lambda line: _say(line) if group.is_first else None)
    except BadInput:
        if _is_first_on_machine():
            raise
        leave(2)
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
    from gradreg.lab.yaml_file import read_yaml

    values, shown = read_yaml("--config", path), ascii(str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"--config must be a mapping of fields to values, got {shown}.")
    unknown = [key for key in values if key not in FIELDS]
    if unknown:
        raise BadInput(f"--config has the unknown field {str(unknown[0])!a}; the fields are {', '.join(FIELDS)}.")
    return values


def _checked_values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: checked(FIELDS[name], value) for name, value in values.items()}


def _refuse_beside_resume(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise BadInput(f"--{name.replace('_', '-')} must be left out with --resume: a run goes on as it began.")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_first_on_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _say(line: str) -> None:
    print(f"gradreg: {line}", file=sys.stderr)


def _print_summary(config: RunConfig, results: dict[str, Any]) -> None:
    settings = "".join(f", {name} {value:g}" for name, value in config.settings.items())
    print(f"{config.task}: {config.method}{settings}, {config.optimizer}, seed {config.seed}")
    end = "diverged" if results["diverged"] else "ended"
    print(f"{end} after {results['epochs']} epochs, {results['steps']} steps, {results['seconds']:g} s")
    print(
        f"test accuracy {results['test_accuracy']:.2%}   validation {results['validation_accuracy']:.2%}   "
        f"train loss {results['train_loss']:.4f}   ‖∇L‖ {results['grad_norm']:.4f}"
    )
    if results.get("flooded_steps") == 0:
        print(
            f"No step had a loss below the level {config.level:g}: this is a run of SGD; a higher --level would flood."
        )
    print(f"Everything is in {results['folder']}.")
