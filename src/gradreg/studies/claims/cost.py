r"""Claim (a): finite differences cost less than double backpropagation.

Counting matrix products of an L-layer network, a gradient takes 3L, F-GR two gradients, 6L, and DB 9L: a ratio of 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from gradreg.lab import stats
from gradreg.lab.cost import steps as costs
from gradreg.lab.cost.measure import CASES as LARGER
from gradreg.lab.cost.measure import COMPARED, PREDICTED_DB_OVER_F_GR, Case, mlp_case
from gradreg.lab.progress import progress_bar
from gradreg.lab.tables import Table
from gradreg.studies.claims.claim import Above, Claim, Measured, Plan, Subclaim

METHODS = ("SGD", "F-GR", "DB")
CASES = {
    "a1, MLP of 4 layers": mlp_case(4),
    "a2, MLP of 10 layers": mlp_case(10),
    "a3, ResNet-18": replace(LARGER["resnet18"], config=replace(LARGER["resnet18"].config, width=16, batch_size=16)),
}


@dataclass(frozen=True)
class Size:
    """How long each seed is measured."""

    rounds: int


FULL, QUICK = Size(12), Size(6)


def measure(plan: Plan, folder: Path) -> Measured:
    del folder
    size = QUICK if plan.is_quick else FULL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios: dict[str, list[dict[str, float]]] = {key: [] for key in CASES}
    try:
        with progress_bar() as progress:
            done = 0
            for seed in plan.seeds:
                for key, case in CASES.items():
                    progress("(a) cost of a step", done, len(plan.seeds) * len(CASES))
                    ratios[key].append(times(case, seed, size.rounds))
                    done += 1
        counts = {key: flops(case, plan.seeds[0]) for key, case in CASES.items()}
    finally:
        torch.set_num_threads(threads)
    rows = []
    for key, of_seeds in ratios.items():
        to_sgd = (f"{stats.mean_interval([r[name] for r in of_seeds]).mean:.2f}" for name in ("F-GR", "DB"))
        count = counts[key]
        counted = (f"{count[name] / count['SGD']:.2f}" for name in ("F-GR", "DB"))
        rows.append((key, *to_sgd, *counted, f"{count['DB'] / count['F-GR']:.2f}", f"{PREDICTED_DB_OVER_F_GR:g}"))
    settings = {
        key: f"width {case.config.width}, batch of {case.config.batch_size}, inputs {'×'.join(map(str, case.shape))}"
        for key, case in CASES.items()
    }
    return Measured(
        {key: [r["DB/F-GR"] for r in of_seeds] for key, of_seeds in ratios.items()},
        {**settings, "rounds": f"{size.rounds} for each seed, after {costs.WARM_UP} that are not counted; one thread"},
        [Table("Time and counted FLOPs (torch.utils.flop_counter) of a step", HEADINGS, rows)],
    )


HEADINGS = (
    "",
    "time, F-GR/SGD",
    "time, DB/SGD",
    "FLOPs, F-GR/SGD",
    "FLOPs, DB/SGD",
    "FLOPs, DB/F-GR",
    "predicted, DB/F-GR",
)


def times(case: Case, seed: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of ratios within a round, in processor time of this thread."""
    seconds = costs.paired_seconds(_steps(case, seed), rounds, costs.clock_for(costs.CPU, threads=1))
    pairs = {"F-GR": ("F-GR", "SGD"), "DB": ("DB", "SGD"), "DB/F-GR": ("DB", "F-GR")}
    return {name: median(x / y for x, y in zip(seconds[a], seconds[b])) for name, (a, b) in pairs.items()}


def flops(case: Case, seed: int) -> dict[str, int]:
    """Of one step."""
    return {name: costs.count_flops(step) for name, step in _steps(case, seed).items()}


def _steps(case: Case, seed: int) -> dict[str, costs.Step]:
    task = case.task(seed)
    configs = {name: replace(case.config, method=name, seed=seed, **COMPARED[name]) for name in METHODS}
    return {name: costs.make_step(config, task) for name, config in configs.items()}


CLAIM = Claim(
    letter="a",
    title="Cost of a step",
    says="Computing gradient regularization by a finite difference costs less than by double backpropagation.",
    where="Stated in the abstract; 6L against 9L matrix products, and more than twice as fast on ResNets (A100).",
    how="One step of F-GR and one of DB in each round, on the same batch, in processor time on one thread: the "
    "median over rounds of their ratio, for each seed, which draws weights and inputs.",
    differs="A CPU in the place of an A100, and small models: what Python does in a step weighs more here. `gradreg "
    "cost` measures more models and depths, and memory.",
    subclaims=tuple(
        Subclaim(key, "A step of DB takes longer than a step of F-GR.", "time of a step, DB/F-GR", Above(1.0))
        for key in CASES
    ),
    measure=measure,
)
