"""`gradreg compare`: does it help your model, at which settings, and at what cost?"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gradreg.lab.commands.config_options import with_fields
from gradreg.lab.commands.options import (
    LAST_SEED,
    Log,
    Out,
    TaskWord,
    Workers,
    app,
    gone_on_with,
    switch,
    trackers,
    whole,
)
from gradreg.lab.config import FIELDS, SETTINGS, from_mapping
from gradreg.lab.folder import BadInput, new_folder
from gradreg.lab.names import one_of
from gradreg.lab.task_names import together
from gradreg.lab.trackers import check, send

OWN = (
    "file",
    "method",
    "seed",
    *SETTINGS,
    "ascent",
    "warmup",
    "fraction",
    "lookahead",
    "period",
    "start",
    "probability",
)
"""Fields that the arms decide; the others are the task's."""


@app.command
@with_fields(leaving_out=OWN)
def compare(
    task: TaskWord = None,
    /,
    *,
    methods: Annotated[
        list[str] | None,
        Parameter(
            name="--methods",
            consume_multiple=True,
            negative="",
            help="Compared with SGD, such as F-GR SAM F-GR:epsilon=0.01.",
        ),
    ] = None,
    trials: Annotated[int | None, whole("--trials", 1, 1000, "Candidates for each method; by default 12")] = None,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "Of the test, paired; by default 5")] = None,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds")] = 0,
    budget: Annotated[
        str | None, Parameter(name="--budget", help="Time, such as 30m or 2h, that decides trials and seeds.")
    ] = None,
    by: Annotated[
        str, Parameter(name="--by", help="What is searched for in place of γ: ratio, or gamma itself.")
    ] = "ratio",
    search_epochs: Annotated[
        int | None, whole("--search-epochs", 1, 10**6, "Of a candidate; the best three then train for all epochs")
    ] = None,
    keep_models: Annotated[bool, switch("--keep-models", "Keep the weights of the test runs in models/.")] = False,
    no_opponent: Annotated[bool, switch("--no-opponent", "Leave out SGD for twice as long.")] = False,
    resume: Annotated[
        Path | None, Parameter(name="--resume", help="Folder of a comparison to go on with, or to join while it runs.")
    ] = None,
    storage: Annotated[
        str | None,
        Parameter(name="--storage", help="Database URL, such as postgresql://USER@HOST/DB, to share work."),
    ] = None,
    study: Annotated[
        str | None, Parameter(name="--study", help="Name of the comparison in the database; by default the folder's.")
    ] = None,
    log: Log = None,
    out: Out = None,
    workers: Workers = None,
    **given: Any,
) -> None:
    """Compare methods on a task of your own, or a built-in one: a verdict, a table with intervals, a page.

    SGD's learning rate and weight decay are tuned first, and longest; then each method, by validation rows; the best of
    each is trained with several seeds and read on test rows, once. May be killed at any time; --resume goes on, and,
    given in other terminals or on other machines, shares the work.
    """
    sent_to = trackers(log or ())
    check(sent_to)
    by = one_of("--by", by, ("ratio", "gamma"))
    if methods is not None and not methods:
        raise BadInput("--methods must name at least one method, got nothing.")
    _check_options(task, resume, storage, study, out, given, methods, trials, seeds, budget, search_epochs, keep_models)
    fields = together(task, given)

    from gradreg.lab.comparison import run
    from gradreg.lab.comparison.plan import DEFAULT_METHODS, Effort, Plan, checked_methods
    from gradreg.lab.comparison.report import show
    from gradreg.lab.player import default_workers
    from gradreg.lab.study.storage import Place
    from gradreg.lab.study.study import Study
    from gradreg.lab.tasks import digest_of

    count = workers or default_workers()
    if resume is not None:
        plan, place = run.known(resume, storage)
        folder = resume
        run.open_study(place, plan)
    elif (
        study is not None
        and storage is not None
        and not _plans(methods, trials, seeds, budget, search_epochs, given)
        and _is_there(place := Place(study, url=storage))
    ):
        with Study(place) as known:
            plan = Plan.from_row(known.plan)
        run.check(plan)
        folder = new_folder(out, "compare")
        run.begin(plan, folder, place, _command(task, plan, storage, study), count, ())
    else:
        config = from_mapping(fields)
        named = [name for word in methods or DEFAULT_METHODS for name in word.split(",") if name.strip()]
        names = checked_methods(named, by)
        numbers = {"trials": trials, "seeds": seeds, "search_epochs": search_epochs}
        effort = Effort(**{name: number for name, number in numbers.items() if number is not None})
        plan = Plan(config, names, effort, seed, by, not no_opponent, digest_of(config.file) or "", keep_models)
        run.check(plan)
        said: list[str] = []
        if budget is not None:
            bought = run.afforded(plan, run.seconds_of(budget), count)
            plan, said = replace(plan, effort=bought.effort), bought.not_afforded
            print(*said, sep="\n")
        place = Place(study or _name(out), url=storage) if storage else None
        if place is not None:
            if study is not None and not _is_there(place):
                print(f"gradreg: there is no study {study} yet: it is begun here.", file=sys.stderr)
            run.open_study(place, plan)
        folder = new_folder(out, "compare")
        place = place or Place("compare", folder.resolve())
        run.begin(plan, folder, place, _command(task, plan, storage, place.name), count, said)

    words = [] if task is None else [task]
    with gone_on_with("gradreg", "compare", *words, "--resume", folder):
        results = run.carry_out(plan, folder, place, count)
    show(results, folder)
    send(sent_to, folder, shlex.join(["gradreg", "compare", *words, "--resume", str(folder)]))


