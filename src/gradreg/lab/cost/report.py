"""What `gradreg cost` prints: three tables and what they say. Functions of results.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gradreg.lab.tables import console, say, table_of

Row = Mapping[str, Any]
DB_OVER_F_GR = "DB/F-GR"


def print_tables(results: Row, folder: Path) -> None:
    out = console()
    out.print(_time_table(results))
    for table in (_flops_table(results), _memory_table(results)):
        out.print()
        out.print(table)
    out.print()
    say(out, *(f"- {line}" for line in [sentence(results), *notes(results)]))
    say(out, "", f"{results['seconds']:.0f} s. Figure and data: {folder}")


def ratio(interval: Row) -> str:
    """`2.03 (2.01 to 2.05)`."""
    return f"{interval['median']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def _cell(interval: Row) -> str:
    """The median, and the interval below it."""
    return f"{interval['median']:.2f}\n{interval['low']:.2f}–{interval['high']:.2f}"


def _methods(results: Row) -> list[str]:
    return [name for name in results["cases"][0]["methods"] if name != "SGD"]


def _time_table(results: Row) -> Table:
    methods = _methods(results)
    title = "Time of a step, over SGD's; below each model its rows and SGD's time"
    table = table_of(title, ["", *methods, DB_OVER_F_GR], gap=1)
    table.add_row("counting products", *(f"{results['predicted'][name]:g}" for name in [*methods, DB_OVER_F_GR]))
    for case in results["cases"]:
        table.add_row(
            f"{case['name']}\n{case['batch_size']} rows, {1e3 * case['sgd_seconds']:.1f} ms",
            *(_cell(case["methods"][name]["time"]) for name in methods),
            _cell(case["db_over_f_gr"]),
        )
    return table


def _flops_table(results: Row) -> Table:
    def cells(case: Row) -> list[str]:
        flops = {name: row["flops"] for name, row in case["methods"].items()}
        return [f"{flops['SGD'] / 1e9:.2f}", *_over_sgd(flops), f"{flops['DB'] / flops['F-GR']:.2f}"]

    return _counted(results, "FLOPs of a step, counted, over SGD's", "SGD, 10⁹", cells, [DB_OVER_F_GR])


def _memory_table(results: Row) -> Table:
    def cells(case: Row) -> list[str]:
        peak = {name: row["peak_bytes"] for name, row in case["methods"].items()}
        return [f"{peak['SGD'] / 2**20:.1f}", *_over_sgd(peak)]

    return _counted(results, "Peak memory of a step, weights and optimizer included, over SGD's", "SGD, MiB", cells, [])


def _over_sgd(values: Mapping[str, float]) -> list[str]:
    return [f"{value / values['SGD']:.2f}" for name, value in values.items() if name != "SGD"]


def _counted(results: Row, title: str, unit: str, cells: Callable[[Row], list[str]], more: Sequence[str]) -> Table:
    table = table_of(title, ["", "parameters", unit, *_methods(results), *more])
    for case in results["cases"]:
        table.add_row(case["name"], f"{case['parameters']:,}", *cells(case))
    return table


def sentence(results: Row) -> str:
    """What was measured of DB against F-GR, next to what counting predicts."""
    cases = results["cases"]
    dearer = [case["name"] for case in cases if case["db_over_f_gr"]["low"] > 1]
    cheaper = [case["name"] for case in cases if case["db_over_f_gr"]["high"] < 1]
    last = cases[-1]
    predicted = results["predicted"]
    text = (
        f"A step of F-GR takes {ratio(last['methods']['F-GR']['time'])} steps of SGD and one of DB "
        f"{ratio(last['methods']['DB']['time'])} with {last['name']}; counting matrix products (6L, 9L over 3L) gives "
        f"{predicted['F-GR']:g} and {predicted['DB']:g}. DB costs more than F-GR in {len(dearer)} of {len(cases)} cases"
    )
    return f"{text}, less in {len(cheaper)} ({', '.join(cheaper)})." if cheaper else f"{text}, less in none."


def notes(results: Row) -> list[str]:
    """How to read the numbers."""
    rounds = sorted({case["rounds"] for case in results["cases"]})
    span = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    load = f", load {results['load']:g} at the start" if results["load"] is not None else ""
    quick = ["Quick: fewer models, and a quarter of the batch except for the MLP."] if results["is_quick"] else []
    return [
        *quick,
        f"{results['machine']}; on {results['device']}, torch {results['versions']['torch']}{load}.",
        f"Time: median over {span} rounds of the ratio to the SGD step of the same round, in {results['clock']}, with "
        "its 95% interval by bootstrap; SGD has momentum 0.9.",
        "FLOPs: matrix products and convolutions of both passes (torch.utils.flop_counter); element by element "
        "operations, normalization, softmax, the optimizer and copies are not counted. The first layer needs no "
        "gradient of its input, so a short network has less than 3L.",
        "Random inputs; MLP of width 512. Small batches on a CPU: what a step does to the weights, whatever the batch, "
        "weighs more in WRN-28-10 than it does at batch 128.",
    ]
