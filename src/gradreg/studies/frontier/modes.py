"""The tasks of the study, its modes with the settings from which their tuning starts, and its opponents.

An opponent is what the same time buys without a cheaper penalty: more steps, a larger learning rate, averaged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gradreg.lab.config import RunConfig
from gradreg.lab.runs import Job

Settings = dict[str, float]

TASKS: dict[str, RunConfig] = {
    "tiny noisy data": RunConfig(
        data="digits", model="mlp", width=128, num_train=300, random_labels=0.4, batch_size=50, epochs=60
    ),
    "small noisy data": RunConfig(
        data="mnist1d", model="mlp", width=128, num_train=1000, random_labels=0.25, batch_size=50, epochs=50
    ),
    "noisy labels": RunConfig(
        data="mnist1d", model="mlp", width=128, depth=4, num_train=4000, random_labels=0.25, batch_size=100, epochs=30
    ),
    "large batch": RunConfig(data="mnist1d", model="mlp", width=128, num_train=4000, batch_size=500, epochs=100),
}
"""Where the full method gains most: random labels, few rows, few steps on large batches."""
ABOUT_TASKS = {
    "tiny noisy data": "digits, 300 rows, 40 % random labels, batch 50",
    "small noisy data": "one-dimensional MNIST, 1,000 rows, 25 % random labels, batch 50",
    "noisy labels": "one-dimensional MNIST, 4,000 rows, 25 % random labels, batch 100",
    "large batch": "one-dimensional MNIST, 4,000 rows, clean labels, batch 500",
}


@dataclass(frozen=True)
class Mode:
    """A way to train."""

    name: str
    about: str
    start: tuple[Settings, ...]
    """Six settings, or as many as there are; a tuning goes on from the best."""
    method: str = "F-GR"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that make the mode what it is."""
    epochs: float = 1.0
    """Epochs over those of the task."""
    rate: float | None = None
    """The learning rate, over that of plain training; None if it is tuned."""
    carries: bool = False
    is_opponent: bool = False


def grid(**values: tuple[float, ...]) -> tuple[Settings, ...]:
    """All combinations."""
    points: list[Settings] = [{}]
    for name, column in values.items():
        points = [{**point, name: value} for point in points for value in column]
    return tuple(points)


_TWO_PASSES = grid(gamma=(0.3, 0.8, 2.0), epsilon=(0.5, 1.5))
_NOW_AND_THEN = grid(gamma=(0.6, 1.6, 4.0), epsilon=(0.7, 2.0))
_RADII = grid(rho=(0.3, 0.6, 1.0, 1.5, 2.2, 3.2))
_AHEAD = grid(lookahead=(0.5, 1.0, 2.0), gamma=(0.03, 0.1))
_PLAIN: tuple[Settings, ...] = ({},)

PLAIN = Mode("plain", "SGD with momentum", _PLAIN, "SGD")
FULL = Mode("full", "F-GR in every step, on the whole batch", _TWO_PASSES)


def _fraction(share: float, gammas: tuple[float, ...], **more: Any) -> tuple[tuple[Settings, ...], dict[str, Any]]:
    return grid(gamma=gammas, epsilon=(0.25, 0.6)), {"fraction": share, **more}


