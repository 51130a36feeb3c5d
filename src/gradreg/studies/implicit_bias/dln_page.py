"""What `gradreg dln` shows: tables on the terminal, a page in the folder. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradreg.lab.page import Block, Figure, Heading, Items, Page, made
from gradreg.lab.stats import BETTER, WORSE
from gradreg.lab.tables import Table
from gradreg.lab.words import mean, number, ranged
from gradreg.studies.implicit_bias.dln_figures import bias_figure, map_figure, steps_figure
from gradreg.studies.implicit_bias.points import METHOD, PLAIN, TABLE, cell_of, point_of

Row = Mapping[str, Any]


def told(results: Row) -> list[Block]:
    """On the terminal: every number that the page in docs quotes."""
    return [*_settings(results), *_more(results), _agreement_table(results["agreement"]), Items(_notes(results))]


def _settings(results: Row) -> list[Block]:
    found = [(_setting_table(s), Items([_verdict(s, name) for name in s["claims"]])) for s in results["settings"]]
    return [block for blocks in found for block in blocks]


def _more(results: Row) -> list[Block]:
    n, d, num_active = results["map"]["shape"]
    how = f"n = {n}, d = {d}, k = {num_active}; a star: an interval without 0; –: not converged."
    return [_steps_table(results), _map_table(results["map"]), how]


def page(results: Row) -> Page:
    settings = results["settings"]
    return Page(
        "Does the implicit bias of gradient regularization help?",
        [
            "In a diagonal linear network the end of training can be computed: it is the minimizer of a potential "
            "whose scale the penalty shrinks from α to α_GR, and a smaller scale means a sparser solution. Does a "
            "finite ascent step (F-GR with ε = γ) do better than the exact penalty (DB)? What was found:",
            Items([f"**{setting['name']}.** {_verdict(setting, 'DB')}" for setting in settings]),
            made(results),
            Figure("dln_bias", bias_figure(results), BIAS),
            Figure("dln_map", map_figure(results), MAP),
            Figure("dln_steps", steps_figure(results), STEPS),
            Heading("Three settings"),
            *_settings(results),
            Heading("Words"),
            Items(WORDS),
            Heading("More numbers"),
            *_more(results),
            Heading("How it was measured"),
            Items(_notes(results)),
            _agreement_table(results["agreement"]),
        ],
        "gradreg dln",
    )


BIAS = (
    "A column for each setting; the test error over that of plain descent, against ε and against γ: below ×1 the "
    "method helps. Last row: what is left of the scale of active and of inactive coordinates; a method that shrinks "
    "both alike is drawn as touching circles."
)
MAP = (
    "The test error of F-GR over that of DB, on data whose mean grows to the right and from initializations that grow "
    "upward: blue, the finite ascent step helps; red, it hurts."
)
STEPS = "Penalties of strength γ, beside plain descent of step η = 2γ: a finite step regularizes by itself."
WORDS = (
    "**Test error**: expected squared error on a new row over the variance of its signal; 1 is no better than the "
    "mean.",
    "**α_GR/α**: what is left of the scale, in the mean over coordinates; *active* ones have a true weight that is not "
    "0.",
    "**Unevenness**: how much more the scale of the active coordinates shrank than that of the others: the mean of "
    "log(α_GR/α) over the ones divided by that over the others.",
    "**Error, even scale**: the test error if the method shrank all coordinates alike, by their geometric mean.",
)


def _notes(results: Row) -> list[str]:
    speed = results["speed"]
    return [
        f"Means and 95 % intervals (Student's t) over {len(results['seeds'])} seeds, which draw the data; comparisons "
        "are seed by seed.",
        f"Speed, n = 50 and d = 100: one flow at a time {1e3 * speed['one_at_a_time']:.0f} ms, in a batch of "
        f"{speed['batch']} {1e3 * speed['batched']:.0f} ms a flow: {speed['ratio']:.1f} times as fast.",
    ]


def _setting_table(setting: Row) -> Table:
    ends = ("test error", "‖β‖₁", "α_GR/α", "active", "inactive", "unevenness", "error, even scale")
    rows = []
    for point in TABLE:
        row, is_plain = point_of(setting, point), point == PLAIN
        method = ("GD (γ = 0)" if is_plain else METHOD[point.scheme], f"{point.epsilon:g}" if point.epsilon else "")
        scales = [mean(row[key]) for key in ("scale", "active", "inactive")]
        uneven = "" if is_plain else mean(row["unevenness"], 1)
        found = (ranged(row["test_error"]), mean(row["l1"], 2), *scales, uneven, mean(row["even_test_error"]))
        rows.append((*method, *found))
    return Table(
        f"{setting['name']}: α = {setting['alpha']:g}, γ = {setting['gamma']:g}", ("method", "ε/γ", *ends), rows
    )


def _verdict(setting: Row, name: str) -> str:
    """The claim, answered for this setting and against this method."""
    claim = setting["claims"][name]
    if claim is None:
        return f"Too few seeds converged to compare F-GR, ε = γ, with {name}."
    verb = {BETTER: "lowers", WORSE: "raises"}.get(claim["verdict"], "is not shown to change")
    by = f"{name} − F-GR is {ranged(claim)} over {claim['num_pairs']} seeds"
    return f"F-GR, ε = γ, {verb} the test error of {name}: {by}."


def _steps_table(results: Row) -> Table:
    headings = ("plain descent at a finite step", "η", "γ = η/2", "converged", "test error", "scale", "DB flow there")
    num_seeds, rows = len(results["seeds"]), []
    for part in results["large_steps"]:
        for point in part["points"]:
            all_did = point["num_converged"] == num_seeds
            rows.append(
                (
                    f"{part['setting']}: {part['method']}",
                    f"{point['rate']:g}",
                    f"{point['gamma']:g}",
                    f"{point['num_converged']} of {num_seeds}",
                    ranged(point["test_error"] if all_did else None),
                    mean(point["scale"] if all_did else None),
                    mean(point.get("flow_scale")),
                )
            )
    return Table("What the step size regularizes by itself", headings, rows)


def _map_table(found: Row) -> Table:
    rows = [
        (f"{ratio:g}", f"{alpha:g}", *(_map_cell(cell_of(found, shift, alpha, ratio)) for shift in found["shifts"]))
        for ratio in found["ratios"]
        for alpha in found["alphas"]
    ]
    shifts = [f"μ/σ = {shift:g}" for shift in found["shifts"]]
    return Table("Test error of F-GR over DB, log₂", ("ε/γ", "α", *shifts), rows)


def _map_cell(cell: Row) -> str:
    if cell["log2_error_ratio"] is None:
        return "–"
    star = "*" if cell["verdict"] in (BETTER, WORSE) else " "
    return number(cell["log2_error_ratio"]["mean"], 2, "+") + star


def _agreement_table(found: Sequence[Row]) -> Table:
    headings = ("scheme", "ε", "rows", "|w₊w₋ − α_GR²|", "|β − argmin φ|", "|β − batched β|", "converged")
    rows = [
        (
            METHOD[row["scheme"]],
            "" if row["epsilon"] is None else f"{row['epsilon']:g}",
            "one by one" if row["per_sample"] else "together",
            *(f"{row[key]:.1e}" for key in ("invariant_error", "argmin_error", "batch_error")),
            "yes" if row["converged"] else "NO",
        )
        for row in found
    ]
    return Table("Integration against theory, largest error over coordinates", headings, rows)