def _plans(*given: Any) -> bool:
    return any(bool(value) for value in given)


def _is_there(place: Any) -> bool:
    """Whether a study has been begun under that name."""
    from gradreg.lab.study.study import Study

    try:
        with Study(place):
            return True
    except BadInput as error:
        if "--study must be the name" in str(error):
            return False
        raise


def _check_options(
    task: str | None,
    resume: Path | None,
    storage: str | None,
    study: str | None,
    out: Path | None,
    given: dict[str, Any],
    *planned: Any,
) -> None:
    if resume is not None:
        for name, value in (("--out", out), ("--study", study)):
            if value is not None:
                raise BadInput(f"{name} must be left out with --resume, whose folder decides it.")
        if given or _plans(*planned):
            raise BadInput(
                "--resume must stand alone but for TASK, --storage, --workers and --log: it goes on as it began."
            )
    elif task is None:
        raise BadInput("TASK must be given: FILE.py, FILE.py:NAME, or a built-in task such as digits.")
    if study is not None and storage is None:
        raise BadInput("--study must be given with --storage.")
    trials, seeds, budget, search_epochs = planned[1:5]
    if budget is not None and (trials, seeds, search_epochs) != (None, None, None):
        raise BadInput("--budget must be left out with --trials, --seeds and --search-epochs, which it decides.")
    if budget is not None:
        from gradreg.lab.comparison.run import seconds_of

        seconds_of(budget)


def _name(out: Path | None) -> str:
    return f"compare-{time.strftime('%Y%m%d-%H%M%S')}" if out is None else out.name


def _command(task: str | None, plan: Any, storage: str | None, name: str) -> str:
    """The same runs again; a password is left out."""
    from gradreg.lab.study.storage import without_password
    from gradreg.lab.tasks import task_of, word_of

    base = plan.base
    words: list[Any] = ["gradreg", "compare", base.data if base.file is None else word_of(base.file)]
    words += ["--methods", *plan.methods, "--trials", plan.effort.trials, "--seeds", plan.effort.seeds]
    words += ["--seed", plan.first_seed] if plan.first_seed else []
    words += ["--search-epochs", plan.effort.search_epochs] if plan.effort.search_epochs else []
    words += ["--keep-models"] if plan.keeps_models else []
    words += ["--by", plan.by] if plan.by != "ratio" else []
    words += [] if plan.has_opponent else ["--no-opponent"]
    defaults = {
        **{name: spec.default for name, spec in FIELDS.items()},
        **(task_of(base).defaults if base.file else {}),
    }
    for field in (f for f in FIELDS if f not in OWN and f != "data"):
        value = getattr(base, field)
        if value != defaults[field]:
            words += [f"--{field.replace('_', '-')}"] if value is True else [f"--{field.replace('_', '-')}", value]
    words += ["--storage", without_password(storage), "--study", name] if storage else []
    return shlex.join(str(word) for word in words)
