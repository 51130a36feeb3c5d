"""The figures of `gradreg dln`, functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, INK, LOOKS, Look, as_svg, band, legend, logarithmic_at, panels, whiskers
from gradreg.lab.stats import BETTER, WORSE
from gradreg.studies.implicit_bias.points import METHOD, PLAIN, TABLE, Point, cell_of, point_of

Row = Mapping[str, Any]
SCHEMES = {scheme: LOOKS[name] for scheme, name in METHOD.items()}
DESCENT = Look(LOOKS["SAM"].color, marker="s")  # without a penalty
BOUND = 2.0  # of the color scale of the map: a factor of 4
KEY = "log2_over_plain"
_DARK, _LIGHT, _EMPTY = (
    "#000001",
    "#fffffe",
    "#d5d8dc",
)  # in colored cells: no page recolors these
_LOST = Line2D([], [], color=INK, marker="x", linestyle="", label="some seed did not converge")


@as_svg
def bias_figure(results: Row) -> Figure:
    """A column for each setting: test error over ε, over γ, and the scale of active and inactive coordinates."""
    settings, num_seeds = results["settings"], len(results["seeds"])
    titles = [f"{s['name']}\nα = {s['alpha']:g}, γ₀ = {s['gamma']:g}" for s in settings] + [""] * 2 * len(settings)
    figure, every = panels(titles, 3.67, 2.6, columns=len(settings))
    for k, setting in enumerate(settings):
        over_epsilon, over_gamma, scales = every[k :: len(settings)]
        _error_panel(over_epsilon, setting, "epsilon", num_seeds)
        over_epsilon.set_xlabel("ε / γ₀, at γ = γ₀")
        _error_panel(over_gamma, setting, "gamma", num_seeds)
        over_gamma.set_xlabel("γ / γ₀, at ε = γ₀")
        _scale_panel(scales, setting)
    labels = ("test error / that of plain descent", "test error / that of plain descent", "α_GR / α")
    for axes, label in zip(every[:: len(settings)], labels):
        axes.set_ylabel(label)
    kinds = [
        Look(INK).mark("active coordinates", linestyle=""),
        Look(INK, is_hollow=True).mark("inactive", linestyle=""),
    ]
    lines = [of.handle(METHOD[scheme]) for scheme, of in SCHEMES.items()]
    handles = [Look(FAINT).handle("plain descent", linewidth=0.8), *lines, *kinds, _LOST]
    legend(figure, handles)
    return figure


def _error_panel(axes: Any, setting: Row, over: str, num_seeds: int) -> None:
    """log₂ of test error relative to plain descent, labelled by the factor itself."""
    axes.axhline(0, color=FAINT, linewidth=0.8)
    ratios = sorted({p[over] for p in setting["points"] if p["scheme"] == "forward"})
    for scheme in METHOD:
        if over == "gamma":
            points = [Point(scheme, r, None if scheme == "exact" else 1.0) for r in ratios]
        else:  # which DB does not have
            points = [Point(scheme, 1.0, None if scheme == "exact" else r) for r in ratios]
        _band(axes, ratios, [point_of(setting, point) for point in points], scheme, num_seeds)
    _factors_over(axes, ratios)


def _factors_over(axes: Any, ticks: Sequence[float]) -> None:
    logarithmic_at(axes, ticks)
    axes.yaxis.set_major_formatter(_factor)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _factor(log2: float, _: int) -> str:
    return f"×{2**log2:.2f}" if log2 > -4 else f"×1/{2**-log2:.0f}"


def _band(axes: Any, xs: Sequence[float], rows: Sequence[Row], scheme: str, num_seeds: int) -> None:
    """Mean and interval; a cross at the lower edge where some seed did not converge, whatever the others say."""
    kept = [(x, row[KEY]) for x, row in zip(xs, rows) if row["num_converged"] == num_seeds]
    band(axes, [x for x, _ in kept], [interval for _, interval in kept], SCHEMES[scheme], marker=".")
    _crosses(axes, [x for x, row in zip(xs, rows) if row["num_converged"] < num_seeds], SCHEMES[scheme])


def _crosses(axes: Any, xs: Sequence[float], of: Look) -> None:
    axes.plot(xs, [0.05] * len(xs), "x", color=of.color, transform=axes.get_xaxis_transform())


def _scale_panel(axes: Any, setting: Row) -> None:
    """α_GR/α of both kinds of coordinates: a method that shrinks both alike is drawn as touching circles."""
    axes.axhline(1, color=FAINT, linewidth=0.8)
    shown = [p for p in TABLE if p != PLAIN]
    for k, point in enumerate(shown):
        row, color = point_of(setting, point), SCHEMES[point.scheme].color
        for key, face, offset in (("active", color, -0.1), ("inactive", "white", 0.1)):
            interval = row[key]
            if interval is not None:
                axes.plot([k + offset] * 2, [interval["low"], interval["high"]], color=color, linewidth=1)
                axes.plot(k + offset, interval["mean"], "o", color=color, markerfacecolor=face, markersize=6)
    labels = [METHOD[p.scheme] + ("" if p.epsilon is None else f"\nε/γ {p.epsilon:g}") for p in shown]
    axes.set_xticks(range(len(shown)), labels, fontsize=8.5)
    axes.tick_params(axis="x", length=0)


@as_svg
def map_figure(results: Row) -> Figure:
    """Where F-GR ends below DB (blue) and where above (red), a panel for each ε/γ."""
    found = results["map"]
    ratios, alphas, shifts = found["ratios"], found["alphas"], found["shifts"]
    figure, every = panels([f"ε = {ratio:g} γ" for ratio in ratios], 3.67, 3.3, columns=len(ratios))
    norm = TwoSlopeNorm(0, -BOUND, BOUND)
    for axes, ratio in zip(every, ratios):
        cells = [[cell_of(found, shift, alpha, ratio) for shift in shifts] for alpha in alphas]
        axes.set_facecolor(_EMPTY)
        # Drawn as paths: an image in the SVG would be a resource to load.
        axes.pcolormesh([[_mean_or_nan(cell) for cell in row] for row in cells], cmap="RdBu_r", norm=norm)
        for k, row in enumerate(cells):
            for j, cell in enumerate(row):
                color = _LIGHT if abs(_mean_or_nan(cell)) > 0.6 * BOUND else _DARK
                axes.text(j + 0.5, k + 0.5, _map_text(cell), ha="center", va="center", fontsize=9, color=color)
        axes.set_xticks([j + 0.5 for j in range(len(shifts))], [f"{s:g}" for s in shifts])
        axes.set_yticks([k + 0.5 for k in range(len(alphas))], [f"{a:g}" for a in alphas])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("mean of the data, in standard deviations", fontsize=9)
    every[0].set_ylabel("α")
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=every, ticks=[-2, -1, 0, 1, 2], pad=0.01)
    if bar.solids is not None:
        bar.solids.set_rasterized(False)
    bar.ax.set_yticklabels(["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    bar.set_label("F-GR's test error / DB's")
    handles = [
        Patch(facecolor="#4393c3", label="the finite ascent step helps"),
        Patch(facecolor="#d6604d", label="it hurts"),
        Patch(facecolor=_EMPTY, label="– some seed did not converge"),
        Line2D([], [], linestyle="", label="( )  interval over seeds includes no change"),
    ]
    legend(figure, handles)
    return figure


def _mean_or_nan(cell: Row) -> float:
    return cell["log2_error_ratio"]["mean"] if cell["log2_error_ratio"] else float("nan")


def _map_text(cell: Row) -> str:
    if cell["log2_error_ratio"] is None:
        return "–"
    factor = 2 ** cell["log2_error_ratio"]["mean"]
    shown = f"{factor:.2f}" if factor > 0.01 else "< .01"
    return shown if cell["verdict"] in (BETTER, WORSE) else f"({shown})"


@as_svg
def steps_figure(results: Row) -> Figure:
    """Explicit penalties of strength γ and plain descent of step η = 2γ on one axis."""
    parts, num_seeds = results["large_steps"], len(results["seeds"])
    titles = [f"{part['setting']}\nplain descent: {part['method']}" for part in parts]
    figure, every = panels(titles, 4.5, 3.4, columns=len(parts))
    by_name = {s["name"]: s for s in results["settings"]}
    for axes, part in zip(every, parts):
        setting = by_name[part["setting"]]
        axes.axhline(0, color=FAINT, linewidth=0.8)
        for scheme in ("exact", "forward"):
            rows = [p for p in setting["points"] if p["scheme"] == scheme and p["gamma"] > 0]
            rows = sorted((p for p in rows if p["epsilon"] in (None, 1.0)), key=lambda p: p["gamma"])
            _band(axes, [p["gamma"] * setting["gamma"] for p in rows], rows, scheme, num_seeds)
        done = [p for p in part["points"] if p["num_converged"] == num_seeds]
        whiskers(axes, [p["gamma"] for p in done], [p[KEY] for p in done], DESCENT)
        _crosses(axes, [p["gamma"] for p in part["points"] if p["num_converged"] < num_seeds], DESCENT)
        exact = {p["gamma"] * setting["gamma"] for p in setting["points"] if p["scheme"] == "exact" and p["gamma"]}
        _factors_over(axes, sorted(exact))
        axes.set_xlabel("γ, or η/2 of plain descent")
    every[0].set_ylabel("test error / that of plain flow")
    lines = [SCHEMES[scheme].handle(METHOD[scheme]) for scheme in ("exact", "forward")]
    legend(figure, [*lines, DESCENT.mark("no penalty, finite step η"), _LOST])
    return figure
