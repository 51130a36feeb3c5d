"""Names beside the points of a figure, where they cover least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Place = tuple[float, float]
_REACH = (9, 16, 26, 38, 52, 68)
"""Distances between a point and its name that are tried, in pixels of a figure of 100 dpi."""


def settle(figure: Figure) -> None:
    """Lay the figure out, once and for all: before, no place in it is known."""
    FigureCanvasAgg(figure).draw()
    figure.set_layout_engine("none")


def write_names(axes: Any, named: Sequence[tuple[str, Place, str]], lines: Sequence[tuple[Place, Place]]) -> None:
    """Names with their points and colors, in a figure that is settled; a line leads to what is not beside its point.

    `lines` are what is drawn besides the points, from end to end.
    """
    inside = axes.get_window_extent()
    spots = [axes.transData.transform(place) for _, place, _ in named]
    taken = [(Bbox.from_bounds(x - 7, y - 7, 14, 14), 1.0) for x, y in spots]
    taken += [(Bbox(axes.transData.transform(ends)).padded(1), 0.5) for ends in lines]
    for (name, _, color), (x, y) in sorted(zip(named, spots), key=lambda pair: -pair[1][1]):
        text = axes.text(0, 0, name, size=9, color=color, ha="left", va="center", transform=None, zorder=4)
        extent = text.get_window_extent()
        width, height = extent.width, 0.8 * extent.height
        places = []
        for reach, angle in product(_REACH, range(0, 360, 30)):
            toward = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = x + reach * toward[0] + (toward[0] - 1) / 2 * width
            middle = y + reach * toward[1] + toward[1] * height / 2
            box = Bbox.from_bounds(left - 1, middle - height / 2, width + 2, height)
            covered = sum(weight * _overlap(box, other) for other, weight in taken)
            places.append((1e3 * _misfit(box, inside) + covered + reach / 4, left, middle, reach, box))
        _, left, middle, reach, box = min(places, key=lambda place: place[0])
        text.set_transform(axes.transData)
        text.set_position(axes.transData.inverted().transform((left, middle)))
        if reach > _REACH[0]:
            end = (min(max(x, left), left + width), min(max(y, box.y0), box.y1))
            line = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*line.T, color=color, linewidth=0.6, alpha=0.7, zorder=2)
        taken.append((box, 2.0))


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return shared.width * shared.height if shared is not None else 0.0


def _misfit(box: Bbox, inside: Bbox) -> float:
    """How far a box sticks out."""
    return max(0, inside.x0 - box.x0, box.x1 - inside.x1) + max(0, inside.y0 - box.y0, box.y1 - inside.y1)
