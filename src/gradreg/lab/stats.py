"""Means over seeds, with 95% intervals of Student's t; methods are compared seed by seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

LEVEL = 0.95
RESAMPLES = 2000
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
    if max(map(abs, values)) > 1e150:  # whose square is none
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    margin = float(t.ppf((1 + LEVEL) / 2, n - 1)) * math.sqrt(variance / n)
    return Interval(mean, mean - margin, mean + margin)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The interval of `values − baseline`, seed by seed: what both share, such as the random labels, cancels."""
    if len(values) != len(baseline):
        raise ValueError(f"pairs need as many values as baselines, got {len(values)} and {len(baseline)}.")
    return mean_interval([value - base for value, base in zip(values, baseline)])


def verdict(difference: Interval, margin: float = 0.0) -> str:
    """`better` or `worse` where the whole interval lies further from 0 than the margin.

    Example:
        >>> verdict(Interval(0.5, 0.1, 0.9)), verdict(Interval(0.5, -0.1, 1.1)), verdict(Interval(0.5, 0.1, 0.9), 0.2)
        ('better', 'no difference shown', 'no difference shown')
    """
    if difference.low > margin:
        return BETTER
    return WORSE if difference.high < -margin else UNDECIDED


def one_row(counts: Iterable[float | None]) -> float:
    """The margin of a difference in accuracy: one of the rows that were scored; 0 where their number is not known.

    Rounding, which differs between processors, moves single rows to and fro: what is within one says nothing.

    Example:
        >>> one_row([500, None, 1000])
        0.002
    """
    known = [count for count in counts if count is not None and count > 0]
    return 1 / min(known) if known else 0.0


@dataclass(frozen=True)
class Ratio:
    """A median over rounds, and its 95% interval by bootstrap."""

    median: float
    low: float
    high: float


def median_ratio(values: Sequence[float], base: Sequence[float], processes: int = 1) -> Ratio:
    """Of pairs, round by round; with several processes, each of as many rounds, these are drawn first.

    Example:
        >>> median_ratio([2.0, 2.0, 4.2, 2.0], [1.0, 1.0, 2.0, 1.0])
        Ratio(median=2.0, low=2.0, high=2.1)
        >>> median_ratio([2.0, 2.0, 4.2, 4.2], [1.0, 1.0, 2.0, 2.0], processes=2)
        Ratio(median=2.05, low=2.0, high=2.1)
    """
    ratios = [a / b for a, b in zip(values, base)]
    rounds = len(ratios) // processes
    blocks = [ratios[k * rounds : (k + 1) * rounds] for k in range(processes)]
    draw = random.Random(0)

    def resample() -> list[float]:
        return [ratio for block in draw.choices(blocks, k=processes) for ratio in draw.choices(block, k=rounds)]

    medians = sorted(median(resample()) for _ in range(RESAMPLES))
    return Ratio(median(ratios), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)])
