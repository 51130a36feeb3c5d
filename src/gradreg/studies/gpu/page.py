"""What was measured, as a reader sees it: on the terminal, and as a page. Functions of results.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradreg.lab.comparison.report import chosen_table
from gradreg.lab.comparison.report import table as arms_table
from gradreg.lab.config import RunConfig
from gradreg.lab.cost.grid import table as grid_table
from gradreg.lab.page import Block, Code, Heading, Items, Page, code, made, plain
from gradreg.lab.tables import Table
from gradreg.lab.words import BRACKETS, listed, plural, ranged
from gradreg.studies.images.page import claims_table, kept_table
from gradreg.studies.images.pieces import Piece as Images
from gradreg.studies.images.summary import piece_row

Row = Mapping[str, Any]
DRY = "This is a dry run at toy size"
"""So begins the page of one."""


def first(results: Row) -> str:
    """What the page is made of, and what is missing: the first sentence."""
    rows = results["pieces"]
    whole = [row for row in rows if row["is_whole"]]
    devices = list(dict.fromkeys(row["device"] for row in whole))
    on = f" on {listed(devices)}" if devices else ""
    missing = [f"{row['name']} ({row['why'] or 'not begun'})" for row in rows if not row["is_whole"]]
    lacks = f"; not whole: {', '.join(missing)}" if missing else ""
    made_of = f"made of {len(whole)} of {len(rows)} pieces{on}{lacks}"
    if results["is_quick"]:
        return (
            f"**{DRY}, which shows that the command works and says nothing about a GPU or a method**: {plain(made_of)}."
        )
    return f"**{'This page is not whole' if missing else 'All of it was measured'}**: {plain(made_of)}."


def told(results: Row) -> list[Block]:
    """On the terminal."""
    shown = [block.text if isinstance(block, Heading) else block for block in _numbers(results)]
    return [first(results).replace("**", ""), _pieces(results), *shown]


def page(results: Row, has_numbers: bool = True) -> Page:
    """`has_numbers`: without them it says what is measured, how, and how large."""
    numbers = _numbers(results) if has_numbers else [NO_NUMBERS]
    return Page(
        "On a GPU",
        [
            first(results),
            made(results),
            Heading("The pieces"),
            _pieces(results),
            Items([*_sittings(results), *NOTES]),
            *numbers,
            Heading("To measure it"),
            *HOW,
        ],
        "gradreg gpu",
    )


def _pieces(results: Row) -> Table:
    whole = "played at toy size" if results["is_quick"] else "whole"
    rows = [
        (
            row["name"],
            row["about"],
            f"{row['minutes']:g}",
            f"{row['took'] / 60:.1f}" if row["is_whole"] else "–",
            whole if row["is_whole"] else row["why"] or "not begun",
        )
        for row in results["pieces"]
    ]
    return Table("", ("piece", "what", "planned, min on an H100", "took, min", "state"), rows)


def _sittings(results: Row) -> list[str]:
    return [
        f"{code(row['command'])} on {plain(row['device'])}, {plain(row['date'])}; {plain(row['driver'])}"
        f"{'; ' if row['driver'] else ''}{plain(row['machine'])}."
        for row in results["sittings"]
    ]


def _numbers(results: Row) -> list[Block]:
    blocks: list[Block] = []
    for row in results["pieces"]:
        if row["result"] is not None:
            show = next(show for key, show in SHOWN.items() if key in row["result"])
            part = "" if row["is_whole"] else f" ({row['why']})"
            blocks += [Heading(f"{row['name']}: {row['about']}{part}"), *show(row["name"], row["result"])]
    return blocks


def _tests(name: str, result: Row) -> list[Block]:
    del name
    return [plain(result["summary"]), *([Code("\n".join(result["failed"]))] if result["failed"] else [])]


def _steps(name: str, result: Row) -> list[Block]:
    """A column for each model: the time of a step over that of SGD's in the same way."""
    del name
    models = result["models"]
    headings = [f"{m['name']}\nSGD {1e3 * m['sgd_seconds']:.3g} ms" for m in models]
    rows = []
    for k, first_row in enumerate(models[0]["methods"]):
        cells = [model["methods"][k] for model in models]
        rows.append([first_row["name"], *(ranged(c["time"], 2, "", BRACKETS) if c["time"] else "–" for c in cells)])
    refused = [
        f"{plain(row['name'])} with {plain(model['name'])}: {plain(row['refused']).rstrip('.')}."
        for model in models
        for row in model["methods"]
        if row["refused"]
    ]
    memory = [row for row in models[0]["methods"] if row.get("memory_ratio")]
    blocks: list[Block] = [Table("Time of a step, over SGD's", ["", *headings], rows)]
    if memory:
        peaks = [
            [row["name"], *(_peak(model["methods"][k]) for model in models)]
            for k, row in enumerate(models[0]["methods"])
        ]
        blocks.append(Table("Peak memory of a step, over SGD's", ["", *(m["name"] for m in models)], peaks))
    about = ", ".join(
        f"{m['name']} {m['batch_size']} rows, {m['parameters']:,} parameters, {m['rounds']} rounds" for m in models
    )
    return [*blocks, Items([f"{plain(about)}; {models[0]['clock']}.", *refused])]


