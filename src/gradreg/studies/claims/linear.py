r"""Claim (c): in a diagonal linear network GR biases toward the rich regime, and a larger ascent step strengthens it.

The three settings of `gradreg dln`: shifted data, row by row, and centered data in the full batch, where what the paper
describes is known to turn around. Training ends at the minimizer of the potential of scale
$\alpha_{GR} = \alpha \circ \exp(-\gamma\int g \circ g')$; small scales are the rich regime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from gradreg.lab import stats
from gradreg.lab.jobs import run_jobs
from gradreg.lab.tables import Table
from gradreg.studies.claims.claim import Above, Claim, Measured, Plan, Row, Subclaim
from gradreg.studies.implicit_bias.dln import SETTINGS, Setting, sweep
from gradreg.studies.implicit_bias.points import EXACT, LARGE, PLAIN, POINTS, Point

SMALL = Point("forward", 1.0, 0.125)  # ε = γ/8
BACKWARD = Point("backward", 1.0, 1.0)
ORDER = (LARGE, SMALL, EXACT, BACKWARD)  # of α_GR, from the smallest
NAMES = {LARGE: "F-GR, ε = γ", SMALL: "F-GR, ε = γ/8", EXACT: "DB", BACKWARD: "B-GR, ε = γ", PLAIN: "no penalty"}


def measure(plan: Plan, folder: Path) -> Measured:
    del folder
    jobs = {(s, seed): lambda s=s, seed=seed: sweep(s, seed) for s in SETTINGS for seed in plan.seeds}
    found = run_jobs(jobs, plan.workers, "(c) diagonal networks")
    values: dict[str, list[float]] = {}
    rows = []
    for setting in SETTINGS:
        seeds = [{p: found[setting, seed][POINTS.index(p)] for p in NAMES} for seed in plan.seeds]
        values |= {
            f"c1, {setting.name}": [1 - _of(at, LARGE, "scale") for at in seeds],
            f"c2, {setting.name}": [smallest_gap(at) for at in seeds],
            f"c3, {setting.name}": [_of(at, EXACT, "test_error") - _of(at, LARGE, "test_error") for at in seeds],
        }
        for point, name in NAMES.items():
            rows.append((setting.name, name, *(_mean([_of(at, point, key) for at in seeds]) for key in SHOWN)))
    table = Table("Means over seeds", ("setting", "method", "mean α_GR/α", "‖β‖₁", "test error"), rows)
    return Measured(values, {s.name: _settings(s) for s in SETTINGS}, [table])


SHOWN = ("scale", "l1", "test_error")


def smallest_gap(at: dict[Point, Row]) -> float:
    """Of mean α_GR/α between neighbors in the order that is claimed: positive if all of it is as claimed."""
    scales = [_of(at, point, "scale") for point in ORDER]
    gaps = [after - before for before, after in pairwise(scales)]
    return min(gaps) if all(math.isfinite(gap) for gap in gaps) else math.nan


def _of(at: dict[Point, Row], point: Point, key: str) -> float:
    return at[point][key] if at[point]["converged"] else math.nan


def _mean(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{stats.mean_interval(finite).mean:.3f}" if len(finite) >= 2 else "–"


def _settings(s: Setting) -> str:
    return f"n = {s.n}, d = {s.d}, {s.num_active} active, mean {s.shift:g}, α = {s.alpha:g}, γ = {s.gamma:g}"


def _subclaims(setting: Setting) -> tuple[Subclaim, ...]:
    c1, c2, c3 = (f"c{k}, {setting.name}" for k in (1, 2, 3))
    return (
        Subclaim(c1, "GR moves toward the rich regime.", "1 − mean α_GR/α of F-GR with ε = γ", Above(), 3),
        Subclaim(
            c2,
            "The farther, the larger the ascent step: F-GR with ε = γ beyond ε = γ/8 beyond DB beyond B-GR.",
            "smallest of the three gaps in mean α_GR/α",
            Above(),
            4,
        ),
        Subclaim(c3, "The larger ascent step generalizes better.", "test error, DB − F-GR with ε = γ", Above(), 3),
    )


CLAIM = Claim(
    letter="c",
    title="Implicit bias in a diagonal linear network",
    says="In a diagonal linear network gradient regularization has an implicit bias toward the rich regime, in a "
    "certain problem a desirable one, and the finite difference strengthens it as the ascent step grows.",
    where="Stated in the abstract.",
    how="The flow of each method is integrated to its end and α_GR read off, on data drawn by each seed. Test error is "
    "the expected squared error on a new row over the variance of its signal. `gradreg dln` has the whole picture.",
    differs="The paper's settings of this experiment are not known to us; these three are ours, and one of them, "
    "centered data in the full batch, is there because the benefit turns into harm in it.",
    subclaims=tuple(sub for setting in SETTINGS for sub in _subclaims(setting)),
    measure=measure,
)
