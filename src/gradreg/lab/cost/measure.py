"""The paper's cost figure: time, FLOPs and memory of a step, against depth and for larger models.

Counting matrix products of L layers, a gradient is 3L: one forward, two backward. F-GR, B-GR and SAM are two
gradients, 6L; the centered difference three, 9L; double backpropagation 3L + 4L + 2L = 9L. So the ratios to SGD are 2
and 3, and DB over F-GR is 1.5.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gradreg.lab import stats
from gradreg.lab.about import provenance
from gradreg.lab.config import RunConfig
from gradreg.lab.cost import steps as costs
from gradreg.lab.data.parts import Part, Split
from gradreg.lab.folder import write_json
from gradreg.lab.page import publish, tell
from gradreg.lab.progress import progress_bar
from gradreg.lab.task import Task
from gradreg.lab.tasks import builtin

COMPARED: dict[str, dict[str, float]] = {
    "SGD": {},
    "F-GR": {"gamma": 0.05, "epsilon": 0.1},
    "B-GR": {"gamma": 0.05, "epsilon": 0.1},
    "Central": {"gamma": 0.05, "epsilon": 0.1},
    "DB": {"gamma": 0.05},
    "SAM": {"rho": 0.05},
}
"""What the values are makes no difference to the work, as long as γ ≠ ε."""
PREDICTED = {"SGD": 1.0, "F-GR": 2.0, "B-GR": 2.0, "Central": 3.0, "DB": 3.0, "SAM": 2.0}
PREDICTED_DB_OVER_F_GR = 1.5
DEPTHS, QUICK_DEPTHS = (2, 4, 8, 16), (2, 4, 8)
MODELS = ("mlp", "resnet18", "wideresnet", "vit", "gpt")
QUICK_MODELS = ("mlp", "resnet18", "gpt")
QUICK_SHARE = 4  # of the batch, except for the MLP
LEAST_ROUNDS = 6  # the extremes of fewer do not enclose the median with 95%

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, on random rows."""

    name: str
    config: RunConfig
    shape: tuple[int, ...]
    """Of a row; of whole numbers below `num_classes` for language, which has a label for each."""
    rounds: int
    num_classes: int = 10

    @property
    def is_language(self) -> bool:
        return self.config.model == "gpt"

    def task(self, seed: int) -> Task:
        """With as many random rows as are in a batch."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.config.batch_size, *self.shape)
        classes = torch.randint(self.num_classes, shape if self.is_language else shape[:1], generator=generator)
        ids = torch.randint(self.num_classes, shape, generator=generator)
        part = Part(ids if self.is_language else torch.randn(shape, generator=generator), classes)
        return builtin(self.config, Split(part, part, part, self.num_classes))


def _case(name: str, data: str, model: str, batch_size: int, shape: tuple[int, ...], rounds: int, **more: Any) -> Case:
    num_classes = more.pop("num_classes", 10)
    # No warm-up of γ: a step at full strength.
    return Case(
        name,
        RunConfig(data=data, model=model, batch_size=batch_size, warmup=0, **more),
        shape,
        rounds,
        num_classes=num_classes,
    )


def mlp_case(depth: int) -> Case:
    return _case(f"MLP, {depth} layers", "mnist1d", "mlp", 128, (512,), 21, depth=depth, width=512)


CASES = {
    "resnet18": _case("ResNet-18", "cifar10", "resnet18", 8, (3, 32, 32), 8),
    "wideresnet": _case("WRN-28-10", "cifar10", "wideresnet", 2, (3, 32, 32), 6),
    "vit": _case("ViT, 6 layers", "cifar10", "vit", 16, (3, 32, 32), 11, depth=6, width=128),
    "gpt": _case("GPT, 4 layers", "text", "gpt", 8, (64,), 11, depth=4, width=256, num_classes=256),
}


@dataclass(frozen=True)
class Plan:
    """What `gradreg cost` measures."""

    models: tuple[str, ...] = MODELS
    depths: tuple[int, ...] = DEPTHS
    """Of the MLP."""
    rounds: int | None = None
    """By default each case's own: fewer for what is large."""
    is_quick: bool = False
    """A quarter of the batch, except for the MLP."""
    threads: int = 1
    device: torch.device = costs.CPU
    seed: int = 0
    """Of weights and rows."""

    @property
    def cases(self) -> list[Case]:
        cases = []
        for model in self.models:
            cases += [mlp_case(depth) for depth in self.depths] if model == "mlp" else [CASES[model]]
        if self.is_quick:
            cases = [case if case.config.model == "mlp" else _smaller(case) for case in cases]
        return [replace(case, rounds=self.rounds) for case in cases] if self.rounds else cases

    @property
    def command(self) -> str:
        depths = f" --depths {','.join(map(str, self.depths))}" if "mlp" in self.models else ""
        rounds = f" --rounds {self.rounds}" if self.rounds else ""
        return (
            f"gradreg cost{' --quick' if self.is_quick else ''} --models {','.join(self.models)}{depths}{rounds} "
            f"--threads {self.threads} --device {self.device.type} --seed {self.seed}"
        )


