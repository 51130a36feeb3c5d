"""What the claims look like to a reader: a table on the terminal, and a page. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradreg.lab.page import Block, Code, Figure, Heading, Items, Page, code, made, plain
from gradreg.lab.tables import Table
from gradreg.studies.claims import CLAIMS
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED
from gradreg.studies.claims.figures import forest_figure

Row = Mapping[str, Any]
PAPER_CONFIG = "configs/paper-wrn-cifar10.yaml"


def notes(results: Row) -> list[str]:
    """How to read the numbers; the same words below the table and on the page."""
    seeds, lost, number = results["seeds"], results["lost_under_holm"], results["num_intervals"]
    stand = f"all but {'; '.join(lost)}" if lost else "all verdicts that an interval gave"
    quick = ["Quick: smaller settings and few seeds; run `gradreg claims` for all of it."]
    chance = [
        f"No correction for multiplicity: of {number} intervals one in twenty would be expected to miss by chance "
        f"alone. Under Holm's correction over all of them there stand: {stand}."
    ]
    return [
        *quick * results["is_quick"],
        f"Number: mean over {len(seeds)} seeds, {seeds[0]} to {seeds[-1]}, with its 95 % interval (Student's t), "
        "oriented so that larger is what the paper says. Of an identity it is the largest error of all seeds.",
        f"Verdict: `{HOLDS}`, the interval lies on the claimed side of its reference (0, or 1 for a ratio, or as the "
        f"claim states); `{FAILS}`, it lies on the other side; `{UNDECIDED}`, it contains it.",
        *chance * bool(number),
    ]


def summary(claim: Row) -> str:
    """`6 of 8 hold; does not hold here: e2, mini-batches; undecided: b4, clean labels.`"""
    parts = claim["parts"]
    found = {verdict: [p["key"] for p in parts if p["verdict"] == verdict] for verdict in (HOLDS, FAILS, UNDECIDED)}
    text = [f"{len(found[HOLDS])} of {len(parts)} {'hold' if len(parts) > 1 else HOLDS}"]
    text += [f"{verdict}: {'; '.join(found[verdict])}" for verdict in (FAILS, UNDECIDED) if found[verdict]]
    if claim["not_measured"]:
        text.append(f"not measured: {'; '.join(claim['not_measured'])}")
    return "; ".join(text) + "."


def table(title: str, parts: Sequence[Row]) -> Table:
    headings = ("claim", "measured for each seed", "number, 95 % interval", "seeds", "verdict")
    rows = [(part["key"], part["measured"], part["shown"], _seeds(part), part["verdict"]) for part in parts]
    return Table(title, headings, rows)


def _seeds(part: Row) -> str:
    n, planned = part["num_seeds"], part["planned_seeds"]
    return str(n) if n == planned else f"{n} of {planned}"


def told(results: Row) -> list[Block]:
    """On the terminal: a table and a sentence for each claim, and how to read them."""
    claims = results["claims"]
    seconds = ", ".join(f"({claim['letter']}) {claim['seconds']:.0f}" for claim in claims)
    tables = [table(f"({claim['letter']}) {claim['title']}", claim["parts"]) for claim in claims]
    said = [f"({claim['letter']}) {summary(claim)}" for claim in claims]
    return [*tables, "\n".join(said), Items(notes(results)), f"Seconds: {seconds}."]


def page(results: Row) -> Page:
    parts = [part for claim in results["claims"] for part in claim["parts"]]
    count = {verdict: sum(part["verdict"] == verdict for part in parts) for verdict in (HOLDS, FAILS, UNDECIDED)}
    found = f"Of {len(parts)} sub-claims {count[HOLDS]} hold, {count[FAILS]} do not, {count[UNDECIDED]} are undecided."
    intervals = [part for part in parts if part["low"] is not None]
    return Page(
        "The claims of the paper, measured",
        [
            f"{INTRODUCTION} {found}",
            Items([f"**({c['letter']}) {c['title']}.** {plain(summary(c))}" for c in results["claims"]]),
            made(results),
            table("The claims of the paper, here", parts),
            Items(notes(results)),
            *([Figure("intervals", forest_figure(intervals), INTERVALS)] if intervals else []),
            *(block for claim in results["claims"] for block in _section(claim, results)),
            *AFTERWORD,
        ],
        "gradreg claims",
    )


def _section(claim: Row, results: Row) -> list[Block]:
    draw = CLAIMS[claim["letter"]].draw
    rules = [(part["key"], part["says"], part["rule"]) for part in claim["parts"]]
    settings = "; ".join(f"{key}: {value}" for key, value in claim["settings"].items())
    quick, seeds = " --quick" * results["is_quick"], results["seeds"]
    alone = f"gradreg claims{quick} --only {claim['letter']} --seed {seeds[0]} --seeds {len(seeds)}"
    return [
        Heading(f"({claim['letter']}) {claim['title']}"),
        f"**The paper.** {claim['says']} *{claim['where']}*",
        f"**Measured.** {claim['how']}",
        f"**What is different.** {claim['differs']}",
        Table("", ("", "what is claimed", "holds if"), rules),
        *(Table(**found) for found in claim["tables"]),
        *([Figure(claim["letter"], draw(claim["data"]), claim["shows"])] if draw and claim["data"] else []),
        f"Settings: {plain(settings)}.",
        f"{code(alone)}: {claim['seconds']:.0f} s, code in `{CLAIMS[claim['letter']].measure.__module__}`.",
    ]


INTERVALS = "Intervals of all sub-claims, each over its own far end: right of the line is what the paper says."
INTRODUCTION = (
    "Karakida et al., [Understanding Gradient Regularization in Deep Learning](https://arxiv.org/abs/2210.02720) "
    "(ICML 2023), make five claims. Each is code in `gradreg.studies.claims`: what is measured, in which settings, and "
    "by which rule it is judged, all fixed before the measurement. This page is what the command wrote. Its tasks are "
    "small; [real images](images.md) have verdicts of their own."
)
AFTERWORD: tuple[Block, ...] = (
    Heading("At the size of the paper"),
    "The claims above are measured on small tasks that need no download. The paper's own experiment, WideResNet-28-10 "
    f"on CIFAR-10 with the grid of γ and ε, is `{PAPER_CONFIG}`. It runs as it is where the binary archive of CIFAR-10 "
    "and GPUs are; `--path` says where the archive is if not here, and `--storage` shares the work among machines:",
    Code(f"gradreg sweep {PAPER_CONFIG}", "bash"),
    Heading("What to know"),
    Items(
        [
            "A verdict is about the settings named here. `undecided` is no evidence of absence: with more seeds "
            "(`--seeds`) the interval shrinks.",
            "Times of a step mean something on a quiet machine only. Everything else depends on the seeds and, in the "
            "last digits, on the processor.",
            "Interrupted, the command keeps each finished claim as a line of `claims.jsonl` and each finished training "
            "run as a line of `runs.jsonl`.",
        ]
    ),
    Heading("To measure it again"),
    Code(
        "gradreg claims                         # all of it\n"
        "gradreg claims --quick                 # smaller, under 5 minutes on two cores\n"
        "gradreg claims --only c e              # some of them\n"
        "gradreg claims --write docs/claims.md  # also this page and its figures",
        "bash",
    ),
)
