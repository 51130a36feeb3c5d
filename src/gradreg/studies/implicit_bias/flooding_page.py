"""What `gradreg flooding` shows: tables on the terminal, a page in the folder. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure as Drawing

from gradreg.lab.figures import LOOKS, as_svg, band, legend, logarithmic, panels
from gradreg.lab.page import Block, Figure, Heading, Items, Page, made
from gradreg.lab.tables import Table
from gradreg.lab.words import percent, ranged

Row = Mapping[str, Any]


def told(results: Row) -> list[Block]:
    """On the terminal: the identity, then a table and the counts of each mode."""
    return [_identity(results), *_modes(results), Items(_notes(results))]


def _modes(results: Row) -> list[Block]:
    return [block for mode in results["modes"] for block in (_table(mode), Items(_counts(mode)))]


def page(results: Row) -> Page:
    worst = max(row["relative_error"] for row in results["identity"])
    explained = [f"{_cosine(mode)} with {mode['name']}" for mode in results["modes"]]
    return Page(
        "How much gradient regularization does flooding really perform?",
        [
            "Flooding descends while the loss is above a level b and ascends while it is below. Two such steps on one "
            "batch that straddle the level are one step of the penalty alone, with ε = η: up and then down F-GR, down "
            f"and then up B-GR. Here that identity holds to a relative error of {worst:.0e}. In whole runs the cosine "
            f"between what such a pair did and the step that the identity predicts is {' and '.join(explained)}.",
            made(results),
            Figure("flooding", figure(results), CAPTION),
            Heading("Whole runs"),
            *_modes(results),
            Heading("The identity"),
            _identity(results),
            Heading("How it was measured"),
            Items([*_notes(results), *WORDS]),
        ],
        "gradreg flooding",
    )


CAPTION = (
    "‖∇L‖² of the plain loss on the training rows during training, means and 95 % intervals over seeds. Where flooding "
    "regularizes, its line falls while the loss stays at the level; the others go on to a loss near zero, where the "
    "gradient vanishes too, so that ends do not compare."
)
WORDS = (
    "A *pair* is two successive steps of opposite sign, none counted twice. The *effective γ* of flooding is η · pairs "
    "/ (descents − ascents): over a run it adds up η (descents − ascents) of gradient and η² · pairs of penalty.",
)


def _cosine(mode: Row) -> str:
    return ranged(mode["explained"], 2) if mode["explained"] else "unknown (the level was not reached)"


def _identity(results: Row) -> Table:
    orders = {"forward": "up, down: F-GR", "backward": "down, up: B-GR"}
    rows = [(orders[r["scheme"]], f"{r['relative_error']:.1e}", f"{r['rounding']:.1e}") for r in results["identity"]]
    title = "Two flooded steps across the level against one step of the penalty"
    return Table(title, ("order", "relative error of the displacement", "rounding of the weights"), rows)


def _table(mode: Row) -> Table:
    title = f"{mode['name']}: η = {mode['rate']:g}, b = {mode['level']:g}, {mode['num_steps']} steps"
    rows = []
    for name, row in mode["methods"].items():
        gamma = mode["counts"]["gamma"] if name == "Flooding" else row["gamma"]
        penalty = ("", "") if name == "SGD" else (f"{mode['rate']:g}", ranged(gamma, 2))
        ends = (ranged(row["train_loss"]), f"{row['squared_norm']['mean']:.2e}", percent(row["accuracy"]))
        rows.append((name, *penalty, *ends))
    return Table(title, ("method", "ε", "γ", "training loss", "‖∇L‖²", "test accuracy, %"), rows)


def _counts(mode: Row) -> list[str]:
    counts, log2 = mode["counts"], mode["log2_fall"]
    fall = None if log2 is None else {key: 2**value for key, value in log2.items()}
    return [
        f"Steps of flooding in pairs across the level: {ranged(counts['pair_share'], 2)} of all, "
        f"{ranged(counts['pair_share_after_level'], 2)} after the level was first reached.",
        f"Cosine of what a pair did and the penalty step that the identity predicts: {ranged(mode['explained'], 4)}.",
        f"‖∇L‖² in the last quarter over that where the level was first reached: {ranged(fall, 2)}.",
    ]


def _notes(results: Row) -> list[str]:
    return [
        f"Task: {results['task']}, float64, plain SGD without momentum or weight decay. γ of flooding is the effective "
        "one, and that of F-GR is the same. Means and 95 % intervals (Student's t) over "
        f"{len(results['seeds'])} seeds.",
    ]


@as_svg
def figure(results: Row) -> Drawing:
    """‖∇L‖² of the plain loss on the training rows, against the step."""
    titles = [f"{mode['name']}\nη = {mode['rate']:g}, b = {mode['level']:g}" for mode in results["modes"]]
    drawing, every = panels(titles, 4.5, 3.2)
    for axes, mode in zip(every, results["modes"]):
        for name, row in mode["methods"].items():
            points = [p for p in row["trace"] if p["log10_squared_norm"]]
            intervals = [{key: 10**value for key, value in p["log10_squared_norm"].items()} for p in points]
            band(axes, [p["step"] for p in points], intervals, LOOKS[name], linewidth=2)
        logarithmic(axes.yaxis)
        axes.set_xlabel("step")
    every[0].set_ylabel("‖∇L‖², all training rows")
    labels = {"SGD": "SGD", "Flooding": "flooding", "F-GR": "F-GR with ε = η and the effective γ of that flooding"}
    legend(drawing, [LOOKS[name].handle(label) for name, label in labels.items()])
    return drawing
