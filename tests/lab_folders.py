"""Folders as `gradreg sweep` and `gradreg train` leave them, made up: smooth accuracies, noise from the seed."""

import json
import math
import random
from dataclasses import asdict, replace
from itertools import product

from gradreg.lab.config import RunConfig
from gradreg.lab.folder import append_line, write_json
from gradreg.lab.methods import METHODS
from gradreg.lab.runs import Job, Result, record

ABOUT = {
    "date": "2026-11-24 12:00:00",
    "machine": "Linux, x86_64, CPU cores: 2, processes: 2, threads: 1",
    "versions": {"gradreg": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu"},
}
GAMMAS, EPSILONS, RHOS = (0.02, 0.05, 0.1, 0.2, 0.5), (0.03, 0.1, 0.3, 1.0), (0.02, 0.05, 0.1, 0.2)
COSTS = {"SGD": 1.0, "F-GR": 2.02, "B-GR": 2.01, "Central": 3.05, "DB": 3.4, "SAM": 2.05, "ASAM": 2.2, "Flooding": 1.02}
BASE = RunConfig(num_train=4000, epochs=30, weight_decay=1e-4)


def configs(methods, seeds, base=BASE):
    """The grid: every setting of every method, SGD at three learning rates."""
    axes = {"gamma": GAMMAS, "epsilon": EPSILONS, "rho": RHOS, "level": (0.05, 0.2)}
    for method in methods:
        needs = METHODS[method].needs
        rates = (0.03, 0.1, 0.3) if method == "SGD" else (0.1,)
        for *values, rate, seed in product(*(axes[name] for name in needs), rates, seeds):
            yield replace(base, method=method, learning_rate=rate, seed=seed, **dict(zip(needs, values)))


def result(config, part="validation", gain=1.0):
    """F-GR gains with a large ε and a middling γ; B-GR with a small one; what is too strong diverges."""
    own = f"{config.method} {config.settings} {config.learning_rate} {config.seed} {part}"  # whatever fields there are
    noise = random.Random(f"{config.seed}").gauss(0, 0.006) + random.Random(own).gauss(0, 0.004)
    lift = -0.02 * abs(math.log(config.learning_rate / 0.1))
    if config.gamma is not None:
        lift += 0.04 - 0.02 * math.log(config.gamma / 0.1) ** 2 / 2
        sign = -1 if config.method == "B-GR" else 1
        lift += sign * 0.012 * math.log((config.epsilon or 0.1) / 0.1)
    elif config.rho is not None:
        lift += 0.03 - 0.015 * math.log(config.rho / 0.1) ** 2
    diverged = bool(config.gamma and config.gamma > 0.3 and (config.epsilon or 0) < 0.05 and config.seed == 1)
    accuracy = 0.1 if diverged else min(max(0.73 + gain * lift + noise, 0.1), 0.99)
    loss = math.nan if diverged else 0.05 * math.exp(-8 * lift + 20 * noise)
    trace = [
        {
            "step": 120 * k,
            "train_loss": loss + 2.3 * math.exp(-0.6 * k),
            "grad_norm": (0.02 + math.exp(-0.4 * k)) * (1.5 - 6 * lift + 10 * noise),
        }
        for k in range(1 if diverged else 11)
    ]
    seconds = 3.2 * COSTS[config.method]
    return Result(accuracy, loss, trace[-1]["grad_norm"], trace, diverged, seconds, num_scored=10_000)


def sweep_folder(
    folder, methods=("SGD", "F-GR", "B-GR", "SAM"), seeds=range(3), base=BASE, gain=1.0, test=True, ended=True
):
    """A sweep with the search on validation rows and, with `test`, the best of each method read on test rows."""
    folder.mkdir(parents=True)
    about = {
        "command": "gradreg sweep --methods " + ",".join(methods),
        **ABOUT,
        "base": asdict(base),
        "axes": {"method": list(methods), "gamma": list(GAMMAS), "epsilon": list(EPSILONS), "rho": list(RHOS)},
        "seeds": list(seeds),
    }
    write_json(folder / "config.json", about)
    scores = {}
    for config in configs(methods, seeds, base):
        found = result(config, gain=gain)
        append_line(folder / "runs.jsonl", record(Job(config, "validation"), found))
        scores.setdefault(replace(config, seed=0), []).append(found.score)
    if test:
        for method in methods:
            best = max((c for c in scores if c.method == method), key=lambda c: sum(scores[c]))
            for seed in seeds:
                config = replace(best, seed=seed)
                append_line(folder / "runs.jsonl", record(Job(config, "test"), result(config, "test", gain)))
    if ended:
        costs = {method: COSTS[method] for method in methods}
        write_json(
            folder / "results.json", {**about, "seconds": 812.4, "costs": costs, "points": [], "best": {}, "test": {}}
        )
    return folder


def train_folder(folder, config, ended=True):
    """A train run of so many epochs."""
    folder.mkdir(parents=True)
    about = {"command": "gradreg train --config a.yaml", **ABOUT, "git": {"commit": "0" * 40, "dirty": False}}
    write_json(folder / "config.json", {**about, "config": asdict(config)})
    found = result(config, "test")
    for epoch in range(1, config.epochs + 1):
        rest = math.exp(-4 * epoch / config.epochs)
        append_line(
            folder / "metrics.jsonl",
            {
                "epoch": epoch,
                "step": 40 * epoch,
                "learning_rate": config.learning_rate * rest,
                "train_loss": found.train_loss + 2 * rest,
                "validation_loss": 0.9 + rest,
                "validation_accuracy": found.score * (1 - rest),
                "grad_norm": found.grad_norm + rest,
                "penalty_ratio": 0.1,
                "seconds": 0.4 * COSTS[config.method],
            },
        )
    if ended:
        results = {
            "epochs": config.epochs,
            "steps": 40 * config.epochs,
            "diverged": found.diverged,
            "train_loss": found.train_loss,
            "grad_norm": found.grad_norm,
            "validation_loss": 0.9,
            "validation_accuracy": found.score - 0.01,
            "test_loss": 0.9,
            "test_accuracy": found.score,
            "seconds": 12.0 * COSTS[config.method],
        }
        write_json(folder / "results.json", {**about, "config": asdict(config), **results})
    return folder


HOSTILE = (
    "<script>window.owned = true</script>",
    "\"><img src=x onerror='window.owned=true'>",
    "../../etc/passwd",
    "x" * 5000,
    "\u202eevil \u0645\u0631\u062d\u0628\u0627 \u0000",
    "{{ 7 * 7 }} {% raw %} $x_1$ & </style>",
)


def hostile_folder(folder):
    """A sweep whose texts attack the page and whose numbers are missing, wrong or not finite."""
    sweep_folder(folder, methods=("SGD", "F-GR"), seeds=range(2), ended=False)
    row = json.loads((folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()[0])
    with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
        for k, name in enumerate(HOSTILE):
            file.write(
                json.dumps({**row, "method": name, "path": None, "seed": name, "accuracy": 0.5 + k / 100}) + "\n"
            )
            file.write(json.dumps({**row, "weight_decay": name, "seed": k, "task": name}) + "\n")
        for accuracy in (math.nan, math.inf, 1e308, -1, None, "0.9", [1], {"a": 1}, 10**400):
            file.write(
                json.dumps({**row, "accuracy": accuracy, "train_loss": accuracy, "trace": accuracy, "gamma": 3}) + "\n"
            )
        file.write(
            '[1, 2]\nnull\n{"accuracy": 0.4}\n{"method": "F-GR", "gamma": "big", "epsilon": {}, "trace": [1, {}]}\n'
        )
        file.write("[" * 100_000 + "\n")
        file.write(json.dumps({**row, "method": "F-GR", "gamma": "\ud800", "data": "mnist1d"}) + "\n")
        file.write('{"data": "mnist1d", "model"')
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    about |= {
        "command": HOSTILE[0],
        "machine": {HOSTILE[1]: HOSTILE[4]},
        "versions": {"a": HOSTILE[3]},
        "seeds": HOSTILE[2],
    }
    write_json(folder / "config.json", about)
    return folder
