"""The best run as text to copy: YAML for `gradreg train --config`, Python for a loop of one's own."""

from __future__ import annotations

from dataclasses import asdict

from gradreg.lab.config import RunConfig, from_mapping
from gradreg.lab.folder import BadInput
from gradreg.lab.report.studies import Point

_SCHEMES = {"F-GR": "forward", "B-GR": "backward", "Central": "central", "DB": "exact"}


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
    """For `gradreg train --config`: every field that has a value."""
    import yaml

    given = {name: value for name, value in asdict(config).items() if value is not None}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)


def as_python(config: RunConfig) -> str:
    """The same method and optimizer around a `model`, a `loader` and a `criterion` of one's own."""
    rising = config.warmup > 0 and config.method in _SCHEMES and config.gamma
    lines = ["import gradreg", "import torch", "", f"num_steps = {config.epochs} * len(loader)"]
    if config.method in _SCHEMES:
        gamma = (
            f"gradreg.warmup({config.gamma:g}, round({config.warmup:g} * num_steps))" if rising else f"{config.gamma:g}"
        )
        epsilon = 1.0 if config.epsilon is None else config.epsilon
        lines += [
            "regularizer = gradreg.GradientRegularizer(",
            "    model,",
            f"    gamma={gamma},",
            f"    epsilon={epsilon:g},",
            f'    scheme="{_SCHEMES[config.method]}",',
        ]
        lines += [] if config.ascent == "gradient" or config.method == "DB" else [f'    ascent="{config.ascent}",']
        lines.append(")")
    elif config.method in ("SAM", "ASAM"):
        lines.append(f"regularizer = gradreg.{config.method.lower()}(model, rho={config.rho:g})")
    elif config.method == "Flooding":
        lines.append(f"flooding = gradreg.Flooding({config.level:g})")
    kinds = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
    momentum = [f"    momentum={config.momentum:g},"] if config.optimizer == "sgd" else []
    lines += [
        f"optimizer = torch.optim.{kinds[config.optimizer]}(",
        "    model.parameters(),",
        f"    lr={config.learning_rate:g},",
        *momentum,
        f"    weight_decay={config.weight_decay:g},",
        ")",
        "schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)",
        f"for epoch in range({config.epochs}):",
        "    for x, y in loader:",
        "        optimizer.zero_grad()",
        *(f"        {line}" for line in _step(config)),
        "        optimizer.step()",
        "        schedule.step()",
    ]
    return "\n".join(lines) + "\n"


def _step(config: RunConfig) -> list[str]:
    if config.method in _SCHEMES or config.method in ("SAM", "ASAM"):
        return ["loss = regularizer.backward(lambda: criterion(model(x), y))"]
    loss = "loss = criterion(model(x), y)"
    return [loss, "flooding(loss).backward()" if config.method == "Flooding" else "loss.backward()"]