def _smaller(case: Case) -> Case:
    batch_size = max(2, case.config.batch_size // QUICK_SHARE)
    return replace(case, config=replace(case.config, batch_size=batch_size))


def run_cost(plan: Plan, folder: Path) -> Row:
    """Measure, write the folder, print the tables; return what results.json holds."""
    from gradreg.lab.cost.report import page, told

    started = time.perf_counter()
    torch.set_num_threads(plan.threads)
    about = {
        "name": folder.name,
        **provenance(plan.command),
        "is_quick": plan.is_quick,
        "seed": plan.seed,
        "device": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu",
        "clock": "processor time" if costs.is_processor_time(plan.device, plan.threads) else "wall-clock time",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    write_json(folder / "config.json", about)
    cases = plan.cases
    rows = []
    with progress_bar() as progress:
        planned, done = sum(case.rounds + 1 + len(COMPARED) for case in cases), 0

        def one_more(what: str) -> None:
            nonlocal done
            done += 1
            progress(what, done, planned)

        for case in cases:
            progress(case.name, done, planned)
            rows.append(measure(case, plan, lambda case=case: one_more(case.name)))
    results: Row = {
        **about,
        "seconds": round(time.perf_counter() - started, 1),
        "predicted": {**PREDICTED, "DB/F-GR": PREDICTED_DB_OVER_F_GR},
        "cases": rows,
    }
    write_json(folder / "results.json", results)
    publish(page(results), folder)
    tell(told(results), results, folder)
    return results


def measure(case: Case, plan: Plan, progress: Callable[[], object] = lambda: None) -> Row:
    """One case: a step of every method, on models of their own that start from the same weights."""
    task = case.task(plan.seed)
    configs = {
        name: replace(case.config, method=name, seed=plan.seed, **settings) for name, settings in COMPARED.items()
    }
    steps = {name: costs.make_step(config, task, plan.device) for name, config in configs.items()}
    flops = {name: costs.count_flops(step) for name, step in steps.items()}  # its step is a warm-up too
    clock = costs.clock_for(plan.device, plan.threads)
    seconds = costs.paired_seconds(steps, case.rounds, clock, warm_up=1, progress=progress)
    del steps
    model = task.build(plan.seed)
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    num_parameters = sum(p.numel() for p in model.parameters())
    del model
    peak = {}
    for name, config in configs.items():
        peak[name] = own + costs.peak_bytes(
            lambda config=config: costs.make_step(config, task, plan.device), plan.device
        )
        progress()
    return {
        "name": case.name,
        "rounds": case.rounds,
        "shape": list(case.shape),
        "parameters": num_parameters,
        **{key: getattr(case.config, key) for key in ("model", "depth", "width", "batch_size")},
        "sgd_seconds": median(seconds["SGD"]),
        "methods": {name: _row(name, seconds, flops, peak) for name in COMPARED},
        "db_over_f_gr": asdict(stats.median_ratio(seconds["DB"], seconds["F-GR"])),
    }


def _row(name: str, seconds: Mapping[str, Sequence[float]], flops: Mapping[str, int], peak: Mapping[str, int]) -> Row:
    return {
        "time": asdict(stats.median_ratio(seconds[name], seconds["SGD"])),
        "flops": flops[name],
        "flops_ratio": flops[name] / flops["SGD"],
        "peak_bytes": peak[name],
        "memory_ratio": peak[name] / peak["SGD"],
    }
