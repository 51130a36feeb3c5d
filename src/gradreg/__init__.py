"""Gradient regularization for any PyTorch training loop: minimize L(θ) + (γ/2)‖∇L(θ)‖².

Importing this reads no other module: a name is looked up where it is made when it is used first (PEP 562), so that a
command which needs no PyTorch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradreg import functional
    from gradreg.functional import Flooding
    from gradreg.training import (
        Ahead,
        Fraction,
        GradientRegularizer,
        LargeGradients,
        Momentum,
        Previous,
        RegularizedOptimizer,
        Split,
        TargetRatio,
        asam,
        bernoulli,
        calibrated_gamma,
        cheap,
        every,
        gnp,
        late,
        msam,
        sam,
        warmup,
    )

__version__ = "0.2.0"

__all__ = [
    "Ahead",
    "Flooding",
    "Fraction",
    "GradientRegularizer",
    "LargeGradients",
    "Momentum",
    "Previous",
    "RegularizedOptimizer",
    "Split",
    "TargetRatio",
    "asam",
    "bernoulli",
    "calibrated_gamma",
    "cheap",
    "every",
    "functional",
    "gnp",
    "late",
    "msam",
    "sam",
    "warmup",
]

_ROOMS = ("functional", "training")
"""Modules that are attributes of the package, whether or not something has imported them."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"gradreg.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'gradreg' has no attribute {name!r}")
    home = "gradreg.functional" if name == "Flooding" else "gradreg.training"
    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
