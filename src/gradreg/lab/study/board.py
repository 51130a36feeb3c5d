"""What a study says about every run, at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from gradreg.lab.runs import Result

LOST, ERROR, INTERRUPTED, DUPLICATE = "its worker was killed", "error", "interrupted", "entered twice"
"""Why a trial failed; the first two count as attempts."""


@dataclass(frozen=True)
class Entry:
    """A run as the study knows it."""

    key: str
    what: Mapping[str, Any]
    """What the worker needs to know, in JSON."""


def _result(found: dict[str, Any]) -> Result:
    """Of a study; earlier versions said accuracy for score."""
    return Result(**{"score" if name == "accuracy" else name: value for name, value in found.items()})


class Board:
    """All trials at one moment, by the key of their run."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        self.first: dict[str, FrozenTrial] = {}
        """The first trial of a run, whatever became of it: what it says about the run holds for the later ones."""
        self.current: dict[str, FrozenTrial] = {}
        """The lowest-numbered trial of a run that has not failed."""
        self.attempts: Counter[str] = Counter()
        """How often a run has failed through no one's wish."""
        self.errors: dict[str, str] = {}
        self.waiting: list[FrozenTrial] = []
        self.running: list[FrozenTrial] = []
        for trial in sorted(trials, key=lambda trial: trial.number):
            key = trial.user_attrs["key"]
            self.first.setdefault(key, trial)
            if trial.state == TrialState.FAIL:
                reason = trial.user_attrs.get("reason", LOST)
                if reason not in (INTERRUPTED, DUPLICATE):
                    self.attempts[key] += 1
                    self.errors[key] = reason
                continue
            self.current.setdefault(key, trial)
            if trial.state == TrialState.WAITING:
                self.waiting.append(trial)
            elif trial.state == TrialState.RUNNING:
                self.running.append(trial)
        done = ((key, trial) for key, trial in self.current.items() if trial.state == TrialState.COMPLETE)
        self.results = {key: _result(trial.user_attrs["result"]) for key, trial in done}
        """What has finished."""

    def is_finished(self, key: str) -> bool:
        trial = self.current.get(key)
        return trial is not None and trial.state == TrialState.COMPLETE
