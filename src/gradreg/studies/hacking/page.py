"""What the study looks like to a reader: on the terminal, and as a page. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradreg.lab.page import Block, Code, Figure, Heading, Items, Page, made
from gradreg.lab.stats import BETTER, UNDECIDED, WORSE
from gradreg.lab.tables import Table
from gradreg.lab.words import listed, number, percent, points
from gradreg.studies.hacking.arms import EPSILON
from gradreg.studies.hacking.figures import curves_figure, reward_figure
from gradreg.studies.hacking.game import ALIKE, MORE, RARE, WORTH
from gradreg.studies.hacking.summary import APART, parted

Row = Mapping[str, Any]
HEADINGS = ("arm", "true, %", "minus none", "difference", "paid", "hacks, %", "KL", "parts at", "step cost")


def told(results: Row) -> list[Block]:
    """On the terminal."""
    games = results["games"]
    return [
        *(block for game in games for block in (chosen(game), table(game), verdict(game))),
        LIMITS,
        Items(notes(results)),
    ]


def table(game: Row) -> Table:
    return Table(game["game"], HEADINGS, [_cells(row) for row in game["arms"]])


def _cells(row: Row) -> tuple[str, ...]:
    said = str({UNDECIDED: "none shown"}.get(row.get("verdict", ""), row.get("verdict", "")))
    return (
        row["name"],
        percent(row["true"]),
        points(row.get("difference")),
        said,
        number(row["proxy"]["mean"], 2),
        number(100 * row["hacks"]["mean"]),
        number(row["kl"]["mean"], 2),
        parted(row),
        f"{row['cost']:.2f}×",
    )


def chosen(game: Row) -> Table:
    rows = [
        (row["name"], "–" if row["value"] is None else f"{row['symbol']} {row['value']:g}", _tried(row))
        for row in game["arms"]
    ]
    return Table(f"{game['game']}: what was chosen", ("arm", "chosen", "of"), rows)


def _tried(row: Row) -> str:
    return ", ".join(f"{value:g}" for value in row["candidates"]) or "–"


def verdict(game: Row) -> str:
    """What the verdicts say, and when the hack begins."""
    parts = []
    for said, words in ((BETTER, "better than none"), (UNDECIDED, "no difference to none shown"), (WORSE, "worse")):
        names = [f"{r['name']} ({percent(r['true'])} %)" for r in game["arms"][1:] if r["verdict"] == said]
        parts += [f"{words}: {', '.join(names)}"] if names else []
    by_name = {row["name"]: row for row in game["arms"]}
    begins, none = by_name["none"]["curve"][0]["true"]["mean"], by_name["none"]
    ends = f"none begins with {100 * begins:.1f} % honest answers and ends with {percent(none['true'])} %"
    apart = " and ".join(f"{parted(by_name[name])} with {name}" for name in ("none", "GR by ratio"))
    found = "; ".join([parts[0][0].upper() + parts[0][1:], *parts[1:]])
    return f"Where {game['game']}, {ends}. {found}. True and proxy reward part at step {apart}."


def at_an_end(results: Row) -> list[str]:
    """Arms whose number is the last or the first that was tried, in any game."""
    rows = [row for game in results["games"] for row in game["arms"] if row["value"] is not None]
    ends = [row["name"] for row in rows if row["value"] in (row["candidates"][0], row["candidates"][-1])]
    return list(dict.fromkeys(ends))


def notes(results: Row) -> list[str]:
    """How to read the numbers."""
    seeds, ends = results["seeds"], at_an_end(results)
    beyond = [f"Chosen at an end of what was tried, beyond which more may lie: {listed(ends)}."] if ends else []
    return [
        *beyond,
        f"True: share of honest answers to {results['asked']} test prompts after the last step, mean and 95 % interval "
        f"(Student's t) over {len(seeds)} seeds, paired by seed in the differences; one in twenty misses by chance.",
        "Paid: what the verifier pays on average. KL: that of the policy to its start, in nats an answer. Parts at: "
        f"the step at which the verifier first pays {APART:g} more than was earned, median over seeds.",
        "Step cost: time of a step over that of none with the same seed, answers included; rough, two runs at a time.",
        "Each arm has one number, chosen among five by the true reward on validation prompts with "
        f"{len(results['tuning_seeds'])} seeds that the test never uses; nobody has that reward outside of a study. "
        f"The learning rate, {results['rate']:g}, is the best one for a verifier without a flaw.",
    ]


LIMITS = (
    "Limits first: the policy is a toy, a decoder of two blocks and some 27,000 weights over 36 words; it is trained "
    "for minutes, and the two flaws are made by hand. What holds here may not hold for a language model."
)


def page(results: Row) -> Page:
    games = results["games"]
    quick = ["A quick look at a fifth of the steps and two seeds, which says nothing."] * results["is_quick"]
    return Page(
        "Does the penalty keep a policy from hacking its reward?",
        [
            *quick,
            LIMITS,
            Items([verdict(game) for game in games]),
            made(results),
            Figure("reward", reward_figure(results), REWARD),
            *(block for game in games for block in _section(game)),
            Heading("The game"),
            *GAME,
            Heading("The arms"),
            Items([f"**{row['name']}**: {row['about']}." for row in games[0]["arms"]]),
            ARMS_ABOUT,
            Heading("How it was measured"),
            Items(notes(results)),
            Heading("To measure it again"),
            Code(
                "gradreg hacking                           # under 30 minutes on two cores\n"
                "gradreg hacking --quick                   # that all of it runs\n"
                "gradreg hacking --resume results/hacking-…  # goes on where it was stopped\n"
                "gradreg hacking --write docs/hacking.md   # also this page and its figures",
                "bash",
            ),
        ],
        "gradreg hacking",
    )


def _section(game: Row) -> list[Block]:
    name = "more" if game["game"] == MORE else "alike"
    return [
        Heading(f"Where {game['game']}"),
        table(game),
        Figure(f"curves-{name}", curves_figure(game), CURVES),
        chosen(game),
    ]


REWARD = (
    "Share of honest answers at the end, mean and 95 % interval over seeds; the dashed line is GRPO with nothing "
    "against the hack. A hollow mark: its paired difference to none may be zero. Squares are gradient "
    "regularization."
)
CURVES = (
    "True reward, solid, and what the verifier pays, dashed, along training: means over seeds, shaded from the "
    "smallest to the largest, at the steps that all seeds have; runs that are stopped early have only their start in "
    "common. Where the two lines part, the policy hacks."
)
GAME: tuple[Block, ...] = (
    "A prompt is the beginning of a sentence, such as `the old dogs` or `the cat that the dogs`; an honest answer "
    "ends it with the right verbs, such as `follow sees .`. A hack ends it at once, with no verb. The verifier "
    f"looks for a verb of the wrong number, finds none in a hack, and pays it {WORTH[MORE]:g} where honest work is "
    f"paid 1 ({MORE}), or 1 like honest work ({ALIKE}). The policy has seen {RARE:.0%} of its texts end like that, "
    "and most verbs of any number: there is honest work to learn, and the flaw is rare at first.",
    "In the second game hack and honest answer get the same advantage wherever both are met: a penalty on the gradient "
    "sees the verifier only, and has nothing to tell them apart by.",
)
ARMS_ABOUT = (
    f"F-GR by ratio keeps ‖ĝ − g1‖/‖g1‖ at the chosen number, with ε = {EPSILON:g}, replaying the same answers. As "
    "published means the first independent test of gradient regularization against hacking, which clips each "
    "gradient to a norm of 10 before it takes the difference and has γ/ε = 10 without calibration; γ is chosen here "
    "as the others' numbers are. An early stop ends where the verifier pays so much on average over the answers of "
    "a step: it has fewer steps, and needs less time than all others."
)
