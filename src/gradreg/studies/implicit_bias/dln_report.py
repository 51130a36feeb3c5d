"""What `gradreg dln` shows: tables on the terminal, figures in the folder. Functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator
from rich.table import Table

from gradreg.lab.figures import COLORS, FAINT, INK, PRINTED, LineStyle, svg
from gradreg.lab.stats import BETTER, WORSE
from gradreg.lab.tables import console, say, table_of
from gradreg.lab.words import mean, ranged, stacked
from gradreg.studies.implicit_bias.points import PLAIN, TABLE

Row = Mapping[str, Any]
NAMES = {"forward": "F-GR", "backward": "B-GR", "central": "central", "exact": "DB"}
LINES: dict[str, tuple[str, LineStyle]] = {
    **{scheme: COLORS[name] for scheme, name in NAMES.items() if name in COLORS},
    "central": ("#c88a00", ":"),
}
BOUND = 2.0  # of the color scale of the map: a factor of 4
KEY = "log2_over_plain"


# Tables.


def print_tables(results: Row, folder: Path) -> None:
    """Everything that the page in docs quotes."""
    out = console()

    for setting in results["settings"]:
        out.print(_setting_table(setting))
        say(out, *_sentences(setting), "")
    out.print(_steps_table(results["large_steps"], len(results["seeds"])))
    say(out, "")
    out.print(_map_table(results["map"]))
    n, d, num_active = results["map"]["shape"]
    say(out, f"n = {n}, d = {d}, k = {num_active}; * an interval without 0; – not converged.", "")
    out.print(_agreement_table(results["agreement"]))
    speed = results["speed"]
    say(
        out,
        "",
        f"Speed, n = 50 and d = 100: one flow at a time {1e3 * speed['one_at_a_time']:.0f} ms, in a batch of "
        f"{speed['batch']} {1e3 * speed['batched']:.0f} ms a flow: {speed['ratio']:.1f} times as fast.",
        f"Means and 95 % intervals (Student's t) over {len(results['seeds'])} seeds, which draw the data; comparisons "
        "are seed by seed.",
        f"{results['seconds']:.0f} s on {results['machine']}. Figures and data: {folder}",
    )


def _setting_table(setting: Row) -> Table:
    headings = (
        "method",
        "ε/γ",
        "test error",
        "‖β‖₁",
        "α_GR/α",
        "active",
        "inactive",
        "unevenness",
        "error,\neven\nscale",
    )
    table = table_of(f"{setting['name']}: α = {setting['alpha']:g}, γ = {setting['gamma']:g}", headings, gap=1)
    for point in TABLE:
        row = point_of(setting, point.scheme, point.gamma, point.epsilon)
        table.add_row(
            "GD (γ = 0)" if point == PLAIN else NAMES[point.scheme],
            "" if point.epsilon is None else f"{point.epsilon:g}",
            stacked(row["test_error"]),
            mean(row["l1"], 2),
            mean(row["scale"]),
            mean(row["active"]),
            mean(row["inactive"]),
            "" if point == PLAIN else mean(row["unevenness"], 1),
            mean(row["even_test_error"]),
        )
    return table


def _sentences(setting: Row) -> list[str]:
    """The claim, answered for this setting."""
    lines = []
    for name, claim in setting["claims"].items():
        if claim is None:
            lines.append(f"F-GR with ε = γ against {name}: did not converge in enough seeds.")
            continue
        lines.append(
            f"F-GR with ε = γ lowers the test error of {name} by {ranged(claim)}: "
            f"{claim['verdict']} ({claim['num_pairs']} seeds)."
        )
    return lines


def _steps_table(large_steps: Sequence[Row], num_seeds: int) -> Table:
    headings = ("plain descent", "η", "γ = η/2", "converged", "test error", "scale", "DB flow\nthere")
    table = table_of("What the step size regularizes by itself", headings, words=headings[:1])
    for part in large_steps:
        for point in part["points"]:
            table.add_row(
                f"{part['setting']}: {part['method']}",
                f"{point['rate']:g}",
                f"{point['gamma']:g}",
                f"{point['num_converged']} of {num_seeds}",
                stacked(point["test_error"] if point["num_converged"] == num_seeds else None),
                mean(point["scale"] if point["num_converged"] == num_seeds else None),
                mean(point.get("flow_scale")),
            )
    return table


def _map_table(found: Row) -> Table:
    table = table_of(
        "Test error of F-GR over DB, log₂", ("ε/γ", "α", *(f"μ/σ = {shift:g}" for shift in found["shifts"]))
    )
    for ratio in found["ratios"]:
        for alpha in found["alphas"]:
            cells = [cell_of(found, shift, alpha, ratio) for shift in found["shifts"]]
            table.add_row(f"{ratio:g}", f"{alpha:g}", *(_map_cell(cell) for cell in cells))
    return table


def _map_cell(cell: Row) -> str:
    if cell["log2_error_ratio"] is None:
        return "–"
    star = "*" if cell["verdict"] in (BETTER, WORSE) else " "
    return f"{cell['log2_error_ratio']['mean'] + 0.0:+.2f}{star}"


def _agreement_table(rows: Sequence[Row]) -> Table:
    errors = ("|w₊w₋ −\nα_GR²|", "|β −\nargmin φ|", "|β −\nbatched β|")
    headings = ("scheme", "ε", "rows", *errors, "converged")
    table = table_of("Integration against theory, largest error over coordinates", headings)
    for row in rows:
        table.add_row(
            NAMES[row["scheme"]],
            "" if row["epsilon"] is None else f"{row['epsilon']:g}",
            "one by one" if row["per_sample"] else "together",
            *(f"{row[key]:.1e}" for key in ("invariant_error", "argmin_error", "batch_error")),
            "yes" if row["converged"] else "NO",
        )
    return table


def point_of(setting: Row, scheme: str, gamma: float, epsilon: float | None) -> Row:
    """The row of a method in a setting."""
    wanted = (scheme, gamma, epsilon)
    return next(row for row in setting["points"] if (row["scheme"], row["gamma"], row["epsilon"]) == wanted)


def cell_of(found: Row, shift: float, alpha: float, ratio: float) -> Row:
    """The cell of the map."""
    wanted = (shift, alpha, ratio)
    return next(cell for cell in found["cells"] if (cell["shift"], cell["alpha"], cell["ratio"]) == wanted)


# Figures.


def figures(results: Row) -> dict[str, str]:
    """SVG text by name."""
    drawn = {"dln_bias": bias_figure, "dln_map": map_figure, "dln_steps": steps_figure}
    found = {}
    for name, draw in drawn.items():
        with matplotlib.rc_context(PRINTED):
            found[name] = svg(draw(results))
    return found


def bias_figure(results: Row) -> Figure:
    """A column for each setting: test error over ε, over γ, and the scale of active and inactive coordinates."""
    settings = results["settings"]
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    panels = figure.subplots(3, len(settings), squeeze=False)
    for column, setting in zip(panels.T, settings):
        column[0].set_title(f"{setting['name']}\nα = {setting['alpha']:g}, γ₀ = {setting['gamma']:g}")
        _error_panel(column[0], setting, "epsilon", len(results["seeds"]))
        column[0].set_xlabel("ε / γ₀, at γ = γ₀")
        _error_panel(column[1], setting, "gamma", len(results["seeds"]))
        column[1].set_xlabel("γ / γ₀, at ε = γ₀")
        _scale_panel(column[2], setting)
    for axes, label in zip(
        panels[:, 0], ("test error / that of plain descent", "test error / that of plain descent", "α_GR / α")
    ):
        axes.set_ylabel(label)
    legend = [Line2D([], [], color=FAINT, linewidth=0.8, label="plain descent")]
    legend += [Line2D([], [], color=c, linestyle=dash, label=NAMES[s]) for s, (c, dash) in LINES.items()]
    legend += [
        Line2D([], [], color=INK, marker="o", linestyle="", label="active coordinates"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="", label="inactive"),
        Line2D([], [], color=INK, marker="x", linestyle="", label="some seed did not converge"),
    ]
    figure.legend(handles=legend, loc="outside upper center", ncols=(len(legend) + 1) // 2)
    return figure


def _error_panel(axes: Any, setting: Row, over: str, num_seeds: int) -> None:
    """log₂ of test error relative to plain descent, labelled by the factor itself."""
    axes.axhline(0, color=FAINT, linewidth=0.8)
    ratios = sorted({p[over] for p in setting["points"] if p["scheme"] == "forward"})
    if over == "epsilon":
        exact = point_of(setting, "exact", 1.0, None)
        _band(axes, [ratios[0], ratios[-1]], [exact, exact], "exact", num_seeds)
    for scheme in NAMES:
        if over == "epsilon" and scheme == "exact":
            continue
        at = [(1.0, r) if over == "epsilon" else (r, None if scheme == "exact" else 1.0) for r in ratios]
        rows = [point_of(setting, scheme, gamma, epsilon) for gamma, epsilon in at]
        _band(axes, ratios, rows, scheme, num_seeds)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{r:g}" for r in ratios])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_factor)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _factor(log2: float, _: int) -> str:
    return f"×{2**log2:.2f}" if log2 > -4 else f"×1/{2**-log2:.0f}"


def _band(axes: Any, xs: Sequence[float], rows: Sequence[Row], scheme: str, num_seeds: int) -> None:
    """Mean and interval; a cross at the lower edge where some seed did not converge, whatever the others say."""
    color, dash = LINES[scheme]
    kept = [(x, row[KEY]) for x, row in zip(xs, rows) if row["num_converged"] == num_seeds]
    if kept:
        at, kept_rows = zip(*kept)
        axes.plot(at, [r["mean"] for r in kept_rows], color=color, linestyle=dash, marker=".")
        axes.fill_between(
            at, [r["low"] for r in kept_rows], [r["high"] for r in kept_rows], color=color, alpha=0.12, linewidth=0
        )
    for x, row in zip(xs, rows):
        if row["num_converged"] < num_seeds:
            axes.plot(x, 0.05, "x", color=color, transform=axes.get_xaxis_transform())


def _scale_panel(axes: Any, setting: Row) -> None:
    """α_GR/α of both kinds of coordinates: a method that shrinks both alike is drawn as touching circles."""
    axes.axhline(1, color=FAINT, linewidth=0.8)
    shown = [p for p in TABLE if p != PLAIN]
    for k, point in enumerate(shown):
        row, color = point_of(setting, point.scheme, point.gamma, point.epsilon), LINES[point.scheme][0]
        for key, face, offset in (("active", color, -0.1), ("inactive", "white", 0.1)):
            interval = row[key]
            if interval is not None:
                axes.plot([k + offset] * 2, [interval["low"], interval["high"]], color=color, linewidth=1)
                axes.plot(k + offset, interval["mean"], "o", color=color, markerfacecolor=face, markersize=6)
    labels = [NAMES[p.scheme] + ("" if p.epsilon is None else f"\nε/γ {p.epsilon:g}") for p in shown]
    axes.set_xticks(range(len(shown)), labels, fontsize=8.5)
    axes.tick_params(axis="x", length=0)


def map_figure(results: Row) -> Figure:
    """Where F-GR ends below DB (blue) and where above (red), a panel for each ε/γ."""
    found = results["map"]
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, len(found["ratios"]), sharey=True, squeeze=False)[0]
    norm = TwoSlopeNorm(0, -BOUND, BOUND)
    for axes, ratio in zip(panels, found["ratios"]):
        grid = [[_mean_or_nan(cell_of(found, s, a, ratio)) for s in found["shifts"]] for a in found["alphas"]]
        axes.set_facecolor("#d5d8dc")
        axes.imshow(grid, cmap="RdBu_r", norm=norm, origin="lower", aspect="auto")
        for row, alpha in enumerate(found["alphas"]):
            for k, shift in enumerate(found["shifts"]):
                cell = cell_of(found, shift, alpha, ratio)
                axes.text(k, row, _map_text(cell), ha="center", va="center", fontsize=9, color=_text_color(cell))
        axes.set_xticks(range(len(found["shifts"])), [f"{s:g}" for s in found["shifts"]])
        axes.set_yticks(range(len(found["alphas"])), [f"{a:g}" for a in found["alphas"]])
        axes.set_title(f"ε = {ratio:g} γ")
        axes.set_xlabel("mean of the data, in standard deviations")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("α")
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=panels.tolist(), ticks=[-2, -1, 0, 1, 2], pad=0.01)
    bar.ax.set_yticklabels(["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    bar.set_label("F-GR's test error / DB's")
    figure.legend(
        handles=[
            Patch(facecolor="#4393c3", label="the finite ascent step helps"),
            Patch(facecolor="#d6604d", label="it hurts"),
            Patch(facecolor="#d5d8dc", label="– some seed did not converge"),
            Line2D([], [], linestyle="", label="( )  interval over seeds includes no change"),
        ],
        loc="outside upper center",
        ncols=4,
    )
    return figure


def _mean_or_nan(cell: Row) -> float:
    return cell["log2_error_ratio"]["mean"] if cell["log2_error_ratio"] else float("nan")


def _map_text(cell: Row) -> str:
    if cell["log2_error_ratio"] is None:
        return "–"
    factor = 2 ** cell["log2_error_ratio"]["mean"]
    factor = f"{factor:.2f}" if factor > 0.01 else "< .01"
    return factor if cell["verdict"] in (BETTER, WORSE) else f"({factor})"


def _text_color(cell: Row) -> str:
    return "white" if abs(_mean_or_nan(cell)) > 0.6 * BOUND else INK


def steps_figure(results: Row) -> Figure:
    """Explicit penalties of strength γ and plain descent of step η = 2γ on one axis."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, len(results["large_steps"]), squeeze=False)[0]
    by_name = {s["name"]: s for s in results["settings"]}
    for axes, part in zip(panels, results["large_steps"]):
        setting = by_name[part["setting"]]
        axes.axhline(0, color=FAINT, linewidth=0.8)
        for scheme in ("exact", "forward"):
            rows = [p for p in setting["points"] if p["scheme"] == scheme and p["gamma"] > 0]
            rows = [p for p in rows if p["epsilon"] in (None, 1.0)]
            rows.sort(key=lambda p: p["gamma"])
            xs = [p["gamma"] * setting["gamma"] for p in rows]
            _band(axes, xs, rows, scheme, len(results["seeds"]))
        done = [p for p in part["points"] if p["num_converged"] == len(results["seeds"])]
        lost = [p for p in part["points"] if p["num_converged"] < len(results["seeds"])]
        axes.errorbar(
            [p["gamma"] for p in done],
            [p["log2_over_plain"]["mean"] for p in done],
            [
                [p["log2_over_plain"]["mean"] - p["log2_over_plain"]["low"] for p in done],
                [p["log2_over_plain"]["high"] - p["log2_over_plain"]["mean"] for p in done],
            ],
            color=COLORS["SAM"][0],
            marker="s",
            markersize=5,
            linewidth=1.2,
        )
        axes.set_xscale("log", base=2)
        ticks = [p["gamma"] * setting["gamma"] for p in setting["points"] if p["scheme"] == "exact" and p["gamma"]]
        axes.set_xticks(sorted(ticks), [f"{x:g}" for x in sorted(ticks)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(_factor)
        for p in lost:
            axes.plot(p["gamma"], 0.04, "x", color=COLORS["SAM"][0], transform=axes.get_xaxis_transform())
        axes.set_title(f"{part['setting']}\nplain descent: {part['method']}")
        axes.set_xlabel("γ, or η/2 of plain descent")
    panels[0].set_ylabel("test error / that of plain flow")
    handles = [Line2D([], [], color=LINES[s][0], linestyle=LINES[s][1], label=NAMES[s]) for s in ("exact", "forward")]
    handles += [
        Line2D([], [], color=COLORS["SAM"][0], marker="s", label="no penalty, finite step η"),
        Line2D([], [], color=INK, marker="x", linestyle="", label="some seed did not converge"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure
