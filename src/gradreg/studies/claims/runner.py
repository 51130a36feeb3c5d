"""Goes through the claims: measures, judges, keeps each as it is finished, and writes the page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradreg.lab.about import provenance
from gradreg.lab.folder import append_line, write_json
from gradreg.lab.page import publish, tell
from gradreg.lab.words import BRACKETS, ranged
from gradreg.studies.claims import CLAIMS
from gradreg.studies.claims.claim import UNDECIDED, Above, Claim, Found, Measured, Plan, Row, Subclaim, holm
from gradreg.studies.claims.page import page, told

DEFAULT_SEEDS, QUICK_SEEDS = 10, 4
PAGE = "claims.md"


def run_claims(plan: Plan, folder: Path, write: Path | None = None) -> Row:
    """Measure, write the folder and the page, print the table; return what results.json holds."""
    started = time.perf_counter()
    about = {
        "name": folder.name,
        **provenance(plan.command, plan.workers),
        "is_quick": plan.is_quick,
        "seeds": list(plan.seeds),
    }
    write_json(folder / "config.json", about)
    claims = []
    for letter in plan.letters:
        claim = CLAIMS[letter]
        since = time.perf_counter()
        measured = claim.measure(plan, folder)
        claims.append({**judged(claim, measured), "seconds": round(time.perf_counter() - since, 1)})
        append_line(folder / "claims.jsonl", claims[-1])
    results = {**about, "seconds": round(time.perf_counter() - started, 1), "claims": claims, **together(claims)}
    write_json(folder / "results.json", results)
    publish(page(results), folder, folder / PAGE, *([write] if write else []))
    tell(told(results), results, folder)
    return results


def judged(claim: Claim, measured: Measured) -> Row:
    """A claim with the numbers and verdicts of its sub-claims."""
    parts = [_part(sub, measured.values[sub.key]) for sub in claim.subclaims if sub.key in measured.values]
    words = {key: getattr(claim, key) for key in ("letter", "title", "says", "where", "how", "differs", "shows")}
    return {
        **words,
        "settings": measured.settings,
        "parts": parts,
        "not_measured": [sub.key for sub in claim.subclaims if sub.key not in measured.values],
        "tables": [asdict(table) for table in measured.tables],
        "data": measured.data,
    }


def _part(sub: Subclaim, values: Sequence[float]) -> Row:
    found = sub.rule.judge(values)
    return {
        "key": sub.key,
        "says": sub.says,
        "measured": sub.number,
        "rule": str(sub.rule),
        "reference": sub.rule.reference if isinstance(sub.rule, Above) else sub.rule.bound,
        "values": list(values),
        **asdict(found),
        "shown": shown(sub, found),
        "planned_seeds": len(values),
    }


def shown(sub: Subclaim, found: Found) -> str:
    """`+2.41 [+1.80, +3.02]`; of an identity `1.9e-13`."""
    if not isinstance(sub.rule, Above):
        return f"{found.number:.1e}".replace("-", "−") if found.number else "0"
    interval = None if found.low is None else {"mean": found.number, "low": found.low, "high": found.high}
    return ranged(interval, sub.digits, "" if sub.rule.reference else "+", BRACKETS)


def together(claims: Sequence[Row]) -> dict[str, Any]:
    """How many intervals there are, and which verdicts would not stand under Holm's correction over all of them."""
    tests = [part for claim in claims for part in claim["parts"] if part["p"] is not None]
    falls = holm([part["p"] for part in tests])
    lost = [p["key"] for p, falls_too in zip(tests, falls) if p["verdict"] != UNDECIDED and not falls_too]
    return {"num_intervals": len(tests), "lost_under_holm": lost}
