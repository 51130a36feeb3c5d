"""The schedule: γ and ε as numbers or functions of the step, helpers that make such functions, and a test on ‖∇L‖².

A step is one closed second pass, or what would have been one: with γ = 0 the second pass is not run, and the step
still counts. The helpers wrap a number or another schedule, so they combine: `every(warmup(0.1, 500), 2)`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Schedule = float | Callable[[int], float]


def value_at(schedule: Schedule, step: int) -> float:
    """The number that a schedule gives at a step."""
    return float(schedule(step) if callable(schedule) else schedule)


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is not a whole number from `least` on."""
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
        check_count("num_steps", self.num_steps, 1)

    def __call__(self, step: int) -> float:
        return value_at(self.value, step) * min(1.0, step / self.num_steps)


@dataclass(frozen=True)
class late:
    """0 before step `start`, `value` from it on (and 0 again from `stop`, if given): no cost outside the window.

    Costs 1 + the share of the steps in the window. A penalty on the last steps alone is reported to come near one from
    the start; here the last quarter kept 0.2 to 0.8 of it (docs/frontier.md). A learning rate that has decayed moves
    little there.

    References:
        Zhou et al., [Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in
        Training](https://arxiv.org/abs/2410.10373), ICLR 2025.

    Example:
        >>> [late(0.1, start=2, stop=4)(step) for step in range(5)]
        [0.0, 0.0, 0.1, 0.1, 0.0]
    """

    value: Schedule
    start: int
    stop: int | None = None

    def __post_init__(self) -> None:
        check_count("start", self.start, 0)
        if self.stop is not None:
            check_count("stop", self.stop, self.start + 1)

    def __call__(self, step: int) -> float:
        inside = step >= self.start and (self.stop is None or step < self.stop)
        return value_at(self.value, step) if inside else 0.0


@dataclass(frozen=True)
class every:
    """`scale · value` on every `period`-th step, 0 on the others: the average cost falls to 1 + 1/period.

    `scale` makes up for the steps without: `scale=period` keeps the average of γ. For SAM, ρ·k every k-th step is
    `sam(model, every(rho, k, scale=k))`. A larger γ may diverge where the average does not.

    References:
        [Composer](https://docs.mosaicml.com/projects/composer/en/stable/method_cards/sam.html), whose SAM has an
        `interval`.

    Example:
        >>> [every(0.1, period=3, scale=2)(step) for step in range(6)]
        [0.0, 0.0, 0.2, 0.0, 0.0, 0.2]
    """

    value: Schedule
    period: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_count("period", self.period, 1)
        check_number("scale", self.scale, 0, math.inf)

    def __call__(self, step: int) -> float:
        return self.scale * value_at(self.value, step) if step % self.period == self.period - 1 else 0.0


@dataclass(frozen=True)
class bernoulli:
    """`value` on a step with probability p, else 0: the average cost is 1 + p.

    Dividing `value` by p keeps its average, with the pitfall of `every`. Which steps is a function of `seed` and the
    step alone, so that ranks agree and a resumed run goes on as it was.

    References:
        Zhao et al., [Randomized Sharpness-Aware Training](https://arxiv.org/abs/2203.09962), 2022.

    Example:
        >>> gamma = bernoulli(0.1, probability=0.5)
        >>> [gamma(step) for step in range(6)]
        [0.0, 0.1, 0.0, 0.1, 0.1, 0.0]
    """

    value: Schedule
    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("probability", self.probability, 0, 1)
        check_count("seed", self.seed, 0)

    def __call__(self, step: int) -> float:
        draw = random.Random((self.seed << 64) + step).random()  # does not touch the global generator
        return value_at(self.value, step) if draw < self.probability else 0.0


@dataclass(frozen=True)
class LargeGradients:
    r"""The second pass only where ‖∇L‖² is large beside what it has been: the test of AE-SAM.

    With $n_t = \|g_1\|^2$, running mean $m_t = \delta m_{t-1} + (1-\delta) n_t$ and variance
    $s_t = \delta s_{t-1} + (1-\delta)(n_t - m_t)^2$, the second pass runs if $n_t \ge m_t + c \sqrt{s_t}$. With c = 0
    that is about every second step, cost 1.3 to 1.5. The decision is the host's, so on an accelerator each step waits
    for the norm of its first gradient, and cannot be captured in a CUDA graph.

    Args:
        threshold: c, a number or a function of the step; the authors let it go from −1 to 1 over the training.
        decay: δ in [0, 1).

    Raises:
        ValueError: a threshold that is not finite, a decay outside of its range.

    References:
        Jiang et al., [An Adaptive Policy to Employ Sharpness-Aware
        Minimization](https://arxiv.org/abs/2304.14647), ICLR 2023.

    Example:
        >>> LargeGradients(threshold=0.5)
        LargeGradients(threshold=0.5, decay=0.9)
    """

    threshold: Schedule = 0.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not callable(self.threshold):
            check_number("threshold", self.threshold, -math.inf, math.inf)
        check_number("decay", self.decay, 0, 1)
        if self.decay == 1:
            raise ValueError("decay must be below 1, got 1: the running mean would never move.")


@dataclass
class RunningTest:
    """The running mean and variance behind `LargeGradients`."""

    rule: LargeGradients
    mean: float | None = None
    variance: float = 0.0

    def is_large(self, square: float, step: int) -> bool:
        """Take ‖g1‖² in, and say whether it is large. One that is not finite is not taken in, and not large."""
        if not math.isfinite(square):
            return False
        decay = self.rule.decay
        self.mean = square if self.mean is None else decay * self.mean + (1 - decay) * square
        self.variance = decay * self.variance + (1 - decay) * (square - self.mean) ** 2
        return square >= self.mean + value_at(self.rule.threshold, step) * math.sqrt(self.variance)


@dataclass(frozen=True)
class Strength:
    """γ and ε of one step, and the share of the batch that the penalty is taken on."""

    gamma: float
    epsilon: float
    share: float = 1.0

    @property
    def ratio(self) -> float:
        """c = γ/ε, the weight of the difference g2 − g1, over the share; exactly 1 where γ = ε on the whole batch."""
        return self.gamma / (self.share * self.epsilon)


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is not a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not (math.isfinite(value) and low <= value <= high):
        span = f"from {low} to {high}" if math.isfinite(high) else ("≥ 0" if low == 0 else "finite")
        raise ValueError(f"{name} must be a number {span}, got {value}.")


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


def strength_of(gamma: Schedule, step: int) -> float:
    """γ at a step, checked."""
    return _check_value("gamma", gamma(step) if callable(gamma) else gamma, f" at step {step}")


def strength_at(gamma: Schedule, epsilon: Schedule, step: int) -> Strength | None:
    """γ and ε at a step, checked; None where γ is 0, so that no second pass runs."""
    when = f" at step {step}"
    strength = strength_of(gamma, step)
    if strength == 0:
        return None
    radius = _check_value("epsilon", epsilon(step) if callable(epsilon) else epsilon, when)
    return Strength(strength, radius)
