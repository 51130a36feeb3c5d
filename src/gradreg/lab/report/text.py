"""What the numbers of a study say, in sentences, and the best run as text to copy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradreg.lab import stats
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.report.plots import Grid, Offer, front
from gradreg.lab.report.studies import Point, Study, number, text
from gradreg.lab.words import SYMBOLS, gap, listed, plural, score, sentence

NOT_READ = "test rows not read"
NO_SCORE = "no score"
ONE_SEED = "one seed: undecided"


@dataclass(frozen=True)
class Comparison:
    """A row of the first table: the best point of a method."""

    method: str
    point: Point
    difference: stats.Interval | None
    verdict: str
    cost: float


def compare(study: Study, costs: dict[str, float]) -> list[Comparison]:
    """The test score minus SGD's over the seeds that both have; an interval needs two of them."""
    baseline = study.best.get("SGD")
    rows = []
    for method, point in study.best.items():
        difference, verdict = None, ""
        if point.test is None:
            verdict = NO_SCORE if point.is_tested else NOT_READ
        elif baseline is not None and method != "SGD":
            difference, verdict = _difference(point, baseline, study.metric)
        rows.append(Comparison(method, point, difference, verdict, costs.get(method, math.nan)))
    return rows


def _difference(point: Point, baseline: Point, metric: Metric) -> tuple[stats.Interval | None, str]:
    if baseline.is_tested and baseline.test is None:
        return None, f"{NO_SCORE} of SGD"
    mine, sgd = (
        {json.dumps(run.seed): run.test for run in p.runs if math.isfinite(run.test)} for p in (point, baseline)
    )
    shared = [seed for seed in mine if seed in sgd]
    if not shared:
        return None, "no seed in common with SGD"
    if len(shared) == 1:
        apart = mine[shared[0]] - sgd[shared[0]]
        return stats.Interval(apart, math.nan, math.nan), ONE_SEED
    found = stats.paired_difference([mine[s] for s in shared], [sgd[s] for s in shared])
    scored = (run.num_scored for p in (point, baseline) for run in p.runs if math.isfinite(run.test))
    return found, metric.verdict(found, scored)


def in_column(part: str, metric: Metric) -> str:
    """The heading of a column of scores: `test, %`, or `test rmse`."""
    named = part if metric == ACCURACY else f"{part} {metric.name}"
    return f"{named}, {metric.unit}" if metric.unit else named


def shown(interval: stats.Interval | None, metric: Metric) -> str:
    """In such a column."""
    return "" if interval is None else score(interval, metric).removesuffix(metric.unit)


def _reached(interval: stats.Interval, metric: Metric) -> str:
    """In a sentence, where the unit tells what it is, or else its name."""
    return score(interval, metric) if metric.unit else f"{metric.name} {score(interval, metric)}"


def headline(study: Study, rows: Sequence[Comparison]) -> str:
    """The verdict on the best method, in one line."""
    best, metric = study.winner, study.metric
    row = next(r for r in rows if r.method == best.method)
    if best.test is None and best.validation is None:
        return f"No method has a {metric.name} of all its runs" if best.is_tested else "No run has been scored yet"
    if best.test is None:
        why = "not all of its test runs have a score" if best.is_tested else "the test rows were not read"
        return f"{best.method} leads on validation rows; {why}"
    if "SGD" not in study.best:
        return f"{best.method} reaches {_reached(best.test, metric)} on test rows; there is no SGD to compare with"
    if best.method == "SGD":
        others = "Nothing was compared with SGD" if len(study.methods) == 1 else "No method is ahead of SGD"
        return others if len(study.methods) == 1 else f"{others} on validation rows"
    if row.verdict == stats.BETTER and row.difference:
        amount = metric.gap(abs(row.difference.mean)).removeprefix("+")
        of = "points of test" if metric.is_share else "in test"
        return f"{best.method} is better than {_sgd(study)} by {amount} {of} {metric.name}"
    if row.verdict == stats.WORSE and row.difference:
        return f"{best.method}, best on validation rows, is worse than {_sgd(study)} on test rows"
    return f"No difference is shown between {best.method}, best on validation rows, and {_sgd(study)}"


def findings(study: Study, rows: Sequence[Comparison]) -> list[str]:
    """What was compared, on what, and what came out."""
    best, metric = study.winner, study.metric
    row = next(r for r in rows if r.method == best.method)
    count = len(study.points)
    said = [
        f"Compared on {task_words(study)}: {listed(study.methods)}, at {count} point{plural(count)} in "
        f"{len(study.runs)} run{plural(len(study.runs))}."
    ]
    named = f"{best.method} ({settings(study, best)})" if settings(study, best) else best.method
    if best.validation:
        said.append(f"Chosen on validation rows: {named}, with {_reached(best.validation, metric)} there.")
    if best.test:
        said.append(f"Test {metric.name} of {best.method}: {score(best.test, metric)}, {seeds_of(best.test, best)}.")
    if row.difference is not None:
        unit = f" {metric.gap_unit}" if metric.is_share else ""
        said.append(f"Difference to {_sgd(study)}, seed by seed: {gap(row.difference, metric)}{unit}: {row.verdict}.")
    judged = [r for r in rows if r.method == "SGD" or (r.difference and r.verdict in _VERDICTS)]
    if len(judged) > 1 and judged[0].method == "SGD" and judged[0].point.test:
        said.append(sentence([_as_row(r, metric) for r in judged], metric))
    if any(r.verdict == ONE_SEED for r in rows):
        said.append("With one seed there is no interval, and no difference can be shown.")
    return said


