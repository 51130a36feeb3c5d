"""The pieces of the study: each is one comparison, which may be begun, interrupted and finished by itself.

A ResNet of 8n + 2 layers with BatchNorm by SGD, and a vision transformer by AdamW, on 10,000 rows of Fashion-MNIST. All
arms are tuned alike, each by as many candidates for a third of the epochs, of which the best three train to the end.
"""

from __future__ import annotations

from dataclasses import replace

from gradreg.lab.comparison.plan import Effort, Plan
from gradreg.lab.config import RunConfig

SMALL, LARGE = "F-GR:epsilon=0.02", "F-GR:epsilon=0.5"
"""The two ends of the question about ε, each with a γ of its own."""
CLAIMED = ("F-GR", "B-GR", "DB", "SAM", "cheap", SMALL, LARGE)

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
_VIT = replace(_RESNET, model="vit", depth=4, width=32, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05)
_EFFORT = Effort(trials=9, seeds=5, search_seeds=1, finalists=3, final_seeds=1, search_epochs=5)


def _piece(base: RunConfig, methods: tuple[str, ...] = CLAIMED, effort: Effort = _EFFORT) -> Plan:
    return Plan(base, methods, effort, keeps_models=True)


def _noisy(base: RunConfig) -> RunConfig:
    return replace(base, random_labels=0.25)


PIECES: dict[str, Plan] = {
    "resnet-14-noisy": _piece(_noisy(_SMALLER)),
    "resnet-14-clean": _piece(_SMALLER),
    "resnet-14-few": _piece(
        replace(_SMALLER, num_train=1000, batch_size=50, epochs=40),
        ("F-GR", "SAM", "cheap", "MSAM"),
        replace(_EFFORT, search_epochs=13),
    ),
    "resnet-14-large-batch": _piece(
        replace(_SMALLER, batch_size=1000, epochs=20),
        ("F-GR", "SAM", "cheap", "MSAM"),
        replace(_EFFORT, search_epochs=7),
    ),
    "resnet-14-smooth": _piece(replace(_noisy(_SMALLER), activation="silu"), ("F-GR", "DB")),
    "vit-28-noisy": _piece(_noisy(_VIT), ("F-GR", "B-GR", "DB", "SAM", "cheap")),
    "vit-28-clean": _piece(_VIT, ("F-GR", "B-GR", "DB", "SAM", "cheap")),
    "resnet-28-noisy": _piece(_noisy(_RESNET), ("F-GR", "B-GR", "DB", "SAM", "cheap")),
}
"""In the order in which they are played: what costs least and says most comes first."""
