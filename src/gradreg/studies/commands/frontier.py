"""`gradreg frontier`: what is kept of the benefit below two passes, against measured cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gradreg.lab.commands.options import LAST_SEED, Out, Workers, Write, app, interrupted_in, switch, whole
from gradreg.lab.folder import BadInput, new_folder, shown
from gradreg.studies.commands.choices import show_choice
from gradreg.studies.commands.seeds import consecutive


@app.command
def frontier(
    *,
    quick: Annotated[bool, switch("--quick", "Two of the four tasks and six seeds: under 4 minutes.")] = False,
    tune: Annotated[bool, switch("--tune", "Choose the numbers of every mode instead, on validation rows.")] = False,
    replace: Annotated[
        bool, switch("--replace", "With --tune: also put the choice where `gradreg frontier` reads it.")
    ] = False,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds")] = 0,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "How many; by default 16, with --quick 6")] = None,
    images: Annotated[
        Path | None,
        Parameter(
            name="--images", help="Folder or record of `gradreg images`, whose real tasks the page judges by, too."
        ),
    ] = None,
    measured: Annotated[
        Path | None, Parameter(name="--from", help="Folder of an earlier call, whose page is made anew: runs nothing.")
    ] = None,
    out: Out = None,
    workers: Workers = None,
    write: Write = None,
) -> None:
    """Measure what each cheaper mode keeps of the benefit of F-GR, and what it costs.

    Retention with intervals on four tasks, times of a step in paired rounds, and each penalty beside the exact one.
    Prints tables, and writes a folder: results.json, report.html,
    frontier.md and its figures. Under 30 minutes on two cores; the
    hyper-parameters come from `gradreg frontier --tune`, which takes longer.
    """
    from gradreg.lab.player import default_workers

    given = {
        "--quick": quick,
        "--seeds": seeds is not None,
        "--write": write is not None,
        "--images": images is not None,
        "--from": measured is not None,
    }
    if tune:
        _left_out(given, "--tune, which has a plan of its own")
        _tune(seed, out, workers or default_workers(), replace)
        return
    if replace:
        raise BadInput("--replace must be left out without --tune: only a tuning has a choice to put there.")
    from gradreg.lab.page import check_page
    from gradreg.studies.frontier.run import DEFAULT_SEEDS, QUICK_SEEDS, Plan, prepare, run_frontier, show

    if write is not None:
        check_page(write, "gradreg frontier")
    real = [] if images is None else _real_tasks(images)
    if measured is not None:
        plan = {"--quick": quick, "--seeds": seeds is not None, "--seed": seed != 0}
        _left_out({**plan, "--out": out is not None, "--workers": workers is not None}, "--from, which runs nothing")
        show(_results("--from", "frontier", measured), measured, write, real)
        return
    chosen = consecutive(seed, seeds or (QUICK_SEEDS if quick else DEFAULT_SEEDS))
    prepare()
    folder = new_folder(out, "frontier")
    with interrupted_in(folder / "runs.jsonl"):
        run_frontier(Plan(chosen, quick, workers or default_workers()), folder, write, real)


def _left_out(given: Mapping[str, bool], beside: str) -> None:
    for name, is_given in given.items():
        if is_given:
            raise BadInput(f"{name} must be left out with {beside}.")


def _real_tasks(folder: Path) -> list[dict[str, Any]]:
    """
    Raises:
        BadInput: it is no folder or record of `gradreg images`, or there is nothing to keep in it.
    """
    from gradreg.studies.frontier.summary import judging
    from gradreg.studies.images.pieces import MODES, PIECES
    from gradreg.studies.images.summary import real_tasks

    found = real_tasks(_results("--images", "images", folder))
    if not judging(found):
        names = ", ".join(name for name, piece in PIECES.items() if {*MODES} <= {*piece.methods})
        raise BadInput(
            f"--images must hold a piece with all modes ({names}) in which F-GR is better than SGD, got none in "
            f"{shown(folder)}."
        )
    return found


def _results(option: str, kind: str, folder: Path) -> dict[str, Any]:
    """
    Raises:
        BadInput: the folder is not one of that command, or it has not ended.
    """
    from gradreg.lab.records import read_record

    try:
        results = read_record(folder if folder.is_file() else folder / "results.json")
        if not str(results.get("command")).startswith(f"gradreg {kind}"):
            raise ValueError("is of something else")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"{'it' if folder.is_file() else 'results.json'} {error}"
        where = f"a folder of gradreg {kind} with its results{', or its record' * (kind == 'images')}"
        raise BadInput(f"{option} must be {where}, got {shown(folder)}: {why}.") from None
    return results


def _tune(seed: int, out: Path | None, workers: int, replaces: bool) -> None:
    from gradreg.lab.progress import progress_bar
    from gradreg.studies.frontier.modes import MODES, TASKS
    from gradreg.studies.frontier.run import prepare
    from gradreg.studies.frontier.tune import SHIPPED, tune

    prepare()
    folder = new_folder(out, "frontier-tune")
    with interrupted_in(folder / "trials.jsonl"), progress_bar() as progress:
        choice = tune(TASKS, MODES, folder, workers, progress, seed)
    show_choice(choice, folder / "frontier.json", SHIPPED, replaces)
