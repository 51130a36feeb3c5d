"""What goes on from step to step: counters and measurements, previous gradients, the running mean of a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradreg.training.diagnostics import Diagnostics
from gradreg.training.directions import Directions
from gradreg.training.schedule import LargeGradients, RunningTest
from gradreg.training.second_pass import Method


class Carried:
    """Travels with copies and pickles of a regularizer, and makes its state dict."""

    def __init__(self, method: Method, when: LargeGradients | None) -> None:
        self.diagnostics = Diagnostics()
        self.directions = Directions(method.ascent)
        self.ahead = None if method.at is None else Directions(method.at.direction, moves_all=True)
        self.test = None if when is None else RunningTest(when)

    @property
    def _remembering(self) -> Directions | None:
        """What holds gradients of the step before."""
        return next((d for d in (self.ahead, self.directions) if d is not None and d.remembers), None)

    def remember(self, named: Mapping[str, nn.Parameter]) -> None:
        """A step is done."""
        if self._remembering is not None:
            self._remembering.remember(named)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(self.diagnostics.state_dict())
        if self.test is not None:
            state["running_test"] = {"mean": self.test.mean, "variance": self.test.variance}
        if self._remembering is not None:
            state["previous"] = self._remembering.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
        """
        Raises:
            ValueError: gradients of other parameters than the selected ones; nothing is changed.
        """
        test = None if self.test is None else RunningTest(self.test.rule, **state["running_test"])
        if self._remembering is not None:
            self._remembering.load_state_dict(state["previous"], named)
        self.test = test
        self.diagnostics.load_state_dict(dict(state))
