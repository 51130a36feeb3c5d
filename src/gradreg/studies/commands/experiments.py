"""Experiments with a fixed plan: the demo, the tuning behind it, diagonal linear networks, flooding."""

from __future__ import annotations

from typing import Annotated

from gradreg.lab.commands.options import (
    LAST_SEED,
    MOST_WORKERS,
    Out,
    Workers,
    app,
    interrupted_in,
    nothing_in,
    switch,
    whole,
)
from gradreg.lab.folder import new_folder
from gradreg.studies.commands.choices import show_choice
from gradreg.studies.commands.seeds import consecutive


@app.command
def demo(
    *,
    quick: Annotated[bool, switch("--quick", "One of the four tasks, three seeds: under 40 seconds.")] = False,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds")] = 0,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "How many; by default 6, with --quick 3")] = None,
    out: Out = None,
    workers: Workers = None,
) -> None:
    """Compare SGD, F-GR, B-GR, DB, SAM and flooding on digits and one-dimensional MNIST.

    Prints a table with intervals and verdicts, and writes a folder: results.json, runs.jsonl, two figures and
    report.html. Under 4 minutes on two cores; hyper-parameters come from `gradreg tune`.
    """
    import torch

    from gradreg.lab.player import default_workers
    from gradreg.studies.demo.run import DEFAULT_SEEDS, QUICK_SEEDS, QUICK_TASKS, Plan, run_demo
    from gradreg.studies.demo.tasks import TASKS

    chosen = consecutive(seed, seeds or (QUICK_SEEDS if quick else DEFAULT_SEEDS))
    plan = Plan(
        tasks=tuple(TASKS[name] for name in QUICK_TASKS) if quick else tuple(TASKS.values()),
        seeds=chosen,
        is_quick=quick,
    )
    torch.set_num_threads(1)
    folder = new_folder(out, "demo")
    with interrupted_in(folder / "runs.jsonl"):
        run_demo(plan, folder, workers or default_workers())


@app.command
def tune(
    *,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "Offset of the tuning seeds, which the demo never uses")] = 0,
    seeds: Annotated[int, whole("--seeds", 2, 20, "How many")] = 2,
    out: Out = None,
    workers: Workers = None,
    replace: Annotated[bool, switch("--replace", "Also put the choice where `gradreg demo` reads it.")] = False,
) -> None:
    """Choose the hyper-parameters of the demo on validation rows; the test rows are not looked at.

    SGD's learning rate and weight decay first, then every method's own settings with both near by. Writes demo.json,
    the choice, and trials.jsonl, every run. A few minutes on two cores.
    """
    import torch

    from gradreg.lab.player import default_workers
    from gradreg.lab.progress import progress_bar
    from gradreg.studies.demo.tasks import TASKS
    from gradreg.studies.demo.tune import FIRST_SEED, SHIPPED
    from gradreg.studies.demo.tune import tune as choose

    torch.set_num_threads(1)
    folder = new_folder(out, "tune")
    with interrupted_in(folder / "trials.jsonl"), progress_bar() as progress:
        chosen_seeds = range(FIRST_SEED + seed, FIRST_SEED + seed + seeds)
        choice = choose(list(TASKS.values()), chosen_seeds, folder, workers or default_workers(), progress)
    show_choice(choice, folder / "demo.json", SHIPPED, replace)


@app.command
def dln(
    *,
    quick: Annotated[bool, switch("--quick", "A coarse map, fewer finite steps and three seeds.")] = False,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds, which draw the data")] = 0,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "How many; by default 6, with --quick 3")] = None,
    out: Out = None,
    workers: Annotated[int | None, whole("--workers", 1, MOST_WORKERS, "Threads; by default 2")] = None,
) -> None:
    """Solve the implicit bias in a diagonal linear network: where a finite ascent step helps, and where it hurts.

    Prints tables with intervals and verdicts, among them how well integration and theory agree, and writes a folder:
    report.html, results.json and three figures. Under 2 minutes on two cores.
    """
    import torch

    from gradreg.lab.player import default_workers
    from gradreg.studies.implicit_bias.dln import DEFAULT_SEEDS, QUICK_SEEDS, Plan, run_dln

    chosen = consecutive(seed, seeds or (QUICK_SEEDS if quick else DEFAULT_SEEDS))
    torch.set_num_threads(1)
    folder = new_folder(out, "dln")
    with nothing_in(folder):
        run_dln(Plan(chosen, quick, workers or default_workers()), folder)


@app.command
def flooding(
    *,
    quick: Annotated[bool, switch("--quick", "A third of the steps, two seeds.")] = False,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds")] = 0,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "How many; by default 3, with --quick 2")] = None,
    out: Out = None,
    workers: Annotated[int | None, whole("--workers", 1, MOST_WORKERS, "Threads; by default 2")] = None,
) -> None:
    """Check that flooding performs gradient regularization, and count how much of it in real runs.

    Prints the identity to rounding, tables with intervals, and writes a folder: report.html, results.json and a figure.
    Under 2 minutes on two cores.
    """
    import torch

    from gradreg.lab.player import default_workers
    from gradreg.studies.implicit_bias.flooding import DEFAULT_SEEDS, QUICK_SEEDS, Plan, run_flooding

    chosen = consecutive(seed, seeds or (QUICK_SEEDS if quick else DEFAULT_SEEDS))
    torch.set_num_threads(1)
    folder = new_folder(out, "flooding")
    with nothing_in(folder):
        run_flooding(Plan(chosen, quick, workers or default_workers()), folder)
