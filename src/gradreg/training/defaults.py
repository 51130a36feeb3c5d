"""What is used where no number is given. Chosen by measurement: `python benchmarks/defaults.py`, docs/choosing.md."""

from __future__ import annotations

from gradreg.functional.ascents import Adaptive, Gradient, Normalized
from gradreg.training.directions import Choice, resolve
from gradreg.training.target import TargetRatio

EPSILON = {Gradient: 0.1, Normalized: 0.05, Adaptive: 0.5}


def default_gamma() -> TargetRatio:
    """γ where none is given."""
    return TargetRatio()


def default_epsilon(ascent: Choice) -> float:
    """ε where none is given.

    Raises:
        ValueError: an ascent whose scale is not known here.
    """
    found = EPSILON.get(type(resolve(ascent)))
    if found is None:
        raise ValueError(
            f"epsilon must be given with ascent={ascent!r}: a length along it has a scale of its own. Without a number "
            'use ascent="gradient", "normalized" or "adaptive".'
        )
    return found
