r"""Does the implicit bias of gradient regularization help? In a diagonal linear network it can be computed.

Three settings, side by side, each with every scheme over ε and γ; a map over the size of the ascent step, the shift of
the data and α; finite steps on the same axis; and how well integration and theory agree.

Defined as: *test error*, expected squared error on a new row over the variance of its signal (1: no better than the
mean). *Scale*, α_GR/α. *Unevenness*, how much more the scale of the active coordinates shrank than that of the others:
the mean of log(α_GR/α) over active coordinates divided by that over inactive ones. *With even scale*, the test error of
the minimizer of the potential whose scale is the geometric mean of α_GR in all coordinates: what the method would give
if it shrank them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gradreg.lab import stats
from gradreg.lab.about import provenance
from gradreg.lab.folder import write_json
from gradreg.lab.jobs import run_jobs
from gradreg.lab.page import publish, tell
from gradreg.studies.implicit_bias.large_steps import descend
from gradreg.studies.implicit_bias.plan import SeededPlan
from gradreg.studies.implicit_bias.points import EXACT, LARGE, PLAIN, POINTS, TABLE, Point
from gradreg.theory import SparseRegression, flow, flows, minimize_potential, sparse_regression

DEFAULT_SEEDS, QUICK_SEEDS = 6, 3
TOLERANCE = ACCURACY = 1e-6  # of the flows in the experiments; the agreement table has its own
MAX_STEPS = 300  # flows that need more have collapsed, and are reported as not converged

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Data, network and penalty."""

    name: str
    n: int
    d: int
    num_active: int
    shift: float
    """Mean of the entries of X."""
    scale: float
    """Their standard deviation."""
    alpha: float
    gamma: float
    per_sample: bool
    """Whether each row's gradient is regularized by itself."""

    def data(self, seed: int) -> SparseRegression:
        return sparse_regression(self.n, self.d, self.num_active, shift=self.shift, scale=self.scale, seed=seed)


SETTINGS = (
    Setting("shifted data, full batch", 50, 100, 5, 5.0, 5**0.5, alpha=0.1, gamma=0.02, per_sample=False),
    Setting("centered data, row by row", 50, 100, 5, 0.0, 1.0, alpha=0.1, gamma=0.12, per_sample=True),
    Setting("centered data, full batch", 50, 100, 5, 0.0, 1.0, alpha=0.3, gamma=1.0, per_sample=False),
)


STEP_RATIOS = (0.125, 0.25, 0.375, 0.5, 1.0)  # of η/2 to γ

# The map. γ is tied to the curvature at the start, so that the penalty is as strong in every cell.
MAP_SHIFTS = (0.0, 0.25, 0.5, 1.0, 2.0)  # in units of the standard deviation
MAP_ALPHAS = (0.07, 0.1, 0.14, 0.2, 0.3)
MAP_RATIOS = (0.5, 1.0, 2.0)  # ε/γ
MAP_STRENGTH = 0.5  # γ λ_max(H) at the start
MAP_SHAPE = (20, 40, 3)


class Plan(SeededPlan):
    """What `gradreg dln` runs."""

    name = "dln"


