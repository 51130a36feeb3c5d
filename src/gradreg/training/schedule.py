"""The schedule: γ and ε as numbers or functions of the step, and helpers that make such functions.

A step is one closed second pass, or what would have been one: with γ = 0 the second pass is not run, and the step
still counts. The helpers wrap a number or another schedule, so they combine: `every(warmup(0.1, 500), 2)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = float | Callable[[int], float]


def value_at(schedule: Schedule, step: int) -> float:
    """The number that a schedule gives at a step."""
    return float(schedule(step) if callable(schedule) else schedule)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}.")


@dataclass(frozen=True)
class warmup:
    """Rises linearly from 0 at step 0 to `value` at step `num_steps`, and stays.

    With Adam and learning-rate warm-up, γ from the first step on can hurt (Zhao, 2024); with plain SGD a large γ may
    diverge without it.

    Example:
        >>> gamma = warmup(0.1, num_steps=4)
        >>> [round(gamma(step), 3) for step in range(6)]
        [0.0, 0.025, 0.05, 0.075, 0.1, 0.1]
    """

    value: Schedule
    num_steps: int

    def __post_init__(self) -> None:
        _check_count("num_steps", self.num_steps, 1)

    def __call__(self, step: int) -> float:
        return value_at(self.value, step) * min(1.0, step / self.num_steps)


@dataclass(frozen=True)
class late:
    """0 before step `start`, `value` from it on (and 0 again from `stop`, if given): no cost outside the window.

    Example:
        >>> [late(0.1, start=2, stop=4)(step) for step in range(5)]
        [0.0, 0.0, 0.1, 0.1, 0.0]
    """

    value: Schedule
    start: int
    stop: int | None = None

    def __post_init__(self) -> None:
        _check_count("start", self.start, 0)
        if self.stop is not None:
            _check_count("stop", self.stop, self.start + 1)

    def __call__(self, step: int) -> float:
        inside = step >= self.start and (self.stop is None or step < self.stop)
        return value_at(self.value, step) if inside else 0.0


@dataclass(frozen=True)
class every:
    """`value` on every `period`-th step, 0 on the others: the average cost falls to 1 + 1/period.

    Example:
        >>> [every(0.1, period=3)(step) for step in range(6)]
        [0.0, 0.0, 0.1, 0.0, 0.0, 0.1]
    """

    value: Schedule
    period: int

    def __post_init__(self) -> None:
        _check_count("period", self.period, 1)

    def __call__(self, step: int) -> float:
        return value_at(self.value, step) if step % self.period == self.period - 1 else 0.0


@dataclass(frozen=True)
class Strength:
    """γ and ε of one step."""

    gamma: float
    epsilon: float

    @property
    def ratio(self) -> float:
        """c = γ/ε, the weight of the difference g2 − g1; exactly 1 where γ = ε."""
        return self.gamma / self.epsilon


def check(name: str, schedule: Schedule) -> None:
    """Refuse a number that no step could use; functions are checked at each step."""
    if not callable(schedule):
        _check_value(name, schedule, "")


def name_of(choice: object) -> str:
    """What a schedule or an ascent is, in words that do not depend on where this process put it."""
    has_address = " at 0x" in repr(choice)
    return getattr(choice, "__qualname__", type(choice).__name__) if has_address else repr(choice)


_WAYS_OUT = {
    "gamma": "γ = 0 trains without the penalty.",
    "epsilon": 'For the backward difference pass scheme="backward"; for no penalty, gamma=0.',
}


def _check_value(name: str, value: float, when: str) -> float:
    lowest = "≥ 0" if name == "gamma" else "> 0"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a finite number {lowest} or a function of the step, got {value!r}{when}.")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and name != "gamma"):
        way_out = _WAYS_OUT.get(name, "For no displacement train without the regularizer.")
        raise ValueError(f"{name} must be a finite number {lowest}, got {number}{when}. {way_out}")
    return number


def strength_at(gamma: Schedule, epsilon: Schedule, step: int) -> Strength | None:
    """γ and ε at a step, checked; None where γ is 0, so that no second pass runs."""
    when = f" at step {step}"
    strength = _check_value("gamma", gamma(step) if callable(gamma) else gamma, when)
    if strength == 0:
        return None
    radius = _check_value("epsilon", epsilon(step) if callable(epsilon) else epsilon, when)
    return Strength(strength, radius)
