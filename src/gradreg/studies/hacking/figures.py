"""The figures of the study, pure functions of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradreg.lab.figures import FAINT, LINE_HEIGHT, LOOKS, Look, as_svg, band, interval, legend, panels, rows_of
from gradreg.lab.stats import UNDECIDED

Row = Mapping[str, Any]
TRUE, PROXY = LOOKS["F-GR"], LOOKS["SAM"]._replace(dashes="--")


@as_svg
def reward_figure(results: Row) -> Figure:
    """True reward at the end, with its interval, a panel for each game."""
    games = results["games"]
    figure, every = panels([game["game"] for game in games], 5.0, LINE_HEIGHT * len(games[0]["arms"]) + 0.8)
    for axes, game in zip(every, games):
        rows_of(axes, [row["name"] for row in game["arms"]])
        axes.axvline(100 * game["arms"][0]["true"]["mean"], color=FAINT, linewidth=0.9, linestyle="--")
        for k, row in enumerate(game["arms"]):
            is_regularized = row["name"].startswith("GR")
            own = Look((LOOKS["F-GR"] if is_regularized else LOOKS["SGD"]).color, marker="s" if is_regularized else "o")
            interval(axes, k, _percent(row["true"]), own._replace(is_hollow=row.get("verdict") == UNDECIDED))
        axes.set_xlim(-4, 104)
        axes.set_xlabel("true reward at the end (% honest answers)")
    return figure


@as_svg
def curves_figure(game: Row) -> Figure:
    """True and proxy reward along training, a panel for each arm."""
    figure, every = panels([_title(row) for row in game["arms"]], 2.6, 1.75, columns=4)
    for axes, row in zip(every, game["arms"]):
        steps = [point["step"] for point in row["curve"]]
        for key, own in (("true", TRUE), ("proxy", PROXY)):
            alone = (
                {"marker": own.marker} if len(steps) == 1 else {}
            )  # runs that are stopped have one reading in common
            band(axes, steps, [_percent(point[key]) for point in row["curve"]], own, **alone)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        last = max(game["arms"][0]["curve"][-1]["step"], 1)
        axes.set_xlim(-0.03 * last, last)
        axes.set_ylim(-5, 210)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("reward × 100", fontsize=10)
    legend(figure, [TRUE.handle("true reward"), PROXY.handle("what the verifier pays")])
    return figure


def _title(row: Row) -> str:
    return row["name"] if row["value"] is None else f"{row['name']}, {row['symbol']} {row['value']:g}"


def _percent(row: Row) -> dict[str, float]:
    return {key: 100 * row[key] for key in ("mean", "low", "high")}
