"""`gradreg hacking`: the penalty, and what else there is, against reward hacking, where the true reward is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gradreg.lab.commands.options import LAST_SEED, Out, Workers, Write, app, gone_on_with, switch, whole
from gradreg.lab.folder import BadInput, new_folder
from gradreg.studies.commands.seeds import consecutive


@app.command
def hacking(
    *,
    quick: Annotated[bool, switch("--quick", "A fifth of the steps and two seeds: that all of it runs.")] = False,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds")] = 0,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "How many; by default 8, with --quick 2")] = None,
    resume: Annotated[Path | None, Parameter(name="--resume", help="Folder of a study to go on with.")] = None,
    out: Out = None,
    workers: Workers = None,
    write: Write = None,
) -> None:
    """Train a small policy by GRPO against a flawed verifier, with eight remedies, and watch its true reward.

    Two flaws: one that pays a hack more than honest work, one that pays it alike. Each remedy is tuned alike, then read
    over paired seeds. Writes a folder: runs.jsonl, results.json, report.html, hacking.md and figures. Under 30 minutes
    on two cores; may be stopped at any time.
    """
    import torch

    from gradreg.lab.player import default_workers
    from gradreg.studies.hacking.run import DEFAULT_SEEDS, QUICK_SEEDS, Plan, begin, plan_of, run_hacking

    count = workers or default_workers()
    if resume is not None:
        given = (("--out", out), ("--quick", quick or None), ("--seeds", seeds), ("--seed", seed or None))
        for name, value in given:
            if value is not None:
                raise BadInput(f"{name} must be left out with --resume, whose folder decides it.")
        plan = plan_of(resume, count)
    else:
        chosen = consecutive(seed, seeds or (QUICK_SEEDS if quick else DEFAULT_SEEDS))
        plan = Plan(chosen, quick, count)
    if write is not None:
        from gradreg.lab.page import check_page

        check_page(write, "gradreg hacking")
    torch.set_num_threads(1)
    folder = resume or new_folder(out, "hacking")
    if resume is None:
        begin(plan, folder)
    with gone_on_with("gradreg", "hacking", "--resume", folder):
        run_hacking(plan, folder, write)