def _mode(name: str, about: str, start: tuple[tuple[Settings, ...], dict[str, Any]], **more: Any) -> Mode:
    return Mode(name, about, start[0], fixed=start[1], **more)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        PLAIN,
        FULL,
        Mode("SAM", "two passes, SAM instead of F-GR", grid(rho=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6)), "SAM"),
        # Which steps.
        Mode("every 4th", "F-GR in every fourth step", _NOW_AND_THEN, fixed={"period": 4}),
        Mode("every 10th", "F-GR in every tenth step", _NOW_AND_THEN, fixed={"period": 10}),
        Mode(
            "every 4th, carried",
            "F-GR in every fourth step, its penalty used again between",
            _TWO_PASSES,
            fixed={"period": 4},
            carries=True,
        ),
        Mode("one in four", "F-GR in a quarter of the steps, at random", _NOW_AND_THEN, fixed={"probability": 0.25}),
        Mode("last quarter", "F-GR in the last quarter of the steps", _TWO_PASSES, fixed={"start": 0.75}),
        Mode(
            "large gradients",
            "F-GR where ‖∇L‖² is above its running mean (AE-SAM)",
            _TWO_PASSES,
            fixed={"threshold": 0.0},
        ),
        # Which rows.
        _mode("Fraction(1/4)", "penalty on a quarter of the batch", _fraction(0.25, (0.1, 0.25, 0.6))),
        _mode("Fraction(1/10)", "penalty on a tenth of the batch", _fraction(0.1, (0.03, 0.08, 0.2))),
        _mode("Fraction(1/20)", "penalty on a twentieth of the batch", _fraction(0.05, (0.02, 0.05, 0.12))),
        _mode(
            "Fraction(1/4), every 4th",
            "penalty on a quarter of the batch, in every fourth step: gradreg.cheap",
            _fraction(0.25, (0.3, 0.8, 2.0), period=4),
        ),
        # One pass.
        Mode("MSAM", "one pass, ahead along the momentum", _RADII, "MSAM"),
        Mode("Previous", "one pass, up the previous gradient", _RADII, "Previous"),
        Mode("Previous-down", "one pass, down the previous gradient", _RADII, "Previous-down"),
        Mode(
            "Split, momentum",
            "half of the batch, or another share γ/ε, ahead along the momentum",
            tuple({"gamma": r / 2, "epsilon": r} for r in (0.5, 1.0, 2.0, 3.0, 4.5, 6.5)),
            "Split",
            {"ascent": "momentum"},
        ),
        Mode(
            "Split, gradient",
            "half of the batch, or another share γ/ε, displaced along the gradient of the rest",
            tuple({"gamma": r / 2, "epsilon": r} for r in (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)),
            "Split",
        ),
        # Both.
        _mode(
            "Ahead + Fraction(1/10)",
            "a penalty on a tenth of the batch, all of it ahead",
            (_AHEAD, {"fraction": 0.1, "epsilon": 0.5}),
        ),
        _mode(
            "Ahead + Fraction(1/20)",
            "a penalty on a twentieth of the batch, all of it ahead",
            (_AHEAD, {"fraction": 0.05, "epsilon": 0.5}),
        ),
        _mode(
            "Ahead + Fraction(1/4), every 4th",
            "all of it ahead, and a penalty on a quarter of the batch in every fourth step",
            (grid(lookahead=(0.5, 1.0, 2.0), gamma=(0.3, 1.0)), {"fraction": 0.25, "epsilon": 0.5, "period": 4}),
        ),
        _mode(
            "Ahead + Fraction(1/20), every 2nd",
            "all of it ahead, and a penalty on a twentieth of the batch in every second step",
            (_AHEAD, {"fraction": 0.05, "epsilon": 0.5, "period": 2}),
        ),
        _mode(
            "Ahead + Fraction(1/10), every 3rd",
            "all of it ahead, and a penalty on a tenth of the batch in every third step",
            (_AHEAD, {"fraction": 0.1, "epsilon": 0.5, "period": 3}),
        ),
        # Opponents at equal time.
        Mode(
            "plain, twice as long",
            "SGD for as long as the full method takes",
            _PLAIN,
            "SGD",
            epochs=2.0,
            is_opponent=True,
        ),
        Mode("plain, larger rate", "SGD at twice its best learning rate", _PLAIN, "SGD", rate=2.0, is_opponent=True),
        Mode(
            "plain, averaged",
            "SGD, mean of the weights of its last steps",
            grid(average=(0.1, 0.25, 0.5, 1.0)),
            "SGD",
            is_opponent=True,
        ),
        Mode("full, half as long", "F-GR for as long as SGD takes", _TWO_PASSES, epochs=0.5, is_opponent=True),
    )
}


ARMS: dict[str, str] = {
    "SAM": "SAM",
    "F-GR, period 4": "every 4th",
    "F-GR, fraction 0.25": "Fraction(1/4)",
    "cheap": "Fraction(1/4), every 4th",
    "MSAM": "MSAM",
    "Previous-down": "Previous-down",
    "Split": "Split, gradient",
    "Split, ascent momentum": "Split, momentum",
    "ahead": "Ahead + Fraction(1/10), every 3rd",
    "SGD, twice as long": "plain, twice as long",
}
"""The modes that a comparison has too, by what they are called there."""


@dataclass(frozen=True)
class Candidate:
    """A point of a mode's space: what is tuned."""

    learning_rate: float
    weight_decay: float
    settings: Settings

    def __hash__(self) -> int:
        return hash(tuple(self.values().items()))

    def values(self) -> Settings:
        """All of it by name."""
        return {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay, **self.settings}


def job(task: RunConfig, mode: Mode, candidate: Candidate, seed: int, scored_on: str) -> Job:
    """A run of a mode on a task."""
    settings = dict(candidate.settings)
    average = settings.pop("average", 0.0)
    config = replace(
        task,
        method=mode.method,
        epochs=max(1, round(task.epochs * mode.epochs)),
        learning_rate=candidate.learning_rate,
        weight_decay=candidate.weight_decay,
        seed=seed,
        **mode.fixed,
        **settings,
    )
    return Job(config, scored_on, num_records=0, average=average, carries=mode.carries)
