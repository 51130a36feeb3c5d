"""What the study looks like to a reader: tables on the terminal, and a page in Markdown. Functions of results.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from gradreg.lab.stats import BETTER
from gradreg.lab.tables import console, escaped, markdown_table, say, table_of
from gradreg.studies.frontier.figure import pareto_figure, worst_figure
from gradreg.studies.frontier.modes import FULL, PLAIN
from gradreg.studies.frontier.summary import panels, price, worst
from gradreg.studies.frontier.tune import CANDIDATES, CANDIDATES_OF_FULL, FINAL_SEEDS, FINALISTS, SEEDS

Row = Mapping[str, Any]
MARK = "<!-- Made by `gradreg frontier`: edit the command, not this page. -->"


def figures_of(results: Row) -> dict[str, str]:
    """The SVG of every figure, by name."""
    drawn = panels(results["tasks"])
    return {"pareto": pareto_figure(drawn), "worst": worst_figure(drawn)} if drawn else {}


# What is said.


def overview(results: Row) -> tuple[list[str], list[list[str]]]:
    """Headings, and each mode with its price and what it retains on each task; the best on its worst task first."""
    tasks = results["tasks"]
    headings = ["mode", "cost", *(task["name"] for task in tasks)]
    by_mode = {row["name"]: [] for row in tasks[0]["modes"]}
    for task in tasks:
        for row in task["modes"]:
            by_mode[row["name"]].append(row)
    least = {name: worst(tasks, name) for name in by_mode}
    order = sorted(by_mode, key=lambda name: -(least[name] or {"mean": -9})["mean"])
    rows = []
    for name in order:
        if name in (PLAIN.name, FULL.name):
            continue
        cells = [_retention(row["retention"]) for row in by_mode[name]]
        mark = " ◇" if by_mode[name][0]["is_opponent"] else ""
        rows.append([f"{name}{mark}", _price(by_mode[name][-1]), *cells])
    full = by_mode[FULL.name]
    rows.insert(0, [FULL.name, _price(full[0]), *(f"1 ({_signed(row['difference'])} points)" for row in full)])
    return headings, rows


def detail(task: Row) -> tuple[list[str], list[list[str]]]:
    """One task: accuracy, difference to plain, costs, where it ends, and what was chosen."""
    headings = [
        *("mode", "accuracy, %", "over plain", "retention"),
        *("cost", "in a stack", "engine", "‖∇L‖", "tr H", "lr, wd, settings"),
    ]
    rows = []
    for row in task["modes"]:
        settings = ", ".join(f"{_SYMBOLS.get(key, key)} {value:g}" for key, value in row["settings"].items())
        difference = row.get("difference")
        rows.append(
            [
                row["name"],
                _plus_minus(row["accuracy"], 1) + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
                "" if difference is None else _signed(difference),
                _retention(row["retention"]),
                *(_cost(row, what) for what in ("larger", "batched", "engine")),
                _number(row["grad_norm"]),
                _number(row["hessian_trace"]),
                f"{row['learning_rate']:g}, {row['weight_decay']:g}{'; ' if settings else ''}{settings}",
            ]
        )
    return headings, rows


_SYMBOLS = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "lookahead": "ρ", "average": "last"}


def sentences(results: Row) -> list[str]:
    """Whether there is something to retain, and which goals are reached."""
    lines = []
    for task in results["tasks"]:
        is_judged = task["verdict"] == BETTER
        word = "beyond noise" if is_judged else "**not beyond noise**: it shows nothing to retain, and is not judged"
        lines.append(f"{task['name']} ({task['about']}): full − plain {_signed(task['gain'])} points, {word}.")
    for goal in results["goals"]:
        names = ", ".join(goal["reached"]) or "none"
        nearly = f" In the mean only: {', '.join(goal['nearly'])}." if goal["nearly"] else ""
        lines.append(f"{goal['goal'][0].upper()}{goal['goal'][1:]}, by its interval on each of these: {names}.{nearly}")
    return lines


def notes(results: Row) -> list[str]:
    """How to read the numbers."""
    seeds = results["seeds"]
    quick = ["Quick: two of the tasks and few seeds; run `gradreg frontier` for all."] if results["is_quick"] else []
    return [
        *quick,
        f"Retention: (mode − plain) / (full − plain) of test accuracy over {len(seeds)} paired seeds, {seeds[0]} to "
        f"{seeds[-1]}, with its 95 % interval by bootstrap over seeds. full: F-GR in every step.",
        "cost: time of a run over that of plain training, measured in the real engine on a small vision transformer, "
        "where a step is mostly arithmetic; `in a stack` and `engine` are of the task's own small model, in the "
        "batched engine and in the real one, where a step is mostly Python. What only stacks do has its cost there.",
        f"Tuned alike: for every mode {CANDIDATES} candidates of learning rate, weight decay and its own numbers on "
        f"{SEEDS} seeds, the best {FINALISTS} again on {FINAL_SEEDS}, by validation accuracy; no seed of the study, no "
        f"test row. The full method, to which all are held, had {CANDIDATES_OF_FULL}: a reference that is tuned too "
        "little would flatter every mode.",
        "◇: an opponent, what the same time buys without a cheaper penalty. plain, twice as long is that of the full "
        "method's cost.",
        "No correction for the number of modes: of 20 intervals one would be expected to miss.",
    ]


# On the terminal.


def print_tables(results: Row, folder: Path) -> None:
    """The overview, a table for each task, and what they say."""
    out = console()
    headings, rows = overview(results)
    _print(out, "Share of the gain that is kept", headings, rows)
    for task in results["tasks"]:
        headings, rows = detail(task)
        _print(out, f"{task['name']}: {task['about']}", headings[:-1], [row[:-1] for row in rows])  # the page has all
    say(out, *sentences(results), "", *(f"- {note}" for note in notes(results)), "")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds_of"].items())
    say(out, f"{results['seconds']:.0f} s: {seconds}. Page, figures and data: {folder}")


def _stacked(cell: str) -> str:
    """The number, and below it how sure it is."""
    number, _, rest = cell.partition(" ")
    return "\n".join([number, *re.split(r" (?=\(|points|diverged)", rest)]).rstrip()


def _print(out: Any, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.text import Text

    mode, *others = headings
    narrow = ["\n".join(wrap(heading, 9)) for heading in others]
    table = table_of(title, [mode, *narrow], words=[mode], gap=1)
    for name, *cells in rows:
        table.add_row(*map(Text, [name, *map(_stacked, cells)]))
    out.print(table)
    out.print()


# The page.


def markdown(results: Row, figures: Mapping[str, str]) -> str:
    """The page; `figures` are paths relative to it. What comes from outside is escaped."""
    made = (
        f"Made by `{results['command'].replace('`', '')}` on {escaped(results['date'])}; "
        f"{escaped(results['machine'])}; torch {escaped(results['versions']['torch'])}, gradreg "
        f"{escaped(results['versions']['gradreg'])}, in {results['seconds'] / 60:.0f} minutes."
    )
    blocks = [
        "# The frontier: benefit against cost",
        MARK,
        INTRODUCTION,
        COMMANDS,
        made,
        "\n".join(f"- {line}" for line in sentences(results)),
        markdown_table(*overview(results)),
        *(f"![{text}]({figures[name]})\n\n{text}" for name, text in CAPTIONS.items() if name in figures),
        "## How to read it",
        "\n".join(f"- {note}" for note in notes(results)),
        "## Each task",
        *(block for task in results["tasks"] for block in (f"### {escaped(task['name'])}", _of_task(task))),
        "## Why",
        MECHANISM,
        *(block for name, points in results["mechanism"].items() for block in _mechanism(name, points)),
        PITFALLS,
    ]
    return "\n\n".join(blocks) + "\n"


def _of_task(task: Row) -> str:
    return f"{escaped(task['about'])}.\n\n{markdown_table(*detail(task))}"


def _mechanism(name: str, points: Sequence[Row]) -> list[str]:
    headings = ["penalty of"]
    headings += [f"{what}, step {point['step']}" for point in points for what in ("cosine", "norm")]
    names = [row["mode"] for row in points[0]["rows"] if row["reference"] == "exact"]
    rows = []
    for mode in names:
        cells = [mode]
        for point in points:
            row = next(r for r in point["rows"] if (r["mode"], r["reference"]) == (mode, "exact"))
            cells += [_plus_minus(row["cosine"], 2), _plus_minus(row["ratio"], 2)]
        rows.append(cells)
    return [f"*{escaped(name)}*", markdown_table(headings, rows)]


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _retention(interval: Row | None) -> str:
    if interval is None:
        return "–"
    return _minus(f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]")


def _signed(interval: Row) -> str:
    return _minus(f"{interval['mean']:+.1f} ± {(interval['high'] - interval['low']) / 2:.1f}")


def _plus_minus(interval: Row, digits: int) -> str:
    return _minus(f"{interval['mean']:.{digits}f} ± {(interval['high'] - interval['low']) / 2:.{digits}f}")


def _price(row: Row) -> str:
    return f"{price(row):.2f}"


def _cost(row: Row, what: str) -> str:
    ratio = row["cost"].get(what)
    return "" if ratio is None else f"{ratio['median']:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


CAPTIONS = {
    "pareto": "What each mode keeps of the gain over what it costs, with 95 % intervals; filled: on the front.",
    "worst": "Each mode on the task where it keeps least.",
}

INTRODUCTION = """\
Twice the cost is why people give gradient regularization up. [Below two passes](cheap.md) has the ways to pay less;
this page is what they keep of the benefit here, each tuned as long as the others, against measured time. It is what
the command wrote."""

COMMANDS = """\
```bash
gradreg frontier                           # all of it
gradreg frontier --quick                   # two tasks, few seeds
gradreg frontier --tune                    # the choice of every mode's numbers, once more
gradreg frontier --write docs/frontier.md  # also this page and its figures
```"""

MECHANISM = """\
The penalty that a mode adds to the gradient, ĝ − g1 in the mean over the batches of an epoch, at frozen points of plain
runs, beside γHg by double backpropagation: the cosine of the two, and the norm of the first over that of the second.
Modes with a displacement of fixed length are held against the γ at which the full method pushes as hard. `exact, other
batches` says how far the noise of batches lets two penalties agree. Where a run ends, ‖∇L‖ and tr H over all training
rows, is in the tables above."""

PITFALLS = """\
## What to know

- The tasks are small, and chosen because full gradient regularization helps there: label noise, few rows, few steps. On
  tasks where it does not, there is nothing to retain.
- The cost of a fraction of the batch is that of arithmetic. Where a step is mostly overhead, as in these small models,
  a small pass costs nearly as much as a large one: see the last columns.
- Times of a step mean something on a quiet machine only; everything else depends on the seeds.
- Interrupted, the command keeps each finished run as a line of `runs.jsonl`."""
