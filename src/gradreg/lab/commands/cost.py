"""`gradreg cost`: what a step of each method costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gradreg.lab.commands.options import LAST_SEED, MOST_WORKERS, Device, Out, TaskWord, app, nothing_in, switch, whole
from gradreg.lab.config import from_mapping
from gradreg.lab.folder import BadInput, new_folder
from gradreg.lab.names import meant, suggestion
from gradreg.lab.task_names import together

_MODELS = ("mlp", "resnet18", "wideresnet", "vit", "gpt")
_MOST_DEPTH = 256


def _listed(field: str, one: Callable[[str], Any], allowed: str, meaning: str) -> Parameter:
    """An option that is a list without repetition, separated by commas."""

    def convert(_: Any, tokens: Sequence[Any]) -> tuple[Any, ...]:
        text = tokens[0].value
        try:
            values = tuple(dict.fromkeys(one(part.strip()) for part in text.split(",")))
        except ValueError:
            raise BadInput(f"{field} must be {allowed}, separated by commas, got {text!a}.") from None
        return values

    return Parameter(name=field, converter=convert, n_tokens=1, negative="", help=meaning, allow_leading_hyphen=True)


def _model(text: str) -> str:
    model = meant(text, _MODELS)
    if model is None:
        hint = suggestion(text, _MODELS)
        raise BadInput(f"--models must be some of {', '.join(_MODELS)}, separated by commas, got {text!a}.{hint}")
    return model


def _depth(text: str) -> int:
    if not 1 <= int(text) <= _MOST_DEPTH:
        raise ValueError
    return int(text)


Models = Annotated[
    tuple[str, ...] | None,
    _listed("--models", _model, f"some of {', '.join(_MODELS)}", "Separated by commas; by default all."),
]
Depths = Annotated[
    tuple[int, ...] | None,
    _listed("--depths", _depth, f"whole numbers from 1 to {_MOST_DEPTH}", "Layers of the MLP; by default 2,4,8,16."),
]


def _refuse(task: str, options: dict[str, Any]) -> None:
    for name, given in options.items():
        if given:
            raise BadInput(f"{name} must be left out with TASK {task}, which decides what is measured.")


@app.command
def cost(
    task: TaskWord = None,
    /,
    *,
    quick: Annotated[bool, switch("--quick", "Three models, small batches: under a minute.")] = False,
    models: Models = None,
    depths: Depths = None,
    rounds: Annotated[int | None, whole("--rounds", 6, 10_000, "Of each case; by default 6 to 21")] = None,
    grid: Annotated[bool, switch("--grid", "Instead: configurations per second of the batched engine.")] = False,
    threads: Annotated[int | None, whole("--threads", 1, MOST_WORKERS, "Of torch; by default its own")] = None,
    device: Device = "auto",
    seed: Annotated[int, whole("--seed", 0, LAST_SEED, "Of weights and inputs")] = 0,
    out: Out = None,
) -> None:
    """Measure a step of SGD, F-GR, B-GR, Central, DB and SAM: time, FLOPs and memory, against depth and for models.

    Prints ratios to SGD with intervals, next to what counting matrix products predicts, and writes a folder:
    report.html, results.json and a figure. Under 5 minutes on two quiet cores. Close what else is running.
    """
    import torch

    from gradreg.lab.cost import steps as costs
    from gradreg.lab.cost.grid import GridPlan, run_grid
    from gradreg.lab.cost.measure import DEPTHS, MODELS, QUICK_DEPTHS, QUICK_MODELS, Plan, run_cost
    from gradreg.lab.processes import resolve

    threads = threads or torch.get_num_threads()
    if task is not None:
        _refuse(task, {"--models": models, "--depths": depths, "--grid": grid, "--quick": quick, "--seed": seed})
        from gradreg.lab.cost.own import Plan as OwnPlan
        from gradreg.lab.cost.own import run_own

        costs.keep_heap()
        config = from_mapping({**together(task, {}), "device": device})
        with nothing_in(out or Path("results")):
            run_own(OwnPlan(config, rounds, threads), lambda: new_folder(out, "cost"))
        return
    if grid:
        for field, given in {
            "--models": models,
            "--depths": depths,
            "--device": device != "auto",
            "--seed": seed,
        }.items():
            if given:
                raise BadInput(f"{field} must be left out with --grid, whose runs decide it.")
        folder = new_folder(out, "cost-grid")
        with nothing_in(folder):
            run_grid(GridPlan(rounds, quick, threads), folder)
        return
    if depths and models and "mlp" not in models:
        raise BadInput(f"--depths must be left out without the model mlp, got --models {','.join(models)}.")
    plan = Plan(
        models=models or (QUICK_MODELS if quick else MODELS),
        depths=depths or (QUICK_DEPTHS if quick else DEPTHS),
        rounds=rounds,
        is_quick=quick,
        threads=threads,
        device=resolve(device),
        seed=seed,
    )
    folder = new_folder(out, "cost")
    costs.keep_heap()
    with nothing_in(folder):
        run_cost(plan, folder)
