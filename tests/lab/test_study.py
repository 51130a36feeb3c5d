"""The study of a sweep with real processes: some of them are killed, all of them may write at once."""

import errno
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from gradreg.lab.folder import BadInput
from gradreg.lab.runs import Result
from gradreg.lab.study import journal as files
from gradreg.lab.study import study as module
from gradreg.lab.study.board import INTERRUPTED, LOST, Entry
from gradreg.lab.study.storage import Place, with_driver, without_password
from gradreg.lab.study.study import Study

PLAN = {"what": "a plan"}
GRACE = 5  # a busy machine may be late with a sign of life
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
    for _ in range(100_000):
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
    for _ in range(100_000):
        take(study, **kwargs)
        if study.held:
            return next(iter(study.held))
        time.sleep(0.01)
    raise AssertionError("no run was freed")


def test_two_workers_share_the_runs_and_each_is_run_once(place):
    Study(place, PLAN)
    processes = [started(place, name, run_all) for name in "ab"]
    for process in processes:
        process.join(1000)
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


@pytest.fixture
def finished(journal):
    """A journal with a run that has finished, and its lines."""
    with Study(journal, PLAN) as study:
        take(study, count=1)
        study.finish("run 0", result(0.75))
    return (journal.folder / "study.log").read_bytes().splitlines(keepends=True)


def assert_named(journal, lines, number):
    """Opening says which line is to blame, and changes nothing."""
    log = journal.folder / "study.log"
    log.write_bytes(b"".join(lines))
    with pytest.raises(BadInput, match=rf"study\.log cannot be used: line {number} ") as error:
        Study(journal).board()
    assert "\n" not in str(error.value)
    assert log.read_bytes() == b"".join(lines)


def test_no_flipped_bit_of_a_journal_changes_a_result_unseen(journal, finished):
    whole, log = b"".join(finished), journal.folder / "study.log"
    for place in range(len(whole) - 1):  # without the last newline the last line counts as cut off
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 7
        log.write_bytes(flipped)
        try:
            results = Study(journal).board().results
        except BadInput as error:
            number = int(re.search(r"cannot be used: line (\d+) ", str(error))[1])
            assert number - whole[:place].count(10) in (1, 2)  # 2: "changed, or a line before it is missing"
            continue
        assert results["run 0"].accuracy == 0.75


SPOILED = {
    "foreign": b"spoiled\n",
    "blank": b"\n",
    "NUL": b"\0\0\0\n",
    "without a check": b'{"op_code":4,"worker_id":"x","study_id":0,"datetime_start":null}\n',
    "not UTF-8": b'{"op_code":"\xff"}\n',
    "a list": b"[]\n",
}


@pytest.mark.parametrize("spoiled", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_line_is_named(journal, finished, spoiled):
    assert_named(journal, [*finished[:3], spoiled, *finished[3:]], 4)


def test_a_lost_or_exchanged_line_is_noticed_at_the_next_one(journal, finished):
    for k in range(len(finished) - 1):
        assert_named(journal, finished[:k] + finished[k + 1 :], k + 1)
        assert_named(journal, [*finished[:k], finished[k + 1], finished[k], *finished[k + 2 :]], k + 1)


def without_checks(lines):
    return [re.sub(rb',"check":"[0-9a-f]{16}"', b"", line) for line in lines]


def test_a_journal_without_checks_is_read_and_gone_on_with(journal, finished):
    old = without_checks(finished)
    assert old != finished
    (journal.folder / "study.log").write_bytes(b"".join(old))
    with Study(journal) as study:
        take(study, count=2)
        study.finish("run 1", result(0.5))
    assert {key: found.score for key, found in Study(journal).board().results.items()} == {
        "run 0": 0.75,
        "run 1": 0.5,
    }
    lines = (journal.folder / "study.log").read_bytes().splitlines(keepends=True)
    assert lines[: len(old)] == old
    assert_named(journal, lines[: len(old)] + lines[len(old) + 1 :], len(old) + 1)


@pytest.mark.parametrize("word", [b"op_code", b"study_name", b"directions", b"user_attr"])
def test_what_is_no_record_in_a_journal_without_checks_is_named(journal, finished, word):
    old = without_checks(finished)
    number = next(k for k, line in enumerate(old, 1) if b'"' + word in line)
    old[number - 1] = old[number - 1].replace(word, b"x" + word[1:], 1)
    assert_named(journal, old, number)


def test_a_trial_of_something_else_is_one_line(journal, finished):
    old = without_checks(finished)
    (journal.folder / "study.log").write_bytes(b"".join(line.replace(b'"key"', b'"kez"') for line in old))
    with pytest.raises(BadInput, match="a trial that is no run of a sweep"):
        Study(journal).board()


def test_an_error_that_lasts_is_not_waited_for(journal, monkeypatch):
    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    Study(journal, PLAN)
    monkeypatch.setattr(module, "locked", read_only)
    monkeypatch.setattr(module.time, "sleep", lambda wait: pytest.fail("it was waited for"))
    with pytest.raises(BadInput, match="cannot be used: Read-only file system; what it holds is kept"):
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
