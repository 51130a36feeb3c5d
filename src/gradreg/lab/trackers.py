"""Where the numbers of a run go besides its folder: TensorBoard, Weights & Biases, MLflow, each an optional package.

A tracker is opened with the folder and the configuration of a run and the steps that it has done, takes a row of
numbers at a step, and is closed with the final numbers, or with None where the run is not over. What it needs to go
on with the same run is in trackers.json.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol
from uuid import uuid4

from gradreg._install import how
from gradreg.lab.config import FIELDS
from gradreg.lab.folder import BadInput, write_json
from gradreg.lab.records import kept_lines

Row = Mapping[str, Any]


class NotReady(BadInput):
    """A tracker cannot be opened: no server, nobody logged in."""


class Tracker(Protocol):
    """What all of them do."""

    def __init__(self, folder: Path, config: Row, step: int) -> None: ...

    def log(self, row: Row, step: int) -> None: ...

    def close(self, results: Row | None, step: int) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, config: Row, step: int) -> None:
        del config
        writer = _package("tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, row: Row, step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, results: Row | None, step: int) -> None:
        self.log(results or {}, step)
        self._writer.close()


class _WandB:
    """Its own variables say where: WANDB_PROJECT (by default gradreg), WANDB_MODE, WANDB_DIR."""

    def __init__(self, folder: Path, config: Row, step: int) -> None:
        del step  # it knows how far it is
        own = _known(folder, "wandb") or _keep(folder, "wandb", uuid4().hex[:12])
        place = {"project": os.environ.get("WANDB_PROJECT", "gradreg"), "dir": os.environ.get("WANDB_DIR", str(folder))}
        self._run = _package("wandb").init(id=own, name=folder.name, config=dict(config), resume="allow", **place)

    def log(self, row: Row, step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self, results: Row | None, step: int) -> None:
        del step
        self._run.summary.update(dict(results or {}))
        self._run.finish()


class _MLflow:
    """Its own variables say where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (by default gradreg)."""

    def __init__(self, folder: Path, config: Row, step: int) -> None:
        del step
        self._mlflow = mlflow = _package("mlflow")
        own = _known(folder, "mlflow")
        if own is None:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "gradreg"))
            _keep(folder, "mlflow", mlflow.start_run(run_name=folder.name).info.run_id)
            mlflow.log_params(dict(config))
        else:
            mlflow.start_run(run_id=own)

    def log(self, row: Row, step: int) -> None:
        self._mlflow.log_metrics({name: float(value) for name, value in row.items()}, step=step)

    def close(self, results: Row | None, step: int) -> None:
        if results is not None:
            self.log(results, step)
        self._mlflow.end_run("KILLED" if results is None else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}
_MODULES = {"tensorboard": "torch.utils.tensorboard"}


def check(names: Sequence[str]) -> None:
    """
    Raises:
        BadInput: a package is missing.
    """
    for name in names:
        _package(name)


class Tracking:
    """Several trackers. One that fails is left out from then on: the run is worth more."""

    def __init__(self, names: Sequence[str], folder: Path, config: Row, step: int) -> None:
        self.results: Row | None = None
        """The final numbers, once there are some."""
        self.step = step
        self._open: dict[str, Tracker] = {}
        for name in names:
            try:
                self._open[name] = TRACKERS[name](folder, config, step)
            except Exception as error:
                self.close()
                raise NotReady(f"--log {name} must be ready to take a run: {_in_one_line(error)}.") from error

    def log(self, row: Row, step: int) -> None:
        self.step = step
        for name in list(self._open):
            with self._left_out_if_it_fails(name):
                self._open[name].log(row, step)

    def close(self) -> None:
        for name in list(self._open):
            with self._left_out_if_it_fails(name):
                self._open.pop(name).close(self.results, self.step)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            print(f"gradreg: --log {name} failed, the run goes on without: {_in_one_line(error)}.", file=sys.stderr)


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: Row, step: int) -> Iterator[Tracking]:
    """Open until the run ends, however it ends."""
    opened = Tracking(names, folder, config, step)
    try:
        yield opened
    finally:
        opened.close()


def send(names: Sequence[str], folder: Path, again: str) -> None:
    """Each test run of a study that has ended as a run of each tracker: its configuration, its curve, its score.

    Args:
        names: of trackers.
        folder: of the study; log/ in it takes what the trackers keep on disk.
        again: the command that goes on with it, and would send them once more.

    Raises:
        NotReady: a tracker cannot be opened.
    """
    options = " ".join(f"--log {name}" for name in names)
    for line in kept_lines(folder / "runs.jsonl") if names else ():
        if line["scored_on"] != "test":
            continue
        arm = line.get("arm", line["method"])
        place = folder / "log" / f"{folder.resolve().name}-{re.sub('[^A-Za-z0-9.-]+', '-', arm)}-{line['seed']}"
        place.mkdir(parents=True, exist_ok=True)
        config = {"arm": arm, **{name: line[name] for name in FIELDS if name in line}}
        curve = line.get("trace", ())
        try:
            opened = Tracking(names, place, config, 0)
        except NotReady as error:
            raise NotReady(
                f"{str(error).rstrip('.')}. The study has ended and is kept; send it with: {again} {options}."
            ) from None
        for moment in curve:
            opened.log(_numbers(moment), int(moment["step"]))
        ends = {f"test_{name}": line[name] for name in ("accuracy", "score") if name in line}
        opened.results = _numbers({**ends, **{name: line.get(name) for name in ("train_loss", "grad_norm", "seconds")}})
        opened.close()


def _numbers(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}


def _package(name: str) -> Any:
    try:
        return import_module(_MODULES.get(name, name))
    except ImportError as error:
        raise BadInput(f"--log {name} needs the package {name}: {how(name)}") from error


def _known(folder: Path, name: str) -> str | None:
    with suppress(OSError, ValueError):
        return json.loads((folder / "trackers.json").read_text(encoding="utf-8")).get(name)
    return None


def _keep(folder: Path, name: str, own: str) -> str:
    known = {other: found for other in TRACKERS if (found := _known(folder, other)) is not None}
    write_json(folder / "trackers.json", {**known, name: own})
    return own


def _in_one_line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 400, placeholder=" …").rstrip(": .…")
