"""What to do where no number is given: candidates for the defaults against plain training, on five small tasks.

    python benchmarks/defaults.py --quick       # two seeds of a few methods: does it run?
    python benchmarks/defaults.py               # all of it; ends with the tables
    python benchmarks/defaults.py --table       # the tables of what is there

Each task is trained with SGD + momentum and with AdamW, whose learning rates are tuned for plain training first, on
validation rows. Then every method trains with that rate, on the same seeds (weights, order of the batches, noise), and
is compared with plain training seed by seed, on test rows after the last step: the difference with its 95% interval of
Student's t. Nothing is chosen on test rows but the default itself: these are the tasks that it was chosen on. Every
finished run is a line of results/defaults/runs.jsonl, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradreg
from gradreg.lab.config import RunConfig
from gradreg.lab.data import load, with_random_labels
from gradreg.lab.data.parts import Part, shuffled
from gradreg.lab.stats import BETTER, WORSE, Interval, paired_difference, verdict

FOLDER = Path("results/defaults")
RATES = {"SGD": (0.01, 0.03, 0.1, 0.3), "AdamW": (3e-4, 1e-3, 3e-3, 1e-2)}
TUNING_SEEDS = (100, 101)

# Tasks.


@dataclass(frozen=True)
class Task:
    """Rows and a model; the score is the accuracy, or R², in %."""

    data: Callable[[], tuple[Part, Part, Part]]  # training, validation, test
    model: Callable[[], nn.Module]
    num_steps: int
    batch_size: int = 64
    noise: float = 0.0  # share of random training labels

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point():
            return F.mse_loss(out, y)
        return F.cross_entropy(out.flatten(0, -2), y.flatten())

    def score(self, out: Tensor, y: Tensor) -> float:
        if y.is_floating_point():
            return 100 * (1 - ((out - y).square().mean() / y.var(correction=0)).item())
        return 100 * (out.argmax(-1) == y).double().mean().item()


@lru_cache
def digits() -> tuple[Part, Part, Part]:
    """1,797 handwritten digits: 1,000 to train on, 297 to tune the rate, 500 to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = shuffled(len(y))
    rows = Part((torch.tensor(x[order], dtype=torch.float32).reshape(-1, 1, 8, 8) - 8) / 8, torch.tensor(y[order]))
    return rows[:1000], rows[1000:1297], rows[1297:]


@lru_cache
def signals() -> tuple[Part, Part, Part]:
    """One-dimensional MNIST: 1,000, 1,000 and 3,000 signals of 40 numbers."""
    split = load(RunConfig(data="mnist1d"))
    return tuple(Part(part.x.unsqueeze(1), part.y) for part in (split.train[:1000], split.validation, split.test))  # pyright: ignore[reportReturnType]


@lru_cache
def friedman() -> tuple[Part, Part, Part]:
    """Friedman's first function of 10 uniform numbers, with noise: 300, 500 and 2,000 rows, standardized."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(2800, noise=2.0, random_state=0)
    rows = Part(torch.tensor(2 * x - 1).float(), torch.tensor((y - y[:300].mean()) / y[:300].std()).float()[:, None])
    return rows[:300], rows[300:800], rows[800:]


def mlp(inputs: int, outputs: int, width: int = 64) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def digits_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def signals_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv1d(16, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv1d(16, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 10)),
    )


TASKS = {
    "digits, CNN": Task(digits, digits_cnn, 400, 32),
    "digits, MLP, 40% random labels": Task(digits, lambda: mlp(64, 10), 600, 50, noise=0.4),
    "MNIST-1D, MLP": Task(signals, lambda: mlp(40, 10), 600, 50),
    "MNIST-1D, CNN": Task(signals, signals_cnn, 1000, 32),
    "Friedman regression, MLP": Task(friedman, lambda: mlp(10, 1), 600, 30),
}


# Methods.

Make = Callable[[nn.Module, torch.optim.Optimizer, int], gradreg.GradientRegularizer | None]


def dial(target: float, ramp: int = 500, **options: Any) -> Make:
    return fixed(gradreg.TargetRatio(target, ramp=ramp), **options)


def fixed(gamma: Any, epsilon: float, **options: Any) -> Make:
    return lambda model, optimizer, num_steps: gradreg.GradientRegularizer(model, gamma, epsilon, **options)


def cheap(target: float) -> Make:
    return lambda model, optimizer, num_steps: gradreg.cheap(model, gradreg.TargetRatio(target))


METHODS: dict[str, Make] = {
    "plain": lambda *_: None,
    "ratio 0.1": dial(0.1, epsilon=0.1),
    "ratio 0.2": dial(0.2, epsilon=0.1),
    "ratio 0.3": dial(0.3, epsilon=0.1),
    "ratio 0.1, no ramp": dial(0.1, 0, epsilon=0.1),
    "ratio 0.1, normalized, ε 0.05": dial(0.1, epsilon=0.05, ascent="normalized"),
    "γ = ε = 0.1": fixed(0.1, 0.1),
    "γ = ε = 1": fixed(1.0, 1.0),
    "SAM, ρ 0.05": fixed(0.05, 0.05, ascent="normalized"),
    **{f"cheap, ratio {target:g}": cheap(target) for target in (0.1, 0.2, 0.3, 0.5, 1.0)},
}
QUICK = ("plain", "ratio 0.1", "γ = ε = 0.1", "cheap, ratio 0.1")


# One run.


def train(task: Task, optimizer: str, rate: float, make: Make, seed: int, tuning: bool = False) -> dict[str, float]:
    """The score after the last step, and the median of the penalty ratio in the second half."""
    rows, validation, test = task.data()
    if task.noise:
        rows = Part(rows.x, with_random_labels(rows.y, task.noise, seed))
    torch.manual_seed(seed)
    model = task.model()
    base: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
        if optimizer == "SGD"
        else torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, task.num_steps)
    regularizer = make(model, base, task.num_steps)
    generator = torch.Generator().manual_seed(seed)
    order, ratios = torch.empty(0, dtype=torch.long), []

    def loss_fn(batch: Part) -> Tensor:
        return task.loss(model(batch[0]), batch[1])  # pyright: ignore[reportArgumentType]

    model.train()
    start = time.process_time()
    for step in range(task.num_steps):
        if len(order) < task.batch_size:
            order = torch.randperm(len(rows), generator=generator)
        chosen, order = order[: task.batch_size], order[task.batch_size :]
        batch: Any = (rows.x[chosen], rows.y[chosen])
        base.zero_grad()
        if regularizer is None:
            loss_fn(batch).backward()
        else:
            regularizer.backward(loss_fn, [batch])
            if step > task.num_steps // 2 and step % 10 == 9:
                ratios.append(float(regularizer.diagnostics()["penalty_ratio"]))  # type: ignore[arg-type]
        base.step()
        schedule.step()
    seconds = time.process_time() - start
    model.eval()
    part = validation if tuning else test
    with torch.no_grad():
        out = model(part.x)
        fine = bool(out.isfinite().all())
        result = {"score": task.score(out, part.y) if fine else 0.0, "seconds": round(seconds, 2)}
    known = sorted(r for r in ratios if math.isfinite(r))
    if known:
        result["ratio"] = round(known[len(known) // 2], 4)
    return result


# The study.


class Runs:
    """The lines of a file, by what was run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.done = {self._key(run): run for run in map(json.loads, lines)}

    @staticmethod
    def _key(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in ("task", "optimizer", "method", "seed", "rate"))

    def get(self, task: str, optimizer: str, method: str, seed: int, rate: float, tuning: bool = False) -> float:
        """The score of a run, which is run if it was not."""
        key = (task, optimizer, method, seed, rate)
        if key not in self.done:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = train(TASKS[task], optimizer, rate, METHODS[method], seed, tuning)
            run = dict(zip(("task", "optimizer", "method", "seed", "rate"), key)) | result
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run, ensure_ascii=False) + "\n")
            self.done[key] = run
        return self.done[key]["score"]


