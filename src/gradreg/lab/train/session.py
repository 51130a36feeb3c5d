"""`gradreg train`: one run on disk, which can be stopped and killed at any moment and goes on as if nothing was.

    config.json      configuration, command, date, machine, versions, git state
    metrics.jsonl    a line for each epoch
    checkpoints/     one folder for each of the last ones, see checkpoint.py
    results.json     when the run has ended; the test rows are read for it, once

In metrics.jsonl, `train_loss` and `grad_norm` are L and ‖∇L‖ over the first 5,000 training rows after the epoch, in
evaluation mode and full precision; those of results.json are over all of them. `learning_rate` is that of the step to
come, `penalty_ratio` is ‖ĝ − g1‖/‖g1‖ in the last step of the epoch, `seconds` are those of the epoch.

config.json, results.json and each line of metrics.jsonl carry a `check`, see records.py.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gradreg.lab import objective, tasks, trackers
from gradreg.lab.about import git_state, machine, versions
from gradreg.lab.config import FIELDS, RunConfig, from_mapping
from gradreg.lab.data import places
from gradreg.lab.folder import BadInput, append_line, new_folder, shown, write_json, write_text
from gradreg.lab.names import one_of
from gradreg.lab.processes import Processes
from gradreg.lab.randomness import seeded
from gradreg.lab.records import Damaged, opened, read_record, sealed
from gradreg.lab.train import checkpoint
from gradreg.lab.train.stopping import StopRequest, stop_requests
from gradreg.lab.train.trainer import Trainer

MEASURED_ROWS = 5000

Row = dict[str, Any]
Show = Callable[[str, int, int], None]


class Stopped(Exception):
    """A signal ended the run after its state was saved; the message says how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class CannotWrite(Exception):
    """The disk is full, say; the message says what is kept."""


@dataclass(frozen=True)
class Plan:
    """A run and what is kept of it."""

    config: RunConfig
    checkpoint_every: int = 1
    """Epochs."""
    keep: int = 3
    """Checkpoints."""
    log: tuple[str, ...] = ()
    """The trackers that get the metrics too."""
    threads: int | None = None
    """Of a run that is under way; sums over another number of threads are rounded differently."""


def start(plan: Plan, out: Path | None, group: Processes, show: Show) -> Row | None:
    """Train into a new folder; what results.json holds, in the first process."""
    trackers.check(plan.log)
    with seeded(plan.config.seed):
        if plan.config.file is not None:
            tasks.check(plan.config)
        trainer = Trainer(plan.config, processes=group, follows_penalty=True)
        group.check_agreement("the configuration", plan)
        if not group.is_first:
            return _Run(plan, Path(), trainer, {}).train(show)
        folder = new_folder(out, "train")
        with _telling_what_is_kept(folder, plan.config):
            about = {
                "command": command(plan),
                "date": time.strftime("%Y-%m-%d %H:%M:%S"),
                "machine": machine(group.size),
                "versions": versions(),
                "git": git_state(),
                **{key: value for key, value in asdict(plan).items() if key != "config"},
                "threads": torch.get_num_threads(),
                "ran_in": os.getcwd(),
                "config": asdict(plan.config),
            }
            if plan.config.file is not None:
                metric = trainer.task.metric.as_row()  # of a run that has not ended too
                about |= {"task_sha256": tasks.digest_of(plan.config.file), "metric": metric}
            write_json(folder / "config.json", sealed(about))
            try:
                with _held(folder, group):
                    return _Run(plan, folder, trainer, about).train(show)
            except trackers.NotReady:
                shutil.rmtree(folder, ignore_errors=True)  # nothing was in it before, and nothing was trained
                raise


def resume(
    folder: Path, given: Mapping[str, Any], group: Processes, show: Show, say: Callable[[str], None]
) -> Row | None:
    """Go on from the last good checkpoint; `given` are fields that the user named again, which must be the same.

    `path` may be another: the data was moved.

    Raises:
        BadInput: no such run, one that has ended or is running, other values than its own, no good checkpoint.
    """
    plan, about = read(folder)
    for name, value in given.items():
        own = getattr(plan.config, name)
        if value != own and (name != "path" or own is None):
            raise BadInput(f"{name} must stay {str(own)!a} with --resume, as the run began, got {str(value)!a}.")
    if (folder / "results.json").exists():
        raise BadInput(f"--resume must be the folder of a run that has not ended, got {shown(folder)}.")
    place_of_data = places.found(plan.config, about.get("ran_in"), given.get("path"))
    trackers.check(plan.log)
    if plan.config.file is not None and about.get("task_sha256") != tasks.digest_of(plan.config.file):
        raise BadInput(
            f"TASK must be as it was when the run began, and {plan.config.file} has changed: start a new run."
        )
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    with (
        seeded(plan.config.seed),
        _held(folder, group),
        _telling_what_is_kept(folder, plan.config),
        places.standing_for(plan.config.path, place_of_data),
    ):
        trainer = Trainer(plan.config, processes=group, follows_penalty=True)
        if not checkpoint.all_in(folder / "checkpoints"):
            raise BadInput(
                f"--resume: nothing was saved in {shown(folder)} before the run ended; start it again in a new folder "
                f"with: {command(plan)}."
            )
        place = checkpoint.last_good(folder / "checkpoints", say)
        group.check_agreement("the checkpoint", place.name)
        run = _Run(plan, folder, trainer, about)
        run.load(checkpoint.read(place))
        return run.train(show)


