"""What goes on from step to step: counters and measurements, previous gradients, the running mean of a test, a dial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.training.diagnostics import Diagnostics, Realized
from gradreg.training.directions import Directions
from gradreg.training.plan import Method
from gradreg.training.ranks import Ranks
from gradreg.training.schedule import LargeGradients, RunningTest, Schedule, Strength, strength_at
from gradreg.training.target import Dial, target_in
from gradreg.training.together import check_step


class Carried:
    """Travels with copies and pickles of a regularizer, and makes its state dict."""

    def __init__(self, method: Method, when: LargeGradients | None, gamma: Schedule) -> None:
        self._method = method
        self.step = 0  # closed second passes, and what would have been one
        self.diagnostics = Diagnostics()
        self.directions = Directions(method.ascent)
        self.ahead = None if method.at is None else Directions(method.at.direction, moves_all=True)
        self.test = None if when is None else RunningTest(when)
        self._last: tuple[Schedule, Schedule, Strength | None] | None = None  # γ, ε and strength, if they were numbers
        self.dial: Dial | None = None
        self._turn_to(gamma)
        self._was_active = self._asks_ratio = False  # of the step at hand

    def strength_at(self, gamma: Schedule, epsilon: Schedule, step: int) -> Strength | None:
        """γ and ε of a step that begins; None where γ is 0.

        Raises:
            ValueError: numbers that no step can use, or not this method.
        """
        if self._last is not None and self._last[:2] == (gamma, epsilon):  # checked before
            return self._last[2]
        self._turn_to(gamma)
        if self.dial is None:
            strength = strength_at(gamma, epsilon, step)
            self._check(strength, step)
            are_numbers = {type(gamma), type(epsilon)} <= {int, float}  # and nothing that changes in place
            self._last = (gamma, epsilon, strength) if are_numbers else None
            return strength
        self._last = None
        strength = self.dial.strength_at(gamma, epsilon, step)
        self._check(strength, step)
        self._was_active = strength is not None
        self._asks_ratio = self._was_active and self.dial.is_due
        self.diagnostics.is_wanted |= self._asks_ratio
        return strength

    def _check(self, strength: Strength | None, step: int) -> None:
        if strength is not None:
            check_step(self._method, strength, step)

    def _turn_to(self, gamma: Schedule) -> None:
        """A dial for this γ, which may be another one since the last step."""
        rule = target_in(gamma)
        if rule != (None if self.dial is None else self.dial.rule):
            self.dial = None if rule is None else Dial(rule)

    def read(self) -> dict[str, Tensor | Realized]:
        """What is known of the last active step."""
        found = self.diagnostics.read()
        return found if self.dial is None else {**found, "gamma": torch.tensor(self.dial.gamma, dtype=torch.float64)}

    def follow(self, ranks: Ranks) -> None:
        """A step is done: hand its ratio to the dial, unread."""
        if self.dial is not None and self._was_active:
            ratio = self.diagnostics.last_ratio if self._asks_ratio else None
            self.dial.follow(None if ratio is None else ranks.mean(ratio))

    @property
    def remembers(self) -> bool:
        return self._remembering is not None

    @property
    def _remembering(self) -> Directions | None:
        """What holds gradients of the step before."""
        return next((d for d in (self.ahead, self.directions) if d is not None and d.remembers), None)

    def remember(self, named: Mapping[str, nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """A step is done, with these gradients of the selected parameters."""
        if self._remembering is not None:
            self._remembering.remember(named, gradients)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(self.diagnostics.state_dict())
        if self.test is not None:
            state["running_test"] = {"mean": self.test.mean, "variance": self.test.variance}
        if self._remembering is not None:
            state["previous"] = self._remembering.state_dict()
        if self.dial is not None:
            state["target"] = self.dial.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
        """
        Raises:
            ValueError: gradients of other parameters than the selected ones, or readings of no dial; nothing is
                changed.
        """
        if self.dial is not None:
            self.dial.check(state["target"])
        test = None if self.test is None else RunningTest(self.test.rule, **state["running_test"])
        if self._remembering is not None:
            self._remembering.load_state_dict(state["previous"], named)
        if self.dial is not None:
            self.dial.load_state_dict(state["target"])
        self.test = test
        self.diagnostics.load_state_dict(dict(state))
