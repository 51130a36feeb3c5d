"""Numbers and verdicts in words: the same in tables, on pages and in figures. Functions of rows of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradreg.lab import stats

Row = Mapping[str, Any]
SYMBOLS = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "level": "b"}


def ranged(interval: Row | None, digits: int = 3) -> str:
    """`0.043 (0.031 to 0.055)`."""
    if interval is None:
        return "–"
    return f"{interval['mean']:.{digits}f} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"


def stacked(interval: Row | None, digits: int = 3) -> str:
    """The mean, and the interval below it."""
    return ranged(interval, digits).replace(" (", "\n").rstrip(")")


def mean(interval: Row | None, digits: int = 3) -> str:
    return "–" if interval is None else f"{interval['mean']:.{digits}f}"


def accuracy(row: Row) -> str:
    """`96.3 ± 0.4`, in percent."""
    interval = row["accuracy"]
    return f"{100 * interval['mean']:.1f} ± {50 * (interval['high'] - interval['low']):.1f}"


def difference(row: Row) -> str:
    """`+1.2 (+0.3 to +2.1)`, in percentage points; empty for SGD itself."""
    if "difference" not in row:
        return ""
    mean, low, high = (100 * row["difference"][key] + 0.0 for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")


def verdict_words(row: Row) -> str:
    """The verdict in a narrow column that is headed `difference`."""
    verdict = row.get("verdict", "")
    text = "none shown" if verdict == stats.UNDECIDED else verdict
    return f"{text}\n{row['diverged']} diverged".strip() if row["diverged"] else text


def diverged(row: Row) -> str:
    return f", {row['diverged']} diverged" if row["diverged"] else ""


def settings(row: Row) -> str:
    """`γ 0.1, ε 1`, in the letters of the paper."""
    return ", ".join(f"{SYMBOLS.get(key, key)} {value:g}" for key, value in row["settings"].items())


def sentence(rows: Sequence[Row]) -> str:
    """What the verdicts say, in words; the first row is SGD."""
    sgd = rows[0]["accuracy"]["mean"]
    parts = []
    for verdict, words in ((stats.BETTER, "better than SGD"), (stats.WORSE, "worse than SGD")):
        names = [f"{r['name']} ({signed(r['difference']['mean'])})" for r in rows[1:] if r["verdict"] == verdict]
        parts += [f"{words}: {', '.join(names)}"] if names else []
    if not parts:
        return f"No method is shown to differ from SGD ({100 * sgd:.1f}%)."
    rest = [r["name"] for r in rows[1:] if r["verdict"] == stats.UNDECIDED]
    parts += [f"no difference shown: {', '.join(rest)}"] if rest else []
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]} (points over {100 * sgd:.1f}%)."


def signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(count: int) -> str:
    return "" if count == 1 else "s"
