"""A sweep: a grid of points or a search over ranges, every point with the same seeds, and what is made of the runs.

Selection is on validation rows: of each method, the point with the highest accuracy averaged over seeds, the first
among equals. Then, once, the best points are run again and scored on the test rows, with the same seeds.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from gradreg.lab import stats
from gradreg.lab.config import FIELDS, SETTINGS, SWEEP_KEYS, RunConfig, by_field, checked, from_mapping
from gradreg.lab.folder import BadInput
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.names import suggestion
from gradreg.lab.runs import Job, Result
from gradreg.lab.search import Range, range_from
from gradreg.lab.yaml_file import read_mapping

AXES = (
    *SETTINGS,
    *("ascent", "warmup", "fraction", "lookahead", "period", "start", "probability", "threshold"),
    *("learning_rate", "weight_decay", "momentum", "batch_size"),
)
"""The fields that a sweep may vary, besides the method."""

MOST_SEEDS, MOST_TRIALS, MOST_RUNS = 100, 10_000, 100_000
DEFAULT_SEEDS, DEFAULT_TRIALS = 5, 20

Row = dict[str, Any]
Point = Mapping[str, Any]
"""A method and the varied fields, by name."""


@dataclass(frozen=True)
class Block:
    """One method with what is varied for it."""

    method: str
    axes: Mapping[str, tuple[Any, ...] | Range]

    @property
    def points(self) -> list[Point]:
        """Of a grid: every combination, the last field fastest."""
        return [{"method": self.method, **dict(zip(self.axes, values))} for values in product(*self.axes.values())]  # type: ignore[arg-type]

    @property
    def is_a_point(self) -> bool:
        return all(not isinstance(axis, Range) and len(axis) == 1 for axis in self.axes.values())


@dataclass(frozen=True)
class Sweep:
    """What is run."""

    base: RunConfig
    """What all runs share."""
    blocks: tuple[Block, ...]
    seeds: tuple[int, ...]
    trials: int | None = None
    """Of a search: points that are tried for each block; None for a grid."""

    @property
    def grid(self) -> list[Point]:
        """Each point once, in order; of a search none."""
        if self.trials is not None:
            return []
        points = [point for block in self.blocks for point in block.points]
        return list({tuple(point.items()): point for point in points}.values())

    @property
    def num_points(self) -> int:
        if self.trials is None:
            return len(self.grid)
        return sum(1 if block.is_a_point else self.trials for block in self.blocks)

    @property
    def num_runs(self) -> int:
        """The test runs included."""
        methods = {block.method for block in self.blocks}
        return (self.num_points + len(methods)) * len(self.seeds)

    @property
    def examples(self) -> list[Point]:
        """Points that stand for all: of a range, its ends."""
        ends = [{k: (v.low, v.high) if isinstance(v, Range) else v for k, v in b.axes.items()} for b in self.blocks]
        return [point for block, values in zip(self.blocks, ends) for point in Block(block.method, values).points]

    @property
    def configs(self) -> list[RunConfig]:
        """The same as runs of the first seed.

        Raises:
            BadInput: one that lacks what its method needs.
        """
        return [replace(self.base, **point) for point in self.examples]

    def job(self, point: Point, seed: int, scored_on: str) -> Job:
        """A run. Curves are recorded in the test runs alone."""
        records = 10 if scored_on == "test" else 0
        return Job(replace(self.base, **point, seed=seed), scored_on, records)

    def plan(self) -> Row:
        """As JSON: what is compared on resuming, and `from_plan` reads."""
        blocks = [
            {"method": b.method, **{k: list(v) if isinstance(v, tuple) else asdict(v) for k, v in b.axes.items()}}
            for b in self.blocks
        ]
        rest = {"grid": blocks} if self.trials is None else {"search": blocks, "trials": self.trials}
        return {"base": asdict(self.base), **rest, "first_seed": self.seeds[0], "seeds": len(self.seeds)}


def read_sweep(
    path: Path,
    changes: Mapping[str, Any],
    seeds: int | None = None,
    trials: int | None = None,
    own: Mapping[str, Any] | None = None,
) -> Sweep:
    """A sweep from a YAML file; `changes` are fields of its base that the command line sets, `own` those of a task.

    Raises:
        BadInput: the file cannot be read, has an unknown key, a value outside of its range, or nothing to run.
    """
    content, shown = read_mapping("CONFIG", path, "with base, grid or search, and seeds"), ascii(str(path))
    if not set(content) & set(SWEEP_KEYS) and set(content) & set(FIELDS):
        way_out = shlex.join(["gradreg", "train", "--config", str(path)])
        raise BadInput(f"CONFIG must be the configuration of a sweep, got {shown}, that of a run: {way_out}.")
    base = content.get("base") or {}
    if not isinstance(base, Mapping):
        raise BadInput(f"base must be a mapping of fields to values, got {type(base).__name__}.")
    content = {**content, "base": {**(own or {}), **by_field(base, "base"), **changes}}
    if seeds is not None:
        content["seeds"] = seeds
    if trials is not None:
        if "search" not in content:
            raise BadInput(f"--search must be left out with a configuration that has no search, {shown}.")
        content["trials"] = trials
    return from_plan(content)


def from_plan(content: Mapping[str, Any]) -> Sweep:
    """A sweep from the mapping of a configuration file or of `plan`; every run of it is checked."""
    unknown = [key for key in content if key not in SWEEP_KEYS]
    if unknown:
        raise BadInput(
            f"configuration has the unknown key {str(unknown[0])!a}; the keys are base, grid or search, trials, seeds."
            f"{suggestion(unknown[0], SWEEP_KEYS)}"
        )
    if ("grid" in content) == ("search" in content):
        raise BadInput("configuration must have one of grid and search.")
    if "trials" in content and "search" not in content:
        raise BadInput("trials must be left out without search.")
    kind = "grid" if "grid" in content else "search"
    base = _base(content.get("base") or {})
    entries = content[kind]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise BadInput(f"{kind} must be a list of blocks, each with a method, and not empty.")
    blocks = tuple(_block(entry, kind, k) for k, entry in enumerate(entries, 1))
    if "SGD" not in {block.method for block in blocks}:
        raise BadInput(f"{kind} must have a block with method SGD, which the others are compared to.")
    first = _whole("first_seed", content.get("first_seed", base.seed), 0, 2**31 - 1)
    count = _whole("seeds", content.get("seeds", DEFAULT_SEEDS), 2, MOST_SEEDS)
    trials = None if kind == "grid" else _whole("trials", content.get("trials", DEFAULT_TRIALS), 1, MOST_TRIALS)
    sweep = Sweep(base, blocks, tuple(range(first, first + count)), trials)
    if sweep.num_runs > MOST_RUNS:
        raise BadInput(f"{kind} must come to at most {MOST_RUNS} runs, got {sweep.num_runs}.")
    _check(sweep, kind)
    return sweep


def _base(content: Any) -> RunConfig:
    if isinstance(content, Mapping):
        content, taken = by_field(content, "base"), ("method", *SETTINGS)
        inside = [key for key in content if key in taken and content[key] not in (None, "SGD")]
        if inside:
            raise BadInput(f"base must leave {inside[0]} to the blocks of the grid.")
    return from_mapping(content, "base")


def _block(entry: Any, kind: str, number: int) -> Block:
    where = f"{kind} block {number}"
    if isinstance(entry, Mapping):
        entry = by_field(entry, where)
    if not isinstance(entry, Mapping) or "method" not in entry:
        raise BadInput(f"{where} must be a mapping with a method.")
    if not isinstance(entry["method"], str):
        raise BadInput(f"{where}: method must be one of {', '.join(METHODS)}, got a {type(entry['method']).__name__}.")
    try:
        method = checked(FIELDS["method"], entry["method"])
        axes = {key: _axis(key, value, kind) for key, value in entry.items() if key != "method"}
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    return Block(method, axes)


def _axis(name: str, value: Any, kind: str) -> tuple[Any, ...] | Range:
    if name not in AXES:
        raise BadInput(f"the field {str(name)!a} cannot be varied; method and these can: {', '.join(AXES)}.")
    if isinstance(value, Mapping):
        if kind == "grid":
            raise BadInput(f"{name} must be a value or a list of values; ranges belong in search.")
        return range_from(FIELDS[name], value)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise BadInput(f"{name} must be a value or a list of values, got an empty list.")
    if None in values:
        raise BadInput(f"{name} must be a value or a list of values, got one that is empty.")
    return tuple(dict.fromkeys(checked(FIELDS[name], item) for item in values))


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{name} must be a whole number from {low} to {high}, got {str(value)!a}.")
    return value


def _check(sweep: Sweep, kind: str) -> None:
    """That each run has what its method needs: of a range one value tells."""
    if sweep.seeds[-1] > 2**31 - 1:
        raise BadInput(f"first_seed must be at most {2**31 - len(sweep.seeds)} with {len(sweep.seeds)} seeds.")
    for number, block in enumerate(sweep.blocks, 1):
        try:
            replace(sweep, blocks=(block,)).configs  # noqa: B018
        except BadInput as error:
            raise BadInput(f"{kind} block {number}: {error}") from None


def value(result: Result, metric: Metric) -> float:
    """What a run counts for: its score; a share that is missing is 0."""
    return 0.0 if metric.is_share and not math.isfinite(result.score) else result.score


def best_points(points: Sequence[Point], ranks: Sequence[Sequence[float]]) -> dict[str, int]:
    """Of each method the place of its best point: the highest mean over seeds, the first among equals."""
    best: dict[str, int] = {}
    for k, point in enumerate(points):
        at = best.setdefault(point["method"], k)
        if math.fsum(ranks[k]) > math.fsum(ranks[at]):
            best[point["method"]] = k
    return best


def summarize(
    points: Sequence[Point],
    validation: Sequence[Sequence[Result]],
    test: Mapping[str, Sequence[Result]],
    metric: Metric = ACCURACY,
) -> Row:
    """`points`, `best` and `test` of results.json. Results are in the order of the seeds.

    Args:
        points: what was tried.
        validation: of each point, its runs.
        test: of each method, the runs of its best point.
        metric: of the scores.
    """
    rows = [
        {
            **point,
            f"validation_{metric.key}": _interval([value(result, metric) for result in results]),
            "num_seeds": len(results),
            "diverged": sum(result.diverged for result in results),
        }
        for point, results in zip(points, validation)
    ]
    ranks = [[metric.rank(result.score) for result in results] for results in validation]
    best = {method: rows[k] for method, k in best_points(points, ranks).items()}
    tested = {m: _tested(m, results, test["SGD"], metric) for m, results in test.items()}
    return {"metric": metric.as_row(), "points": rows, "best": best, "test": tested}


def _interval(values: Sequence[float]) -> Row | None:
    return asdict(stats.mean_interval(values)) if all(map(math.isfinite, values)) else None


def _tested(method: str, results: Sequence[Result], baseline: Sequence[Result], metric: Metric) -> Row:
    scores, plain = ([value(result, metric) for result in runs] for runs in (results, baseline))
    row: Row = {
        metric.key: _interval(scores),
        "train_loss": _mean([result.train_loss for result in results]),
        "grad_norm": _mean([result.grad_norm for result in results]),
        "diverged": sum(result.diverged for result in results),
    }
    if method != "SGD":
        row |= metric.against(scores, plain, (r.num_scored for r in results))
    return row


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def axes(points: Sequence[Point]) -> dict[str, list[Any]]:
    """Of each varied field the values that occur, in order of appearance."""
    found: dict[str, dict[Any, None]] = {}
    for point in points:
        for name, value in point.items():
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}
