"""What a comparison looks like to a reader: on the terminal, and as a page. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from gradreg.lab.comparison.arms import BASELINE
from gradreg.lab.comparison.figures import cost_figure, score_figure
from gradreg.lab.comparison.result import chosen, leader, notes, taken
from gradreg.lab.config import from_mapping
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import NO_RESULT, Metric
from gradreg.lab.page import Block, Code, Figure, Heading, Items, Page, made, plain, publish, tell
from gradreg.lab.report.snippets import lines_of
from gradreg.lab.stats import UNDECIDED
from gradreg.lab.tables import WIDTH, Table, say
from gradreg.lab.words import gap, listed, score

Row = Mapping[str, Any]


def show(results: Row, folder: Path) -> None:
    """Write the page, and print what it says."""
    publish(page(results), folder)
    tell(told(results), results, folder)


def told(results: Row) -> list[Block]:
    """On the terminal."""
    return [chosen_table(results), table(results), results["verdict"], Items(notes(results))]


def text(results: Row) -> str:
    """The same as a text of 80 columns."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, force_jupyter=False)
    for block in (chosen_table(results), table(results)):
        block.print(console)
        console.print()
    say(console, results["verdict"])
    return out.getvalue().rstrip()


def table(results: Row) -> Table:
    metric = Metric.from_row(results["metric"])
    unit = f", {metric.unit}" if metric.unit else ""
    headings = (f"{results['task']}", f"test {metric.name}{unit}", f"minus {BASELINE}", "verdict", "cost")
    return Table("", headings, [_cells(row, metric) for row in results["arms"]])


def _cells(row: Row, metric: Metric) -> tuple[str, ...]:
    told = {UNDECIDED: "none shown"}.get(row.get("verdict", ""), row.get("verdict", ""))
    failed = f"{len(row['failed'])} failed" if row["failed"] else ""
    diverged = f"{row['diverged']} diverged" if row["diverged"] else ""
    verdict = ", ".join(part for part in (told, failed, diverged) if part)
    cost = f"{row['cost']['median']:.2f}×" if row.get("cost") else "–"
    return row["name"], score(row["test"], metric).rstrip("%"), gap(row.get("difference"), metric), verdict, cost


def chosen_table(results: Row) -> Table:
    metric = Metric.from_row(results["metric"])
    rows = [
        (row["name"], metric.shown(row["validation"]) if row["validation"] is not None else NO_RESULT, chosen(row))
        for row in results["arms"]
    ]
    return Table("", ("chosen", "validation", "settings"), rows)


def page(results: Row) -> Page:
    metric = Metric.from_row(results["metric"])
    best = leader(results["arms"], metric)
    drawn = [row for row in results["arms"] if row["test"] is not None]
    figures: list[Block] = []
    if drawn:
        figures.append(Figure("scores", score_figure(drawn, metric), SCORES.format(metric=plain(metric.name))))
    if any(row.get("cost") for row in drawn):
        figures.append(Figure("cost", cost_figure(drawn, metric), COST))
    return Page(
        f"Does gradient regularization help on {results['task']}?",
        [
            f"**{plain(results['verdict'])}**",
            table(results),
            *figures,
            Heading("What was chosen"),
            _searched(results),
            chosen_table(results),
            Heading(f"{best['name']}, to copy"),
            Code(snippet(results, best), "python"),
            Heading("The arms"),
            Items([f"**{plain(row['name'])}**: {plain(row['about'])}." for row in results["arms"]]),
            Heading("How it was measured"),
            Items([*map(plain, notes(results)), "All runs are in `runs.jsonl`, the numbers above in `results.json`."]),
            made(results),
        ],
        "gradreg compare",
    )


def _searched(results: Row) -> str:
    known, are_all = taken(results)
    if are_all:
        return "In another comparison" + ", but for the learning rate" * results["plan"].get("tries_rates", False) + "."
    return f"In another comparison: {listed(known)}; the others on validation rows, alike." if known else SEARCHED


def snippet(results: Row, row: Row) -> str:
    """The method of an arm around a loop of one's own."""
    if row["method"] not in METHODS:
        return f"# {row['name']} is a method of the task's own file, with {chosen(row)}.\n"
    config = configuration(results, row)
    return "\n".join(lines_of(config)) + "\n"


def configuration(results: Row, row: Row) -> Any:
    """A run of an arm, with the settings that were chosen."""
    base = {**results["plan"]["base"], "seed": results["seeds"][0]}
    own = {"method": row["method"], "epochs": base["epochs"] * row["epochs"], **row["fixed"], **row["settings"]}
    rate = {name: row[name] for name in ("learning_rate", "weight_decay")}
    return from_mapping({key: value for key, value in {**base, **rate, **own}.items() if value is not None})


SEARCHED = "On validation rows; plain training has the most candidates, all others as many as each other."
SCORES = (
    "Test {metric} of each arm, mean and 95% interval over seeds; the dashed line is tuned plain training. A hollow "
    "marker says that the paired difference to SGD may be zero."
)
COST = "The same over the cost of a step; what lies to the right must lie better to be worth it."
