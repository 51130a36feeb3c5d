"""A method on a model: it turns a loss into the gradient that the optimizer sees.

γ rises from 0 over the first steps (`warmup`): without it a large γ diverges in some seeds. So does ρ of a step in one
pass. SAM and flooding have no γ and run as published, from the first step on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradreg
from gradreg.functional import Adaptive
from gradreg.lab.config import SETTINGS, RunConfig
from gradreg.lab.folder import BadInput
from gradreg.lab.methods import METHODS, SIGNS, Method

Batch = Any
LossFunction = Callable[[Batch], Tensor]
Schedule = float | Callable[[int], float]


class Backward(Protocol):
    """As `gradreg.GradientRegularizer.backward`: adds the gradient of the sum over batches, returns that sum."""

    def __call__(
        self,
        loss_fn: Callable[..., Tensor],
        batches: Sequence[Batch] | None = None,
        /,
        *,
        backward: Callable[[Tensor], Any] = ...,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Attached:
    """A method on a model."""

    backward: Backward
    regularizer: gradreg.GradientRegularizer | None = None
    """What has a state to save, if the method has one."""
    flooded: Flooded | None = None
    """Flooding, which has a count to save."""


class Flooded:
    """Flooding that counts the steps whose loss lay below the level; the count stays where the loss is until read."""

    def __init__(self, level: float) -> None:
        self._flooding = gradreg.Flooding(level)
        self._steps = torch.zeros((), dtype=torch.int64)

    def __call__(self, loss: Tensor) -> Tensor:
        self._steps = self._steps.to(loss.device) + (loss.detach() < self._flooding.level)
        return self._flooding(loss)

    @property
    def steps(self) -> int:
        return int(self._steps)

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps = torch.tensor(count)


def attach(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    """The method of a configuration on a model, for a run of so many steps."""
    if config.method == "SGD":
        return Attached(_plainly(lambda loss: loss))
    if config.method == "Flooding":  # returns the loss before flooding, as the other methods do
        assert config.level is not None
        flooded = Flooded(config.level)
        return Attached(_plainly(flooded), flooded=flooded)
    if config.method in _OWN:
        regularizer = _own(config.method, model, num_steps, config, optimizer)
    else:
        regularizer = gradreg.GradientRegularizer(model, **options(num_steps, config, optimizer))
    return Attached(regularizer.backward, regularizer)


def options(num_steps: int, config: RunConfig, optimizer: Optimizer | None) -> dict[str, Any]:
    """The method as arguments of `gradreg.GradientRegularizer`; γ is 0 for plain training.

    Raises:
        BadInput: a method that is none, or one along the momentum without an optimizer.
    """
    if config.method == "SGD":
        return {"gamma": 0.0, "epsilon": 1.0}
    if config.method not in _OPTIONS:
        raise BadInput(f"method must be one of {', '.join(_OPTIONS)} here, got {config.method!a}.")
    if optimizer is None and (config.method == "MSAM" or config.lookahead or config.ascent == "momentum"):
        raise BadInput("optimizer must be given for a direction along its momentum.")
    given = _OPTIONS[config.method](num_steps, config, optimizer)
    if "batch" not in given and config.fraction < 1:
        given["batch"] = gradreg.Fraction(config.fraction)
    if config.lookahead:
        is_sam = config.method in ("SAM", "ASAM")
        radius = config.lookahead if is_sam else _rising(config.lookahead, num_steps, config)
        given["at"] = gradreg.Ahead(gradreg.Momentum(optimizer), radius)
    if config.threshold is not None:
        given["when"] = gradreg.LargeGradients(config.threshold)
    return given


_OWN: dict[str, Callable[..., Any]] = {}
"""The methods of the user's tasks, which this process has met."""


def make_known(methods: Mapping[str, Callable[..., Any]]) -> None:
    """Make methods of the user's known by their names.

    Raises:
        BadInput: a name of ours, or a function that takes something else than a model and settings.
    """
    for name, make in methods.items():
        if name in METHODS and name not in _OWN:
            raise BadInput(f"methods must have names of their own, got {name!a}, which is one of gradreg's.")
        if not isinstance(name, str) or not name.isprintable() or not callable(make):
            raise BadInput(f"methods must be functions by name, got {name!a}.")
        parameters = list(inspect.signature(make).parameters)
        known = (*SETTINGS, "optimizer")
        strange = [p for p in parameters[1:] if p not in known]
        if not parameters or strange:
            raise BadInput(
                f"method {name!a} must be a function of the model and of any of {', '.join(known)}, got "
                f"({', '.join(parameters)})."
            )
        needs = tuple(p for p in parameters if p in SETTINGS)
        _OWN[name] = make
        METHODS[name] = Method(name, (make.__doc__ or "a method of the task's own").strip().splitlines()[0], needs)


