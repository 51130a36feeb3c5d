"""`gradreg claims`: every claim of the paper, measured and judged."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from gradreg.lab.commands.options import LAST_SEED, Out, Workers, Write, app, switch, whole
from gradreg.lab.folder import BadInput, new_folder
from gradreg.studies.commands.seeds import consecutive


@app.command
def claims(
    *,
    quick: Annotated[bool, switch("--quick", "Smaller settings and four seeds: under 5 minutes.")] = False,
    only: Annotated[
        list[str] | None,
        Parameter(name="--only", consume_multiple=True, negative="", help="Some of the claims: a b c d e."),
    ] = None,
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "First of the consecutive seeds")] = 0,
    seeds: Annotated[int | None, whole("--seeds", 2, 100, "How many; by default 10, with --quick 4")] = None,
    out: Out = None,
    workers: Workers = None,
    write: Write = None,
) -> None:
    """Measure each claim of the paper, and say whether it holds here.

    (a) cost, (b) generalization, (c) implicit bias in a diagonal linear network, (d) SAM, (e) flooding. Prints one
    table, and writes a folder: results.json, report.html, claims.md and its figures. Under 25 minutes on two cores.
    """
    from gradreg.lab.player import default_workers
    from gradreg.studies.claims.claim import Plan
    from gradreg.studies.claims.runner import DEFAULT_SEEDS, QUICK_SEEDS, run_claims

    letters = _letters(only)
    chosen = consecutive(seed, seeds or (QUICK_SEEDS if quick else DEFAULT_SEEDS))
    if write is not None:
        from gradreg.lab.page import check_page

        check_page(write, "gradreg claims")
    import torch

    from gradreg.lab.cost.steps import keep_heap

    torch.set_num_threads(1)
    if "a" in letters:
        keep_heap()
    folder = new_folder(out, "claims")
    plan = Plan(letters, chosen, quick, workers or default_workers())
    try:
        run_claims(plan, folder, write)
    except KeyboardInterrupt:
        kept = [str(folder / name) for name in ("claims.jsonl", "runs.jsonl") if (folder / name).exists()]
        what = f"what was finished is kept in {' and '.join(kept)}" if kept else f"nothing was finished in {folder}"
        raise KeyboardInterrupt(what) from None


def _letters(only: list[str] | None) -> tuple[str, ...]:
    from gradreg.studies.claims import CLAIMS

    wanted = tuple(CLAIMS) if only is None else tuple(only)
    for letter in wanted:
        if letter not in CLAIMS:
            raise BadInput(f"--only must be one or more of {', '.join(CLAIMS)}, with spaces between, got {letter!a}.")
    if not wanted:
        raise BadInput(f"--only must be one or more of {', '.join(CLAIMS)}, got nothing.")
    return tuple(letter for letter in CLAIMS if letter in wanted)
