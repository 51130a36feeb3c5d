"""`gradreg frontier`: what is kept of the benefit below two passes, against measured cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from gradreg.lab.commands.options import LAST_SEED, Out, Workers, Write, app, interrupted_in, switch, whole
from gradreg.lab.folder import BadInput, new_folder
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

    if tune:
        for name, given in (("--quick", quick), ("--seeds", seeds is not None), ("--write", write is not None)):
            if given:
                raise BadInput(f"{name} must be left out with --tune, which has a plan of its own.")
        _tune(seed, out, workers or default_workers(), replace)
        return
    if replace:
        raise BadInput("--replace must be left out without --tune: only a tuning has a choice to put there.")
    from gradreg.lab.page import check_page
    from gradreg.studies.frontier.run import DEFAULT_SEEDS, QUICK_SEEDS, Plan, prepare, run_frontier

    chosen = consecutive(seed, seeds or (QUICK_SEEDS if quick else DEFAULT_SEEDS))
    if write is not None:
        check_page(write, "gradreg frontier")
    prepare()
    folder = new_folder(out, "frontier")
    with interrupted_in(folder / "runs.jsonl"):
        run_frontier(Plan(chosen, quick, workers or default_workers()), folder, write)


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
