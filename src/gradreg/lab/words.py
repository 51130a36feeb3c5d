"""Numbers and verdicts in words: the same in tables, on pages and in figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gradreg.lab import stats
from gradreg.lab.metric import ACCURACY, Metric

Row = Mapping[str, Any]
SYMBOLS = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "level": "b", "lookahead": "ρ", "average": "last"}


def ranged(interval: Any, digits: int = 3, sign: str = "", form: str = "{} ({} to {})") -> str:
    """A mean, or a median, with its interval; alone where there is none.

    Example:
        >>> ranged({"mean": 0.043, "low": 0.031, "high": 0.055}), ranged(stats.Interval(1, math.nan, math.nan), 1)
        ('0.043 (0.031 to 0.055)', '1.0')
        >>> ranged({"median": 2.4, "low": 1.8, "high": 3.0}, 1, "+", BRACKETS)
        '+2.4 [+1.8, +3.0]'
    """
    if interval is None:
        return "–"
    row = interval if isinstance(interval, Mapping) else asdict(interval)
    middle = row["mean"] if "mean" in row else row["median"]
    shown = [number(value, digits, sign) for value in (middle, row["low"], row["high"])]
    return shown[0] if math.isnan(row["low"]) else form.format(*shown)


BRACKETS = "{} [{}, {}]"


def plus_minus(interval: Any, digits: int = 1, sign: str = "") -> str:
    """`96.3 ± 0.4`; the mean alone where there is no interval."""
    if interval is None:
        return "–"
    row = interval if isinstance(interval, Mapping) else asdict(interval)
    margin = (row["high"] - row["low"]) / 2
    return number(row["mean"], digits, sign) + ("" if math.isnan(margin) else f" ± {margin:.{digits}f}")


def mean(interval: Row | None, digits: int = 3) -> str:
    return "–" if interval is None else number(interval["mean"], digits)


def number(value: float, digits: int = 1, sign: str = "") -> str:
    """With a minus that is one, and no negative zero."""
    return f"{value + 0.0:{sign}.{digits}f}".replace("-", "−")


def percent(share: Any) -> str:
    """`96.3 ± 0.4`, of an interval of shares; empty where there is none."""
    return "" if share is None else plus_minus(_times_100(share))


def points(share: Any) -> str:
    """`+1.2 (+0.3 to +2.1)`, percentage points; empty where there is no interval."""
    return "" if share is None else ranged(_times_100(share), 1, "+")


def _times_100(share: Any) -> dict[str, float]:
    return {key: 100 * value for key, value in (share if isinstance(share, Mapping) else asdict(share)).items()}


def accuracy(row: Row) -> str:
    return percent(row["accuracy"])


def difference(row: Row) -> str:
    """Empty for SGD itself."""
    return points(row.get("difference"))


def verdict_words(row: Row) -> str:
    """The verdict in a narrow column that is headed `difference`."""
    verdict = row.get("verdict", "")
    text = "none shown" if verdict == stats.UNDECIDED else verdict
    return f"{text}\n{row['diverged']} diverged".strip() if row["diverged"] else text


def settings(row: Row) -> str:
    """`γ 0.1, ε 1`, in the letters of the paper."""
    return ", ".join(f"{SYMBOLS.get(key, key)} {value:g}" for key, value in row["settings"].items())


def sentence(rows: Sequence[Row], metric: Metric = ACCURACY) -> str:
    """What the verdicts say, in words; the first row is SGD."""
    sgd = metric.written(rows[0][metric.key]["mean"])
    parts = []
    for verdict, words in ((stats.BETTER, "better than SGD"), (stats.WORSE, "worse than SGD")):
        names = [f"{r['name']} ({metric.gap(r['difference']['mean'])})" for r in rows[1:] if r["verdict"] == verdict]
        parts += [f"{words}: {', '.join(names)}"] if names else []
    if not parts:
        return f"No method is shown to differ from SGD ({sgd})."
    rest = [r["name"] for r in rows[1:] if r["verdict"] == stats.UNDECIDED]
    parts += [f"no difference shown: {', '.join(rest)}"] if rest else []
    text = "; ".join(parts)
    over = f"{metric.gap_unit} over" if metric.is_share else f"{metric.name} minus SGD's"
    return f"{text[0].upper()}{text[1:]} ({over} {sgd})."


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(count: int) -> str:
    return "" if count == 1 else "s"


def score(interval: Any, metric: Metric) -> str:
    """`77.3 ± 0.8%`, in the unit of the score; the mean alone where there is no interval."""
    if interval is None:
        return "–"
    if metric.is_share:
        return percent(interval) + metric.unit
    row = interval if isinstance(interval, Mapping) else asdict(interval)
    half = (row["high"] - row["low"]) / 2
    return metric.shown(row["mean"]) if math.isnan(half) else plus_minus(row, _digits(half))


def gap(difference: Any, metric: Metric) -> str:
    """`−0.011 (−0.015 to −0.007)`; in points of a share; empty where there is none."""
    if difference is None or metric.is_share:
        return points(difference)
    row = difference if isinstance(difference, Mapping) else asdict(difference)
    half = (row["high"] - row["low"]) / 2
    return metric.gap(row["mean"]) if math.isnan(half) else ranged(row, _digits(half), "+")


def _digits(half: float) -> int:
    """After the point: two of half an interval's own."""
    return min(max(1 - math.floor(math.log10(half)), 0), 8) if half > 0 else 4
