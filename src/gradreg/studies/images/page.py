"""What the study looks like to a reader: on the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradreg.lab.comparison.report import chosen_table, table
from gradreg.lab.comparison.result import taken
from gradreg.lab.comparison.run import duration
from gradreg.lab.page import Block, Code, Figure, Heading, Items, Page, made, plain
from gradreg.lab.stats import WORSE
from gradreg.lab.words import listed, plural, points
from gradreg.studies.claims.claim import FAILS, HOLDS, UNDECIDED
from gradreg.studies.frontier.figure import pareto_figure
from gradreg.studies.frontier.page import reached
from gradreg.studies.frontier.summary import goals, panels
from gradreg.studies.images.figures import gains_figure
from gradreg.studies.images.pieces import PIECES
from gradreg.studies.images.summary import CLAIMS, as_tasks
from gradreg.studies.images.tables import (
    about,
    arms_table,
    as_comparison,
    claims_table,
    controls_table,
    flatness_counts,
    flatness_table,
    glance_table,
    is_earlier,
    kept_table,
    named,
)

Row = Mapping[str, Any]


def told(results: Row) -> list[Block]:
    """On the terminal."""
    pieces = results["pieces"]
    return [
        completeness(results),
        *(block for piece in pieces for block in (table(as_comparison(piece)), piece["verdict"])),
        claims_table(results),
        *([kept_table(results)] if any(piece["kept"] for piece in pieces) else []),
        *(flatness_table(piece) for piece in pieces if piece["flatness"]),
        Items(notes()),
    ]


def completeness(results: Row) -> str:
    """What is there, and what is missing."""
    here, missing = [piece for piece in results["pieces"] if not is_earlier(piece)], results["missing"]
    quick = "A quick look at tiny sizes, which says nothing about the methods. " * results["is_quick"]
    lacking = [f"{piece['name']} ({listed(piece['lacks'])})" for piece in here if piece.get("lacks")]
    arms = f" Arms not yet played: {listed(lacking)}." if lacking else ""
    if not missing:
        return f"{quick}All {len(here)} pieces are here.{arms}"
    by_plan = " by the plan of this version" * any(map(is_earlier, results["pieces"]))
    return (
        f"{quick}{len(here)} of {len(here) + len(missing)} pieces are here{by_plan}; not yet played: {listed(missing)} "
        f"(`gradreg images --resume FOLDER` goes on).{arms}"
    )


def notes() -> list[str]:
    """How to read the numbers."""
    return [
        " ".join(f"*{key}*: {says}" for key, says, *_ in CLAIMS)
        + f" Verdicts: `{HOLDS}` where the whole 95 % interval of the difference, paired by seed, lies above 0, "
        f"`{FAILS}` where it lies below, else `{UNDECIDED}`. No correction for multiplicity: one interval in twenty "
        "misses by chance.",
        "Shares of the gain are given only where F-GR is better than SGD beyond noise; intervals by bootstrap over "
        "seeds, which with few seeds are somewhat too narrow. Cost is that of the very network, in the same run.",
        "What flatness buys: ECE in percent, and how *sure* the model is, the mean of its largest probability: above "
        "its accuracy it is overconfident, below too modest; accuracy in percent under noise, blur and low contrast, "
        "with weights rounded to 8 and 4 bits, and *kept* on five classes after a gentle epoch of fine-tuning on the "
        "other five (rate 0.001); the plain loss L, ‖∇L‖, tr H and λ_max on 1,000 training rows in evaluation mode, "
        "with the labels trained on; ‖W‖, the length of all matrices and kernels. ↑ and ↓: the paired 95 % interval of "
        "the difference to SGD lies above or below 0.",
        "Before a norm layer the length of weights changes nothing but derivatives: a larger weight decay makes "
        "weights shorter, and by that alone ‖∇L‖, tr H and λ_max larger, and the same fine-tuning stronger. Where an "
        "arm has another learning rate or weight decay than SGD, compare it with the row of SGD there, below the arms.",
    ]


def page(results: Row, record: str = "") -> Page:
    """`record`: the file beside it that has its numbers."""
    pieces = results["pieces"]
    earlier = [named(piece) for piece in pieces if is_earlier(piece)]
    drawn = [
        {**piece, "about": about(piece)} for piece in pieces if any(row.get("difference") for row in piece["arms"])
    ]
    return Page(
        "Real images, real networks",
        [
            completeness(results),
            INTRODUCTION,
            *([EARLIER.format(names=plain(listed(earlier)))] if earlier else []),
            judged(results),
            *([GLANCE, glance_table(pieces)] if pieces else []),
            made(results),
            *([Figure("gains", gains_figure(drawn), GAINS)] if drawn else []),
            Heading("The claims"),
            claims_table(results),
            Items(notes()[:1]),
            *_controls(results),
            *_kept(results),
            Heading("What flatness buys besides accuracy"),
            *_counted(pieces),
            *(flatness_table(piece) for piece in pieces if piece["flatness"]),
            Items(notes()[2:]),
            Heading("The arms"),
            ARMS_SAID,
            arms_table(pieces),
            Heading("The pieces"),
            *(block for piece in pieces for block in _section(piece)),
            *AFTERWORD,
            *([_record(pieces, record)] if record else []),
        ],
        "gradreg images",
    )


def judged(results: Row) -> str:
    """How many readings of each claim came out which way, and by name those that do not hold."""
    found = [(claim, piece) for piece in results["pieces"] if not is_earlier(piece) for claim in piece["claims"]]
    if not found:
        return "No claim has been judged yet."
    words = {HOLDS: ("holds", "hold"), FAILS: ("fails", "fail"), UNDECIDED: ("is undecided", "are undecided")}
    count = {verdict: sum(claim["verdict"] == verdict for claim, _ in found) for verdict in words}
    counted = listed([f"{count[verdict]} {words[verdict][count[verdict] != 1]}" for verdict in words])
    failed = [
        f"{claim['key']} on {piece['name']} ({claim['first']} − {claim['second']} {points(claim['difference'])})"
        for claim, piece in found
        if claim["verdict"] == FAILS
    ]
    holding = [claim["key"] for claim, _ in found if claim["verdict"] == HOLDS]
    keys = [claim["key"] for claim, _ in found]
    of_each = [f"*{key}* holds in {holding.count(key)} of {keys.count(key)}" for key in dict.fromkeys(keys)]
    said = f"Of {len(found)} reading{plural(len(found))} of the claims {counted}: {listed(of_each)}."
    named = f" **Does not hold here:** {plain(listed(failed))}." if failed else ""
    return said + _where_longer_harms(found) + named


def _where_longer_harms(found: Sequence[tuple[Row, Row]]) -> str:
    """There F-GR is better at equal time without a gain of its own."""
    pieces = [piece for claim, piece in found if (claim["key"], claim["verdict"]) == ("equal time", HOLDS)]
    count = sum(arm["is_opponent"] and arm["verdict"] == WORSE for piece in pieces for arm in piece["arms"])
    said = f" In {count} of the {len(pieces)} at equal time training for twice as long is itself worse than SGD."
    return said * bool(count)


def _controls(results: Row) -> list[Block]:
    table = controls_table(results)
    if not table.rows:
        return []
    return [Heading("The method, or its learning rate and weight decay?"), CONTROLS, table]


def _kept(results: Row) -> list[Block]:
    if not any(piece["kept"] for piece in results["pieces"]):
        return [
            Heading("What cheaper modes keep"),
            "In no piece does F-GR gain beyond noise: there is nothing to keep.",
        ]
    tasks = as_tasks([{**piece, "about": about(piece)} for piece in results["pieces"]])
    judging = [task for task in tasks if not task["is_earlier"]]
    return [
        Heading("What cheaper modes keep"),
        *([Items(reached(goals(judging)))] if judging else []),
        *([Figure("kept", pareto_figure(panels(tasks)), KEPT)] if tasks else []),
        kept_table(results),
        Items(notes()[1:2]),
    ]


def _counted(pieces: Sequence[Row]) -> list[Block]:
    table = flatness_counts([piece for piece in pieces if not is_earlier(piece)])
    return [COUNTED, table] if table.rows else []


def _section(piece: Row) -> list[Block]:
    plan = piece["plan"]
    base, seeds = plan["base"], piece["seeds"]
    known, are_all = taken(piece)
    source = PIECES[piece["name"]].settings_of
    searched = []
    if not are_all:
        short = plan.get("search_epochs", 0)
        candidates = (
            f"{plan['trials']} candidate{plural(plan['trials'])}" + f" for {short} epoch{plural(short)}" * bool(short)
        )
        again = "for all epochs" if short else "again"
        other = " other" * bool(known)
        searched.append(f"{candidates} of each{other} arm, the best {plan['finalists']} {again} on another seed")
    if known:
        of = "the settings" if are_all else f"{listed(known)} with the settings"
        then = "each at the best of three learning rates" if plan.get("tries_rates") else "whose validation this is"
        searched.insert(0, f"{of} of `{source}`, {then}")
    return [
        Heading(about(piece), 3),
        *([] if is_earlier(piece) else [plain(piece["verdict"])]),
        table(as_comparison(piece)),
        chosen_table(as_comparison(piece)),
        f"`{piece['name']}`: {base['num_train']:,} training rows, batches of {base['batch_size']}, {base['epochs']} "
        f"epochs, {base['optimizer']}; {'; '.join(searched)}; {len(seeds)} test seeds. {piece['num_runs']} runs, "
        f"{duration(piece['seconds'])} of one core; {plain(piece['made']['date'][:10])}."
        + " † Of an earlier plan."
        * is_earlier(piece),
    ]


def _record(pieces: Sequence[Row], record: str) -> str:
    """Where the numbers are."""
    means = [piece["name"] for piece in pieces if not all("scores" in arm for arm in piece["arms"])]
    but = f" (not of {listed(means)}: there, as this page has them)" if means else ""
    return (
        f"Every number of this page is in [{record}]({record}), with each seed's score{but}. `--write` keeps what it "
        "has of pieces that the folder lacks, so that pieces can be played on several machines."
    )


EARLIER = (
    "**Read this first.** {names} were played by an earlier plan of this study, which searched otherwise: their "
    "verdicts are not counted below."
)
CONTROLS = (
    "Where validation rows preferred for an arm another learning rate or weight decay than for SGD, although each was "
    "tried at the other's. This is SGD there, on the same test seeds: what is left in the last column is not the "
    "learning rate's nor the weight decay's. Both were chosen for the arm, and favour it: what it gains over SGD as "
    "tuned is in the column before that of SGD there. A difference without an interval is one of means."
)
KEPT = (
    "The share of F-GR's gain that each arm keeps, over what it costs on the very network, with 95 % intervals. Plain "
    "training is at (1, 0); what lies on the line is the most that can be kept at that cost."
)
GLANCE = (
    "In one look: the accuracy of tuned plain training on test rows, and what others gain over it, in points with 95 % "
    "intervals over paired seeds, ↑ or ↓ where that is beyond chance; ± is half of a 95 % interval. `cheap` is "
    "`gradreg.cheap`. All arms are in the figure below."
)
COUNTED = (
    "In how many pieces a measure lies beyond chance above ↑ or below ↓ that of SGD. A piece counts where the arm has "
    "SGD's own learning rate and weight decay, since these alone move every measure; of plain training for twice as "
    "long every piece. An empty cell: in none."
)
ARMS_SAID = (
    "In the settings below lr and wd are learning rate and weight decay; *ratio* is the ‖ĝ − g1‖/‖g1‖ that γ follows; "
    "ε and ρ say how far a pass is displaced: ε times the gradient, or a length with SAM, MSAM, `Previous` and a "
    "momentum; ρ ahead how far all of a step is."
)
GAINS = (
    "What each arm gains over plain training, mean and 95 % interval of the paired differences on 10,000 test rows. "
    "Right of the dashed line is better; a hollow circle may be zero."
)
INTRODUCTION = (
    "Fashion-MNIST, real images of clothes; a ResNet of 10 layers with BatchNorm by SGD, and a small vision "
    "transformer by AdamW. SGD stands for plain training. Every arm was tuned on validation rows, learning rate "
    "and weight decay of SGD first and longest, and read on the 10,000 test rows; the ResNet at 28×28 pixels with "
    "the settings of 14×14, each arm at the best of three learning rates or of that of SGD. Where an arm and SGD came "
    "to different learning rates or weight decays, each was tried at the other's."
)
AFTERWORD: tuple[Block, ...] = (
    Heading("What we would not believe ourselves"),
    Items(
        [
            "Five seeds: a difference that they do not show is `undecided`, not absent.",
            "The plan was mended twice after test rows had been read: plain training had been tuned too little, and "
            "then had places that the other arms did not see. Both mends were of the search alone.",
            "A cost is that of single steps, timed with nothing beside them, and its interval that of the pairs of one "
            "call: whole runs and another call may differ by more. The record has the seconds of each arm's runs.",
            "The networks are narrow (8 channels, 32 features), the ViT sees 28×28 pixels in patches of 7 a side (of 4 "
            "in vit-28-modes), the training part is 10,000 rows of 55,000, and the schedules are short: what two cores "
            "bear. On larger networks the order may change.",
            "Nine candidates an arm are few: an arm with more settings (γ or its ratio, and ε) is searched more "
            "coarsely than one with fewer (ρ).",
            "5,000 validation rows and one seed of each finalist decide between close candidates, with their noise.",
            "At 28×28 pixels the ResNet has the settings that its arms came to at 14×14, but for the learning rate: "
            "what is best at full resolution may lie elsewhere.",
            "Costs below two passes are of these small networks, where a pass over few rows is dearer than its share.",
        ]
    ),
    Heading("To measure it again"),
    Code(
        "gradreg images                                   # all pieces, hours on two cores\n"
        f"gradreg images --only {next(iter(PIECES))}           # one of them\n"
        "gradreg images --resume results/images-…         # goes on where it was stopped\n"
        "gradreg images --quick                           # that all of it runs, in minutes\n"
        "gradreg images --resume FOLDER --write docs/images.md  # also this page, figures and record",
        "bash",
    ),
    "The data: Debian's package `dataset-fashion-mnist`, or the four files in a folder named by `--path`.",
)
