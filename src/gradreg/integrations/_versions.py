"""The versions of the hosts that the tests were run with, and what is said of others."""

from __future__ import annotations

import sys
from typing import Any

from gradreg.training.notices import warn

TESTED = {
    "transformers": ("5.14", "5.20", "5.21", "5.22", "5.23"),  # the last in every run of the tests, the others by hand
    "trl": ("1.8", "1.16"),
    "sentence_transformers": ("6.2",),
    "verl": ("0.9",),
}
# What the mixin stands on: without one of these a step would have no penalty, or a checkpoint no state.
NEEDED = (
    "_inner_training_loop",
    "_load_optimizer_and_scheduler",
    "_prepare_inputs",
    "_save_optimizer_and_scheduler",
    "training_step",
)


def check_versions(trainer: Any) -> None:
    """Refuse a trainer that is made otherwise, and warn of versions of its packages that were not tested.

    Raises:
        RuntimeError: a Trainer without a method that the second pass stands on.
    """
    kinds = [kind for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] != "gradreg"]
    packages = {kind.__module__.split(".")[0] for kind in kinds}
    found = {name: sys.modules[name].__version__ for name in TESTED if name in packages and name in sys.modules}
    tested = "; ".join(f"{name} {', '.join(TESTED[name])}" for name in TESTED if name in found)
    missing = [name for name in NEEDED if not any(name in vars(kind) for kind in kinds)]
    if missing:
        raise RuntimeError(
            f"{type(trainer).__name__} has no {missing[0]}, which the second pass stands on; found "
            f"{_listed(found)}, and tested were {tested}: install one of these, or use a loop of your own and "
            "gradreg.GradientRegularizer."
        )
    unknown = {name: version for name, version in found.items() if not is_tested(name, version)}
    if unknown:
        warn(
            f"gradreg was tested with {tested}, and not with {_listed(unknown)}: install one of these, or check by "
            "yourself that gamma=0 is plain training and that penalty_ratio in the logs is what you expect."
        )


def is_tested(name: str, version: str) -> bool:
    """Whether the tests were run with this version of a package."""
    return any(version == known or version.startswith(f"{known}.") for known in TESTED[name])


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
