r"""How much gradient regularization does flooding really perform?

Flooding descends while L > b and ascends while L < b. Two steps of plain SGD of size η on one batch that straddle the
level are one step of the penalty alone,

$$\theta_{t+2} = \theta_t - \eta^2\,\frac{\nabla L(\theta_t + \eta\nabla L) - \nabla L(\theta_t)}{\eta}
\quad\text{(up, then down)}$$

with ε = η: F-GR; down and then up is B-GR. Here the identity is checked to rounding, and then real runs are counted,
with the same batch in every step, where the identity holds for each pair, and with mini-batches, where it need not.

Defined as: *pair*, two successive steps of opposite sign, none counted twice. *Effective γ*, η · pairs / (descents −
ascents): over a run, flooding adds up η (descents − ascents) of gradient and η² · pairs of penalty. *Explained*, the
cosine between what a pair did to the weights and the penalty step that the identity predicts from its first batch.
Where ascents and descents alternate strictly, the order of a pair, F-GR or B-GR, is a matter of where one starts to
count; pairs are counted from the first ascent's predecessor on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from gradreg import Flooding, GradientRegularizer
from gradreg.functional import penalty_gradient
from gradreg.lab import stats
from gradreg.lab.about import provenance
from gradreg.lab.data import Part, Split, load
from gradreg.lab.folder import write_json
from gradreg.lab.jobs import run_jobs
from gradreg.lab.models import build
from gradreg.lab.page import publish, tell
from gradreg.lab.runs import accuracy, measure
from gradreg.studies.demo.tasks import TASKS
from gradreg.studies.implicit_bias.plan import SeededPlan

DEFAULT_SEEDS, QUICK_SEEDS = 3, 2
NUM_RECORDS = 32
CHECK_EVERY = 29  # pairs that begin at such a step are compared with the identity

Row = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """How the batches are drawn, and the level that is flooded."""

    name: str
    batch_size: int
    same_batch: bool
    """Whether every step sees the same rows; the training rows are then these alone."""
    rate: float
    """η, constant; no momentum, no weight decay."""
    level: float
    """b."""
    num_steps: int


MODES = (
    Mode("the same 200 rows in every step", 200, True, rate=0.2, level=0.5, num_steps=1500),
    Mode("mini-batches of 100", 100, False, rate=0.2, level=0.7, num_steps=2100),
)
TASK = TASKS["mnist1d, MLP, 25% random labels"]


class Plan(SeededPlan):
    """What `gradreg flooding` runs."""

    name = "flooding"


def run_flooding(plan: Plan, folder: Path) -> Row:
    """Compute, write the folder, print the tables; return what results.json holds."""
    from gradreg.studies.implicit_bias.flooding_page import page, told

    started = time.perf_counter()
    modes = [_shorter(mode) if plan.is_quick else mode for mode in MODES]
    # Initialization draws from the global random state, which threads share: not in a job.
    starts = [start_of(seed) for seed in plan.seeds]
    jobs = {(mode, s.seed): lambda mode=mode, s=s: compare(mode, s) for mode in modes for s in starts}
    found = run_jobs(jobs, plan.workers, "flooding")
    results: Row = {
        "name": folder.name,
        **provenance(plan.command, threads=plan.workers),
        "is_quick": plan.is_quick,
        "seeds": list(plan.seeds),
        "task": TASK.task,
        "identity": identity(plan.seeds[0]),
        "modes": [summarize(mode, [found[mode, seed] for seed in plan.seeds]) for mode in modes],
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(folder / "results.json", results)
    publish(page(results), folder)
    tell(told(results), results, folder)
    return results


def _shorter(mode: Mode) -> Mode:
    return replace(mode, num_steps=mode.num_steps // 3)


# The identity.


def identity(seed: int) -> list[Row]:
    """Two flooded steps against one step of the penalty, in both orders, from two independent codes."""
    start = start_of(seed)
    data, model = start.data, start.model
    batch, rate = data.train[torch.arange(100)], 0.1
    loss_of = _loss_of(model, batch)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = []
    for scheme, sign in (("forward", 1.0), ("backward", -1.0)):
        there = {name: start[name] + sign * rate * g for name, g in grad(loss_of)(start).items()}
        level = ((loss_of(start) + loss_of(there)) / 2).item()
        model.load_state_dict(start)
        optimizer, signs = torch.optim.SGD(model.parameters(), lr=rate), []
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch.x), batch.y)
            signs.append(1 if loss.item() > level else -1)
            Flooding(level)(loss).backward()
            optimizer.step()
        moved = _flat(dict(model.named_parameters())) - _flat(start)
        step = -(rate**2) * _flat(penalty_gradient(loss_of, start, scheme=scheme, epsilon=rate))
        rows.append(
            {
                "scheme": scheme,
                "straddles": signs == [-int(sign), int(sign)],
                "relative_error": ((moved - step).norm() / step.norm()).item(),
                "rounding": (torch.finfo(torch.float64).eps * _flat(start).norm() / step.norm()).item(),
            }
        )
    return rows


def _loss_of(model: nn.Module, batch: Part) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda p: F.cross_entropy(functional_call(model, p, (batch.x,)), batch.y)


def _flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters.values()])


def _doubled(split: Split) -> Split:
    """In float64: a pair moves the weights by η² only, far below what float32 resolves after many steps."""
    train, validation, test = (Part(part.x.double(), part.y) for part in (split.train, split.validation, split.test))
    return Split(train, validation, test)


# Real runs.


@dataclass(frozen=True)
class Start:
    """What the runs of a seed begin with."""

    seed: int
    data: Split
    model: nn.Module
    """Copied by each run."""


def start_of(seed: int) -> Start:
    """Data with the random labels of a seed, and a model initialized by it."""
    config = replace(TASK, seed=seed)
    data = load(config)
    return Start(seed, _doubled(data), build(config, data).double())


def compare(mode: Mode, start: Start) -> Row:
    """SGD, flooding, and F-GR with the ε and the effective γ of that flooding, from the same weights and batches."""
    if mode.same_batch:
        data = start.data
        start = replace(start, data=Split(data.train[torch.arange(mode.batch_size)], data.validation, data.test))
    flooded = train(mode, start, "Flooding")
    gamma = flooded["counts"]["gamma"]
    return {
        "SGD": train(mode, start, "SGD"),
        "Flooding": flooded,
        "F-GR": train(mode, start, "F-GR", gamma),
    }


def train(mode: Mode, start: Start, method: str, gamma: float = 0.0) -> Row:
    """One run; F-GR takes ε = η, as flooding does."""
    data, model = start.data, deepcopy(start.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=mode.rate)
    regularizer = GradientRegularizer(model, gamma, mode.rate)
    flooding = Flooding(mode.level)
    generator = torch.Generator().manual_seed(start.seed)
    record_every = max(1, mode.num_steps // NUM_RECORDS)
    trace, is_descent, checks, rows = [], [], [], torch.arange(0)
    at_level: float | None = None  # ‖∇L‖ where the level was first reached
    checked: tuple[dict[str, Tensor], Part] | None = None
    for step in range(mode.num_steps):
        if step % record_every == 0:
            trace.append({"step": step, **measure(model, data.train)})
        if mode.same_batch:
            batch = data.train
        else:
            if len(rows) < mode.batch_size:
                rows = torch.randperm(len(data.train), generator=generator)
            chosen, rows = rows[: mode.batch_size], rows[mode.batch_size :]
            batch = data.train[chosen]
        model.train()
        if method == "Flooding" and step % CHECK_EVERY == 0:
            checked = ({name: p.detach().clone() for name, p in model.named_parameters()}, batch)
        optimizer.zero_grad()
        if method == "F-GR":
            regularizer.backward(lambda batch=batch: F.cross_entropy(model(batch.x), batch.y))
        else:
            loss = F.cross_entropy(model(batch.x), batch.y)
            is_descent.append(loss.item() > mode.level)
            if method == "Flooding" and at_level is None and not is_descent[-1]:
                at_level = measure(model, data.train)["grad_norm"]
                model.train()
            (flooding(loss) if method == "Flooding" else loss).backward()
        optimizer.step()
        if checked and step % CHECK_EVERY == 1:
            if is_descent[-1] != is_descent[-2]:
                scheme = "backward" if is_descent[-2] else "forward"
                checks.append(_explained(model, *checked, scheme, mode.rate))
            checked = None
    last = measure(model, data.train)
    trace.append({"step": mode.num_steps, **last})
    result: Row = {"accuracy": accuracy(model, data.test), **last, "gamma": gamma, "trace": trace}
    if method == "Flooding":
        late = [2 * math.log2(point["grad_norm"]) for point in trace[-NUM_RECORDS // 4 :]]
        fall = _mean(late) - 2 * math.log2(at_level) if at_level else math.nan
        result |= {
            "log2_fall": fall,
            "counts": count(is_descent, mode.rate),
            "explained": _mean(checks),
            "num_checked": len(checks),
        }
    return result


def _explained(model: nn.Module, start: dict[str, Tensor], batch: Part, scheme: str, rate: float) -> float:
    """Cosine between the displacement of the weights since `start` and the step that the identity predicts."""
    moved = _flat(dict(model.named_parameters())) - _flat(start)
    step = -_flat(penalty_gradient(_loss_of(model, batch), start, scheme=scheme, epsilon=rate))
    return (moved @ step / (moved.norm() * step.norm()).clamp(min=1e-300)).item()


def count(is_descent: Sequence[bool], rate: float) -> Row:
    """Pairs by their order, and the γ they amount to.

    Example:
        >>> found = count([True, True, True, False, True, False, True], rate=0.1)  # ↓ ↓ (↓ ↑) (↓ ↑) ↓
        >>> found["backward"], found["forward"], round(found["gamma"], 3)  # 0.1 · 2 / (5 − 2)
        (2, 0, 0.067)
    """
    forward = backward = 0
    k = 0
    while k + 1 < len(is_descent):
        if is_descent[k] == is_descent[k + 1]:
            k += 1
            continue
        forward, backward = forward + (not is_descent[k]), backward + is_descent[k]
        k += 2
    descents = sum(is_descent)
    net = 2 * descents - len(is_descent)
    pairs = forward + backward
    start = next((k for k, descends in enumerate(is_descent) if not descends), len(is_descent))
    flooded = len(is_descent) - start
    return {
        "forward": forward,
        "backward": backward,
        "descents": descents,
        "ascents": len(is_descent) - descents,
        "pair_share": 2 * pairs / len(is_descent),
        "pair_share_after_level": 2 * pairs / flooded if flooded else math.nan,
        "gamma": rate * pairs / max(net, 1),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def summarize(mode: Mode, runs: Sequence[Row]) -> Row:
    """Means with intervals over seeds."""

    def interval(values: Sequence[float]) -> Row | None:
        finite = [v for v in values if math.isfinite(v)]
        return asdict(stats.mean_interval(finite)) if len(finite) >= 2 else None

    methods = {}
    for method in ("SGD", "Flooding", "F-GR"):
        of_method = [run[method] for run in runs]
        points = []
        for moment in zip(*(run["trace"] for run in of_method)):
            logs = interval([2 * math.log10(max(p["grad_norm"], 1e-300)) for p in moment])
            points.append({"step": moment[0]["step"], "log10_squared_norm": logs})
        methods[method] = {
            "accuracy": interval([run["accuracy"] for run in of_method]),
            "train_loss": interval([run["train_loss"] for run in of_method]),
            "squared_norm": interval([run["grad_norm"] ** 2 for run in of_method]),
            "gamma": interval([run["gamma"] for run in of_method]),
            "trace": points,
        }
    keys = ("forward", "backward", "descents", "ascents", "pair_share", "pair_share_after_level", "gamma")
    counts = {key: interval([run["Flooding"]["counts"][key] for run in runs]) for key in keys}
    own = {key: interval([run["Flooding"][key] for run in runs]) for key in ("explained", "log2_fall")}
    return {**asdict(mode), "methods": methods, "counts": counts, **own}
