"""What came out of a comparison: a row for each arm, verdicts, a sentence. Functions of what the study holds.

Verdicts come from the paired differences on test rows, seed by seed, oriented so that better is better whichever way
the score goes. A run that failed or diverged has no score; an arm with such a test run has no interval, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from gradreg.lab import stats
from gradreg.lab.comparison.arms import AHEAD, CHEAP, LONGER, Arm
from gradreg.lab.comparison.schedule import TEST, VALIDATION, ComparisonSchedule
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import Metric
from gradreg.lab.search import Point
from gradreg.lab.study.board import Board
from gradreg.lab.study.schedule import key_of
from gradreg.lab.words import SYMBOLS, gap, listed, plural, score

Row = dict[str, Any]
_SHORT = {**SYMBOLS, "learning_rate": "lr", "weight_decay": "wd", "lookahead": "ρ ahead", "ratio": "ratio"}


def arm_rows(schedule: ComparisonSchedule, board: Board, costs: Mapping[str, Row]) -> list[Row]:
    """Of a comparison that is finished, the baseline first."""
    progress, results, plan = schedule.progress(board), board.results, schedule.plan
    rows: list[Row] = []
    baseline: list[float] = []
    for a, arm in enumerate(schedule.arms):
        found = progress[arm.name]
        assert found.choice is not None
        name = found.name
        test = [results[key_of(name, seed, TEST)] for seed in plan.seeds]
        seeds = plan.final_seeds if plan.effort.search_epochs else (*plan.search_seeds, *plan.final_seeds)
        chosen = [r for seed in seeds if (r := results.get(key_of(name, seed, VALIDATION))) is not None]
        scores = [result.score for result in test]
        row = {
            **_about(arm, found.choice),
            "tried": sum(runs is not None for _, runs in found.tried),
            "runs": len(found.entries) + len(test),
            "validation": plan.taken[arm.name].validation if not chosen else _mean([run.score for run in chosen]),
            "scores": scores,
            "failed": [_last_line(r.error) for _, runs in found.tried for r in runs or () if r.error]
            + [_last_line(r.error) for r in test if r.error],
            "diverged": sum(r.diverged and not r.error for r in test),
            "seconds": median(r.seconds for r in test),
            "cost": costs.get(arm.name),
            **_tested(scores),
        }
        if a == 0:
            baseline = scores
        else:
            row |= schedule.metric.against(scores, baseline, (run.num_scored for run in test))
        rows.append(row)
    return rows


def _about(arm: Arm, choice: Point) -> Row:
    settings = {name: v for name, v in choice.items() if name not in ("learning_rate", "weight_decay")}
    return {
        "name": arm.name,
        "method": arm.method,
        "about": _ABOUT.get(arm.name) or METHODS[arm.method].about,
        "is_opponent": arm.is_opponent,
        "epochs": arm.epochs,
        "fixed": dict(arm.fixed),
        **{name: choice[name] for name in ("learning_rate", "weight_decay")},
        "settings": settings,
    }


_ABOUT = {
    LONGER: "plain training for as long as two passes take",
    CHEAP: "F-GR on a quarter of the batch in every fourth step",
    AHEAD: "ahead along the momentum, and a penalty on a tenth of the batch in every third step",
}


def _tested(scores: Sequence[float]) -> Row:
    if not all(map(math.isfinite, scores)):
        return {"test": None}
    return {"test": asdict(stats.mean_interval(scores))}


def _mean(scores: Sequence[float]) -> float:
    finite = [score for score in scores if math.isfinite(score)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _last_line(error: str) -> str:
    lines = error.strip().splitlines()
    return lines[-1][:200] if lines else ""


def leader(rows: Sequence[Row], metric: Metric) -> Row:
    """The method that is best on validation rows; opponents and the baseline are none."""
    methods = [row for row in rows[1:] if not row["is_opponent"]]
    return max(methods, key=lambda row: metric.worth(row["validation"] if row["validation"] is not None else math.nan))


def verdict(results: Row) -> str:
    """The answer, in a sentence or two."""
    metric, rows = Metric.from_row(results["metric"]), results["arms"]
    best, plain, task = leader(rows, metric), rows[0], results["task"]
    named = f"{best['name']} ({settings(best)})"
    if best["test"] is None or plain["test"] is None:
        broken = listed([row["name"] for row in (plain, best) if row["test"] is None])
        return f"On {task} nothing can be said: {broken} has test runs that failed or diverged."
    seeds = f"over {len(results['seeds'])} paired seeds"
    apart = f"{gap(best['difference'], metric)} {seeds}"
    numbers = f"{metric.name} {score(best['test'], metric)} against {score(plain['test'], metric)}, {apart}"
    cost = f", at {best['cost']['median']:.2f} times the cost of a step" if best.get("cost") else ""
    if best["verdict"] == stats.BETTER:
        said = f"{named} is better than tuned plain training on {task}: {numbers}{cost}."
    elif best["verdict"] == stats.WORSE:
        said = f"{named}, best on validation rows, is worse than tuned plain training on {task}: {numbers}{cost}."
    else:
        said = (
            f"No difference is shown between {named}, best on validation rows, and tuned plain training on {task}: "
            f"{numbers}{cost}."
        )
    return said + _beside_opponent(results, best, metric)


def _beside_opponent(results: Row, best: Row, metric: Metric) -> str:
    """Whether it is more than what the same time buys."""
    opponent = next((row for row in results["arms"] if row["is_opponent"]), None)
    if opponent is None or opponent["test"] is None:
        return ""
    difference = stats.paired_difference(best["scores"], opponent["scores"])
    found = metric.verdict(difference)
    reached = f" {opponent['name']} reaches {score(opponent['test'], metric)}"
    if found == stats.UNDECIDED:
        return f"{reached}: no difference to {best['name']} is shown at equal time."
    return f"{reached}: {best['name']} is {found} than that."


def settings(row: Mapping[str, Any]) -> str:
    """`ratio 0.3, ε 0.1`, or for plain training its learning rate and weight decay."""
    return _told(row["settings"] or _base(row))


def chosen(row: Mapping[str, Any]) -> str:
    """All that was chosen for an arm."""
    return _told({**_base(row), **row["settings"]})


def _base(row: Mapping[str, Any]) -> Point:
    return {name: row[name] for name in ("learning_rate", "weight_decay")}


def _told(settings: Point) -> str:
    return ", ".join(f"{_SHORT.get(name, name)} {value:g}" for name, value in settings.items())


def notes(results: Mapping[str, Any]) -> list[str]:
    """How to read the numbers; the same words below the table and on the page."""
    plan, metric = results["plan"], Metric.from_row(results["metric"])
    seeds = results["seeds"]
    way = "higher" if metric.higher_is_better else "lower"
    best = min(plan["finalists"], plan["trials"])
    trials, search_seeds = plan["trials"], plan["search_seeds"]
    tried = f"{trials} candidate{plural(trials)} on {search_seeds} seed{plural(search_seeds)}"
    if plan.get("search_epochs"):
        tried += f" for {plan['search_epochs']} epochs"
        tried += f", the best {best} for all on {plan['final_seeds']} more"
    elif plan["final_seeds"] and plan["finalists"]:
        tried += f", the best {best} again on {plan['final_seeds']} more"
    unit = "percent" if metric.is_share else "the unit of the score"
    said = [
        f"Score: {metric.name} on test rows, in {unit}; {way} is better. Mean and 95 % interval (Student's t) over "
        f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}; differences and verdicts are paired by seed.",
        f"{_tuned(results, tried)} The test rows were read once, by the choice of each arm.",
        "SGD is plain training, with the task's own optimizer.",
        *([results["how_cost"]] if results.get("how_cost") else []),
        *results.get("not_afforded", []),
    ]
    if any(row["is_opponent"] for row in results["arms"]):
        said.append(f"{LONGER} is what the time of two passes buys without a penalty.")
    failed = [(row["name"], row["failed"]) for row in results["arms"] if row["failed"]]
    for row in results["arms"]:
        if row["diverged"]:
            said.append(
                f"{row['name']}: {row['diverged']} of its test runs diverged and count as they ended; with more "
                "candidates, or a smaller learning rate to start from, the search may find settings that do not."
            )
    for name, errors in failed:
        count = f"{len(errors)} run{plural(len(errors))}"
        said.append(f"{name}: {count} failed, the last with {errors[-1]}; tracebacks are in failed/.")
    return said


def taken(results: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The arms whose settings are of another comparison, and whether these are all."""
    names = [row["name"] for row in results["arms"]]
    found = [name for name in names if name in results["plan"].get("taken", {})]
    return found, found == names


def _tuned(results: Mapping[str, Any], tried: str) -> str:
    """How the settings were found."""
    plan = results["plan"]
    known, are_all = taken(results)
    if are_all and plan.get("tries_rates"):
        return (
            "Each arm has the settings that it came to in another comparison, at that learning rate, a third or three "
            "times it, as validation rows say here; where one came to another than SGD, each was tried where the other "
            "ended."
        )
    if are_all:
        return (
            "Nothing was searched for: each arm has the settings that it came to in another comparison, and its "
            "validation score is of there."
        )
    if known:
        return (
            f"{listed(known)} have the settings that they came to in another comparison. Each other arm was tuned "
            f"alike, by validation rows: at most {tried}, from SGD's learning rate and weight decay on; where one went "
            "on to others, SGD was tried there too, and the arm where SGD ended."
        )
    alike = f"Each arm was tuned alike, by validation rows: at most {tried}; SGD's learning rate and weight decay first"
    if not plan.get("is_thorough"):
        return f"{alike}, from which the others start."
    return (
        f"{alike}, over a wide grid and on for as long as a factor of three led to better ones, up to three times as "
        "many. From there the others start; where one went on to another learning rate or weight decay, SGD was tried "
        "there too, and the arm where SGD ended."
    )
