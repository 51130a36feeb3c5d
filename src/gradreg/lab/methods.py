"""The methods that are compared, by name: what each needs to be told, and what it can be combined with.

Nothing here imports torch; attach.py puts a method on a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradreg.lab.folder import BadInput

SIGNS = {"MSAM": -1, "Previous": 1, "Previous-down": -1}
"""The methods that are one displaced pass, and the side of their direction to which they go."""
ONE_PASS = (*SIGNS, "Split")
"""They have no gradient of the whole batch at θ, beside which a penalty could be held."""
ASCENTS = {
    **dict.fromkeys(("F-GR", "B-GR", "Central"), ("gradient", "normalized", "adaptive")),
    "Split": ("gradient", "normalized", "momentum", "previous"),
}
"""The methods whose displacement has a direction of one's choice."""
OWN_ASCENT = {"normalized": ["SAM"], "adaptive": ["ASAM"], "momentum": ["MSAM"], "previous": ["Previous"]}
"""And those that have that one."""
STEPS = ("period", "start", "probability")
"""The fields that say in which steps there is a penalty."""
PASSES = ("fraction", "lookahead", "threshold", *STEPS)
"""All fields that make a penalty cheaper or move it."""

CHEAP = {"fraction": 0.25, "period": 4}
"""What makes F-GR `gradreg.cheap`."""


@dataclass(frozen=True)
class Method:
    """A row of the tables."""

    name: str
    about: str
    """One line for the reports."""
    needs: tuple[str, ...]
    """The settings of a configuration that it reads."""
    takes: tuple[str, ...] = ()
    """Of `PASSES`, what it can be combined with."""

    @property
    def follows_ratio(self) -> bool:
        """Whether `ratio` may stand in the place of γ: it is read off from two gradients."""
        return {"gamma", "epsilon"} <= set(self.needs) and self.name not in ONE_PASS


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("SGD", "plain training", ()),
        Method("F-GR", "forward difference of the gradient", ("gamma", "epsilon"), PASSES),
        Method("B-GR", "backward difference of the gradient", ("gamma", "epsilon"), PASSES),
        Method("Central", "centered difference of the gradient", ("gamma", "epsilon"), PASSES),
        Method("DB", "the exact penalty by double backpropagation", ("gamma",), STEPS),
        Method("SAM", "gradient at distance ρ uphill", ("rho",), PASSES),
        Method("ASAM", "gradient at a distance uphill that scales with the weights", ("rho",), PASSES),
        Method("MSAM", "one pass: gradient at distance ρ along the momentum", ("rho",), STEPS),
        Method("Previous", "one pass: gradient at distance ρ up the previous gradient", ("rho",), STEPS),
        Method("Previous-down", "one pass: the same down the previous gradient", ("rho",), STEPS),
        Method("Split", "one pass: a share γ/ε of the batch displaced", ("gamma", "epsilon"), STEPS),
        Method("Flooding", "loss pushed back up below a level", ("level",)),
    )
}


def check_together(config: Any) -> None:
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
    allowed = ASCENTS.get(config.method, ("gradient",))
    if config.ascent not in allowed:
        having = [key for key, ascents in ASCENTS.items() if config.ascent in ascents] + OWN_ASCENT[config.ascent]
        raise BadInput(
            f"ascent must be {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)} with method {config.method}, "
            f"got {config.ascent!a}; methods with it: {', '.join(having)}."
        )
    if config.threshold is not None and config.fraction < 1:
        raise BadInput("threshold must be left out with a fraction of the batch: it tests the gradient of all of it.")
    if config.optimizer != "sgd" and config.momentum != 0.9:
        raise BadInput(
            f"momentum must be left out with optimizer {config.optimizer}, got '{config.momentum:g}'; sgd has it."
        )
    needs_momentum = config.method == "MSAM" or config.lookahead or config.ascent == "momentum"
    if needs_momentum and config.optimizer == "sgd" and config.momentum == 0:
        raise BadInput("momentum must be above 0 for a direction along it, got '0'.")


def _refuse(config: Any, name: str, default: float | None, takes: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value != default and name not in takes:
        with_it = ", ".join(key for key, method in METHODS.items() if name in method.takes)
        raise BadInput(
            f"{name} must be left out with method {config.method}, got '{value:g}'; methods with it: {with_it}."
        )
