"""The workers of a study: each takes runs from the study until nothing is left, on any number of machines."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from gradreg.lab.batched import most_slices
from gradreg.lab.data.places import standing_for
from gradreg.lab.folder import BadInput, append_line
from gradreg.lab.player import play, run_all, without_main
from gradreg.lab.progress import progress_bar
from gradreg.lab.records import sealed
from gradreg.lab.runs import Job, record
from gradreg.lab.study.board import ERROR
from gradreg.lab.study.schedule import Schedule, Status
from gradreg.lab.study.storage import Place
from gradreg.lab.study.study import Study
from gradreg.lab.tasks import Source, know

STACKS = 4
"""That a worker takes at a time."""
SHARES = 2
"""Into which the work of each worker is divided, so that they end together."""
MODELS = "models"
"""Takes the weights of runs, beside runs.jsonl."""
PAUSE = 0.5  # seconds between looks at what others do


@dataclass(frozen=True)
class Worker:
    """How runs are played in this process."""

    folder: Path
    """Takes a line of runs.jsonl for each run that finishes here."""
    place: Place
    schedule_of: Callable[[Mapping[str, Any]], Schedule]
    """Of the plan in the study; a function of a module, which other processes find by its name."""
    is_batched: bool
    count: int = 1
    """Workers on this machine, among whom a batch is shared out."""
    known: tuple[Source, ...] = ()
    """Tasks of the user's that its runs need."""
    data: tuple[str | None, str | None] = (None, None)
    """The path of the configuration's data, and the place that it stands for."""


def work(worker: Worker, report: Callable[[Status], None] = lambda status: None) -> None:
    """Run what is left of a study, and stay until others have finished what they have.

    Raises:
        BadInput: the study cannot be used, or some run has failed so often that it was given up.
    """
    with Study(worker.place) as study:
        schedule = worker.schedule_of(study.plan)
        most = _batch_size(schedule, worker) if worker.is_batched else 1
        schedule.look_ahead(most)
        while True:
            board = study.claim(schedule.wanted, most, schedule.attempts)
            status = schedule.status(board)
            report(status)
            if study.held:
                _play(study, schedule, worker)
            elif status.is_finished:
                return
            elif not board.running and not board.waiting:
                raise BadInput(schedule.given_up(board))
            else:
                time.sleep(PAUSE)


def _batch_size(schedule: Schedule, worker: Worker) -> int:
    """A few stacks, since methods that need other passes stack apart; but no worker shall wait for another's last."""
    share = schedule.num_runs / (SHARES * worker.count)
    return max(1, min(STACKS * most_slices(schedule.base), math.ceil(share)))


def _play(study: Study, schedule: Schedule, worker: Worker) -> None:
    """Run what is held; each result is kept as soon as it is there."""
    whats = {key: trial.user_attrs["what"] for key, trial in study.held.items()}
    jobs = {key: _keeping(schedule.job(what), worker.folder, schedule.weights(what)) for key, what in whats.items()}
    keys, todo = list(jobs), list(jobs.values())
    runs = play(todo, 1) if worker.is_batched else run_all(todo, workers=1)
    with study.alive(), closing(runs) as results:
        try:
            for k, result in results:
                if study.finish(keys[k], result):
                    with suppress(OSError):  # the study has it, from which the lines are written at the end
                        line = {**record(todo[k], result), **schedule.line(whats[keys[k]])}
                        append_line(worker.folder / "runs.jsonl", sealed(line))
        except BadInput:
            raise  # this machine cannot run it, another may
        except Exception as error:  # what a run may meet: no memory left, a method that the model does not bear
            study.release(f"{ERROR}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _keeping(job: Job, folder: Path, name: str) -> Job:
    """With its weights in the folder, if it has a name for them."""
    if not name:
        return job
    (folder / MODELS).mkdir(exist_ok=True)
    return replace(job, weights=folder / MODELS / name)


def work_together(worker: Worker, schedule: Schedule) -> None:
    """Work with `worker.count` processes, or in this one; shows progress on a terminal.

    Ctrl-C and SIGTERM end the workers, which give back what they have.
    """
    torch.set_num_threads(1)
    with progress_bar() as progress, _terminated_as_interrupted():

        def report(status: Status) -> None:
            progress(status.text, status.done, status.planned)

        with Study(worker.place) as study:
            status = schedule.status(study.board())
        progress("starting", status.done, status.planned)  # what was done before says nothing of the time that is left
        if worker.count == 1 or status.is_finished:
            work(worker, report)
            return
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe(duplex=False) for _ in range(worker.count)]
        processes = [spawn.Process(target=_process, args=(worker, end)) for _, end in pipes]
        try:
            with _interrupts_held(), without_main():
                for process in processes:
                    process.start()
            for _, end in pipes:
                end.close()
            with Study(worker.place) as study:
                while any(process.is_alive() for process in processes):
                    report(schedule.status(study.board()))
                    _wait(processes)
                if not schedule.status(study.board()).is_finished:
                    raise BadInput(_last_words([pipe for pipe, _ in pipes]))
        finally:
            _end(processes)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that start here never see Ctrl-C: it reaches the parent, which sends SIGTERM."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _process(worker: Worker, words: Connection) -> None:
    torch.set_num_threads(1)
    know(worker.known)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with _terminated_as_interrupted(), standing_for(*worker.data):
        try:
            work(worker)
        except KeyboardInterrupt:
            pass
        except BadInput as error:
            words.send(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _wait(processes: Sequence[BaseProcess]) -> None:
    until = time.monotonic() + 2 * PAUSE
    for process in processes:
        process.join(max(0.05, until - time.monotonic()))


def _last_words(pipes: Sequence[Connection]) -> str:
    for pipe in pipes:
        try:
            if pipe.poll():
                return pipe.recv()
        except EOFError:
            continue
    return "every worker was killed, as the system does where memory is short; try fewer --workers."


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        if process.pid is not None:
            process.join(15)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C, where signals can be taken at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
