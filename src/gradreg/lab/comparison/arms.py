"""What is compared: an arm is a row of the table, a method with the settings from which its search starts.

An opponent is what the same time buys without a penalty: plain training for as long as two passes take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from gradreg.lab.config import BUILT_IN, FIELDS, RunConfig, checked
from gradreg.lab.folder import BadInput
from gradreg.lab.methods import CHEAP as OF_CHEAP
from gradreg.lab.methods import METHODS
from gradreg.lab.search import Climb, Point, beside, rounded, shrinking
from gradreg.lab.words import SYMBOLS

BASELINE = "SGD"
"""The name of plain training, whatever the task's optimizer."""
LONGER = "SGD, twice as long"
CHEAP, AHEAD = "cheap", "ahead"
"""`gradreg.cheap`, and what it was at first: a penalty on a tenth of the batch in every third step, all of it ahead."""
STEP = 3.0
"""Between neighbors at first, for numbers whose scale is not known."""
DECAY = 1e-4
"""Weight decay that is tried where the task has none."""


def _grid(**values: tuple[float, ...]) -> tuple[Point, ...]:
    return tuple(dict(zip(values, point)) for point in product(*values.values()))


_BY_RATIO = _grid(ratio=(0.1, 0.3, 1.0), epsilon=(0.1, 0.5))
_BY_GAMMA = _grid(gamma=(0.03, 0.1, 0.3), epsilon=(0.1, 0.5))
_STARTS: dict[str, tuple[Point, ...]] = {
    "DB": _grid(gamma=(0.003, 0.01, 0.03, 0.1, 0.3)),
    "SAM": _grid(rho=(0.02, 0.05, 0.1, 0.2, 0.4)),
    "ASAM": _grid(rho=(0.2, 0.5, 1.0, 2.0)),
    "MSAM": _grid(rho=(0.1, 0.3, 1.0, 3.0)),
    "Previous": _grid(rho=(0.1, 0.3, 1.0, 3.0)),
    "Previous-down": _grid(rho=(0.1, 0.3, 1.0, 3.0)),
    "Split": tuple({"gamma": r / 2, "epsilon": r} for r in (0.2, 0.5, 1.0, 2.0)),
    "Flooding": _grid(level=(0.02, 0.05, 0.1, 0.2, 0.4)),
}


@dataclass(frozen=True)
class Arm:
    """A row of the table."""

    name: str
    method: str
    settings: tuple[Point, ...] = ({},)
    """From which the search starts, at the learning rate and weight decay of the baseline."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that make the arm what it is."""
    epochs: int = 1
    """Times those of the task."""
    is_opponent: bool = False
    held: str = ""
    """Fields that a user holds, as the command line has them: `:epsilon=0.01`."""

    @property
    def word(self) -> str:
        """From which `arm_of` makes it again."""
        return f"{self.name.split(', ')[0]}{self.held}"

    def config(self, base: RunConfig, point: Point, seed: int) -> RunConfig:
        """A run of it."""
        own = {"method": self.method, "epochs": base.epochs * self.epochs, "seed": seed}
        return replace(base, **{**own, **self.fixed, **point})

    def search(self, base: RunConfig, center: Point, trials: int, reserve: int = 0) -> Climb:
        """Around the settings of the arm, at a center of learning rate and weight decay, where there can be a run.

        A learning rate or a weight decay that is held stays what it is. With a reserve the start is `wide`.
        """
        held = {name: self.fixed[name] for name in center if name in self.fixed}
        center = {**center, **held}

        def possible(points: Sequence[Point]) -> list[Point]:
            return [point for point in points if point == {**point, **held} and self._bears(base, point)]

        def neighbors(point: Point, step: float) -> list[Point]:
            return possible(around(point, step))

        start: Sequence[Point] = [{**center, **settings} for settings in self.settings]
        if self.settings == ({},):
            start = wide(center) if reserve else [center, *around(center, STEP)]
        return Climb(possible(start), trials, neighbors, shrinking(STEP), reserve)

    def _bears(self, base: RunConfig, point: Point) -> bool:
        try:
            self.config(base, point, 0)
        except BadInput:  # such as a γ of Split that is not below its ε
            return False
        return True