def run_dln(plan: Plan, folder: Path) -> Row:
    """Compute, write the folder, print the tables; return what results.json holds."""
    from gradreg.studies.implicit_bias.dln_page import page, told

    started = time.perf_counter()
    shifts = MAP_SHIFTS[::2] if plan.is_quick else MAP_SHIFTS
    steps = STEP_RATIOS[2:] if plan.is_quick else STEP_RATIOS
    stepped = [s for s in SETTINGS if s.alpha == SETTINGS[0].alpha]
    jobs: dict[Any, Callable[[], Any]] = {("agreement",): agreement, ("speed",): speed}
    # The longest come first, so that no thread is left alone with one at the end.
    jobs |= {("steps", s, r): lambda s=s, r=r: large_step(s, r, plan.seeds) for s in stepped for r in steps}
    jobs |= {("sweep", s, seed): lambda s=s, seed=seed: sweep(s, seed) for s in SETTINGS for seed in plan.seeds}
    jobs |= {("map", m, seed): lambda m=m, seed=seed: map_column(m, seed) for m in shifts for seed in plan.seeds}
    found = run_jobs(jobs, plan.workers, "diagonal networks")
    results: Row = {
        "name": folder.name,
        **provenance(plan.command, threads=plan.workers),
        "is_quick": plan.is_quick,
        "seeds": list(plan.seeds),
        "agreement": found["agreement",],
        "speed": found["speed",],
        "settings": [summarize(s, [found["sweep", s, seed] for seed in plan.seeds]) for s in SETTINGS],
        "large_steps": [
            {
                "setting": s.name,
                "method": "SGD, one row a step" if s.per_sample else "GD, all rows",
                "gamma": s.gamma,
                "points": [
                    summarize_step(found["steps", s, r], [found["sweep", s, seed] for seed in plan.seeds])
                    for r in steps
                ],
            }
            for s in stepped
        ],
        "map": summarize_map(shifts, {m: [found["map", m, seed] for seed in plan.seeds] for m in shifts}),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(folder / "results.json", results)
    publish(page(results), folder)
    tell(told(results), results, folder)
    return results


# The three settings.


def sweep(setting: Setting, seed: int) -> list[Row]:
    """Every point on the data of a seed."""
    data = setting.data(seed)
    ends = flows(
        data.X,
        data.y,
        alpha=setting.alpha,
        gamma=[p.gamma * setting.gamma for p in POINTS],
        epsilon=[None if p.epsilon is None else p.epsilon * setting.gamma for p in POINTS],
        scheme=[p.scheme for p in POINTS],
        per_sample=setting.per_sample,
        tolerance=TOLERANCE,
        accuracy=ACCURACY,
        max_steps=MAX_STEPS,
    )
    errors = data.test_error(ends.beta)
    rows = []
    for k, point in enumerate(POINTS):
        shrinkage = torch.log(ends.alpha_gr[k] / setting.alpha)
        active, inactive = shrinkage[data.is_active].mean().item(), shrinkage[~data.is_active].mean().item()
        row = {
            **asdict(point),
            "converged": bool(ends.converged[k]),
            "test_error": errors[k].item(),
            "log2_over_plain": math.log2(errors[k].item() / errors[POINTS.index(PLAIN)].item()),
            "l1": ends.beta[k].abs().sum().item(),
            "scale": torch.exp(shrinkage).mean().item(),
            "active": math.exp(active),
            "inactive": math.exp(inactive),
            "unevenness": active / inactive if abs(inactive) > ACCURACY else math.nan,
            "coordinates": torch.exp(shrinkage).tolist() if point in (PLAIN, EXACT, LARGE) else None,
        }
        if point in TABLE and row["converged"]:
            even = setting.alpha * math.exp(shrinkage.mean().item())
            row["even_test_error"] = data.test_error(minimize_potential(data.X, data.y, even)).item()
        rows.append(row)
    return rows


def summarize(setting: Setting, seeds: Sequence[list[Row]]) -> Row:
    """Means with intervals over the seeds in which a point converged, and the paper's claim as a verdict."""
    rows = []
    for k, point in enumerate(POINTS):
        runs = [rows_of_seed[k] for rows_of_seed in seeds if rows_of_seed[k]["converged"]]
        keys = ["test_error", "log2_over_plain", "l1", "scale", "active", "inactive", "unevenness"]
        keys += ["even_test_error"] if point in TABLE else []
        rows.append({**asdict(point), "num_converged": len(runs), **{key: _interval(runs, key) for key in keys}})
    claims = {
        name: _claim([rows_of_seed[POINTS.index(LARGE)] for rows_of_seed in seeds], [r[POINTS.index(p)] for r in seeds])
        for name, p in (("DB", EXACT), ("GD", PLAIN), ("B-GR", Point("backward", 1.0, 1.0)))
    }
    coordinates = {p.scheme if p.gamma else "plain": seeds[0][POINTS.index(p)]["coordinates"] for p in (EXACT, LARGE)}
    return {**asdict(setting), "points": rows, "claims": claims, "coordinates_of_first_seed": coordinates}


def _interval(runs: Sequence[Row], key: str) -> Row | None:
    values = [r[key] for r in runs if math.isfinite(r.get(key, math.nan))]
    return asdict(stats.mean_interval(values)) if len(values) >= 2 else None


def _claim(mine: Sequence[Row], others: Sequence[Row]) -> Row | None:
    """By how much F-GR with ε = γ lowers the test error, seed by seed."""
    pairs = [(o["test_error"], m["test_error"]) for m, o in zip(mine, others) if m["converged"] and o["converged"]]
    if len(pairs) < 2:
        return None
    difference = stats.paired_difference(*zip(*pairs))
    return {**asdict(difference), "verdict": stats.verdict(difference), "num_pairs": len(pairs)}


# The map.


def map_column(shift: float, seed: int) -> list[Row]:
    """All α and ε at one shift of the data: log₂ of test error over that of DB at the same γ."""
    n, d, num_active = MAP_SHAPE
    data = sparse_regression(n, d, num_active, shift=shift, seed=seed)
    # At w = α the Hessian is ±g on its diagonal and a part of λ_max = 4α²‖X‖²/n.
    curvature = 4 * torch.linalg.matrix_norm(data.X, 2).item() ** 2 / n
    cells = [(alpha, ratio) for alpha in MAP_ALPHAS for ratio in (None, *MAP_RATIOS)]
    gammas = [MAP_STRENGTH / (curvature * alpha**2) for alpha, _ in cells]
    ends = flows(
        data.X,
        data.y,
        alpha=[alpha for alpha, _ in cells],
        gamma=gammas,
        epsilon=[None if ratio is None else ratio * gamma for (_, ratio), gamma in zip(cells, gammas)],
        scheme=["exact" if ratio is None else "forward" for _, ratio in cells],
        tolerance=TOLERANCE,
        accuracy=ACCURACY,
        max_steps=MAX_STEPS,
    )
    errors, rows, base = data.test_error(ends.beta), [], 0
    for k, (alpha, ratio) in enumerate(cells):
        if ratio is None:
            base = k
            continue
        ok = bool(ends.converged[k] & ends.converged[base])
        gain = math.log2(errors[k].item() / errors[base].item()) if ok else math.nan
        rows.append({"alpha": alpha, "ratio": ratio, "converged": ok, "log2_error_ratio": gain})
    return rows


def summarize_map(shifts: Sequence[float], columns: dict[float, list[list[Row]]]) -> Row:
    """A cell for each shift, α and ε/γ."""
    cells = []
    for shift in shifts:
        for k, cell in enumerate(columns[shift][0]):
            values = [seed[k]["log2_error_ratio"] for seed in columns[shift] if seed[k]["converged"]]
            # What converges while others collapse is no fair sample: all seeds or none.
            interval = stats.mean_interval(values) if len(values) == len(columns[shift]) else None
            verdict = stats.verdict(stats.Interval(-interval.mean, -interval.high, -interval.low)) if interval else None
            cells.append(
                {
                    "shift": shift,
                    "alpha": cell["alpha"],
                    "ratio": cell["ratio"],
                    "num_converged": len(values),
                    "log2_error_ratio": asdict(interval) if interval else None,
                    "verdict": verdict,
                }
            )
    return {"shifts": list(shifts), "alphas": MAP_ALPHAS, "ratios": MAP_RATIOS, "cells": cells, "shape": MAP_SHAPE}


# Finite steps.


def large_step(setting: Setting, ratio: float, seeds: Sequence[int]) -> Row:
    """Plain GD, or SGD with one row a step, of step η = 2γ · ratio, on the data of every seed."""
    data = [setting.data(seed) for seed in seeds]
    rate = 2 * ratio * setting.gamma
    end = descend(data, alpha=setting.alpha, rate=rate, one_row=setting.per_sample, seed=seeds[0])
    runs = [
        {
            "converged": bool(end.converged[k]),
            "test_error": d.test_error(end.beta[k]).item(),
            "scale": (end.scale[k] / setting.alpha).mean().item(),
        }
        for k, d in enumerate(data)
    ]
    return {"ratio": ratio, "rate": rate, "gamma": rate / 2, "num_steps": end.num_steps, "runs": runs}


def summarize_step(step: Row, sweeps: Sequence[list[Row]]) -> Row:
    """Means over the seeds that converged, and test error relative to that of the flow without penalty."""
    plain = [rows[POINTS.index(PLAIN)]["test_error"] for rows in sweeps]
    runs = [
        {**run, "log2_over_plain": math.log2(run["test_error"] / base)}
        for run, base in zip(step["runs"], plain)
        if run["converged"]
    ]
    flow_at = Point("exact", step["ratio"], None)
    if flow_at in POINTS:
        there = [rows[POINTS.index(flow_at)] for rows in sweeps]
        step = {**step, "flow_scale": _interval([r for r in there if r["converged"]], "scale")}
    keys = ("test_error", "log2_over_plain", "scale")
    kept = {key: value for key, value in step.items() if key != "runs"}
    return {**kept, "num_converged": len(runs), **{key: _interval(runs, key) for key in keys}}


# Integration against theory.


def agreement(epsilons: Sequence[float] = (0.002, 0.02, 0.2)) -> list[Row]:
    """The largest errors of w₊∘w₋ = α_GR², of β = argmin φ and of the batched flow, for each scheme and ε."""
    data = sparse_regression(10, 20, 2, shift=2.0, scale=2.0)
    alpha, gamma = 0.2, 0.02
    methods: list[tuple[str, float | None]] = [("exact", None)]
    methods += [(scheme, epsilon) for scheme in ("forward", "backward", "central") for epsilon in epsilons]
    rows = []
    for per_sample in (False, True):
        together = flows(
            data.X,
            data.y,
            alpha=alpha,
            gamma=gamma,
            epsilon=[epsilon for _, epsilon in methods],
            scheme=[scheme for scheme, _ in methods],
            per_sample=per_sample,
        )
        for k, (scheme, epsilon) in enumerate(methods):
            end = flow(data.X, data.y, alpha=alpha, gamma=gamma, epsilon=epsilon, scheme=scheme, per_sample=per_sample)
            best = minimize_potential(data.X, data.y, end.alpha_gr)
            rows.append(
                {
                    "scheme": scheme,
                    "epsilon": epsilon,
                    "per_sample": per_sample,
                    "converged": end.converged and bool(together.converged[k]),
                    "invariant_error": (end.w_plus * end.w_minus - end.alpha_gr**2).abs().max().item(),
                    "argmin_error": (end.beta - best).abs().max().item(),
                    "batch_error": (together.beta[k] - end.beta).abs().max().item(),
                }
            )
    return rows


def speed() -> Row:
    """Seconds of processor time for a flow of the first setting: one at a time, and in a batch of all points.

    Both to the same end, ‖Xβ − y‖∞ ≤ 1e-6 ‖y‖∞, and with the same allowed error of a step.
    """
    setting, singles = SETTINGS[0], [EXACT, LARGE]
    data = setting.data(0)
    started = time.thread_time()
    for p in singles:
        epsilon = None if p.epsilon is None else p.epsilon * setting.gamma
        flow(
            data.X, data.y, alpha=setting.alpha, gamma=setting.gamma, epsilon=epsilon, scheme=p.scheme,
            tolerance=TOLERANCE, rtol=ACCURACY, atol=1e-9,
        )  # fmt: skip
    between = time.thread_time()
    sweep(setting, 0)
    ended = time.thread_time()
    alone, together = (between - started) / len(singles), (ended - between) / len(POINTS)
    return {"one_at_a_time": alone, "batched": together, "ratio": alone / together, "batch": len(POINTS)}
