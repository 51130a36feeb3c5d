"""A comparison: what is compared, how long each is searched for, and with how many seeds it is judged.

The baseline is tuned first: over a wide grid around the task's own numbers, and on for as long as a factor of three
leads to better ones, within three times the candidates of another arm. Every other arm starts from its learning rate
and weight decay; where one goes on to others, the baseline is tried there too, and the other arms where that ends, so
that nobody gains by a place that another did not see. All of that sees validation rows only, on seeds that the test
never uses; the choice of each arm is then trained once more for each test seed, and read on test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gradreg.lab.comparison.arms import BASELINE, Arm, arm_of, longer
from gradreg.lab.config import RunConfig, from_mapping
from gradreg.lab.folder import BadInput

KIND = "compare"
FIRST_SEED = 1_000_000
"""Of the search; those of the test lie below."""
DEFAULT_METHODS = ("F-GR", "SAM")
DEFAULT_TRIALS, DEFAULT_SEEDS = 12, 5
MOST_TRIALS, MOST_SEEDS = 1000, 100
RECORDS = 10


@dataclass(frozen=True)
class Effort:
    """How much is spent on each arm."""

    trials: int = DEFAULT_TRIALS
    """Candidates."""
    seeds: int = DEFAULT_SEEDS
    """Of the test, paired."""
    search_seeds: int = 2
    """Of each candidate."""
    finalists: int = 3
    """Candidates that are tried again, since the best of many was also lucky."""
    final_seeds: int = 2
    """Further seeds of a finalist."""
    search_epochs: int = 0
    """Of a candidate's first runs, after which the finalists alone are trained for all epochs; 0 trains all for all."""

    def __post_init__(self) -> None:
        if self.search_epochs and not (self.finalists and self.final_seeds):
            raise BadInput("search_epochs must be 0 without finalists, which train for all epochs.")

    @property
    def runs(self) -> int:
        """Of an arm, validation and test."""
        return self.trials * self.search_seeds + min(self.finalists, self.trials) * self.final_seeds + self.seeds


LADDER = tuple(
    Effort(trials, seeds, search_seeds, finalists, final_seeds)
    for trials, seeds, search_seeds, finalists, final_seeds in (
        (24, 10, 2, 4, 4),
        (18, 8, 2, 3, 3),
        (12, 5, 2, 3, 2),
        (9, 5, 1, 3, 2),
        (6, 4, 1, 2, 2),
        (4, 3, 1, 2, 1),
        (3, 3, 1, 1, 0),
    )
)
"""What a budget is spent on, the dearest first."""


@dataclass(frozen=True)
class Taken:
    """What another comparison came to for an arm."""

    point: Mapping[str, float]
    validation: float | None
    """Score there."""


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    base: RunConfig
    """What all runs share; its learning rate and weight decay are where the search starts."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    effort: Effort = Effort()
    first_seed: int = 0
    by: str = "ratio"
    """Whether γ is searched for by the penalty ratio that it shall keep, or by value."""
    has_opponent: bool = True
    digest: str = ""
    """Of the user's file: all workers must have the same."""
    keeps_models: bool = False
    """Whether the weights at the end of each test run are kept in the folder."""
    num_records: int = RECORDS
    """How often a test run records its training loss, which reads all training rows; 0 for its end only."""
    is_thorough: bool = True
    """Whether the baseline's search goes on while it finds better, and it and the others are tried where each ended."""
    taken: Mapping[str, Taken] = field(default_factory=dict)
    """Of arms by their names: what another comparison chose, in the place of a search."""
    tries_rates: bool = False
    """Whether what is taken is of another task: an arm tries it at a third and three times the learning rate too."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The baseline first, the opponent last."""
        arms = {arm.name: arm for arm in (arm_of(name, self.by) for name in (BASELINE, *self.methods))}
        return (*arms.values(), longer()) if self.has_opponent else tuple(arms.values())

    @property
    def searched(self) -> tuple[Arm, ...]:
        """Those that have more than one candidate."""
        return tuple(arm for arm in self.arms if self.tries_rates or arm.name not in self.taken)

    @property
    def search_seeds(self) -> tuple[int, ...]:
        first = FIRST_SEED + self.first_seed
        return tuple(range(first, first + self.effort.search_seeds))

    @property
    def final_seeds(self) -> tuple[int, ...]:
        first = self.search_seeds[-1] + 1
        return tuple(range(first, first + self.effort.final_seeds))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.effort.seeds))

    def as_row(self) -> dict[str, Any]:
        """As JSON: what is compared on resuming, and `from_row` reads. What came later is there only if it is set."""
        row = {
            "kind": KIND,
            "base": asdict(self.base),
            "methods": list(self.methods),
            **asdict(self.effort),
            "first_seed": self.first_seed,
            "by": self.by,
            "has_opponent": self.has_opponent,
            "digest": self.digest,
            "keeps_models": self.keeps_models,
            "num_records": self.num_records,
            "is_thorough": self.is_thorough,
            "taken": {name: asdict(taken) for name, taken in self.taken.items()},
            "tries_rates": self.tries_rates,
        }
        later = {
            "search_epochs": 0,
            "keeps_models": False,
            "num_records": RECORDS,
            "is_thorough": False,
            "taken": {},
            "tries_rates": False,
        }
        return {name: value for name, value in row.items() if name not in later or value != later[name]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Plan:
        """
        Raises:
            BadInput: not the plan of a comparison, or a damaged one.
        """
        try:
            effort = Effort(**{name: int(row.get(name, 0)) for name in asdict(Effort())})
            rest = {name: row[name] for name in ("first_seed", "by", "has_opponent", "digest")}
            rest["keeps_models"] = row.get("keeps_models", False)
            rest["num_records"] = int(row.get("num_records", RECORDS))
            rest["is_thorough"] = row.get("is_thorough", False)
            rest["taken"] = {name: Taken(**taken) for name, taken in row.get("taken", {}).items()}
            rest["tries_rates"] = row.get("tries_rates", False)
            return cls(from_mapping(row["base"], "base"), tuple(row["methods"]), effort, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"the plan must be that of a comparison, and has no good {error}.") from None


def checked_methods(names: Sequence[str], by: str) -> tuple[str, ...]:
    """Words of arms besides the baseline, each once.

    Raises:
        BadInput: none, or no such method.
    """
    found = dict.fromkeys(arm_of(name, by).word for name in names)
    found.pop(BASELINE, None)
    if not found:
        raise BadInput("--methods must name at least one method besides SGD, with which all are compared.")
    return tuple(found)


def example(plan: Plan, arm: Arm) -> RunConfig:
    """A run of an arm, to see whether there can be one."""
    center = {"learning_rate": plan.base.learning_rate, "weight_decay": plan.base.weight_decay}
    return replace(arm.config(plan.base, {**center, **arm.settings[0]}, plan.first_seed))