def _own(
    name: str, model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer
) -> gradreg.GradientRegularizer:
    """γ rises, and so does ρ: all else is as it was given."""
    make = _OWN[name]
    given: dict[str, Any] = {"optimizer": optimizer, "epsilon": config.epsilon, "level": config.level}
    given["gamma"] = _gamma(num_steps, config) if config.settings.keys() & {"gamma", "ratio"} else None
    given["rho"] = None if config.rho is None else _rising(config.rho, num_steps, config)
    wanted = list(inspect.signature(make).parameters)[1:]
    found = make(model, **{key: given[key] for key in wanted})
    if not isinstance(found, gradreg.GradientRegularizer):
        raise BadInput(f"method {name!a} must return a gradreg.GradientRegularizer, got {type(found).__name__}.")
    return found


def _plainly(transform: Callable[[Tensor], Tensor]) -> Backward:
    def run(
        loss_fn: Callable[..., Tensor],
        batches: Sequence[Batch] | None = None,
        /,
        *,
        backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> Tensor:
        total: Tensor | None = None
        for arguments in [()] if batches is None else [(batch,) for batch in batches]:
            loss = loss_fn(*arguments)
            backward(transform(loss))
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    return run


Options = Callable[[int, RunConfig, Any], dict[str, Any]]


def _penalty(scheme: str) -> Options:
    def options(num_steps: int, config: RunConfig, optimizer: Any) -> dict[str, Any]:
        del optimizer
        epsilon = 1.0 if config.epsilon is None else config.epsilon  # DB has none
        return {"gamma": _gamma(num_steps, config), "epsilon": epsilon, "scheme": scheme, "ascent": config.ascent}

    return options


def _sam(num_steps: int, config: RunConfig, optimizer: Any) -> dict[str, Any]:
    del optimizer
    assert config.rho is not None
    rho = _in_its_steps(config.rho, num_steps, config)
    return {"gamma": rho, "epsilon": rho, "ascent": Adaptive() if config.method == "ASAM" else "normalized"}


def _one_pass(num_steps: int, config: RunConfig, optimizer: Any) -> dict[str, Any]:
    assert config.rho is not None
    rho = _in_its_steps(_rising(config.rho, num_steps, config), num_steps, config)
    sign = SIGNS[config.method]
    direction = gradreg.Momentum(optimizer, sign) if config.method == "MSAM" else gradreg.Previous(sign)
    return {"gamma": rho, "epsilon": rho, "ascent": direction}


def _split(num_steps: int, config: RunConfig, optimizer: Any) -> dict[str, Any]:
    """ε rises with γ, so that the share of the batch that is displaced stays."""
    assert config.epsilon is not None
    known = {"momentum": lambda: gradreg.Momentum(optimizer), "previous": gradreg.Previous}
    ascent = known[config.ascent]() if config.ascent in known else config.ascent
    epsilon = _rising(config.epsilon, num_steps, config)
    return {"gamma": _gamma(num_steps, config), "epsilon": epsilon, "ascent": ascent, "batch": gradreg.Split()}


def _gamma(num_steps: int, config: RunConfig) -> Schedule:
    """γ in its steps, or what makes it follow a ratio, whose target rises as γ would."""
    if config.ratio is not None:
        target = gradreg.TargetRatio(config.ratio, ramp=round(config.warmup * num_steps))
        return _in_its_steps(target, num_steps, config)
    assert config.gamma is not None
    return _in_its_steps(_rising(config.gamma, num_steps, config), num_steps, config)


def _rising(value: float, num_steps: int, config: RunConfig) -> Schedule:
    rising_steps = round(config.warmup * num_steps)
    return gradreg.warmup(value, rising_steps) if rising_steps and value else value


def _in_its_steps(value: Schedule, num_steps: int, config: RunConfig) -> Schedule:
    if config.start:
        value = gradreg.late(value, round(config.start * num_steps))
    if config.period > 1:
        value = gradreg.every(value, config.period)
    return gradreg.bernoulli(value, config.probability) if config.probability < 1 else value


_OPTIONS: dict[str, Options] = {
    "F-GR": _penalty("forward"),
    "B-GR": _penalty("backward"),
    "Central": _penalty("central"),
    "DB": _penalty("exact"),
    "SAM": _sam,
    "ASAM": _sam,
    **dict.fromkeys(SIGNS, _one_pass),
    "Split": _split,
}
