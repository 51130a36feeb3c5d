"""What a result looks like to a reader: a table on the terminal, a page in the folder. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradreg.lab.page import inline, render
from gradreg.lab.tables import console, say, table_of
from gradreg.lab.words import accuracy, difference, diverged, settings, verdict_words
from gradreg.studies.demo.tasks import RANDOM_SHARE

Row = Mapping[str, Any]
_HEADINGS = ("method", "test, %", "minus SGD, points", "difference", "loss", "‖∇L‖", "cost")


def notes(results: Row) -> list[str]:
    """How to read the numbers; the same words below the table and on the page."""
    seeds = results["seeds"]
    quick = (
        ["Quick: one of the four tasks and few seeds; run `gradreg demo` for all of them."]
        if results["is_quick"]
        else []
    )
    return [
        *quick,
        f"Mean and 95% interval (Student's t) over {len(seeds)} seeds, {seeds[0]} to {seeds[-1]}; the last step is "
        "scored, on test rows. A seed decides the initialization, the order of the batches and the random labels; the "
        "split of the rows is fixed.",
        "A verdict comes from the interval of the difference to SGD, seed by seed; at 95%, one in twenty of them "
        "is expected to be wrong where there is no difference.",
        f"Random labels: {RANDOM_SHARE:.0%} of the training labels are another class; validation and test are clean.",
        "Loss and ‖∇L‖ are of the plain cross-entropy on all training rows, in evaluation mode, after the last step.",
        "Cost is the median ratio of a method's step to SGD's over interleaved rounds in this run, in processor time. "
        "These models are small, so that what Python does in a step weighs more than in larger ones (`make bench`).",
        "Hyper-parameters, learning rate and weight decay first of all, were chosen on validation rows by `{command}` "
        "({date}); SGD was given more candidates than any other method.".format(**results["tuned"]),
    ]


def print_table(results: Row, folder: Path) -> None:
    """The table, one sentence for each task, and where the files are."""
    out = console()
    for task in results["tasks"]:
        table = table_of(task["name"], _HEADINGS, words=["difference"])
        for row in task["methods"]:
            table.add_row(*_cells(row))
        out.print(table)
        say(out, task["sentence"], "")
    say(out, *(f"- {note}" for note in notes(results)))
    say(out, "", f"{results['seconds']:.0f} s. Page, figures and data: {folder}")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row["name"],
        accuracy(row),
        difference(row),
        verdict_words(row),
        f"{row['train_loss']:.3f}",
        f"{row['grad_norm']:.3f}",
        f"{row['cost']:.2f}×",
    )


def page(results: Row, figures: Mapping[str, str]) -> str:
    """The self-contained page."""
    filters = {"accuracy": accuracy, "difference": difference, "diverged": diverged, "settings": settings}
    svgs = {name: inline(name, text) for name, text in figures.items()}
    return render("gradreg.studies.demo", "page.html", filters, results=results, figures=svgs, notes=notes(results))
