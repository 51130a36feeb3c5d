"""What the study looks like to a reader: tables on the terminal, and a page. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from gradreg.lab.comparison.arms import BASELINE
from gradreg.lab.page import Block, Code, Figure, Heading, Items, Page, made
from gradreg.lab.stats import BETTER
from gradreg.lab.tables import Table
from gradreg.lab.words import BRACKETS, plus_minus, ranged, settings
from gradreg.studies.frontier.figure import pareto_figure, worst_figure
from gradreg.studies.frontier.figure import worst as worst_points
from gradreg.studies.frontier.modes import ARMS, FULL, MODES, PLAIN
from gradreg.studies.frontier.summary import alike, judging, panels, price, worst
from gradreg.studies.frontier.tune import CANDIDATES, CANDIDATES_OF_FULL, FINAL_SEEDS, FINALISTS, SEEDS

Row = Mapping[str, Any]


def overview(results: Row) -> Table:
    """Each mode with its price and what it retains on each task that judges; the best on its worst task first, of those
    that were played on all."""
    tasks = judging(everything(results)) or everything(results)
    own = {row["name"]: row for row in results["tasks"][-1]["modes"]}
    everywhere = {row["name"] for row in alike(tasks)[0]["modes"]}
    least = {name: worst(tasks, name) for name in own}
    order = sorted(own, key=lambda name: (name not in everywhere, -(least[name] or {"mean": -9})["mean"]))
    full = [f"1 ({plus_minus(task['gain'], 1, '+')}\npoints)" for task in tasks]
    rows = [[FULL.name, f"{price(own[FULL.name]):.2f}", *full]]
    for name in [name for name in order if name not in (PLAIN.name, FULL.name)]:
        mark = " ◇" if own[name]["is_opponent"] else ""
        kept = [_cell(task, name, has_cost=task in results["real"]) for task in tasks]
        rows.append([f"{name}{mark}", f"{price(own[name]):.2f}", *kept])
    return Table("Share of the gain that is kept", ["mode", "cost, × plain", *(task["name"] for task in tasks)], rows)


def everything(results: Row) -> list[Row]:
    """The real tasks, and those of the study."""
    return [*results["real"], *results["tasks"]]


def _cell(task: Row, name: str, has_cost: bool) -> str:
    row = next((row for row in task["modes"] if row["name"] == name), None)
    if row is None:
        return ""
    return _retention(row) + (f"\nat {price(row):.2f}" if has_cost and row["retention"] is not None else "")


def detail(task: Row) -> Table:
    """One task: accuracy, difference to plain, costs, where it ends, and what was chosen."""
    headings = ["mode", "accuracy, %", "over plain", "retention", *COSTS, "‖∇L‖", "tr H", "settings"]
    rows = []
    for row in task["modes"]:
        chosen = f"lr {row['learning_rate']:g}, wd {row['weight_decay']:g}"
        rows.append(
            [
                row["name"],
                plus_minus(row["accuracy"]) + (f"\n{row['diverged']} diverged" if row["diverged"] else ""),
                plus_minus(row["difference"], 1, "+") if "difference" in row else "",
                _retention(row),
                *(f"{row['cost'][what]['median']:.2f}" if what in row["cost"] else "" for what in COSTS.values()),
                *("–" if row[end] is None else f"{row[end]:.3g}" for end in ("grad_norm", "hessian_trace")),
                "; ".join([chosen, *([settings(row)] if row["settings"] else [])]),
            ]
        )
    return Table(f"{task['name']}: {task['about']}", headings, rows)


def modes_table(results: Row) -> Table:
    """What each mode is, and what it is called where `gradreg images` has it."""
    elsewhere = {PLAIN.name: BASELINE, FULL.name: FULL.method} | {mode: arm for arm, mode in ARMS.items()}
    names = [name for name in MODES if any(row["name"] == name for task in results["tasks"] for row in task["modes"])]
    rows = [(name, MODES[name].about, elsewhere.get(name, "")) for name in names]
    return Table("", ("mode", "what it is", "on real images"), rows)


COSTS = {"cost": "larger", "in a stack": "batched", "engine": "engine"}


def _retention(row: Row) -> str:
    return ranged(row["retention"], 2, "", BRACKETS)


def sentences(results: Row) -> list[str]:
    """Whether there is something to retain, what keeps most where it keeps least, and which goals are reached."""
    lines = []
    for task in everything(results):
        is_judged = task["verdict"] == BETTER
        word = "beyond noise" if is_judged else "**not beyond noise**: it shows nothing to retain, and is not judged"
        gain = plus_minus(task["gain"], 1, "+")
        name = f"{task['name']} ({task['about']})" if "about" in task else f"**{task['name']}**"
        earlier = " " + EARLIER if task.get("is_earlier") else ""
        lines.append(f"{name}: full − plain {gain} points, {word}.{earlier}")
    return [*_failing(results["real"]), *lines, *_best(judging(everything(results))), *reached(results["goals"])]


def _failing(tasks: Sequence[Row]) -> list[str]:
    """The cheaper modes of which nothing is kept beyond noise on a real task."""
    found: dict[str, list[str]] = {}
    for task in judging(tasks):
        for row in task["modes"]:
            kept = row["retention"]
            if kept is not None and kept["low"] <= 0 and price(row) <= MOST and not row["is_opponent"]:
                found.setdefault(row["name"], []).append(f"{_retention(row)} on {task['name']}")
    said = "; ".join(f"{name} ({', '.join(where)})" for name, where in found.items())
    return [f"**Fails on real images**, where nothing of the gain is shown to be kept: {said}."] if found else []


def _best(tasks: Sequence[Row]) -> list[str]:
    """Of what was played on all of them, and is nowhere too dear."""
    drawn = panels(alike(tasks))
    left_out = {p.mode for panel in drawn for p in panel.points if p.is_opponent or p.cost > MOST}
    least = [
        f"{p.mode} {ranged(asdict(p.retention), 2, '', BRACKETS)} ({task})"
        for task, p in worst_points(drawn)
        if p.mode not in left_out
    ]
    said = f"Kept on its worst of {len(tasks)} tasks, best of those at no more than {MOST:g}× on any: "
    return [f"{said}{'; '.join(least[:3])}."] if least else []


def reached(goals: Sequence[Row]) -> list[str]:
    """Which modes reach what a mode should."""
    lines = []
    for goal in goals:
        names = "; ".join(goal["reached"]) or "none"
        nearly = f" In the mean only: {'; '.join(goal['nearly'])}." if goal["nearly"] else ""
        lines.append(f"Goal: {goal['goal']}, by its interval on each judged task. Reached by: {names}.{nearly}")
    return lines


def notes(results: Row) -> list[str]:
    """How to read the numbers."""
    seeds = results["seeds"]
    quick = ["Quick: two of the tasks and few seeds; run `gradreg frontier` for all."]
    return [
        *quick * results["is_quick"],
        f"Retention: (mode − plain) / (full − plain) of test accuracy over {len(seeds)} paired seeds, {seeds[0]} to "
        f"{seeds[-1]}, with its 95 % interval by bootstrap over seeds; ± is half of a 95 % interval.",
        "cost: time of a run over that of plain training, measured in the real engine on a small vision transformer, "
        "where a step is mostly arithmetic; `in a stack` and `engine` are of the task's own small model, in the "
        "batched engine and in the real one, where a step is mostly Python. What only the "
        "batched engine can do has its cost from there.",
        f"Tuned alike: for every mode {CANDIDATES} candidates of learning rate, weight decay and its own numbers on "
        f"{SEEDS} seeds, the best {FINALISTS} again on {FINAL_SEEDS}, by validation accuracy; no seed of the study, no "
        f"test row. The full method, to which all are held, had {CANDIDATES_OF_FULL}: a reference that is tuned too "
        "little would flatter every mode.",
        "◇: an opponent, what the same time buys without a cheaper penalty. plain, twice as long is that of the full "
        "method's cost.",
        "No correction for the number of modes: of 20 intervals one would be expected to miss.",
        *[REAL] * bool(results["real"]),
    ]


def told(results: Row) -> list[Block]:
    """On the terminal: the overview, a table for each task, and what they say."""
    details = [_without_settings(detail(task)) for task in results["tasks"]]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds_of"].items())
    said = "\n".join(sentences(results))
    return [overview(results), *details, said, Items(notes(results)), f"Seconds: {seconds}."]


def _on_page(task: Row) -> Table:
    """Below a heading with its name."""
    return replace(detail(task), title=task["about"])


def _without_settings(table: Table) -> Table:
    """The page has them."""
    return replace(table, headings=table.headings[:-1], rows=[row[:-1] for row in table.rows])


def page(results: Row) -> Page:
    drawn, alike_ = panels(everything(results)), panels(alike(judging(everything(results))))
    figures = ("pareto", pareto_figure, drawn, PARETO), ("worst", worst_figure, alike_, WORST)
    return Page(
        "The frontier: benefit against cost",
        [
            INTRODUCTION,
            Items([*([] if results["real"] else [SMALL]), *sentences(results)]),
            made({**results, "command": results["command"] + " --images FOLDER" * bool(results["real"])}),
            overview(results),
            *(Figure(name, draw(tasks), caption) for name, draw, tasks, caption in figures if tasks),
            Heading("How to read it"),
            Items(notes(results)),
            Heading("The modes"),
            modes_table(results),
            Heading("Each task"),
            *(block for task in results["tasks"] for block in (Heading(task["name"], 3), _on_page(task))),
            Heading("Why"),
            MECHANISM,
            *(_mechanism(name, points) for name, points in results["mechanism"].items()),
            *AFTERWORD,
        ],
        "gradreg frontier",
    )


def _mechanism(name: str, points: Sequence[Row]) -> Table:
    headings = [f"{what}, step {point['step']}" for point in points for what in ("cosine", "norm")]
    rows = []
    for mode in [row["mode"] for row in points[0]["rows"] if row["reference"] == "exact"]:
        found = [next(r for r in p["rows"] if (r["mode"], r["reference"]) == (mode, "exact")) for p in points]
        rows.append([mode, *(plus_minus(row[what], 2) for row in found for what in ("cosine", "ratio"))])
    return Table(name, ["penalty of", *headings], rows)


PARETO = "What each mode keeps of the gain over what it costs, with 95 % intervals; filled: on the front."
WORST = "Each mode that was played on every task, on the one where it keeps least."
MOST = 1.5
"""Of the cost on any task, for a mode to be named."""
INTRODUCTION = (
    "Twice the cost is why people give gradient regularization up. [Below two passes](cheap.md) has the ways to pay "
    "less; this page is what they keep of the benefit, each tuned as long as the others, against measured time. It is "
    "what the command wrote. Which modes reach what a mode should reach on every task, and which keep most on their "
    "worst:"
)
EARLIER = "Played by an earlier plan of [the study](images.md), which searched otherwise: not to be built on."
SMALL = "**These tasks are small, and the order does not travel**: [real images and networks](images.md) have another."
REAL = (
    "In bold: [real images and networks](images.md), measured by `gradreg images` with its own tuning, 5 paired seeds "
    "and the cost on that very network, which stands beside each share. A goal is held against the modes that were "
    "played on every task."
)
MECHANISM = (
    "The penalty that a mode adds to the gradient, ĝ − g1 in the mean over the batches of an epoch, at frozen points "
    "of plain runs, beside γHg by double backpropagation: the cosine of the two, and the norm of the first over that "
    "of the second. Modes with a displacement of fixed length are held against the γ at which the full method pushes "
    "as hard. `exact, other batches` says how far the noise of batches lets two penalties agree. Where a run ends, "
    "‖∇L‖ and tr H over all training rows, is in the tables above."
)
AFTERWORD: tuple[Block, ...] = (
    Heading("What to know"),
    Items(
        [
            "The tasks are small, and chosen because full gradient regularization helps there: label noise, few rows, "
            "few steps. On tasks where it does not, there is nothing to retain.",
            "The cost of a fraction of the batch is that of arithmetic. Where a step is mostly overhead, as in these "
            "small models, a small pass costs nearly as much as a large one: see `in a stack` and `engine`.",
            "Times of a step mean something on a quiet machine only; everything else depends on the seeds.",
            "Interrupted, the command keeps each finished run as a line of `runs.jsonl`.",
        ]
    ),
    Heading("To measure it again"),
    Code(
        "gradreg frontier                           # all of it\n"
        "gradreg frontier --quick                   # two tasks, few seeds\n"
        "gradreg frontier --tune                    # the choice of every mode's numbers, once more\n"
        "gradreg frontier --images docs/images.json  # with the real tasks of `gradreg images`\n"
        "gradreg frontier --from FOLDER             # the page of what was measured, once more\n"
        "gradreg frontier --write docs/frontier.md  # also this page and its figures",
        "bash",
    ),
)
