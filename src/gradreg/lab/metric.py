"""What a score is: its name, which way is better, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradreg.lab import stats

NO_RESULT = "no result"
"""The verdict where there is none."""


@dataclass(frozen=True)
class Metric:
    """A number for each run.

    Example:
        >>> ACCURACY.shown(0.7734), ACCURACY.gap(0.0123), Metric("rmse", higher_is_better=False).shown(0.07734)
        ('77.3', '+1.2', '0.0773')
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    is_share: bool = False
    """From 0 to 1, and written in percent."""

    @property
    def key(self) -> str:
        """In the files: `validation_accuracy`, or `validation_score` where the score is the user's."""
        return "accuracy" if self == ACCURACY else "score"

    @property
    def unit(self) -> str:
        """Of the numbers that are shown."""
        return "%" if self.is_share else ""

    @property
    def scale(self) -> float:
        """From a number to what is shown."""
        return 100 if self.is_share else 1

    @property
    def gap_unit(self) -> str:
        return "points" if self.is_share else self.name

    def worth(self, value: float) -> float:
        """Larger is better; what is not finite is worst."""
        if not math.isfinite(value):
            return -math.inf
        return value if self.higher_is_better else -value

    def rank(self, value: float) -> float:
        """As `worth`, but finite, for means: a share that is missing is that of the worst."""
        if not math.isfinite(value):
            return 0.0 if self.is_share else -1e30
        return self.worth(value)

    def verdict(self, difference: stats.Interval, counts: Iterable[float | None] = ()) -> str:
        """Of a paired difference: better is better, whichever way the score goes. `counts`: rows of each score."""
        if not self.higher_is_better:
            difference = stats.Interval(-difference.mean, -difference.high, -difference.low)
        return stats.verdict(difference, stats.one_row(counts) if self.is_share else 0.0)

    def against(
        self, scores: Sequence[float], baseline: Sequence[float], counts: Iterable[float | None] = ()
    ) -> dict[str, Any]:
        """`difference` and `verdict` of a row of results, paired by seed; none where a score is no number."""
        if not all(map(math.isfinite, [*scores, *baseline])):
            return {"difference": None, "verdict": NO_RESULT}
        difference = stats.paired_difference(scores, baseline)
        return {"difference": asdict(difference), "verdict": self.verdict(difference, counts)}

    def shown(self, value: float, digits: int = 1) -> str:
        if self.is_share:
            text = f"{100 * value:.{digits}f}"
        else:
            text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value + 0.0:#.3g}".rstrip(".")
        return text.replace("-", "−")

    def written(self, value: float) -> str:
        """With its unit."""
        return f"{self.shown(value)}{self.unit}"

    def gap(self, value: float) -> str:
        """With its sign."""
        text = f"{100 * value + 0.0:+.1f}" if self.is_share else f"{value + 0.0:+.2g}"
        return text.replace("-", "−")

    def as_row(self) -> dict[str, Any]:
        return {"name": self.name, "higher_is_better": self.higher_is_better, "is_share": self.is_share}

    @classmethod
    def from_row(cls, row: Mapping[str, Any] | None) -> Metric:
        """Of a file; of one without it, accuracy."""
        if not isinstance(row, Mapping):
            return ACCURACY
        return cls(str(row.get("name")), bool(row.get("higher_is_better")), bool(row.get("is_share")))


ACCURACY = Metric("accuracy", is_share=True)
