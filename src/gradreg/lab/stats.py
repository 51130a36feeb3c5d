"""Means over seeds, with 95% intervals of Student's t; methods are compared seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    r"""$\bar x \pm t_{0.975,\,n-1} \, s/\sqrt n$.

    Example:
        >>> interval = mean_interval([1.0, 2.0, 3.0])  # s = 1, t = 4.303
        >>> round(interval.low, 3), round(interval.high, 3)
        (-0.484, 4.484)
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got {n}.")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    margin = float(t.ppf((1 + LEVEL) / 2, n - 1)) * math.sqrt(variance / n)
    return Interval(mean, mean - margin, mean + margin)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The interval of `values − baseline`, seed by seed: what both share, such as the random labels, cancels."""
    if len(values) != len(baseline):
        raise ValueError(f"pairs need as many values as baselines, got {len(values)} and {len(baseline)}.")
    return mean_interval([value - base for value, base in zip(values, baseline)])


def verdict(difference: Interval) -> str:
    """`better` or `worse` where the interval excludes 0.

    Example:
        >>> verdict(Interval(0.5, 0.1, 0.9)), verdict(Interval(0.5, -0.1, 1.1))
        ('better', 'no difference shown')
    """
    if difference.low > 0:
        return BETTER
    return WORSE if difference.high < 0 else UNDECIDED
