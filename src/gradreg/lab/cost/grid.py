"""`gradreg cost --grid`: configurations per second of the batched engine against one at a time, next to its targets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gradreg.lab.about import provenance
from gradreg.lab.batched.speed import ALL_THREADS, BATCHED, EACH_CORE, GridSpeed
from gradreg.lab.folder import write_json
from gradreg.lab.page import Items, Page, made, publish, tell
from gradreg.lab.progress import progress_bar
from gradreg.lab.tables import Table
from gradreg.lab.words import listed, ranged

TARGETS = {64: 3.0, 256: 1.5}
"""By width, on two cores of a CPU."""
TARGET_ON_GPU = 10.0
REACHED, MISSED, UNDECIDED = "reached", "missed", "undecided"

Row = dict[str, Any]
Measure = Callable[[int, int, int, int], GridSpeed]


@dataclass(frozen=True)
class GridPlan:
    """How large the grid is, and how often it is trained."""

    rounds: int | None = None
    is_quick: bool = False
    threads: int = 1

    @property
    def num_rounds(self) -> int:
        return self.rounds or (6 if self.is_quick else 8)

    @property
    def num_configs(self) -> int:
        return 16 if self.is_quick else 32

    @property
    def num_steps(self) -> int:
        return 10 if self.is_quick else 20

    @property
    def command(self) -> str:
        rounds = f" --rounds {self.rounds}" if self.rounds else ""
        return f"gradreg cost --grid{' --quick' if self.is_quick else ''}{rounds} --threads {self.threads}"


def run_grid(plan: GridPlan, folder: Path, measure: Measure | None = None) -> Row:
    """Measure, write the folder, print the table; return what results.json holds."""
    if measure is None:
        from gradreg.lab.batched import grid_speed as measure
    assert measure is not None
    started = time.perf_counter()
    torch.set_num_threads(plan.threads)
    about = {
        "name": folder.name,
        **provenance(plan.command),
        "is_quick": plan.is_quick,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "rounds": plan.num_rounds,
    }
    write_json(folder / "config.json", about)
    speeds = []
    with progress_bar() as progress:
        for done, width in enumerate(TARGETS):
            progress(f"grid, width {width}", done, len(TARGETS))
            speeds.append(measure(width, plan.num_configs, plan.num_steps, plan.num_rounds))
    results = {
        **about,
        "seconds": round(time.perf_counter() - started, 1),
        "grids": [{**asdict(speed), **verdict(speed)} for speed in speeds],
    }
    write_json(folder / "results.json", results)
    publish(_page(results), folder)
    tell([table(results), Items(notes(results))], results, folder)
    return results


def verdict(speed: GridSpeed) -> Row:
    """The target, and whether the interval lies above it."""
    target = TARGETS[speed.width] if speed.device == "cpu" else TARGET_ON_GPU
    says = REACHED if speed.low >= target else MISSED if speed.high < target else UNDECIDED
    return {"target": target, "verdict": says}


def table(results: Mapping[str, Any]) -> Table:
    ways = {ALL_THREADS: "all threads", EACH_CORE: "each core", BATCHED: "batched"}
    rows = [
        [
            str(grid["width"]),
            *(f"{grid['configs_per_second'][way]:.2f}" for way in ways),
            ranged({"median": grid["ratio"], **grid}, 2),
            f"{grid['target']:g}",
            grid["verdict"],
        ]
        for grid in results["grids"]
    ]
    return Table("Configurations per second", ["width", *ways.values(), "ratio", "target", "verdict"], rows)


def notes(results: Row) -> list[str]:
    first = results["grids"][0]
    load = f", load {results['load']:g} at the start" if results["load"] is not None else ""
    return [
        f"{first['num_configs']} configurations (SGD, F-GR, B-GR, DB; each with a seed, γ and ε of its own) of "
        f"{first['num_steps']} steps: an MLP of depth 3 on one-dimensional MNIST, batches of 100.",
        "One at a time with all threads on a run, and with a process of one thread on each core; batched as one model. "
        f"The ratio is to the faster of the two: median over {results['rounds']} rounds, 95% interval by bootstrap.",
        f"{results['machine']}; on {first['device']}, torch {results['versions']['torch']}{load}.",
    ]


def _page(results: Row) -> Page:
    asked = "How many configurations per second does the batched engine train, beside runs played one at a time?"
    found = listed([f"{g['ratio']:.2f} times as many at width {g['width']} ({g['verdict']})" for g in results["grids"]])
    blocks = [f"{asked} {found}.", made(results), table(results), Items(notes(results))]
    return Page("The batched engine", blocks, "gradreg cost")