def read_plan(folder: Path) -> Plan:
    """What a run was started with. Raises as `read`."""
    return read(folder)[0]


def read(folder: Path) -> tuple[Plan, Row]:
    """What a run was started with, and all that its config.json says.

    Raises:
        BadInput: `folder` is not that of a run of `gradreg train`, or config.json is not what was written.
    """
    what = "--resume must be the folder of a run of gradreg train"
    try:
        about = read_record(folder / "config.json")
        return _plan(about, folder), about
    except OSError as error:
        raise BadInput(f"{what}, got {shown(folder)}: no config.json ({error.strerror}).") from error
    except Damaged as error:
        raise BadInput(f"{shown(folder / 'config.json')} {error}; {_way_out(error.record, folder)}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{what}, got {shown(folder)}, whose config.json is not of that kind.") from error


def _plan(about: Row, folder: Path) -> Plan:
    config = from_mapping(about["config"], shown(folder / "config.json"))
    log = about.get("log", ["tensorboard"] if about.get("tensorboard") else [])  # an older run's
    names = tuple(one_of("log", name, list(trackers.TRACKERS)) for name in log)
    return Plan(config, about["checkpoint_every"], about["keep"], names, about["threads"])


def _way_out(about: Row, folder: Path) -> str:
    """Of a changed config.json; the command in it is told where it agrees with the configuration beside it."""
    by_hand = 'put it right, or, after a change of your own, take out its line "check"'
    with suppress(BadInput, ValueError, KeyError, TypeError):
        if command(_plan(about, folder)) == about["command"]:
            return f"{by_hand}, or start again in a new folder with: {about['command']}"
    return f"{by_hand}, or start the run again in a new folder"


def command(plan: Plan) -> str:
    """The command line that runs it again: what differs from the defaults."""
    words = ["gradreg", "train", *_task_word(plan.config)]
    default = Plan(plan.config)
    for name, spec in FIELDS.items():
        if name == "file":
            continue
        value = getattr(plan.config, name)
        if value != spec.default:
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    for name in ("checkpoint_every", "keep"):
        if getattr(plan, name) != getattr(default, name):
            words += ["--" + name.replace("_", "-"), str(getattr(plan, name))]
    for name in plan.log:
        words += ["--log", name]
    return shlex.join(words)


