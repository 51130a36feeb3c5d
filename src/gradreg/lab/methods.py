"""The methods that are compared, as values: each turns a loss into the gradient that the optimizer sees.

γ rises from 0 over the first steps (`warmup`): without it a large γ diverges in some seeds. So does ρ of a step in one
pass. SAM and flooding have no γ and run as published, from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

import gradreg
from gradreg.lab.folder import BadInput

if TYPE_CHECKING:
    from gradreg.lab.config import RunConfig

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Batch], Tensor]
Schedule = float | Callable[[int], float]

SIGNS = {"MSAM": -1, "Previous": 1, "Previous-down": -1}
"""The methods that are one displaced pass, and the side of their direction to which they go."""
ONE_PASS = (*SIGNS, "Split")
"""They have no gradient of the whole batch at θ, beside which a penalty could be held."""
STEPS = ("period", "start", "probability")
"""The fields that say in which steps there is a penalty."""
PASSES = ("fraction", "lookahead", "threshold", *STEPS)
"""All fields that make a penalty cheaper or move it."""


class Backward(Protocol):
    """Adds the gradient to `.grad` and returns L(θ), detached; `backward` runs the backward pass of a loss."""

    def __call__(
        self, loss_fn: LossFunction, batches: Sequence[Batch], /, *, backward: Callable[[Tensor], Any] = ...
    ) -> Tensor: ...


@dataclass(frozen=True)
class Attached:
    """A method on a model."""

    backward: Backward
    regularizer: gradreg.GradientRegularizer | None = None
    """What has a state to save, if the method has one."""


Attach = Callable[[nn.Module, int, "RunConfig", Optimizer], Attached]


@dataclass(frozen=True)
class Method:
    """A row of the tables."""

    name: str
    about: str
    """One line for the reports."""
    needs: tuple[str, ...]
    """The settings of a configuration that it reads."""
    attach: Attach
    """The method on a model, for a run of so many steps."""
    takes: tuple[str, ...] = ()
    """Of `PASSES`, what it can be combined with."""


def _sgd(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    del model, num_steps, config, optimizer
    return Attached(_plainly(lambda loss: loss))


def _flooding(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    """Returns the loss before flooding, as the other methods do."""
    del model, num_steps, optimizer
    assert config.level is not None
    return Attached(_plainly(gradreg.Flooding(config.level)))


def _plainly(transform: Callable[[Tensor], Tensor]) -> Backward:
    def run(
        loss_fn: LossFunction, batches: Sequence[Batch], /, *, backward: Callable[[Tensor], Any] = Tensor.backward
    ) -> Tensor:
        (batch,) = batches
        loss = loss_fn(batch)
        backward(transform(loss))
        return loss.detach()

    return run


def _penalty(scheme: str) -> Attach:
    def attach(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
        assert config.gamma is not None
        gamma = _in_its_steps(_rising(config.gamma, num_steps, config), num_steps, config)
        epsilon = 1.0 if config.epsilon is None else config.epsilon  # DB has none
        ascent = "gradient" if scheme == "exact" else config.ascent
        options = _options(config, optimizer, _rising(config.lookahead, num_steps, config))
        return _attached(gradreg.GradientRegularizer(model, gamma, epsilon, scheme=scheme, ascent=ascent, **options))

    return attach


def _sam(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    assert config.rho is not None
    rho = _in_its_steps(config.rho, num_steps, config)
    preset = gradreg.asam if config.method == "ASAM" else gradreg.sam
    return _attached(preset(model, rho, **_options(config, optimizer, config.lookahead)))


def _one_pass(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    assert config.rho is not None
    rho = _in_its_steps(_rising(config.rho, num_steps, config), num_steps, config)
    sign = SIGNS[config.method]
    direction = gradreg.Momentum(optimizer, sign) if config.method == "MSAM" else gradreg.Previous(sign)
    return _attached(gradreg.GradientRegularizer(model, rho, rho, ascent=direction))


def _split(model: nn.Module, num_steps: int, config: RunConfig, optimizer: Optimizer) -> Attached:
    """ε rises with γ, so that the share of the batch that is displaced stays."""
    assert config.gamma is not None
    assert config.epsilon is not None
    gamma = _in_its_steps(_rising(config.gamma, num_steps, config), num_steps, config)
    known = {"momentum": lambda: gradreg.Momentum(optimizer), "previous": gradreg.Previous}
    return _attached(
        gradreg.GradientRegularizer(
            model,
            gamma,
            _rising(config.epsilon, num_steps, config),
            ascent=known[config.ascent]() if config.ascent in known else config.ascent,
            batch=gradreg.Split(),
        )
    )


def _attached(regularizer: gradreg.GradientRegularizer) -> Attached:
    return Attached(regularizer.backward, regularizer)


def _rising(value: float, num_steps: int, config: RunConfig) -> Schedule:
    rising_steps = round(config.warmup * num_steps)
    return gradreg.warmup(value, rising_steps) if rising_steps and value else value


def _in_its_steps(value: Schedule, num_steps: int, config: RunConfig) -> Schedule:
    if config.start:
        value = gradreg.late(value, round(config.start * num_steps))
    if config.period > 1:
        value = gradreg.every(value, config.period)
    return gradreg.bernoulli(value, config.probability) if config.probability < 1 else value


def _options(config: RunConfig, optimizer: Optimizer, lookahead: Schedule) -> dict[str, Any]:
    return {
        "batch": gradreg.Fraction(config.fraction) if config.fraction < 1 else None,
        "at": gradreg.Ahead(gradreg.Momentum(optimizer), lookahead) if config.lookahead else None,
        "when": None if config.threshold is None else gradreg.LargeGradients(config.threshold),
    }


def check_together(config: RunConfig) -> None:
    """
    Raises:
        BadInput: fields that mean nothing together.
    """
    method = METHODS[config.method]
    for name, default in (("fraction", 1), ("lookahead", 0), ("threshold", None), ("period", 1), ("start", 0)):
        _refuse(config, name, default, method.takes)
    _refuse(config, "probability", 1, method.takes)
    if config.method == "Split":
        assert config.gamma is not None
        assert config.epsilon is not None
        if config.gamma >= config.epsilon:
            raise BadInput(
                f"gamma must be below epsilon with method Split, which displaces a share γ/ε of the batch, got "
                f"'{config.gamma:g}' and '{config.epsilon:g}'."
            )
        if config.ascent == "adaptive":
            raise BadInput("ascent must be one of gradient, normalized, momentum, previous with method Split.")
    elif config.ascent in ("momentum", "previous"):
        raise BadInput(
            f"ascent must be one of gradient, normalized, adaptive with method {config.method}, got "
            f"'{config.ascent}'; methods MSAM, Previous and Split have it."
        )
    if config.threshold is not None and config.fraction < 1:
        raise BadInput("threshold must be left out with a fraction of the batch: it tests the gradient of all of it.")
    needs_momentum = config.method == "MSAM" or config.lookahead or config.ascent == "momentum"
    if needs_momentum and config.optimizer == "sgd" and config.momentum == 0:
        raise BadInput("momentum must be above 0 for a direction along it, got '0'.")


def _refuse(config: RunConfig, name: str, default: float | None, takes: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value != default and name not in takes:
        with_it = ", ".join(key for key, method in METHODS.items() if name in method.takes)
        raise BadInput(
            f"{name} must be left out with method {config.method}, got '{value:g}'; methods with it: {with_it}."
        )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("SGD", "plain training", (), _sgd),
        Method("F-GR", "forward difference of the gradient", ("gamma", "epsilon"), _penalty("forward"), PASSES),
        Method("B-GR", "backward difference of the gradient", ("gamma", "epsilon"), _penalty("backward"), PASSES),
        Method("Central", "centered difference of the gradient", ("gamma", "epsilon"), _penalty("central"), PASSES),
        Method("DB", "the exact penalty by double backpropagation", ("gamma",), _penalty("exact"), STEPS),
        Method("SAM", "gradient at distance ρ uphill", ("rho",), _sam, PASSES),
        Method("ASAM", "gradient at a distance uphill that scales with the weights", ("rho",), _sam, PASSES),
        Method("MSAM", "one pass: gradient at distance ρ along the momentum", ("rho",), _one_pass, STEPS),
        Method("Previous", "one pass: gradient at distance ρ up the previous gradient", ("rho",), _one_pass, STEPS),
        Method("Previous-down", "one pass: the same down the previous gradient", ("rho",), _one_pass, STEPS),
        Method("Split", "one pass: a share γ/ε of the batch displaced", ("gamma", "epsilon"), _split, STEPS),
        Method("Flooding", "loss pushed back up below a level", ("level",), _flooding),
    )
}
