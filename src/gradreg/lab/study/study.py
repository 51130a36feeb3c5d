"""A study: which runs there are, who has which, what came out. It lies in a journal file or a database.

A run is a *trial* of Optuna, known by its key. WAITING → RUNNING is Optuna's atomic change of state, so that one worker
gets it; COMPLETE holds the result; FAIL says that the attempt came to nothing, and the run is entered again as a new
trial. Two workers may enter a run at the same time: of the trials with one key, the lowest-numbered that has not
failed is the run, and the others are given up by whoever meets them. So nothing is run twice at once, and entering
needs no lock.

Who is alive: beside a journal each worker holds the lock of a file, which the system frees when it dies. In a database
it repeats a heartbeat for each of its runs, and one that has been silent for `grace` seconds of the database's clock
is taken for dead.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from gradreg.lab.config import FIELDS
from gradreg.lab.folder import BadInput
from gradreg.lab.runs import Result
from gradreg.lab.study.board import DUPLICATE, INTERRUPTED, LOST, Board, Entry
from gradreg.lab.study.journal import Spoiled, hold, locked
from gradreg.lab.study.storage import Place, open_storage, sqlite_file

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds between attempts to reach a database that is locked or away, or a disk that is full."""

LASTING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Errors of a file system that no waiting ends."""

OPENING_WAITS = (0.5, 2.0)
"""The same on opening, where a wrong address should soon be told; two that make the tables at once need one."""


def _with_all_fields(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan of an earlier version lacks fields that have come since: they are as they were, at their defaults."""
    if not isinstance(plan.get("base"), Mapping):
        return plan
    return {**plan, "base": {**{name: spec.default for name, spec in FIELDS.items()}, **plan["base"]}}


