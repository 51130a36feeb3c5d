r"""What a claim is, and the rules for its verdicts: stated with the claim, before anything is measured.

Of every sub-claim one number is measured for each seed, oriented so that larger is what the paper says. No
correction for multiplicity goes into a verdict: each interval has 95 % for itself. `holm` says which verdicts would
stand if all of them were to be right at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradreg.lab import stats
from gradreg.lab.tables import Table

HOLDS, FAILS, UNDECIDED = "holds", "does not hold here", "undecided"
LEAST_SEEDS = 2

Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A number and what it says about a sub-claim."""

    number: float
    low: float | None
    high: float | None
    num_seeds: int
    """Those that gave a number."""
    verdict: str
    p: float | None = None
    """Two-sided, of Student's t test against the reference; of an identity there is none."""


@dataclass(frozen=True)
class Above:
    """Holds if the whole 95 % interval over seeds lies above the reference, fails if it lies below it.

    Example:
        >>> Above().judge([1.0, 2.0, 3.0]).verdict  # −0.48 to 4.48
        'undecided'
        >>> Above().judge([2.0, 2.5, 3.0]).verdict, Above(4.0).judge([2.0, 2.5, 3.0]).verdict
        ('holds', 'does not hold here')
    """

    reference: float = 0.0

    def __str__(self) -> str:
        return f"95 % interval above {self.reference:g}"

    def judge(self, values: Sequence[float]) -> Found:
        """A seed without a finite number is left out, and counted.

        Raises:
            ValueError: fewer than two seeds.
        """
        _check(values)
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) < LEAST_SEEDS:
            return Found(math.nan, None, None, len(finite), UNDECIDED)
        interval = stats.mean_interval(finite)
        verdict = HOLDS if interval.low > self.reference else FAILS if interval.high < self.reference else UNDECIDED
        p = _p_value(interval, self.reference, len(finite))
        return Found(interval.mean, interval.low, interval.high, len(finite), verdict, p)


@dataclass(frozen=True)
class AtMost:
    """An identity: holds if no seed is farther from it than `bound`, rounding with room to spare.

    Example:
        >>> AtMost(1e-12).judge([1e-16, 2e-16]).verdict, AtMost(1e-12).judge([1e-16, 2e-6]).verdict
        ('holds', 'does not hold here')
    """

    bound: float

    def __str__(self) -> str:
        return f"largest of all seeds at most {self.bound:g}"

    def judge(self, values: Sequence[float]) -> Found:
        _check(values)
        worst = max(values) if all(math.isfinite(value) for value in values) else math.nan
        return Found(worst, None, None, len(values), HOLDS if worst <= self.bound else FAILS)


def _check(values: Sequence[float]) -> None:
    if len(values) < LEAST_SEEDS:
        raise ValueError(f"a verdict needs at least {LEAST_SEEDS} seeds, got {len(values)}.")


def _p_value(interval: stats.Interval, reference: float, n: int) -> float:
    from scipy.stats import t

    if interval.half_width == 0:
        return 0.0 if interval.mean != reference else 1.0
    standard_error = interval.half_width / float(t.ppf((1 + stats.LEVEL) / 2, n - 1))
    return 2 * float(t.sf(abs(interval.mean - reference) / standard_error, n - 1))


def holm(p_values: Sequence[float], level: float = 1 - stats.LEVEL) -> list[bool]:
    """Which hypotheses fall when all of them are tested at once: the k-th smallest p of n must be below level/(n − k).

    References:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics, 1979.

    Example:
        >>> holm([0.001, 0.04, 0.03])  # 0.001 ≤ 0.05/3, 0.03 > 0.05/2: there it ends
        [True, False, False]
    """
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    falls = [False] * len(p_values)
    for rank, k in enumerate(order):
        if p_values[k] > level / (len(p_values) - rank):
            break
        falls[k] = True
    return falls


@dataclass(frozen=True)
class Subclaim:
    """One thing that the claim says about one setting."""

    key: str
    """As in the tables: `b1, clean labels`."""
    says: str
    number: str
    """What is measured for each seed, with its unit."""
    rule: Above | AtMost
    digits: int = 2
    """After the point."""


@dataclass(frozen=True)
class Measured:
    """What a claim's code found."""

    values: dict[str, list[float]]
    """For each sub-claim, by its key, a number for each seed. A sub-claim that is missing was not measured."""
    settings: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    """More to see than the verdict, on the page."""
    data: Row = field(default_factory=dict)
    """What the figure is drawn from."""


@dataclass(frozen=True)
class Plan:
    """What `gradreg claims` runs."""

    letters: tuple[str, ...]
    seeds: tuple[int, ...]
    is_quick: bool = False
    """Smaller settings, and not all of them."""
    workers: int = 2

    @property
    def command(self) -> str:
        from gradreg.studies.claims import CLAIMS

        quick = " --quick" if self.is_quick else ""
        only = "" if self.letters == tuple(CLAIMS) else f" --only {' '.join(self.letters)}"
        return f"gradreg claims{quick}{only} --seed {self.seeds[0]} --seeds {len(self.seeds)}"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as code."""

    letter: str
    title: str
    says: str
    """What the paper says, in one sentence."""
    where: str
    """In the paper."""
    how: str
    """What is measured here."""
    differs: str
    """What is different from the paper."""
    subclaims: tuple[Subclaim, ...]
    measure: Callable[[Plan, Path], Measured]
    """The folder takes whatever is to be kept of single runs."""
    draw: Callable[[Row], str] | None = None
    """An SVG from the `data` that was measured, and what it shows."""
    shows: str = ""
