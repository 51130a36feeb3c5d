"""The study of a sweep with real processes: some of them are killed, all of them may write at once."""

import errno
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from gradreg.lab.folder import BadInput
from gradreg.lab.runs import Result
from gradreg.lab.sweep import journal as files
from gradreg.lab.sweep import study as module
from gradreg.lab.sweep.board import INTERRUPTED, LOST, Entry
from gradreg.lab.sweep.storage import Place, with_driver, without_password
from gradreg.lab.sweep.study import Study

PLAN = {"what": "a plan"}
GRACE = 2
FORK = multiprocessing.get_context("fork")  # the imports are done


@pytest.fixture(params=["journal", "database"])
def place(request, tmp_path):
    if request.param == "journal":
        return Place("sweep", folder=tmp_path)
    return Place("sweep", url=f"sqlite:///{tmp_path}/study.db", grace=GRACE)


@pytest.fixture
def journal(tmp_path):
    return Place("sweep", folder=tmp_path)


def entries(count):
    return [Entry(f"run {k}", {"k": k}) for k in range(count)]


def take(study, count=3, most=1, attempts=3):
    return study.claim(lambda board: entries(count), most, lambda key: attempts)


def result(accuracy=0.5):
    return Result(accuracy, float("nan"), 1.0, [{"step": 1, "train_loss": 0.5}], False, 0.1)


def started(place, name, target, *args):
    """A process that has reached the place where it touches a file."""
    mark = place_folder(place) / f".{name}"
    process = FORK.Process(target=target, args=(place, mark, *args))
    process.start()
    for _ in range(3000):
        if mark.exists():
            return process
        time.sleep(0.01)
    raise AssertionError("the process did not start")


def place_folder(place):
    return place.folder or Path(place.url.removeprefix("sqlite:///")).parent


def hold_a_run(place, mark, most=1, count=3):
    with Study(place) as study, study.alive():
        take(study, count, most)
        mark.touch()
        time.sleep(600)


def run_all(place, mark):
    with Study(place) as study, study.alive():
        mark.touch()
        while True:
            board = take(study, count=12)
            if not study.held:
                if not board.running and not board.waiting:
                    return
                continue
            for key in list(study.held):
                with (place_folder(place) / "played").open("a") as file:
                    file.write(f"{key}\n")
                study.finish(key, result())


def killed(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def until_one_is_held(study, **kwargs):
    for _ in range(2000):
        take(study, **kwargs)
        if study.held:
            return next(iter(study.held))
        time.sleep(0.01)
    raise AssertionError("no run was freed")


def test_two_workers_share_the_runs_and_each_is_run_once(place):
    Study(place, PLAN)
    processes = [started(place, name, run_all) for name in "ab"]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    played = Counter((place_folder(place) / "played").read_text().splitlines())
    assert played == Counter(entry.key for entry in entries(12))
    assert len(Study(place).board().results) == 12


def test_a_run_that_another_has_is_not_taken(place):
    Study(place, PLAN)
    process = started(place, "a", hold_a_run, 3)
    try:
        with Study(place) as study:
            time.sleep(1.5 * GRACE if place.url else 0)  # alive, though it has held them for longer than the grace
            board = take(study)
            assert not study.held
            assert [trial.user_attrs["key"] for trial in board.running] == ["run 0", "run 1", "run 2"]
    finally:
        killed(process)


def test_the_run_of_a_killed_worker_is_run_again_and_what_it_had_finished_is_not(place):
    Study(place, PLAN)
    with Study(place) as study:
        take(study)
        study.finish("run 0", result(0.75))
    killed(started(place, "a", hold_a_run))  # dies with run 1
    with Study(place) as study:
        take(study)
        assert list(study.held) == ["run 2"]
        study.finish("run 2", result())
        assert until_one_is_held(study) == "run 1"
        study.finish("run 1", result())
        assert study.board().results["run 0"].score == 0.75
        assert study.board().attempts == {"run 1": 1}


def test_a_run_that_kills_its_workers_is_given_up(journal):
    Study(journal, PLAN)
    for name in "ab":
        killed(started(journal, name, hold_a_run, 1, 1))
    with Study(journal) as study:
        take(study, count=2, attempts=2)
        assert list(study.held) == ["run 1"]
        assert study.board().attempts["run 0"] == 2


def test_a_claim_that_was_cut_off_is_free_again(journal):
    """Killed after the change of state, before the worker's name was written."""
    Study(journal, PLAN)
    with Study(journal) as study:
        take(study, count=1)
        trial = study.held.pop("run 0")
        study._storage.set_trial_user_attr(trial._trial_id, "worker", None)
        take(study, count=1)
        assert list(study.held) == ["run 0"]


def test_what_is_given_back_does_not_count_as_an_attempt(place):
    Study(place, PLAN)
    with Study(place) as study:
        take(study, count=1)
    with Study(place) as study:
        take(study, count=1, attempts=1)
        assert list(study.held) == ["run 0"]


def test_a_run_that_was_entered_twice_is_run_once(place):
    with Study(place, PLAN) as study:
        take(study, count=1, most=0)
        # As another worker would that had looked at the same moment.
        study._study.add_trial(module.optuna.create_trial(state=TrialState.WAITING, user_attrs={"key": "run 0"}))
        take(study, count=1, most=2)
        assert len(study.held) == 1
        study.finish("run 0", result())
        assert not take(study, count=1).waiting
        assert not study.held


def test_a_worker_that_was_taken_for_dead_does_not_overwrite(place):
    with Study(place, PLAN) as slow, Study(place) as other:
        take(slow, count=1)
        other._fail(slow.held["run 0"], LOST)
        take(other, count=1)
        assert not slow.finish("run 0", result(0.1))
        assert other.finish("run 0", result(0.9))
        assert other.board().results["run 0"].score == 0.9


def test_a_result_comes_back_as_it_was(place):
    with Study(place, PLAN) as study:
        take(study, count=1)
        study.finish("run 0", result(float("nan")))
    back = Study(place).board().results["run 0"]
    assert (back.score != back.score, back.grad_norm, back.trace) == (True, 1.0, result().trace)


def test_half_a_line_costs_nothing_that_was_finished(journal):
    with Study(journal, PLAN) as study:
        take(study)
        study.finish("run 0", result())
    log = journal.folder / "study.log"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"op_code":6,"worker_id":"x","trial')
    with Study(journal) as study:
        assert list(study.board().results) == ["run 0"]
        take(study)
        study.finish("run 1", result())
    assert list(Study(journal).board().results) == ["run 0", "run 1"]
    assert log.read_bytes().startswith(whole)


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_journal_cut_anywhere_opens(journal, cut):
    with Study(journal, PLAN) as study:
        take(study, count=1)
        study.finish("run 0", result())
    log = journal.folder / "study.log"
    log.write_bytes(log.read_bytes()[:-cut])
    with Study(journal) as study:
        take(study, count=1)
        assert list(study.held) == ["run 0"]
        study.finish("run 0", result())
        assert list(study.board().results) == ["run 0"]


def test_a_spoiled_line_is_named(journal):
    Study(journal, PLAN)
    log = journal.folder / "study.log"
    log.write_bytes(b"spoiled\n" + log.read_bytes())
    with pytest.raises(BadInput, match=r"study\.log cannot be used"):
        Study(journal)


def test_a_full_disk_is_waited_for_and_leaves_whole_lines(journal, monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0, 0))
    real, broken = files.os.fsync, [True, True]

    def fsync(handle):
        if broken and broken.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with Study(journal, PLAN) as study:
        take(study)
        before = (journal.folder / "study.log").read_bytes()
        monkeypatch.setattr(files.os, "fsync", fsync)
        assert study.finish("run 0", result())
        after = (journal.folder / "study.log").read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") == before.count(b"\n") + 2  # the result and the state, each once
        broken[:] = [True] * 10
        with pytest.raises(BadInput, match="No space left on device"):
            take(study)
        broken.clear()
    assert list(Study(journal).board().results) == ["run 0"]


