r"""Claim (e): flooding performs F-GR implicitly.

The identity on one batch, in both orders, and then real runs: is what a pair of steps across the level does to the
weights the penalty step that the identity predicts, and does ‖∇L‖ fall at the level? The definitions are those of
`gradreg.studies.implicit_bias.flooding`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gradreg.lab import stats
from gradreg.lab.data import Split
from gradreg.lab.jobs import run_jobs
from gradreg.lab.tables import Table
from gradreg.lab.words import ranged
from gradreg.studies.claims.claim import Above, AtMost, Claim, Measured, Plan, Row, Subclaim
from gradreg.studies.implicit_bias.flooding import MODES, Mode, Start, identity, start_of, train

BOUND = 1e-11  # the weights' own rounding is 7e-13 of a step of η²
HALF = 0.5**0.5  # the cosine at which half of the squared displacement is explained
COUNTS = {"pair_share_after_level": "share of steps in pairs, at the level", "gamma": "effective γ"}
LABELS = {"one batch": MODES[0], "mini-batches": MODES[1]}


@dataclass(frozen=True)
class Size:
    """How long the runs are."""

    num_steps: dict[str, int]


FULL = Size({label: mode.num_steps for label, mode in LABELS.items()})
QUICK = Size({"one batch": 500, "mini-batches": 2100})  # fewer do not reach the level


def measure(plan: Plan, folder: Path) -> Measured:
    del folder
    size = QUICK if plan.is_quick else FULL
    modes = {label: replace(mode, num_steps=size.num_steps[label]) for label, mode in LABELS.items()}
    # Initialization draws from the global random state, which threads share: not in a job.
    identities = [identity(seed) for seed in plan.seeds]
    starts = [start_of(seed) for seed in plan.seeds]
    jobs = {(label, s.seed): lambda m=m, s=s: flooded(m, s) for label, m in modes.items() for s in starts}
    found = run_jobs(jobs, plan.workers, "(e) flooding")
    values = {
        "e1, up then down": [rows[0]["relative_error"] for rows in identities],
        "e1, down then up": [rows[1]["relative_error"] for rows in identities],
    }
    shown = []
    for label in modes:
        runs = [found[label, seed] for seed in plan.seeds]
        values[f"e2, {label}"] = [run["explained"] for run in runs]
        values[f"e3, {label}"] = [-run["log2_fall"] for run in runs]
        shown.append((label, *(_ranged([run["counts"][key] for run in runs]) for key in COUNTS)))
    table = Table("How much of it, in real runs", ("", *COUNTS.values()), shown)
    about = {
        k: f"η = {m.rate:g}, b = {m.level:g}, {m.num_steps} steps of {m.batch_size} rows" for k, m in modes.items()
    }
    return Measured(values, about, [table])


def flooded(mode: Mode, start: Start) -> Row:
    """One run with flooding; on one batch the training rows are that batch alone."""
    if mode.same_batch:
        data = start.data
        start = replace(start, data=Split(data.train[: mode.batch_size], data.validation, data.test))
    return train(mode, start, "Flooding")


def _ranged(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return ranged(asdict(stats.mean_interval(finite))) if len(finite) >= 2 else "–"


def _of_runs(label: str) -> tuple[Subclaim, ...]:
    return (
        Subclaim(
            f"e2, {label}",
            "In a real run two steps across the level do the penalty step to the weights: half of the squared "
            "displacement or more.",
            "mean cosine of what a pair did and the predicted penalty step",
            Above(HALF),
            3,
        ),
        Subclaim(
            f"e3, {label}",
            "So ‖∇L‖² falls while the loss stays at the level.",
            "−log₂ of ‖∇L‖² in the last quarter over ‖∇L‖² where the level was reached",
            Above(),
        ),
    )


CLAIM = Claim(
    letter="e",
    title="Flooding performs F-GR",
    says="Flooding, which descends above a level of the loss and ascends below it, performs finite-difference gradient "
    "regularization in an implicit way.",
    where="Stated in the abstract.",
    how="Two real steps of `gradreg.Flooding` and SGD across the level against one step of the penalty, float64; then "
    "whole runs of plain SGD with flooding, on the same rows in every step and on mini-batches. `gradreg flooding` "
    "compares them with SGD and F-GR.",
    differs="The paper's settings of this experiment are not known to us. The identity needs one batch, no momentum "
    "and no weight decay; practice has none of the three.",
    subclaims=(
        Subclaim(
            "e1, up then down", "Two steps are one of F-GR with ε = η.", "relative error of the step", AtMost(BOUND)
        ),
        Subclaim(
            "e1, down then up", "Two steps are one of B-GR with ε = η.", "relative error of the step", AtMost(BOUND)
        ),
        *(sub for label in LABELS for sub in _of_runs(label)),
    ),
    measure=measure,
)
