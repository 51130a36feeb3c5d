"""The best run as text to copy: YAML for `gradreg train --config`, Python for a loop of one's own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict

from gradreg.lab.config import BUILT_IN, RunConfig, from_mapping
from gradreg.lab.folder import BadInput
from gradreg.lab.methods import SIGNS
from gradreg.lab.report.studies import Point

_SCHEMES = {"F-GR": "forward", "B-GR": "backward", "Central": "central", "DB": "exact"}
_OURS = ("SGD", "Flooding", "SAM", "ASAM", "Split", *SIGNS, *_SCHEMES)


def configuration(point: Point) -> RunConfig:
    """The configuration of the point's first seed.

    Raises:
        BadInput: the folder holds one that no run can have.
    """
    given = {name: value for name, value in point.runs[0].config.items() if value is not None}
    try:
        return from_mapping({**given, "seed": point.seeds[0]} if point.seeds[0] is not None else given)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from error


def as_yaml(config: RunConfig) -> str:
    """For `gradreg train --config`: every field that has a value; of a task of the user's own those that it has."""
    import yaml

    without = () if config.file is None else BUILT_IN
    given = {name: value for name, value in asdict(config).items() if value is not None and name not in without}
    told = "" if config.file is None else f"# The file is named on the command line:\n# {train_command(config)}\n"
    return told + yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)


def train_command(config: RunConfig) -> str:
    """What trains again from the YAML; a file is found where it lies."""
    words = [] if config.file is None else [config.file.removesuffix(":task")]
    return shlex.join(["gradreg", "train", *words, "--config", "best.yaml"])


def as_python(config: RunConfig) -> str:
    """The same method and optimizer around a `model`, a `loader` and a `criterion` of one's own.

    Of a task of the user's own the method alone: its file has the rest.
    """
    if config.file is not None:
        return "\n".join(lines_of(config)) + "\n"
    kinds = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
    momentum = [f"    momentum={config.momentum:g},"] if config.optimizer == "sgd" else []
    lines = [
        "import gradreg",
        "import torch",
        "",
        f"num_steps = {config.epochs} * len(loader)",
        f"optimizer = torch.optim.{kinds[config.optimizer]}(",
        "    model.parameters(),",
        f"    lr={config.learning_rate:g},",
        *momentum,
        f"    weight_decay={config.weight_decay:g},",
        ")",
        "schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)",
        *_method(config),
        f"for epoch in range({config.epochs}):",
        "    for x, y in loader:",
        "        optimizer.zero_grad()",
        *(f"        {line}" for line in _step(config)),
        "        optimizer.step()",
        "        schedule.step()",
    ]
    return "\n".join(lines) + "\n"


_TO_OWN = (
    ("lambda batch: criterion(model(batch[0]), batch[1]), [(x, y)]", "loss_of, [batch]"),
    ("lambda: criterion(model(x), y)", "loss_fn"),
    ("criterion(model(x), y)", "loss_fn()"),
)


def lines_of(config: RunConfig) -> list[str]:
    """The method alone, around a `model`, an `optimizer`, a loss and steps of one's own."""
    if config.method not in _OURS:
        return [f"# {config.method} is a method of the task's own file."]
    step = "\n".join(_step(config))
    for ours, own in _TO_OWN:
        step = step.replace(ours, own)
    rate = f"# learning rate {config.learning_rate:g}, weight decay {config.weight_decay:g}"
    if config.method == "SGD":
        return [rate]
    head = ["import gradreg", "", rate]
    head += ["# num_steps: of the whole training"] if "num_steps" in " ".join(_method(config)) else []
    return [*head, *_method(config), "", "# in each step, in place of loss.backward():", step]


def _method(config: RunConfig) -> list[str]:
    """As `gradreg.lab.attach` does it."""
    if config.method == "SGD":
        return []
    if config.method == "Flooding":
        return [f"flooding = gradreg.Flooding({config.level:g})"]
    options: list[str] = []
    if config.fraction < 1:
        options.append(f"batch=gradreg.Fraction({config.fraction:g})")
    if config.lookahead:
        radius = _rising(config.lookahead, config) if config.method in _SCHEMES else f"{config.lookahead:g}"
        options.append(f"at=gradreg.Ahead(gradreg.Momentum(optimizer), {radius})")
    if config.threshold is not None:
        options.append(f"when=gradreg.LargeGradients({config.threshold:g})")
    if config.method in ("SAM", "ASAM"):
        arguments = [f"rho={_in_its_steps(f'{config.rho:g}', config)}", *options]
        return _call(f"gradreg.{config.method.lower()}", arguments)
    if config.method in SIGNS:
        assert config.rho is not None
        sign = SIGNS[config.method]
        direction = f"Momentum(optimizer, {sign})" if config.method == "MSAM" else f"Previous({sign})"
        rho = _in_its_steps(_rising(config.rho, config), config)
        arguments = [f"gamma={rho}", f"epsilon={rho}", f"ascent=gradreg.{direction}"]
        return _call("gradreg.GradientRegularizer", arguments)
    epsilon = 1.0 if config.epsilon is None else config.epsilon
    arguments = [f"gamma={_in_its_steps(_gamma(config), config)}"]
    if config.method == "Split":
        known = {"momentum": "gradreg.Momentum(optimizer)", "previous": "gradreg.Previous()"}
        ascent = known.get(config.ascent, f'"{config.ascent}"')
        arguments += [f"epsilon={_rising(epsilon, config)}", f"ascent={ascent}", "batch=gradreg.Split()"]
        return _call("gradreg.GradientRegularizer", arguments)
    arguments += [f"epsilon={epsilon:g}", f'scheme="{_SCHEMES[config.method]}"']
    arguments += [] if config.ascent == "gradient" else [f'ascent="{config.ascent}"']
    return _call("gradreg.GradientRegularizer", [*arguments, *options])


def _gamma(config: RunConfig) -> str:
    if config.ratio is not None:
        return f"gradreg.TargetRatio({config.ratio:g}, ramp=round({config.warmup:g} * num_steps))"
    assert config.gamma is not None
    return _rising(config.gamma, config)


def _call(function: str, arguments: Sequence[str]) -> list[str]:
    lines = [f"    {argument}," for argument in ("model", *arguments)]
    short = f"regularizer = {function}({', '.join(('model', *arguments))})"
    return [short] if len(arguments) == 1 else [f"regularizer = {function}(", *lines, ")"]


def _rising(value: float, config: RunConfig) -> str:
    is_rising = config.warmup > 0 and value
    return f"gradreg.warmup({value:g}, round({config.warmup:g} * num_steps))" if is_rising else f"{value:g}"


def _in_its_steps(value: str, config: RunConfig) -> str:
    if config.start:
        value = f"gradreg.late({value}, round({config.start:g} * num_steps))"
    if config.period > 1:
        value = f"gradreg.every({value}, {config.period})"
    return f"gradreg.bernoulli({value}, {config.probability:g})" if config.probability < 1 else value


def _step(config: RunConfig) -> list[str]:
    if config.fraction < 1 or config.method == "Split":  # which divide the batch
        return ["loss = regularizer.backward(lambda batch: criterion(model(batch[0]), batch[1]), [(x, y)])"]
    if config.method not in ("SGD", "Flooding"):
        return ["loss = regularizer.backward(lambda: criterion(model(x), y))"]
    loss = "loss = criterion(model(x), y)"
    return [loss, "flooding(loss).backward()" if config.method == "Flooding" else "loss.backward()"]
