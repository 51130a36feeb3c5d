"""The methods and strengths that `gradreg dln` compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
METHOD = {"forward": "F-GR", "backward": "B-GR", "central": "Central", "exact": "DB"}
"""The name of each scheme in tables and figures."""


def point_of(setting: Mapping[str, Any], point: Point) -> Mapping[str, Any]:
    """The row of a point in the results of a setting."""
    return next(row for row in setting["points"] if Point(row["scheme"], row["gamma"], row["epsilon"]) == point)


def cell_of(found: Mapping[str, Any], shift: float, alpha: float, ratio: float) -> Mapping[str, Any]:
    """A cell of the map."""
    wanted = (shift, alpha, ratio)
    return next(cell for cell in found["cells"] if (cell["shift"], cell["alpha"], cell["ratio"]) == wanted)
