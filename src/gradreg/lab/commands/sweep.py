"""`gradreg sweep`: the paper's grid, or a search, by any number of workers."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gradreg.lab.commands.options import LAST_SEED, Log, Out, Workers, app, gone_on_with, trackers, whole
from gradreg.lab.folder import BadInput, new_folder
from gradreg.lab.task_names import fields_of
from gradreg.lab.trackers import check, send

if TYPE_CHECKING:
    from gradreg.lab.study.storage import Place
    from gradreg.lab.sweep.plan import Sweep


@app.command
def sweep(
    config: Annotated[Path | None, Parameter(name="CONFIG", help="YAML file: base, grid or search, seeds.")] = None,
    *,
    task: Annotated[
        str | None,
        Parameter(name="--task", help="FILE.py or FILE.py:NAME: a task of your own, not base's data."),
    ] = None,
    resume: Annotated[
        Path | None, Parameter(name="--resume", help="Folder of a sweep to go on with, or to join while it runs.")
    ] = None,
    storage: Annotated[
        str | None,
        Parameter(
            name="--storage", help="Database URL, such as postgresql://USER@HOST/DB; by default a file in --out."
        ),
    ] = None,
    study: Annotated[
        str | None, Parameter(name="--study", help="Name of the sweep in the database; by default the folder's.")
    ] = None,
    search: Annotated[int | None, whole("--search", 1, 10_000, "Points to try for each block of a search")] = None,
    seed: Annotated[int | None, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds")] = None,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "How many; by default the configuration's, or 5")] = None,
    epochs: Annotated[int | None, whole("--epochs", 1, 10**6, "In the place of the configuration's")] = None,
    path: Annotated[
        str | None,
        Parameter(name="--path", help="Where the data is, in the place of the configuration's; with --resume, now."),
    ] = None,
    device: Annotated[str | None, Parameter(name="--device", help="auto, cpu or cuda.")] = None,
    batched: Annotated[
        bool | None,
        Parameter(
            name="--batched",
            negative="--single",
            help="Train many runs as one batched model, or one by one; by default batched where every run can be.",
        ),
    ] = None,
    grace: Annotated[
        int | None,
        whole("--grace", 2, 86_400, "Seconds without a sign after which a worker on a database is taken for dead"),
    ] = None,
    log: Log = None,
    out: Out = None,
    workers: Workers = None,
) -> None:
    """Train a grid of methods and settings over several seeds, or search for settings.

    The best point of each method is chosen on validation rows, then read once on test rows. Prints a table with
    intervals and verdicts, and writes a folder: config.json, study.log, runs.jsonl, results.json. May be killed at any
    time; --resume goes on, and, given in other terminals or on other machines, shares the work.
    """
    from gradreg.lab.batched import is_worthwhile
    from gradreg.lab.data.places import found, standing_for
    from gradreg.lab.player import default_workers
    from gradreg.lab.study.complete import check_complete
    from gradreg.lab.study.storage import Place
    from gradreg.lab.study.workers import Worker, work_together
    from gradreg.lab.sweep import folder as sweep_folder
    from gradreg.lab.sweep.schedule import SweepSchedule, schedule_of
    from gradreg.lab.tasks import sources

    sent_to = trackers(log or ())
    check(sent_to)
    own = fields_of(task)
    changes = {"seed": seed, "epochs": epochs, "path": path, "device": device}
    asked = _read(config, {k: v for k, v in changes.items() if v is not None}, seeds, search, own)
    _check_options(config, resume, storage, study, out)
    count = workers or default_workers()
    moved = path if config is None else None
    if resume is not None:
        begun = sweep_folder.find(resume, storage)
        sweep, place, folder = begun.sweep, begun.place, resume
        _check_same(asked, sweep, resume)
        is_batched = _engine(batched, sweep, begun.is_batched)
        check_complete(resume, begun.place, SweepSchedule(begun.sweep), begun.command)
        data = sweep.base.path, found(sweep.base, begun.ran_in, moved)
        _open(place, sweep)
    else:
        place = Place(study or _name(out), url=storage, grace=grace or Place.grace) if storage else None
        sweep = asked or _from_study(place)
        is_batched = _engine(batched, sweep, all(map(is_worthwhile, sweep.configs)))
        data = sweep.base.path, found(sweep.base, None, moved) if moved else None
        with standing_for(*data):
            _check_runs(sweep)
        if place is not None:
            _open(place, sweep)
        folder = new_folder(out, "sweep")
        if place is None:
            place = Place("sweep", folder.resolve())
            _open(place, sweep)
        sweep_folder.begin(folder, sweep, place, _command(config, place, sweep, changes), count, is_batched)

    words = [] if task is None else ["--task", task]
    with gone_on_with("gradreg", "sweep", *words, "--resume", folder), standing_for(*data):
        work_together(
            Worker(folder.resolve(), place, schedule_of, is_batched, count, sources(), data), SweepSchedule(sweep)
        )
        results = sweep_folder.conclude(folder, place, sweep)
    sweep_folder.print_table(results, folder)
    send(sent_to, folder, shlex.join(["gradreg", "sweep", *words, "--resume", str(folder)]))


def _read(
    config: Path | None, changes: dict[str, Any], seeds: int | None, search: int | None, own: dict[str, Any]
) -> Sweep | None:
    from gradreg.lab.sweep.plan import read_sweep

    if config is not None:
        return read_sweep(config, changes, seeds, search, own)
    for name, value in {**changes, "seeds": seeds, "search": search}.items():
        if value is not None and name != "path":
            raise BadInput(f"--{name} must be left out without CONFIG: a sweep that was begun keeps its configuration.")
    return None


def _check_options(
    config: Path | None, resume: Path | None, storage: str | None, study: str | None, out: Path | None
) -> None:
    from gradreg.lab.study.storage import without_password

    if resume is not None and out is not None:
        raise BadInput("--out must be left out with --resume, which is the folder.")
    if resume is not None and study is not None:
        raise BadInput("--study must be left out with --resume: the folder says which it is.")
    if study is not None and storage is None:
        raise BadInput("--study must be given with --storage.")
    if study is not None and not (study.isprintable() and 0 < len(study) <= 200):
        raise BadInput(f"--study must be a printable name of at most 200 characters, got {study!a}.")
    if config is None and resume is None and study is None:
        raise BadInput("CONFIG must be given, or --resume DIR, or --storage URL with --study NAME.")
    if storage is not None:
        without_password(storage)


def _check_same(asked: Sweep | None, known: Sweep, folder: Path) -> None:
    if asked is None or asked == known:
        return
    one, other = asked.plan(), known.plan()
    key = next(key for key in {**one, **other} if one.get(key) != other.get(key))
    raise BadInput(f"CONFIG must be that of the sweep in {str(folder)!a} or left out; {key} differs.")


def _from_study(place: Place | None) -> Sweep:
    from gradreg.lab.study.study import Study
    from gradreg.lab.sweep.plan import from_plan

    assert place is not None
    return from_plan(Study(place).plan)


def _open(place: Place, sweep: Sweep) -> None:
    from gradreg.lab.study.study import Study

    Study(place, sweep.plan())


def _engine(batched: bool | None, sweep: Sweep, default: bool) -> bool:
    from gradreg.lab.batched import is_stackable

    if batched and not all(map(is_stackable, sweep.configs)):
        raise BadInput("--batched must be left out: not every run of this sweep can be a slice of a batched model.")
    return default if batched is None else batched


def _check_runs(sweep: Sweep) -> None:
    """What only data and model can tell: that the data is there, and that the model takes it."""
    from dataclasses import replace

    from gradreg.lab.tasks import trained

    for size in sorted({config.batch_size for config in sweep.configs}):
        trained(replace(sweep.base, batch_size=size)).build(sweep.base.seed)


def _name(out: Path | None) -> str:
    return f"sweep-{time.strftime('%Y%m%d-%H%M%S')}" if out is None else out.name


def _command(config: Path | None, place: Place, sweep: Sweep, changes: dict[str, Any]) -> str:
    """The same runs again; a password is left out."""
    from gradreg.lab.study.storage import without_password
    from gradreg.lab.tasks import word_of

    words: list[Any] = ["gradreg", "sweep", *([] if config is None else [config])]
    words += [] if sweep.base.file is None else ["--task", word_of(sweep.base.file)]
    for name, value in changes.items():
        words += [] if value is None else [f"--{name}", value]
    words += ["--seeds", len(sweep.seeds)] if config is not None else []
    words += ["--search", sweep.trials] if config is not None and sweep.trials is not None else []
    if place.url is not None:
        words += ["--storage", without_password(place.url), "--study", place.name]
    return shlex.join(str(word) for word in words)
