"""The pieces of the study: each is one comparison, which is begun, interrupted and finished by itself.

A ResNet of 8n + 2 layers with BatchNorm by SGD, and a vision transformer by AdamW, on 10,000 rows of Fashion-MNIST or
fewer. Candidates train to the end: a third of the epochs sees too little of what is memorized late, and chose a weight
decay so small that any regularizer gained. No seed of the search is one of the test. The ResNet at full resolution has
the settings that its arms came to at half of it, where a search costs a third, but for the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gradreg.lab.comparison.plan import Effort, Plan, Taken
from gradreg.lab.config import RunConfig

SMALL, LARGE = "F-GR:epsilon=0.02", "F-GR:epsilon=0.5"
"""The two ends of the question about ε, each with a γ of its own."""
SPLIT = "Split:ascent=momentum"
"""Half of the batch ahead along the momentum: one pass."""
METHODS = ("F-GR", "B-GR", "DB", "SAM", SPLIT, "cheap")
CLAIMED = ("F-GR", "B-GR", "DB", "SAM", SPLIT, SMALL, LARGE, "cheap")
CHEAPER = ("F-GR", "SAM", SPLIT, "MSAM", "cheap")
MODES = (
    *("F-GR", "F-GR:period=4", "F-GR:fraction=0.25", "cheap"),
    *("ahead", "MSAM", "Split", SPLIT, "Previous-down"),
)
"""The full method, and the ways below two passes that the frontier of small tasks did not rule out."""

_RESNET = RunConfig(
    data="fashion-mnist",
    model="resnet18",
    depth=10,
    width=8,
    num_train=10_000,
    batch_size=128,
    epochs=15,
    learning_rate=0.1,
    weight_decay=5e-4,
)
_SMALLER = replace(_RESNET, shrink=2)
_FEW = replace(_SMALLER, num_train=1000, batch_size=50, epochs=40)
_LARGER = replace(_RESNET, channels_last=True)
"""In the layout that is faster on a CPU."""
_FINER = replace(_RESNET, model="vit", depth=4, width=32, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05)
"""In 7×7 patches of 4 pixels a side."""
_VIT = replace(_FINER, patch=7)
"""In 4×4 patches: 16 of them in the place of 49."""
_EFFORT = Effort(trials=9, seeds=5, search_seeds=1, finalists=3, final_seeds=1)
_QUICK = Effort(trials=2, seeds=2, search_seeds=1, finalists=1, final_seeds=1)


@dataclass(frozen=True)
class Piece:
    """A comparison, and what it is in words."""

    name: str
    about: str
    base: RunConfig
    methods: tuple[str, ...]
    claims: tuple[str, ...] = ("gain", "equal time", "b1", "b2", "b4")
    """Those that are judged where their arms are there: not where another piece has the same."""
    measures_flatness: bool = True
    """Minutes on two cores for each arm."""
    settings_of: str = ""
    """The piece from which the arms that both have take their settings, in the place of a search."""

    def plan(self, path: str | None = None, taken: Mapping[str, Taken] | None = None) -> Plan:
        """With the data at a path, or where Debian's package has it, and what is taken from the piece `settings_of`."""
        plan = self._plan(replace(self.base, path=path), _EFFORT)
        return self._taking(plan, taken)

    def quick_plan(self, path: str | None = None, taken: Mapping[str, Taken] | None = None) -> Plan:
        """A few hundred rows for two epochs, and two candidates: to see that all of it runs."""
        base = replace(self.base, path=path, shrink=4, width=4, depth=10 if self.base.model == "resnet18" else 1)
        base = replace(base, num_train=300, batch_size=50, epochs=2)
        return self._taking(replace(self._plan(base, _QUICK), has_opponent=False), taken)

    def _plan(self, base: RunConfig, effort: Effort) -> Plan:
        return Plan(base, self.methods, effort, keeps_models=self.measures_flatness, num_records=0)

    def _taking(self, plan: Plan, taken: Mapping[str, Taken] | None) -> Plan:
        if not self.settings_of:
            return plan
        plan = replace(plan, taken={a.name: taken[a.name] for a in plan.arms if a.name in taken} if taken else {})
        if self.base == PIECES[self.settings_of].base:
            return plan
        tests = Effort(trials=3, seeds=plan.effort.seeds, search_seeds=1, finalists=0, final_seeds=0)
        return replace(plan, effort=tests, tries_rates=True)


def _noisy(base: RunConfig) -> RunConfig:
    return replace(base, random_labels=0.25)


PIECES: dict[str, Piece] = {
    piece.name: piece
    for piece in (
        Piece("resnet-14-noisy", "ResNet-10, 14×14 pixels, 25 % random labels", _noisy(_SMALLER), METHODS),
        Piece(
            "resnet-14-scale",
            "ResNet-10, 25 % random labels: small and large ε",
            _noisy(_SMALLER),
            ("F-GR", SMALL, LARGE),
            claims=("b4",),
            measures_flatness=False,
            settings_of="resnet-14-noisy",
        ),
        Piece("resnet-14-few", "ResNet-10, 14×14 pixels, 1,000 rows", _FEW, CHEAPER),
        Piece(
            "resnet-14-modes",
            "ResNet-10, 14×14 pixels, 1,000 rows: cheaper modes",
            _FEW,
            MODES,
            claims=(),
            measures_flatness=False,
            settings_of="resnet-14-few",
        ),
        Piece(
            "resnet-14-few-noisy",
            "ResNet-10, 14×14 pixels, 1,000 rows, 25 % random labels",
            _noisy(_FEW),
            (*MODES, "SAM"),
            measures_flatness=False,
        ),
        Piece(
            "resnet-14-few-smooth",
            "ResNet-10 with SiLU, 14×14 pixels, 1,000 rows",
            replace(_FEW, activation="silu"),
            (*MODES, "SAM", "B-GR", "DB"),
            measures_flatness=False,
        ),
        Piece(
            "resnet-14-large-batch",
            "ResNet-10, 14×14 pixels, batches of 1,000",
            replace(_SMALLER, batch_size=1000, epochs=20),
            CHEAPER,
        ),
        Piece(
            "vit-28-few",
            "ViT, 1,000 rows",
            replace(_VIT, num_train=1000, batch_size=50, epochs=40),
            CHEAPER,
        ),
        Piece(
            "vit-28-modes",
            "ViT, 2,000 rows, 25 % random labels",
            replace(_noisy(_FINER), num_train=2000, batch_size=64, epochs=25),
            MODES,
            measures_flatness=False,
        ),
        Piece(
            "resnet-14-smooth",
            "ResNet-10 with SiLU, 14×14 pixels, 25 % random labels",
            replace(_noisy(_SMALLER), activation="silu"),
            ("F-GR", "DB", "cheap"),
        ),
        Piece("resnet-14-clean", "ResNet-10, 14×14 pixels, clean labels", _SMALLER, CLAIMED),
        Piece("vit-28-noisy", "ViT, 25 % random labels", _noisy(_VIT), METHODS),
        Piece("vit-28-clean", "ViT, clean labels", _VIT, METHODS),
        Piece(
            "resnet-28-noisy",
            "ResNet-10, 28×28 pixels, 25 % random labels",
            _noisy(_LARGER),
            METHODS,
            settings_of="resnet-14-noisy",
        ),
        Piece(
            "resnet-28-clean",
            "ResNet-10, 28×28 pixels, clean labels",
            _LARGER,
            METHODS,
            settings_of="resnet-14-clean",
        ),
    )
}
"""In the order in which they are played: what costs least and says most comes first."""
QUICK = ("resnet-14-noisy", "vit-28-noisy", "resnet-28-noisy")