def around(point: Point, step: float) -> list[Point]:
    """The neighbors of `beside`; weight decay of 0 has a small one beside it."""
    found = beside(point, step)
    return [*found, {**point, "weight_decay": DECAY}] if point.get("weight_decay") == 0 else found


def wide(center: Point) -> list[Point]:
    """Learning rates three times up and down, with weight decays up to 27 times as large; what is nearest comes first.

    A climb from the center alone ends where one seed's noise makes a dip, and the best weight decay often lies far up.
    """
    rate, decay = center["learning_rate"], center["weight_decay"]
    rates = [rate * STEP**k for k in (0, -1, 1)]
    decays = [decay * STEP**k for k in (0, 1, -1, 2, 3)] if decay else [0.0, DECAY, 10 * DECAY, 100 * DECAY]
    order = sorted(product(range(len(rates)), range(len(decays))), key=sum)
    return [{**center, "learning_rate": rounded(rates[i]), "weight_decay": rounded(decays[k])} for i, k in order]


def center_of(base: RunConfig) -> Point:
    """Where the baseline's search starts: the task's own numbers."""
    return {"learning_rate": rounded(base.learning_rate), "weight_decay": rounded(base.weight_decay)}


def arm_of(name: str, by: str) -> Arm:
    """The arm of a method's name, in any spelling that a configuration takes, or of `cheap` and `ahead`.

    Args:
        name: of the method; `F-GR:epsilon=0.01` holds a field, which is then not searched for.
        by: what is searched for where it may be either, `ratio` or `gamma`.

    Raises:
        BadInput: no such method.
    """
    name, *held = name.split(":")
    if held:
        return _holding(arm_of(name, by), held)
    if name.lower() == CHEAP:
        return replace(arm_of("F-GR", by), name=CHEAP, fixed=OF_CHEAP)
    if name.lower() == AHEAD:
        settings = _grid(**{by: (0.03, 0.1)}, epsilon=(0.5,), lookahead=(0.03, 0.3))
        return Arm(AHEAD, "F-GR", settings, {"fraction": 0.1, "period": 3})
    try:
        method = checked(FIELDS["method"], name)
    except BadInput as error:
        raise BadInput(
            str(error).replace("method must be one of", "--methods must be one of cheap, ahead,", 1)
        ) from None
    if method == BASELINE:
        return Arm(BASELINE, method)
    if method in _STARTS:
        return Arm(method, method, _STARTS[method])
    needs = METHODS[method].needs
    if METHODS[method].follows_ratio:
        return Arm(method, method, _BY_RATIO if by == "ratio" else _BY_GAMMA)
    tried = {"gamma": (0.03, 0.1, 0.3), "epsilon": (0.1, 0.5), "rho": (0.02, 0.1, 0.5), "level": (0.05, 0.2)}
    return Arm(method, method, _grid(**{need: tried[need] for need in needs}))


def _holding(arm: Arm, held: Sequence[str]) -> Arm:
    """With fields at values of their own in all that it tries."""
    fields: dict[str, Any] = {}
    for word in held:
        name, equals, value = word.partition("=")
        if not equals or name not in FIELDS or name in ("method", "seed", "epochs", *BUILT_IN):
            raise BadInput(f"--methods must hold fields of a method, such as F-GR:epsilon=0.01, got {word!a}.")
        fields[name] = checked(FIELDS[name], value)
    decided = {*fields, *(("gamma", "ratio") if {"gamma", "ratio"} & set(fields) else ())}
    free = [{name: value for name, value in point.items() if name not in decided} for point in arm.settings]
    settings = tuple({tuple(point.items()): point for point in free}.values())
    own = ", ".join(f"{SYMBOLS.get(name, name)} {value}" for name, value in fields.items())
    text = "".join(f":{name}={value}" for name, value in fields.items())
    return replace(arm, name=f"{arm.name}, {own}", settings=settings, fixed={**arm.fixed, **fields}, held=text)


def longer() -> Arm:
    """The opponent at equal time."""
    return Arm(LONGER, BASELINE, epochs=2, is_opponent=True)