def _peak(row: Row) -> str:
    return f"{row['memory_ratio']:.2f}" if row.get("memory_ratio") else "–"


def _grid(name: str, result: Row) -> list[Block]:
    del name
    first_grid = result["grids"][0]
    size = f"{first_grid['num_configs']} configurations of {first_grid['num_steps']} steps, {result['rounds']} rounds."
    return [grid_table(result), Items([size])]


def _comparison(name: str, result: Row) -> list[Block]:
    seeds = len(result["seeds"])
    blocks: list[Block] = [plain(result["verdict"]), arms_table(result)]
    if any(row["name"] == "F-GR" for row in result["arms"]):
        row = piece_row(Images(name, name, RunConfig(), ()), result, ())
        blocks += [claims_table({"pieces": [row]}), *([kept_table({"pieces": [row]})] if row["kept"] else [])]
    plan = result["plan"]
    epochs = plan["search_epochs"]
    search = f"{plan['trials']} candidate{plural(plan['trials'])} of {epochs} epoch{plural(epochs)}"
    test = f"{seeds} seeds of {plan['base']['epochs']} epochs"
    how = [f"Each arm: {search}, then {test}; {plain(result['machine'])}.", *map(plain, result["not_afforded"])]
    return [*blocks, chosen_table(result), Items(how)]


SHOWN: dict[str, Callable[[str, Row], Sequence[Block]]] = {
    "summary": _tests,
    "models": _steps,
    "grids": _grid,
    "arms": _comparison,
}
"""By a key that results of a kind have."""

NO_NUMBERS = "The numbers of a dry run are left out here: they are of toy models, and show nothing."
NOTES = (
    "Fashion-MNIST, 60,000 rows: 55,000 to train on, 5,000 to choose by, and 10,000 test rows that are read once.",
    "Times of a step: on a model of its own and the same batch each method makes one in every round, in an order that "
    "rotates; printed is the median over rounds of the ratio to the SGD step of the same round, with its 95 % interval "
    "by bootstrap. The clock is read when the device is done. `cheap` is the mean of four steps, one of them with a "
    "penalty on a quarter of the batch; `Split` displaces a half of the batch, along the momentum.",
    "fp32 means that convolutions may use TF32, as PyTorch lets them by default, and matrix products may not. Beside "
    "each way stands the SGD step of the same way, in milliseconds.",
    "Comparisons train in bf16 with channels last, but for the MLP; several processes share the device, so that the "
    "seconds of a run mean nothing, and costs are taken afterwards with nothing beside them.",
    "The searches are short: few candidates, each for a part of the epochs, which may choose too small a weight decay; "
    "each arm has its own, and where it is not that of SGD, a difference of tenths may be the weight decay's.",
    "No correction for the number of intervals.",
)
HOW: tuple[Block, ...] = (
    "It needs a Python with torch for the device and the packages of the extra `lab`, no installation of gradreg, and "
    "no network. The data is a folder with the four files of Fashion-MNIST, 30 MB, which may travel with the clone in "
    "`data/`, which git ignores; without `--path` it is that of Debian's package `dataset-fashion-mnist`.",
    Code(
        "make gpu                                         # all of it, and docs/gpu.md\n"
        'make gpu ARGS="--path data/fashion-mnist"        # with data that travelled along\n'
        "PYTHONPATH=src python3 -m gradreg gpu --quick    # the dry run, on a CPU too\n"
        "gradreg gpu --only graph resnet-18               # some pieces\n"
        "gradreg gpu --out results/gpu --minutes 9        # begin none that would end later\n"
        "gradreg gpu --resume results/gpu --minutes 9     # what is left\n"
        "timeout -s INT 540 gradreg gpu --out results/gpu; tar -czf gpu.tar.gz results/gpu",
        "bash",
    ),
    "Each piece is kept as it ends, and of a comparison each run; so after Ctrl-C, a kill or a full disk `--resume` "
    "goes on with what is left, on another machine too. The page is made of what there is.",
)
