r"""The dial: γ that follows a wanted penalty ratio.

$$\text{ratio} = \|\hat g - g_1\| / \|g_1\| = \gamma s, \qquad s = \|g_2 - g_1\| / (\epsilon \|g_1\|)$$

For one batch and one ε the ratio is proportional to γ, and what a γ means depends on s: on the loss, the data, the
model, and the time. So the ratio is what is asked for, s is measured, and γ = ratio / s. Only γ is turned, never ε: a
controller that lengthens ε where curvature falls meets less curvature at each turn, and runs away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradreg.training.schedule import Schedule, Strength, check_count, check_number, strength_at, value_at

MEMORY = 10
"""Readings over which s is averaged, geometrically; the first so many are taken in consecutive steps."""
START = 1e-3
"""γ/ε of the first step, before anything was measured."""
RISE = 2.0
"""γ grows at most so many times from one reading to the next; it falls as fast as it must."""


@dataclass(frozen=True)
class TargetRatio:
    r"""A γ that keeps $\|\hat g - g_1\| / \|g_1\|$ near a target, in place of a number.

    $$\gamma_t = \min(\tau_t / \bar s, \; c \, \epsilon_t)$$

    with the target τ, the running geometric mean $\bar s$ of about ten measured ratios per γ, and c = `limit`. It
    starts at γ = ε/1000, or at `start`, and at most doubles from reading to reading. With c = 1 no step leaves the
    segment between g1 and g2, whatever is measured; where γ meets that bound, the ratio stays below the target. The
    target rises over the first `ramp` steps: before a network has begun to learn, a penalty holds it back.

    The helpers of a schedule apply to the target: `late(TargetRatio(0.3), 1000)`, `every(TargetRatio(0.3), 3)`. What
    has been measured is carried by the regularizer and saved in its `state_dict()`; this value is configuration alone.

    A reading is taken in each of the first ten active steps, and in every `period`-th from then on. It is read at the
    beginning of the step that follows: there an accelerator is waited for, and nowhere else. A step that is read
    measures, which costs a few reductions over the parameters. Of several ranks all take the mean of their ratios. In a
    CUDA graph γ is a number.

    Args:
        target: τ > 0, once it has risen.
        ramp: steps in which it rises linearly; 0 for none.
        limit: c > 0, the largest γ/ε.
        start: γ > 0 that a step at the full target begins with, where one is known (`gradreg.calibrated_gamma`).
        period: active steps from one reading to the next.

    Raises:
        ValueError: a number outside of its range.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch
        >>> from gradreg import GradientRegularizer
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> regularizer = GradientRegularizer(model, gamma=TargetRatio(0.3, ramp=0), epsilon=1.0)
        >>> x = torch.eye(2)
        >>> for _ in range(20):
        ...     model.zero_grad()
        ...     loss = regularizer.backward(lambda: (model(x) - 1).square().sum() / 2)  # H = 1, so s = 1
        >>> round(regularizer.diagnostics()["penalty_ratio"].item(), 3)
        0.3
    """

    target: float = 0.1
    ramp: int = 500
    limit: float = 1.0
    start: float | None = None
    period: int = 10

    def __post_init__(self) -> None:
        start = 1.0 if self.start is None else self.start
        for name, value in (("target", self.target), ("limit", self.limit), ("start", start)):
            check_number(name, value, 0, math.inf)
            if value == 0:
                raise ValueError(f"{name} must be > 0, got 0. For no penalty pass gamma=0 in place of TargetRatio.")
        check_count("ramp", self.ramp, 0)
        check_count("period", self.period, 1)

    def __call__(self, step: int) -> float:
        """The ratio that is wanted at a step, which the helpers of a schedule change; γ is no function of the step."""
        return self.target * min(1.0, (step + 1) / max(1, self.ramp))


def target_in(schedule: object) -> TargetRatio | None:
    """The `TargetRatio` that a schedule wraps, if it does: its values are then ratios, and not γ."""
    while not isinstance(schedule, TargetRatio):
        schedule = getattr(schedule, "value", None)
        if schedule is None:
            return None
    return schedule


class Dial:
    """What a `TargetRatio` has measured so far, and the γ that follows from it."""

    def __init__(self, rule: TargetRatio) -> None:
        self.rule = rule
        self._per_ratio = None if rule.start is None else rule.start / rule.target  # 1/s as γ uses it
        self._log_s = 0.0  # mean of log s
        self._num_readings = 0
        self._since = 0  # active steps since the last one that is read
        self._gamma = 0.0  # of the step at hand, or of the last
        self._pending: Tensor | None = None  # the ratio of that step, not read yet

    def strength_at(self, target: Schedule, epsilon: Schedule, step: int) -> Strength | None:
        """γ and ε of a step; None where the target is 0. Reads what the step before has left."""
        self._read()
        wanted = value_at(target, step)
        strength = strength_at(wanted, epsilon, step)  # checks both
        if strength is None:
            return None
        if self._per_ratio is None:
            self._per_ratio = START * strength.epsilon / wanted
        self._gamma = min(wanted * self._per_ratio, self.rule.limit * strength.epsilon)
        return Strength(self._gamma, strength.epsilon)

    @property
    def is_due(self) -> bool:
        """Whether the ratio of the next active step is to be measured."""
        return self._num_readings < MEMORY or self._since + 1 >= self.rule.period

    def follow(self, ratio: Tensor | None) -> None:
        """An active step is done; its ratio, if it was due and has one."""
        self._since = 0 if ratio is not None else self._since + 1
        self._pending = ratio

    def _read(self) -> None:
        """Take up the ratio that waits. One that is 0 or not finite, of a skipped step, says nothing."""
        if self._pending is None:
            return
        if self._pending.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("gamma=TargetRatio reads what it measures, which a CUDA graph cannot: capture a number.")
        ratio, self._pending = float(self._pending), None
        if not (math.isfinite(ratio) and ratio > 0):
            return
        assert self._per_ratio is not None
        self._num_readings += 1
        share = 1 / min(self._num_readings, MEMORY)
        self._log_s += share * (math.log(ratio / self._gamma) - self._log_s)
        self._per_ratio = min(math.exp(-self._log_s), RISE * self._per_ratio)

    @property
    def gamma(self) -> float:
        """γ of the last active step; 0 before the first."""
        return self._gamma

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {
            "gamma": self._gamma,
            "per_ratio": self._per_ratio,
            "log_s": self._log_s,
            "num_readings": self._num_readings,
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: other keys or values than `state_dict` gives; nothing is changed.
        """
        self.check(state)
        self._gamma, self._per_ratio, self._log_s = state["gamma"], state["per_ratio"], state["log_s"]
        self._num_readings, self._since = state["num_readings"], state["since"]
        self._pending = None

    def check(self, state: object) -> None:
        """Refuse what `state_dict` cannot have given."""
        expected = sorted(self.state_dict())
        if not isinstance(state, Mapping) or sorted(state) != expected:
            found = sorted(state) if isinstance(state, Mapping) else repr(state)
            raise ValueError(f"state_dict['target'] must have the keys {expected}, got {found}.")
        for name in expected:
            value, is_count = state[name], name in ("num_readings", "since")
            if name == "per_ratio" and value is None:
                continue
            is_number = isinstance(value, int if is_count else (int, float)) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and (value >= 0 or name == "log_s")):
                kind = "an integer" if is_count else "a finite number"
                bound = "" if name == "log_s" else " ≥ 0"
                raise ValueError(f"state_dict['target'][{name!r}] must be {kind}{bound}, got {value!r}.")
