"""What is measured, and how large: sizes for an NVIDIA H100, by arithmetic; the same at toy size for a dry run.

A pass is a gradient over all 55,000 training rows of Fashion-MNIST (60,000 less 5,000 validation rows). A row of 28×28
takes 1.3 · 10⁹ multiplications and additions through ResNet-18, in bf16 2 s for a pass, half of it while the host
launches kernels, so that some processes share a GPU; WRN-16-4 takes three quarters of that. Five arms make 8.1 passes
in an epoch (SGD 1, F-GR, B-GR and SAM 2, cheap 1.1), and 19 epochs each, search and all: 154 passes, and one for each
of the 35 runs at its end, which reads all rows in fp32. That is 7 minutes for ResNet-18.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gradreg.lab.comparison.plan import Effort, Plan
from gradreg.lab.config import RunConfig

FAST = {"precision": "bf16", "channels_last": True}
_IMAGES = RunConfig(data="fashion-mnist", batch_size=128, learning_rate=0.1, weight_decay=5e-4)
_RESNET = replace(_IMAGES, model="resnet18", epochs=4, **FAST)
_WIDE = replace(_RESNET, model="wideresnet", depth=16, width=4)
_MLP = replace(_IMAGES, model="mlp", depth=3, width=128, epochs=6, learning_rate=0.03, random_labels=0.25)

MODELS: dict[str, RunConfig] = {
    "MLP, 10 layers": replace(_IMAGES, model="mlp", depth=10, width=512),
    "ResNet-18": replace(_IMAGES, model="resnet18"),
    "GPT, 4 layers": RunConfig(data="text", model="gpt", depth=4, width=256, batch_size=64),
}
"""Whose steps are timed: mostly launches of kernels, mostly convolutions, mostly matrix products."""


@dataclass(frozen=True)
class Tests:
    """The tests that need a CUDA device."""


@dataclass(frozen=True)
class Steps:
    """A step of each method beside one of SGD that is made in the same way."""

    settings: dict[str, object]
    """Fields of the configuration that make the way what it is."""
    is_captured: bool = False
    seconds: float = 6.0
    """For the paired rounds of a model."""

    @property
    def needs_gpu(self) -> bool:
        return self.is_captured or bool(self.settings.get("compile"))


@dataclass(frozen=True)
class Grid:
    """Configurations per second, one at a time and as one batched model."""

    widths: tuple[int, ...] = (64, 256)
    num_configs: int = 64
    num_steps: int = 10
    rounds: int = 6


@dataclass(frozen=True)
class Piece:
    """What can be begun, ended and shown by itself."""

    about: str
    minutes: float
    """On an H100, planned."""
    what: Tests | Steps | Grid | Plan


def _compared(base: RunConfig, methods: str, effort: Effort, by: str = "ratio", has_opponent: bool = False) -> Plan:
    return Plan(base, tuple(methods.split()), effort, by=by, has_opponent=has_opponent, num_records=0)


_SHORT = Effort(trials=3, seeds=3, search_seeds=1, finalists=1, final_seeds=1, search_epochs=1)
_FIVE = "F-GR B-GR SAM cheap"

PIECES: dict[str, Piece] = {
    "tests": Piece("the tests that need a GPU", 1, Tests()),
    "eager": Piece("a step of each method, fp32", 0.8, Steps({})),
    "bf16": Piece("the same in bf16, channels last", 0.8, Steps(FAST)),
    "graph": Piece("fp32, captured in a CUDA graph", 0.8, Steps({}, is_captured=True)),
    "compiled": Piece("fp32, the model compiled", 2, Steps({"compile": True})),
    "grid": Piece("grids: one at a time and as one batched model", 1.5, Grid()),
    "few": Piece(
        "the frontier's modes: ResNet-18, 5,000 rows, a quarter of the labels random",
        4.5,
        _compared(
            replace(_RESNET, num_train=5000, random_labels=0.25, epochs=15),
            "F-GR DB SAM cheap MSAM F-GR:period=4 F-GR:fraction=0.1",
            Effort(trials=4, seeds=4, search_seeds=1, finalists=2, final_seeds=1, search_epochs=5),
            has_opponent=True,
        ),
    ),
    "mlp": Piece(
        "claim (b): an MLP of 3 layers on all rows, a quarter of the labels random, in the batched engine",
        2.5,
        _compared(
            _MLP,
            "F-GR B-GR DB SAM F-GR:epsilon=0.02 F-GR:epsilon=0.5",
            Effort(trials=9, seeds=10, search_seeds=1, finalists=3, final_seeds=1, search_epochs=2),
            by="gamma",
        ),
    ),
    "resnet-18": Piece("claim (b): ResNet-18 on all rows", 7, _compared(_RESNET, _FIVE, _SHORT)),
    "wrn-16-4": Piece("claim (b): WRN-16-4 on all rows", 4.5, _compared(_WIDE, _FIVE, _SHORT)),
}
"""In the order in which they are played: 25.4 minutes in all."""


def pieces(is_quick: bool) -> dict[str, Piece]:
    """All of them, by name."""
    if not is_quick:
        return PIECES
    return {name: replace(piece, minutes=0.5, what=_toy(piece.what)) for name, piece in PIECES.items()}


def models(is_quick: bool) -> dict[str, RunConfig]:
    """Whose steps are timed."""
    return {name: smaller(config) for name, config in MODELS.items()} if is_quick else MODELS


def _toy(what: Tests | Steps | Grid | Plan) -> Tests | Steps | Grid | Plan:
    if isinstance(what, Steps):
        return replace(what, seconds=0.1)
    if isinstance(what, Grid):
        return Grid((64,), num_configs=4, num_steps=2, rounds=2)
    if isinstance(what, Tests):
        return what
    least = Effort(trials=1, seeds=2, search_seeds=1, finalists=1, final_seeds=1, search_epochs=1)
    return replace(what, base=replace(smaller(what.base), num_train=64, epochs=2), effort=least)


def smaller(config: RunConfig) -> RunConfig:
    """The same kind of model and step, of a size that a CPU makes in milliseconds."""
    if config.data == "text":
        return replace(config, depth=1, width=16, batch_size=4)
    if config.model == "mlp":  # at all its pixels, which a stack needs
        return replace(config, depth=2, width=16, batch_size=16)
    depth, width = {"resnet18": (10, 4), "wideresnet": (10, 1)}[config.model]
    return replace(config, depth=depth, width=width, shrink=4, batch_size=16)
