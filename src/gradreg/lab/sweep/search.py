"""Points of a search, proposed by Optuna's tree-structured Parzen estimator from the points that were run.

A point is a function of what is known and of the seed, so that any worker can propose it: nothing of the sampler has
to be kept.

References:
    Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass
from typing import Any

from gradreg.lab.config import checked
from gradreg.lab.folder import BadInput
from gradreg.lab.names import suggestion

NUM_RANDOM = 10
"""Points before the estimator has something to go by (Optuna's default)."""


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included."""

    low: float
    high: float
    scale: str = "linear"


def range_from(spec: Field[Any], content: Mapping[Any, Any]) -> Range:
    """`{low: 1e-3, high: 1, scale: log}`, for a field that is a number."""
    name = spec.name
    if spec.metadata.get("type") is not float:
        raise BadInput(f"{name} must be a value or a list of values; it has no range.")
    unknown = [key for key in content if key not in ("low", "high", "scale")]
    if unknown:
        hint = suggestion(unknown[0], ("low", "high", "scale"))
        raise BadInput(f"{name} has the unknown key {str(unknown[0])!a}; a range has low, high and scale.{hint}")
    if content.get("low") is None or content.get("high") is None:
        raise BadInput(f"{name} must have low and high as a range.")
    low, high = (checked(spec, content[end]) for end in ("low", "high"))
    scale = content.get("scale", "linear")
    if scale not in ("linear", "log"):
        raise BadInput(f"{name} must have the scale linear or log, got {str(scale)!a}.")
    if low >= high or (scale == "log" and low <= 0):
        above = "above 0 and " if scale == "log" else ""
        raise BadInput(f"{name} must have low {above}below high, got {low:g} and {high:g}.")
    return Range(low, high, scale)


def propose(
    method: str,
    axes: Mapping[str, tuple[Any, ...] | Range],
    tried: Sequence[tuple[Mapping[str, Any], float | None]],
    seed: int,
) -> dict[str, Any]:
    """The next point.

    Args:
        method: put into the point.
        axes: of each field the values or the range.
        tried: earlier points with their mean accuracy, None while they run.
        seed: of the sampler, another one for each point.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(axis.low, axis.high, log=axis.scale == "log")
        if isinstance(axis, Range)
        else CategoricalDistribution(axis)
        for name, axis in axes.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=NUM_RANDOM, seed=seed, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point, accuracy in tried:
        params = {name: point[name] for name in axes}
        state = TrialState.RUNNING if accuracy is None else TrialState.COMPLETE
        study.add_trial(optuna.create_trial(state=state, value=accuracy, params=params, distributions=space))
    chosen = study.ask(space).params
    return {"method": method, **{name: _short(chosen[name], axis) for name, axis in axes.items()}}


def _short(value: Any, axis: tuple[Any, ...] | Range) -> Any:
    """Three digits are enough, and can be read."""
    return min(max(float(f"{value:.3g}"), axis.low), axis.high) if isinstance(axis, Range) else value
