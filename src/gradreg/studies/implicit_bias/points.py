"""The methods and strengths that `gradreg dln` compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A method at a strength, in units of the setting's γ."""

    scheme: str
    gamma: float
    epsilon: float | None


PLAIN, EXACT = Point("exact", 0.0, None), Point("exact", 1.0, None)
LARGE = Point("forward", 1.0, 1.0)  # ε = γ
RATIOS = (0.125, 0.25, 0.5, 1.0, 2.0)
OVER_EPSILON = [Point(scheme, 1.0, r) for scheme in ("forward", "backward", "central") for r in RATIOS]
OVER_GAMMA = [
    Point(s, r, 1.0 if s != "exact" else None) for s in ("forward", "backward", "central", "exact") for r in RATIOS
]
POINTS = list(dict.fromkeys([PLAIN, EXACT, *OVER_EPSILON, *OVER_GAMMA]))
TABLE = [PLAIN, Point("backward", 1.0, 1.0), EXACT, Point("central", 1.0, 1.0), Point("forward", 1.0, 0.125), LARGE]
