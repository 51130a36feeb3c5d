"""What the claims look like to a reader: a table on the terminal, and a page in Markdown. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from gradreg.lab.tables import console, escaped, markdown_table, say, table_of
from gradreg.studies.claims import CLAIMS
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED
from gradreg.studies.claims.figures import forest_figure

Row = Mapping[str, Any]
MARK = "<!-- Made by `gradreg claims`: edit the command, not this page. -->"
PAPER_CONFIG = "configs/paper-wrn-cifar10.yaml"


def figures_of(results: Row) -> dict[str, str]:
    """The SVG of every figure, by name."""
    parts = [part for claim in results["claims"] for part in claim["parts"] if part["low"] is not None]
    figures = {"intervals": forest_figure(parts)} if parts else {}
    for claim in results["claims"]:
        draw = CLAIMS[claim["letter"]].draw
        if draw is not None and claim["data"]:
            figures[claim["letter"]] = draw(claim["data"])
    return figures


def notes(results: Row) -> list[str]:
    """How to read the numbers; the same words below the table and on the page."""
    seeds, lost = results["seeds"], results["lost_under_holm"]
    stand = f"all but {'; '.join(lost)}" if lost else "all verdicts that an interval gave"
    quick = (
        ["Quick: smaller settings and few seeds; run `gradreg claims` for all of it."] if results["is_quick"] else []
    )
    number = results["num_intervals"]
    chance = [
        f"No correction for multiplicity: of {number} intervals one in twenty would be expected to miss by chance "
        f"alone. Under Holm's correction over all of them there stand: {stand}."
    ]
    return [
        *quick,
        f"Number: mean over {len(seeds)} seeds, {seeds[0]} to {seeds[-1]}, with its 95 % interval (Student's t), "
        "oriented so that larger is what the paper says. Of an identity it is the largest error of all seeds.",
        f"Verdict: `{HOLDS}`, the interval lies on the claimed side of its reference (0, or 1 for a ratio, or as the "
        f"claim states); `{FAILS}`, it lies on the other side; `{UNDECIDED}`, it contains it.",
        *(chance if number else []),
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


# On the terminal.


def print_table(results: Row, folder: Path) -> None:
    """A table and a sentence for each claim, how to read them, and where the files are."""
    out = console()
    headings = ("claim", "what was measured", "number,\n95 % interval", "seeds", "verdict")
    for claim in results["claims"]:
        table = table_of(f"({claim['letter']}) {claim['title']}", headings, words=(*headings[:2], "verdict"))
        for part in claim["parts"]:
            cells = (part["key"], part["measured"], part["shown"].replace(" [", "\n["), _seeds(part), part["verdict"])
            table.add_row(*map(Text, cells))
        out.print(table)
        out.print()
    lines = [f"({claim['letter']}) {summary(claim)}" for claim in results["claims"]]
    lines += ["", *(f"- {note}" for note in notes(results))]
    seconds = ", ".join(f"({claim['letter']}) {claim['seconds']:.0f}" for claim in results["claims"])
    lines += ["", f"{results['seconds']:.0f} s: {seconds}. Page, figures and data: {folder}"]
    say(out, *lines)


def _seeds(part: Row) -> str:
    n, planned = part["num_seeds"], part["planned_seeds"]
    return str(n) if n == planned else f"{n} of {planned}"


# The page.


def markdown(results: Row, figures: Mapping[str, str]) -> str:
    """The page; `figures` are paths relative to it. What comes from outside is escaped."""
    made = (
        f"Made by `{results['command'].replace('`', '')}` on {escaped(results['date'])}; "
        f"{escaped(results['machine'])}; torch {escaped(results['versions']['torch'])}, gradreg "
        f"{escaped(results['versions']['gradreg'])}, in {results['seconds'] / 60:.1f} minutes."
    )
    rows = [
        (part["key"], part["measured"], part["shown"], _seeds(part), part["verdict"])
        for claim in results["claims"]
        for part in claim["parts"]
    ]
    blocks = [
        "# The claims of the paper, measured",
        MARK,
        INTRODUCTION,
        COMMANDS,
        made,
        "\n".join(f"- **({c['letter']}) {c['title']}.** {escaped(summary(c))}" for c in results["claims"]),
        markdown_table(("claim", "measured for each seed", "number, 95 % interval", "seeds", "verdict"), rows),
        "\n".join(f"- {note}" for note in notes(results)),
        *(f"![{INTERVALS}]({figures[name]})\n\n{INTERVALS}" for name in ("intervals",) if name in figures),
        *(block for claim in results["claims"] for block in _section(claim, figures, _only(claim, results))),
        PAPER_SCALE,
        PITFALLS,
    ]
    return "\n\n".join(blocks) + "\n"


def _section(claim: Row, figures: Mapping[str, str], command: str) -> list[str]:
    rules = [(part["key"], part["says"], part["rule"]) for part in claim["parts"]]
    blocks = [
        f"## ({claim['letter']}) {claim['title']}",
        f"**The paper.** {claim['says']} *{claim['where']}*",
        f"**Measured.** {claim['how']}",
        f"**What is different.** {claim['differs']}",
        markdown_table(("", "what is claimed", "holds if"), rules),
        *(f"*{escaped(t['title'])}*\n\n{markdown_table(t['headings'], t['rows'])}" for t in claim["tables"]),
    ]
    if claim["letter"] in figures:
        blocks.append(f"![{claim['shows']}]({figures[claim['letter']]})\n\n{claim['shows']}")
    settings = "; ".join(f"{escaped(key)}: {escaped(str(value))}" for key, value in claim["settings"].items())
    return [*blocks, f"Settings: {settings}.", f"`{command}`: {claim['seconds']:.0f} s, code in `{_code(claim)}`."]


def _only(claim: Row, results: Row) -> str:
    """The command that measures this claim alone, as here."""
    quick = " --quick" if results["is_quick"] else ""
    return (
        f"gradreg claims{quick} --only {claim['letter']} --seed {results['seeds'][0]} --seeds {len(results['seeds'])}"
    )


def _code(claim: Row) -> str:
    return CLAIMS[claim["letter"]].measure.__module__


INTERVALS = "Intervals of all sub-claims, each over its own far end: right of the line is what the paper says."

INTRODUCTION = """\
Karakida et al., [Understanding Gradient Regularization in Deep Learning](https://arxiv.org/abs/2210.02720) (ICML 2023),
make five claims. Each is code in `gradreg.studies.claims`: what is measured, in which settings, and by which rule it is
judged, all fixed before the measurement. This page is what the command wrote."""

COMMANDS = """\
```bash
gradreg claims                         # all of it
gradreg claims --quick                 # smaller, under 5 minutes on two cores
gradreg claims --only c e              # some of them
gradreg claims --write docs/claims.md  # also this page and its figures
```"""

PAPER_SCALE = f"""\
## At the size of the paper

The claims above are measured on small tasks that need no download. The paper's own experiment, WideResNet-28-10 on
CIFAR-10 with the grid of γ and ε, is `{PAPER_CONFIG}`. It runs as it is where the binary archive of
CIFAR-10 and GPUs are; `--path` says where the archive is if not here, and `--storage` shares the work among machines:

```bash
gradreg sweep {PAPER_CONFIG}
```"""

PITFALLS = """\
## What to know

- A verdict is about the settings named here. `undecided` is no evidence of absence: with more seeds (`--seeds`) the
  interval shrinks.
- Times of a step mean something on a quiet machine only. Everything else depends on the seeds and, in the last
  digits, on the processor.
- Interrupted, the command keeps each finished claim as a line of `claims.jsonl` and each finished training run as a
  line of `runs.jsonl`."""
