r"""What a mode keeps of the benefit: its share of what the full method gains over plain training.

$$\text{retention} = \frac{\bar a_\text{mode} - \bar a_\text{plain}}{\bar a_\text{full} - \bar a_\text{plain}}$$

Means run over seeds, which the three share: seed k of each has the same initialization, order and labels. So plain
training retains 0 and the full method 1, in any unit of the score a; a mode may lie outside of [0, 1]. A run that
diverged, NaN, has the score of guessing, `chance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradreg.lab.stats import LEVEL, Interval, paired_difference

NUM_RESAMPLES = 20_000
RESAMPLING_SEED = 0
_Scores = Sequence[float]


def gain(full: _Scores, plain: _Scores, chance: float) -> Interval:
    """What a method gains over plain training, seed by seed, with Student's interval.

    Args:
        full: a score for each seed, the larger the better; NaN where the run diverged.
        plain: those of plain training with the same seeds.
        chance: the score of guessing, in the same unit.

    Raises:
        ValueError: fewer than 2 seeds, or lists of different lengths.

    Example:
        >>> found = gain([78.0, math.nan, 80.0], [76.0, 12.0, 76.0], chance=10.0)  # +2, −2, +4
        >>> round(found.mean, 3), found.low < 0 < found.high
        (1.333, True)
    """
    full_, plain_ = _arrays(chance, full=full, plain=plain)
    return paired_difference(full_.tolist(), plain_.tolist())


def retention(
    mode: _Scores, full: _Scores, plain: _Scores, chance: float, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """The retention of a mode, with a 95 % interval by the percentile bootstrap.

    Seeds are drawn with replacement, the same for the three, so that numerator and denominator keep what they share;
    the draws are the same in every call. A draw in which the full method gains nothing has no retention: it counts as
    −∞ for the lower end and as +∞ for the upper one, so an end is infinite when more than 2.5 % of the draws are such.
    With few seeds a percentile bootstrap is somewhat too narrow.

    Args:
        mode: a score for each seed, the larger the better; NaN where the run diverged.
        full: those of the full method.
        plain: those of plain training.
        chance: the score of guessing, in the same unit.
        num_resamples: draws.

    Raises:
        ValueError: fewer than 2 seeds, lists of different lengths, fewer than 1,000 draws, or a full method that gains
            nothing on average: there is nothing to retain.

    References:
        Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, §13.3.

    Example:
        >>> plain, full = [76.0, 77.0, 75.0, 76.0], [80.0, 80.0, 79.0, 81.0]  # + 4 on average
        >>> kept = retention([79.0, 79.5, 78.0, 79.5], full, plain, chance=10.0)  # + 3
        >>> kept.mean, 0.6 < kept.low < 0.75 < kept.high < 0.9
        (0.75, True)
        >>> retention(full, full, plain, chance=10.0)
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    mode_, full_, plain_ = _arrays(chance, mode=mode, full=full, plain=plain)
    if num_resamples < 1000:
        raise ValueError(f"num_resamples must be at least 1000 for a 95 % interval, got {num_resamples}.")
    kept, whole = mode_ - plain_, full_ - plain_
    if not whole.mean() > 0:
        raise ValueError(
            f"full must gain over plain on average, got {whole.mean():.4g}: there is no benefit here to retain a share "
            "of; report gain(mode, plain) instead."
        )
    drawn = np.random.default_rng(RESAMPLING_SEED).integers(len(whole), size=(num_resamples, len(whole)))
    kept_drawn, whole_drawn = kept[drawn].mean(1), whole[drawn].mean(1)
    is_defined = whole_drawn > 0
    ratio = kept_drawn / np.where(is_defined, whole_drawn, 1.0)
    tail = (1 - LEVEL) / 2
    # Order statistics, not interpolated: −∞ and +∞ have no value between them.
    low = np.quantile(np.where(is_defined, ratio, -np.inf), tail, method="lower")
    high = np.quantile(np.where(is_defined, ratio, np.inf), 1 - tail, method="higher")
    return Interval(float(kept.mean() / whole.mean()), float(low), float(high))


def _arrays(chance: float, **scores: _Scores) -> list[np.ndarray]:
    """The scores, with those of diverged runs replaced."""
    if not math.isfinite(chance):
        raise ValueError(f"chance must be a finite score, got {chance}: pass that of guessing, 1 / number of classes.")
    counts = {name: len(values) for name, values in scores.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"the methods must have a score for each of the same seeds, got {found}.")
    if min(counts.values()) < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {min(counts.values())}: run more of them.")
    arrays = [np.asarray(values, dtype=np.float64) for values in scores.values()]
    return [np.where(np.isfinite(array), array, chance) for array in arrays]
