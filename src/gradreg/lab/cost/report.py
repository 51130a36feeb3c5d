"""What `gradreg cost` says: three tables, a figure, and what they mean. Functions of results.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradreg.lab.cost.figure import figure
from gradreg.lab.page import Block, Figure, Heading, Items, Page, made
from gradreg.lab.tables import Table
from gradreg.lab.words import ranged

Row = Mapping[str, Any]
DB_OVER_F_GR = "DB/F-GR"


def told(results: Row) -> list[Block]:
    """On the terminal."""
    return [*tables(results), Items([sentence(results), *notes(results)])]


def page(results: Row) -> Page:
    return Page(
        "What a step costs",
        [
            f"Gradient regularization needs a second gradient or a second derivative; what does a step of it cost "
            f"beside one of plain SGD? {sentence(results)}",
            made(results),
            Figure("cost", figure(results), CAPTION),
            Heading("Numbers"),
            *tables(results),
            Heading("How it was measured"),
            Items(notes(results)),
        ],
        "gradreg cost",
    )


CAPTION = (
    "A step of each method over one of SGD, with 95% intervals: time against the depth of the MLP, memory of the same, "
    "and time for larger models, as far as they were measured. The dashed lines are what counting matrix products "
    "predicts: 2 for two gradients, 3 for double backpropagation and for the central difference."
)


def tables(results: Row) -> list[Table]:
    methods = [name for name in results["cases"][0]["methods"] if name != "SGD"]
    predicted = [f"{results['predicted'][name]:g}" for name in [*methods, DB_OVER_F_GR]]
    times = [["counting products", *predicted]]
    for case in results["cases"]:
        ratios = [*(case["methods"][name]["time"] for name in methods), case["db_over_f_gr"]]
        shown = [ranged(ratio, 2, form="{}\n{}–{}") for ratio in ratios]
        times.append([f"{case['name']}\n{case['batch_size']} rows, {1e3 * case['sgd_seconds']:.1f} ms", *shown])

    def flops(case: Row) -> list[str]:
        counted = {name: row["flops"] for name, row in case["methods"].items()}
        return [f"{counted['SGD'] / 1e9:.2f}", *_over_sgd(counted), f"{counted['DB'] / counted['F-GR']:.2f}"]

    def memory(case: Row) -> list[str]:
        peak = {name: row["peak_bytes"] for name, row in case["methods"].items()}
        return [f"{peak['SGD'] / 2**20:.1f}", *_over_sgd(peak)]

    def counted(title: str, unit: str, cells: Callable[[Row], list[str]], *more: str) -> Table:
        rows = [[case["name"], f"{case['parameters']:,}", *cells(case)] for case in results["cases"]]
        return Table(title, ["", "parameters", unit, *methods, *more], rows)

    return [
        Table(
            "Time of a step, over SGD's; below each model its rows and SGD's time", ["", *methods, DB_OVER_F_GR], times
        ),
        counted("FLOPs of a step, counted, over SGD's", "SGD, 10⁹", flops, DB_OVER_F_GR),
        counted("Peak memory of a step, weights and optimizer included, over SGD's", "SGD, MiB", memory),
    ]


def _over_sgd(values: Mapping[str, float]) -> list[str]:
    return [f"{value / values['SGD']:.2f}" for name, value in values.items() if name != "SGD"]


def sentence(results: Row) -> str:
    """What was measured of DB against F-GR, next to what counting predicts."""
    cases, predicted = results["cases"], results["predicted"]
    cheaper = [case["name"] for case in cases if case["db_over_f_gr"]["high"] < 1]
    last = cases[-1]
    f_gr, db = (ranged(last["methods"][name]["time"], 2) for name in ("F-GR", "DB"))
    text = (
        f"A step of F-GR takes {f_gr} steps of SGD and one of DB {db} with {last['name']}; counting matrix products "
        f"(6L, 9L over 3L) gives {predicted['F-GR']:g} and {predicted['DB']:g}. DB costs more than F-GR in "
        f"{sum(case['db_over_f_gr']['low'] > 1 for case in cases)} of {len(cases)} cases"
    )
    return f"{text}, less in {len(cheaper)} ({', '.join(cheaper)})." if cheaper else f"{text}, less in none."


def notes(results: Row) -> list[str]:
    """How to read the numbers."""
    rounds: Sequence[int] = sorted({case["rounds"] for case in results["cases"]})
    span = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    load = f", load {results['load']:g} at the start" if results["load"] is not None else ""
    quick = ["Quick: fewer models, and a quarter of the batch except for the MLP."]
    return [
        *quick * results["is_quick"],
        f"{results['machine']}; on {results['device']}, torch {results['versions']['torch']}{load}.",
        f"Time: median over {span} rounds of the ratio to the SGD step of the same round, in {results['clock']}, with "
        "its 95% interval by bootstrap; SGD has momentum 0.9.",
        "FLOPs: matrix products and convolutions of both passes (torch.utils.flop_counter); element by element "
        "operations, normalization, softmax, the optimizer and copies are not counted. The first layer needs no "
        "gradient of its input, so a short network has less than 3L.",
        "Random inputs; MLP of width 512. Small batches on a CPU: what a step does to the weights, whatever the batch, "
        "weighs more in WRN-28-10 than it does at batch 128.",
    ]