class Study:
    """An open study, as one worker sees it.

    Args:
        place: where it is.
        plan: what is to be run; makes the study if there is none. Without a plan the study must exist.

    Raises:
        BadInput: the study cannot be opened, is another's, or is of another plan.
    """

    def __init__(self, place: Place, plan: Mapping[str, Any] | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.place = place
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.held: dict[str, FrozenTrial] = {}
        """The runs that this worker has, by key."""
        self._seat: int | None = None
        try:
            self.patiently(lambda: self._open(plan is not None), OPENING_WAITS)
        except KeyError:
            if place.url is None:
                raise BadInput(f"the study must be one of gradreg sweep; {place} holds none.") from None
            raise BadInput(f"--study must be the name of a sweep in the database, got {place.name!a}.") from None
        self.patiently(lambda: self._agree(plan), OPENING_WAITS)

    def _open(self, create: bool) -> None:
        self._storage = open_storage(self.place)
        name = self.place.name
        try:
            self._study = optuna.load_study(study_name=name, storage=self._storage)
        except KeyError:
            if not create:
                raise
            self._study = optuna.create_study(
                study_name=name, storage=self._storage, direction="maximize", load_if_exists=True
            )

    def _agree(self, plan: Mapping[str, Any] | None) -> None:
        with self._exclusive():
            known = self._study.user_attrs.get("plan")
            if known is None and plan is not None and not self._study.get_trials(deepcopy=False):
                self._study.set_user_attr("grace", self.place.grace)
                self._study.set_user_attr("plan", plan)
                known = self._study.user_attrs["plan"]
        if known is None:
            raise BadInput(f"the study must be one of gradreg sweep; {self.place} is not.")
        if plan is not None and _with_all_fields(known) != _with_all_fields(plan):
            different = next(key for key in {**known, **plan} if known.get(key) != plan.get(key))
            raise BadInput(
                f"the configuration must be that of the study {self.place}; {different} differs. "
                "Start another sweep with another --out or --study."
            )
        self.plan: Mapping[str, Any] = known
        # One that is patient less than another beats would take it for dead: all have the grace of the first.
        self.grace = self._study.user_attrs.get("grace", self.place.grace)
        if isinstance(self._storage, optuna.storages.RDBStorage):
            self._storage.grace_period = self.grace

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError, StorageInternalError):
            self.release(INTERRUPTED)
        if self._seat is not None:
            with suppress(OSError):
                self._seat_of(self.worker).unlink(missing_ok=True)
            os.close(self._seat)
            self._seat = None

    def board(self) -> Board:
        return self.patiently(self._look)

    def _look(self) -> Board:
        try:
            return Board(self._study.get_trials(deepcopy=False))
        except (KeyError, TypeError) as error:
            raise Spoiled("it holds a trial that is no run of a sweep") from error

    def claim(self, wanted: Callable[[Board], Sequence[Entry]], most: int, attempts: Callable[[str], int]) -> Board:
        """Enter what is wanted and not there, then take up to `most` runs that wait; returns what was seen before.

        Args:
            wanted: the runs that should be there, in order.
            most: how many runs this worker wants to `hold`.
            attempts: of a run, how many failures are still to be followed by another attempt.
        """

        def step() -> Board:
            with self._exclusive():
                self._take_a_seat()
                self._fail_lost()
                board = self._look()
                missing = [entry for entry in wanted(board) if entry.key not in board.current]
                for entry in missing:
                    if board.attempts[entry.key] < attempts(entry.key):
                        attrs = {"key": entry.key, "what": dict(entry.what)}
                        self._study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=attrs))
                if missing:
                    board = self._look()
                for trial in board.waiting:
                    if len(self.held) >= most:
                        break
                    self._claim(trial, board)
                if self.held:  # without a lock another may have finished one of them meanwhile
                    board = self._look()
                    for key, trial in list(self.held.items()):
                        if board.current[key].number != trial.number:
                            self._fail(self.held.pop(key), DUPLICATE)
            return board

        return self.patiently(step)

    def _claim(self, trial: FrozenTrial, board: Board) -> None:
        key = trial.user_attrs["key"]
        if board.current[key] is not trial:
            self._fail(trial, DUPLICATE)
            return
        if self.place.url is not None:
            self._beat(trial)  # before it is claimed: whoever is killed in between has left a heartbeat
        try:
            if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                self.held[key] = trial
                self._storage.set_trial_user_attr(trial._trial_id, "worker", self.worker)
        except UpdateFinishedTrialError:
            pass

    def finish(self, key: str, result: Result) -> bool:
        """Keep a result; False if this worker was taken for dead and the run is another's now."""
        trial = self.held[key]

        def step() -> bool:
            try:
                self._storage.set_trial_user_attr(trial._trial_id, "result", asdict(result))
                value = result.score if result.score == result.score else 0.0
                self._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [value])
            except UpdateFinishedTrialError:
                return False
            return True

        kept = self.patiently(step)
        del self.held[key]
        return kept

    def release(self, reason: str) -> None:
        """Give up the runs that are held; they will be entered again."""
        while self.held:
            self._fail(self.held.popitem()[1], reason)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Say all the while, from a thread, that the runs that are held are worked on."""
        if self.place.url is None:
            yield
            return
        over = threading.Event()
        interval = self.grace / 4

        def beat() -> None:
            while not over.wait(interval):
                for trial in list(self.held.values()):
                    with suppress(StorageInternalError):  # the next one may get through
                        self._beat(trial)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self, trial: FrozenTrial) -> None:
        assert isinstance(self._storage, optuna.storages.RDBStorage)
        self._storage.record_heartbeat(trial._trial_id)

    def _fail(self, trial: FrozenTrial, reason: str) -> None:
        try:
            self._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass

    def _fail_lost(self) -> None:
        """Fail the trials whose worker is dead."""
        if self.place.url is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(self._study)
            return
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Claims are made under the lock that is held here: one without a worker was cut off.
            worker = trial.user_attrs.get("worker")
            if worker is None or (worker != self.worker and self._is_dead(worker)):
                self._fail(trial, LOST)

    def _seat_of(self, worker: str) -> Path:
        return self.place.locks / Path(worker).name

    def _take_a_seat(self) -> None:
        if self.place.url is None and self._seat is None:
            self._seat = hold(self._seat_of(self.worker))

    def _is_dead(self, worker: str) -> bool:
        seat = self._seat_of(worker)
        if not seat.exists():
            return True
        handle = hold(seat)
        if handle is None:
            return False
        seat.unlink(missing_ok=True)
        os.close(handle)
        return True

    def _exclusive(self) -> Any:
        """One worker at a time, where the storage is a file. SQLite has no row locks that Optuna could hold."""
        if self.place.url is None:
            return locked(self.place.locks / "claims")
        path = sqlite_file(self.place.url)
        return locked(path.with_name(path.name + ".claims")) if path else nullcontext()

    def patiently(self, step: Callable[[], T], waits: Sequence[float] | None = None) -> T:
        """Try until it works, then give up with one line: a database may be locked, a disk full for a while."""
        from sqlalchemy.exc import SQLAlchemyError

        for wait in (*(WAITS if waits is None else waits), None):
            try:
                return step()
            except (OSError, StorageInternalError, SQLAlchemyError) as error:
                if wait is None or getattr(error, "errno", None) in LASTING:
                    raise self._unusable(error) from error
                time.sleep(wait)
            except Spoiled as error:
                raise BadInput(
                    f"the study {self.place} cannot be used: {error}. Nothing was changed; put it right, or put back a "
                    "copy, or begin another sweep in a new folder."
                ) from error
        raise AssertionError

    def _unusable(self, error: BaseException) -> BadInput:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        reason = getattr(cause, "strerror", None) or str(getattr(cause, "orig", None) or cause)
        return BadInput(
            f"the study {self.place} cannot be used: {reason.strip().splitlines()[0]}; what it holds is kept."
        )