_VERDICTS = (stats.BETTER, stats.WORSE, stats.UNDECIDED)


def _as_row(row: Comparison, metric: Metric) -> dict[str, Any]:
    tested: dict[str, Any] = {"name": row.method, metric.key: asdict(row.point.test)} if row.point.test else {}
    return tested | ({"difference": asdict(row.difference), "verdict": row.verdict} if row.difference else {})


def _sgd(study: Study) -> str:
    return "tuned SGD" if sum(point.method == "SGD" for point in study.points) > 1 else "SGD"


def heat_sentence(grid: Grid, sgd: float | None) -> str:
    """Where the best cell is, whether it lies on an edge, and how many are ahead of SGD."""
    metric = grid.metric
    means = {at: cell.mean for at, cell in grid.cells.items() if math.isfinite(cell.mean)}
    if grid.best is None:
        return f"No cell has a validation {metric.name}."
    row, column = grid.best
    where = [
        f"{label} {value}"
        for label, value in ((grid.row_label, grid.rows[row]), (grid.column_label, grid.columns[column]))
        if label
    ]
    said = f"Best at {', '.join(where)} ({metric.written(means[grid.best])})"
    edges = [
        f"the {'smallest' if k == 0 else 'largest'} {label}"
        for label, k, count in ((grid.row_label, row, len(grid.rows)), (grid.column_label, column, len(grid.columns)))
        if label and count > 1 and k in (0, count - 1)
    ]
    said += f", at {' and '.join(edges)}: the best may lie beyond" if edges else ""
    if sgd is not None:
        ahead = sum(metric.worth(mean) > metric.worth(sgd) for mean in means.values())
        side = "above" if metric.higher_is_better else "below"
        said += f"; {ahead} of {len(means)} {side} SGD's {metric.written(sgd)}"
    diverged = sum(cell.num_diverged > 0 for cell in grid.cells.values())
    return said + (f"; {diverged} with runs that diverged." if diverged else ".")


def curve_sentence(ends: dict[str, float], written: Callable[[float], str]) -> str:
    """Who ends lowest and highest; nothing where one method is alone."""
    ends = {method: value for method, value in ends.items() if math.isfinite(value)}
    if not ends:
        return ""
    low, high = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    lowest, highest = written(ends[low]), written(ends[high])
    if len(ends) == 1:
        return f"Ends at {lowest} ({low})."
    if lowest == highest:
        return f"All end at {lowest}."
    return f"Ends lowest with {low} ({lowest}), highest with {high} ({highest})."


def short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""


def cost_sentence(offers: Sequence[Offer], metric: Metric) -> str:
    best = front(offers, metric)
    rest = [offer.method for offer in offers if offer not in best]
    said = "On the front: " + ", ".join(f"{o.method} ({o.cost:.2f}×, {metric.written(o.mean)})" for o in best) + "."
    if rest:
        verb = "is" if len(rest) == 1 else "are"
        much = "much" if metric.higher_is_better else "low"
        said += f" {listed(rest)} {verb} not: another method reaches as {much} for no more."
    way = "up" if metric.higher_is_better else "down"
    return said + f" The front goes by the means; whether a step {way} is more than chance, the verdicts above say."


def task_words(study: Study) -> str:
    """Data and model, or the reference of a task of the user's own."""
    task = study.task
    epochs = [f"{text(task['epochs'])} epochs"] if task.get("epochs") is not None else []
    if task.get("file") is not None:
        return ", ".join([text(task["file"]), *epochs])
    labels = number(task.get("random_labels"))
    words = [
        text(task.get("data")),
        text(task.get("model")).upper(),
        f"{labels:.0%} random labels" if labels > 0 else "clean labels",
    ]
    words += [
        f"{word} {text(task[key])}"
        for key, word in (("depth", "depth"), ("width", "width"))
        if task.get(key) is not None
    ]
    words += [f"{text(task['num_train'])} training rows"] if task.get("num_train") is not None else []
    return ", ".join(word for word in [*words, *epochs] if word)


def settings(study: Study, point: Point) -> str:
    """`γ 0.1, ε 1, learning rate 0.05`: what distinguishes the point."""
    return ", ".join(
        f"{words(name)} {text(value)}" for name in study.columns if (value := point.config.get(name)) is not None
    )


def words(name: str) -> str:
    return SYMBOLS.get(name, name.replace("_", " "))


def seeds_of(interval: stats.Interval, point: Point) -> str:
    count = len({json.dumps(run.seed) for run in point.runs if math.isfinite(run.test)})
    return f"95% interval over {count} seeds" if math.isfinite(interval.low) else "one seed"
