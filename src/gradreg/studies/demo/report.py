"""What a result looks like to a reader: tables on the terminal, a page in the folder. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradreg.lab.page import Block, Figure, Heading, Items, Page, made, plain
from gradreg.lab.tables import Table
from gradreg.lab.words import accuracy, difference, settings, verdict_words
from gradreg.studies.demo.figures import accuracy_figure, gradient_norm_figure
from gradreg.studies.demo.tasks import RANDOM_SHARE

Row = Mapping[str, Any]
HEADINGS = ("method", "test, %", "minus SGD, points", "difference", "loss", "‖∇L‖", "cost")


def notes(results: Row) -> list[str]:
    """How to read the numbers; the same words below the table and on the page."""
    seeds = results["seeds"]
    quick = ["Quick: one of the four tasks and few seeds; run `gradreg demo` for all of them."]
    return [
        *quick * results["is_quick"],
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


def table(task: Row) -> Table:
    return Table(task["name"], HEADINGS, [_cells(row) for row in task["methods"]])


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (f"{row['train_loss']:.3f}", f"{row['grad_norm']:.3f}", f"{row['cost']:.2f}×")
    return (row["name"], accuracy(row), difference(row), verdict_words(row), *numbers)


def told(results: Row) -> list[Block]:
    """On the terminal."""
    return [*(block for task in results["tasks"] for block in (table(task), task["sentence"])), Items(notes(results))]


def page(results: Row) -> Page:
    tasks = results["tasks"]
    return Page(
        "Does gradient regularization help here?",
        [
            f"Small networks, trained by SGD and by five ways to keep the gradient of the loss small, on {len(tasks)} "
            f"task{'s' * (len(tasks) > 1)} and {len(results['seeds'])} seeds. What was found:",
            Items([f"**{plain(task['name'])}.** {plain(task['sentence'])}" for task in tasks]),
            made(results),
            Heading("Test accuracy"),
            Figure("accuracy", accuracy_figure(results), ACCURACY),
            Heading("Gradient norm during training"),
            Figure("gradient_norm", gradient_norm_figure(results), NORM),
            Heading("Numbers"),
            *(block for task in tasks for block in _of_task(task)),
            Heading("The methods"),
            METHODS,
            Items([f"**{row['name']}**: {row['about']}." for row in tasks[0]["methods"]]),
            Heading("How it was measured"),
            Items([*notes(results), "All runs are in `results.json`."]),
        ],
        "gradreg demo",
    )


def _of_task(task: Row) -> list[Block]:
    own = [
        (settings(row), f"{row['learning_rate']:.3g}, {row['weight_decay']:.3g}") for row in task["methods"]
    ]  # beside the numbers, where there is room for it
    numbers = table(task)
    rows = [(name, *more, *cells) for more, (name, *cells) in zip(own, numbers.rows)]
    return [
        Table(numbers.title, ("method", "settings", "rate, decay", *HEADINGS[1:]), rows),
        f"{task['num_train']} training rows, batches of {task['batch_size']}, {task['epochs']} epochs.",
    ]


ACCURACY = (
    "Mean over seeds and its 95% interval; the dashed line is SGD. To the right of it is better, but a hollow circle "
    "says that the paired difference to SGD may be zero."
)
NORM = (
    "‖∇L‖ of the plain cross-entropy on all training rows, logarithmic: geometric mean over seeds, shaded from the "
    "smallest to the largest. A low end alone is no merit: a network that has memorized its labels has a small "
    "gradient too."
)
METHODS = (
    "Each replaces the gradient g₁ = ∇L(θ) by g₁ + (γ/ε)(g₂ − g₁), where g₂ is the gradient at a displaced point, "
    "except for DB, which differentiates ‖∇L‖² itself, and flooding, which changes the loss to |L − b| + b."
)