class _Run:
    """A run under way, in one of its processes. Only the first writes."""

    def __init__(self, plan: Plan, folder: Path, trainer: Trainer, about: Row) -> None:
        self.plan = plan
        self.folder = folder
        self.trainer = trainer
        self.about = about
        self.group = trainer.processes
        self.seconds = 0.0  # of the whole run, up to the last clock()
        self.epoch_seconds = 0.0
        self.is_diverged = False
        self._best: float | None = None  # on validation rows
        self._clock = time.perf_counter()

    def train(self, show: Show) -> Row | None:
        first_step, epochs = self.trainer.step, self.plan.config.epochs
        with ExitStack() as stack:
            stop = stack.enter_context(stop_requests(once=self.group.size == 1))
            names = self.plan.log if self.group.is_first else ()
            tracking = trackers.tracking(names, self.folder, asdict(self.plan.config), first_step)
            log = stack.enter_context(tracking)
            self._clock = time.perf_counter()

            def should_stop() -> bool:
                planned = self.trainer.num_steps - first_step
                epoch = min(self.trainer.place.epoch + 1, epochs)
                metric = self.trainer.task.metric
                best = "" if self._best is None else f", best {metric.written(self._best)}"
                show(f"epoch {epoch} of {epochs}{best}", self.trainer.step - first_step, planned)
                return self.group.any(stop.signal is not None)

            while self.trainer.place.epoch < epochs and not self.is_diverged:
                if self.trainer.epoch(should_stop):
                    self._end_epoch(log)
                if self.group.any(stop.signal is not None) and self.trainer.place.epoch < epochs:
                    self._leave(stop)
            found = self._results() if self.group.is_first else None
            last = ("test_loss", f"test_{self.trainer.task.metric.key}")  # the rows are there already
            log.results = {key: found[key] for key in last} if found else None
            self.group.wait()
            return found

    def _end_epoch(self, log: trackers.Tracking) -> None:
        if self.group.is_first:
            line = self._measured()
            self.is_diverged = not math.isfinite(line["train_loss"])
            append_line(self.folder / "metrics.jsonl", sealed(line))
            log.log(line, line["step"])
            self._clock = time.perf_counter()  # what trackers take is not the run's
            score, metric = line[f"validation_{self.trainer.task.metric.key}"], self.trainer.task.metric
            if self._best is None or metric.worth(score) > metric.worth(self._best):
                self._best = score
        self.is_diverged = self.group.any(self.is_diverged)
        self.epoch_seconds = 0.0
        epoch = self.trainer.place.epoch
        if epoch % self.plan.checkpoint_every == 0 or epoch == self.plan.config.epochs or self.is_diverged:
            self._save()

    def _measured(self) -> Row:
        trainer = self.trainer
        task, model = trainer.task, trainer.model
        loss, norm = objective.gradient_norm(model, task.train, of=task.objective, most=MEASURED_ROWS)
        validation = objective.evaluate(model, task.validation, of=task.objective)
        self._tick()
        return {
            "epoch": trainer.place.epoch,
            "step": trainer.step,
            "learning_rate": trainer.learning_rate,
            "train_loss": loss,
            "validation_loss": validation.loss,
            f"validation_{task.metric.key}": validation.score,
            "grad_norm": norm,
            "penalty_ratio": trainer.penalty_ratio,
            "seconds": round(self.epoch_seconds, 3),
        }

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self.epoch_seconds += now - self._clock
        self._clock = now

    def _save(self) -> Path:
        place = self.trainer.place
        target = self.folder / "checkpoints" / checkpoint.name_of(place.epoch, place.position)
        if self.group.is_first:
            self._tick()
            own = {"seconds": self.seconds, "epoch_seconds": self.epoch_seconds, "is_diverged": self.is_diverged}
            _synchronize(self.folder / "metrics.jsonl")
            checkpoint.write(target, {**self.trainer.state_dict(), "run": own})
            checkpoint.rotate(target, self.plan.keep)
        self.group.wait()
        return target

    def load(self, state: Row) -> None:
        self.trainer.load_state_dict(state)
        for name, value in state["run"].items():
            setattr(self, name, value)
        if self.group.is_first:
            self._keep_metrics(self.trainer.place.epoch)
        self.group.wait()

    def _keep_metrics(self, epochs: int) -> None:
        """The lines of so many epochs; later ones will be made again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept, found = lines[:epochs], []
        for number, line in enumerate(kept, 1):
            try:
                found.append(opened(line).get("epoch"))
            except ValueError as error:
                raise BadInput(
                    f"line {number} of {shown(path)} {error}; put it right, or start again in a new folder with: "
                    f"{command(self.plan)}."
                ) from error
        if found != list(range(1, epochs + 1)):
            raise BadInput(f"{shown(path)} must hold a line for each of the {epochs} epochs of the checkpoint.")
        if lines != kept:
            write_text(path, b"".join(kept).decode("utf-8"))

    def _leave(self, stop: StopRequest) -> None:
        target = self._save()
        epochs = self.plan.config.epochs
        where = f"{self.trainer.step} of {self.trainer.num_steps} steps ({epochs} epochs)"
        raise Stopped(
            stop.signal or signal.SIGTERM,
            f"saved after {where} in {target}; go on with: {_command_to_resume(self.folder, self.plan.config)}",
        )

    def _results(self) -> Row:
        trainer, task = self.trainer, self.trainer.task
        loss, norm = objective.gradient_norm(trainer.model, task.train, of=task.objective)
        validation, test = (
            objective.evaluate(trainer.model, p, of=task.objective) for p in (task.validation, task.test)
        )
        self._tick()
        results = {
            **self.about,
            "epochs": trainer.place.epoch,
            "steps": trainer.step,
            **({} if trainer.flooded is None else {"flooded_steps": trainer.flooded.steps}),
            "diverged": self.is_diverged or not math.isfinite(loss),
            "train_loss": loss,
            "grad_norm": norm,
            "validation_loss": validation.loss,
            f"validation_{task.metric.key}": validation.score,
            "test_loss": test.loss,
            f"test_{task.metric.key}": test.score,
            "metric": task.metric.as_row(),
            "num_scored": test.count,
            "seconds": round(self.seconds, 1),
        }
        write_json(self.folder / "results.json", sealed(results))
        return {**results, "folder": str(self.folder)}


@contextmanager
def _telling_what_is_kept(folder: Path, config: RunConfig) -> Iterator[None]:
    """After a full disk, and after a Ctrl-C that nothing waited for."""
    try:
        yield
    except (OSError, KeyboardInterrupt) as error:
        kept = [place.name for place in checkpoint.all_in(folder / "checkpoints")]
        way_out = (
            f"{', '.join(kept)} kept; go on with: {_command_to_resume(folder, config)}" if kept else "nothing was kept"
        )
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(way_out) from None
        raise CannotWrite(f"cannot write to {shown(folder)}: {error.strerror or error}; {way_out}") from error


def _command_to_resume(folder: Path, config: RunConfig) -> str:
    return shlex.join(["gradreg", "train", *_task_word(config), "--resume", str(folder)])


def _task_word(config: RunConfig) -> list[str]:
    return [] if config.file is None else [tasks.word_of(config.file)]


@contextmanager
def _held(folder: Path, group: Processes) -> Iterator[None]:
    """No other process goes on with this run meanwhile; a killed one lets go by itself."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / "config.json").open("rb") as file:
        if group.is_first:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInput(
                    f"--resume must be the folder of a run that is not running, got {shown(folder)}."
                ) from error
        yield


def _synchronize(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())