def tuned_rate(runs: Runs, task: str, optimizer: str) -> float:
    """The learning rate with the best mean of plain training on validation rows."""
    means = {
        rate: sum(runs.get(task, optimizer, "plain", seed, rate, tuning=True) for seed in TUNING_SEEDS)
        for rate in RATES[optimizer]
    }
    return max(means, key=lambda rate: means[rate])


def table(runs: Runs, tasks: Sequence[str], methods: Sequence[str], num_seeds: int) -> str:
    """A row for each task and optimizer: plain, and the difference of each method to it; below, how often it shows."""
    verdicts: dict[str, list[str]] = {method: [] for method in methods}
    lines = ["| task | optimizer | plain | " + " | ".join(methods[1:]) + " |", "|---" * (2 + len(methods)) + "|"]
    for task in tasks:
        for optimizer in RATES:
            tuning = [r for r in runs.done.values() if (r["task"], r["optimizer"]) == (task, optimizer)]
            found = {m: {r["seed"]: r for r in tuning if r["method"] == m and r["seed"] < num_seeds} for m in methods}
            if len(found["plain"]) < 2:
                continue
            plain = {seed: run["score"] for seed, run in found["plain"].items()}
            cells = [f"{statistics.mean(plain.values()):.1f} ± {statistics.stdev(plain.values()):.1f}"]
            for method in methods[1:]:
                seeds = [seed for seed in found[method] if seed in plain]
                if len(seeds) < 2:
                    cells.append("")
                    continue
                of = [found[method][seed] for seed in seeds]
                gap = paired_difference([run["score"] for run in of], [plain[seed] for seed in seeds])
                ratios = sorted(run["ratio"] for run in of if "ratio" in run)
                verdicts[method].append(verdict(gap))
                cells.append(f"{_show(gap)}" + (f" ({ratios[len(ratios) // 2]:.2f})" if ratios else ""))
            lines.append(f"| {task} | {optimizer} | " + " | ".join(cells) + " |")
    counts = [f"{verdicts[m].count(BETTER)} better, {verdicts[m].count(WORSE)} worse" for m in methods[1:]]
    lines.append("| beyond noise | | | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def _show(gap: Interval) -> str:
    return f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds of a few methods")
    parser.add_argument("--table", action="store_true", help="run nothing, and print the tables of what is there")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="some of the tasks, by their names")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="some of the methods, by their names")
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks: list[str] = arguments.tasks
    methods: list[str] = list(QUICK) if arguments.quick else ["plain", *(m for m in arguments.methods if m != "plain")]
    num_seeds = 2 if arguments.quick else arguments.seeds
    runs = Runs(arguments.out / "runs.jsonl")
    if not arguments.table:
        for seed in range(num_seeds):
            for task in tasks:
                for optimizer in RATES:
                    rate = tuned_rate(runs, task, optimizer)
                    for method in methods:
                        runs.get(task, optimizer, method, seed, rate)
    print(f"Score in % after the last step; differences to plain, seed by seed, with 95% intervals, {num_seeds} seeds.")
    print("± is the deviation among seeds of plain training; in parentheses the median ratio of the second half.\n")
    print(table(runs, tasks, methods, num_seeds))


if __name__ == "__main__":
    main()