def test_a_database_that_is_away_for_a_while_loses_nothing(place, monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0, 0))
    failures = [StorageInternalError("away")] * 2
    with Study(place, PLAN) as study:
        take(study)
        real = study._storage.set_trial_state_values

        def sometimes(*args, **kwargs):
            if failures:
                raise failures.pop()
            return real(*args, **kwargs)

        monkeypatch.setattr(study._storage, "set_trial_state_values", sometimes)
        assert study.finish("run 0", result())
        failures[:] = [StorageInternalError("away")] * 9
        with pytest.raises(BadInput, match="away"):
            study.patiently(lambda: study._storage.set_trial_state_values(0, TrialState.RUNNING))
        failures.clear()


def test_a_study_of_another_plan_is_refused(place):
    Study(place, PLAN)
    Study(place, PLAN)
    with pytest.raises(BadInput, match="what differs"):
        Study(place, {"what": "another plan"})


def test_a_study_that_is_not_there_is_refused(place):
    with pytest.raises(BadInput, match="must be"):
        Study(place)


def test_a_study_of_something_else_is_refused(place):
    study = Study(place, PLAN)._study
    other = Place("other", place.folder, place.url)
    foreign = module.optuna.create_study(study_name="other", storage=study._storage)
    foreign.add_trial(module.optuna.create_trial(value=1.0))
    with pytest.raises(BadInput, match="must be one of gradreg sweep"):
        Study(other, PLAN)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "--storage must be a URL"),
        ("sqlite:////no/such/folder/study.db", "cannot be used"),
        ("sqlite://", "one in memory"),
        ("nosuchsystem://host/db", "--storage"),
    ],
)
def test_a_database_that_cannot_be_used_gets_one_line(url, message, monkeypatch):
    monkeypatch.setattr(module, "OPENING_WAITS", ())
    with pytest.raises(BadInput, match=message) as error:
        Study(Place("sweep", url=url), PLAN)
    assert "\n" not in str(error.value)


def test_a_password_is_not_shown():
    assert "secret" not in without_password("postgresql://user:secret@host/db")
    assert "secret" not in str(Place("sweep", url="postgresql://user:secret@host/db"))
    assert with_driver("postgresql://user@host/db") == "postgresql+psycopg://user@host/db"
    assert with_driver("postgresql+psycopg2://user@host/db") == "postgresql+psycopg2://user@host/db"


def test_who_joins_is_as_patient_as_who_began(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    Study(Place("sweep", url=url, grace=60), PLAN)
    joined = Study(Place("sweep", url=url, grace=2))
    assert joined.grace == joined._storage.grace_period == 60


def test_interrupted_is_the_reason_on_leaving(journal):
    with Study(journal, PLAN) as study:
        take(study)
    trial = Study(journal)._study.get_trials()[0]
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, INTERRUPTED)
    assert not [path for path in journal.locks.iterdir() if path.name not in ("claims", "journal")]
