"""A γ for a wanted penalty ratio, measured on some batches before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gradreg.training.anatomy import Anatomy
from gradreg.training.calls import check_loss_fn
from gradreg.training.combination import give
from gradreg.training.defaults import default_epsilon
from gradreg.training.player import PLAYERS
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.replay import Moment
from gradreg.training.schedule import check
from gradreg.training.target import TargetRatio

_PROBE = 0.01
"""γ/ε that the measurement begins with: small, so that no ratio is warned of; the ratio is proportional to it."""


def calibrated_gamma(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    target: float = 0.1,
    epsilon: float | None = None,
    **options: Any,
) -> float:
    r"""The γ for which $\|\hat g - g_1\| / \|g_1\|$ is `target`, by the median over some batches.

    $$\gamma = \text{target} / \mathrm{median}_b \, s_b, \qquad s = \|g_2 - g_1\| / (\epsilon \|g_1\|)$$

    Exact for a single batch, at the weights at hand; s changes in training, most of all at its beginning, so that a
    model at initialization tells little: measure after the warm-up, or let `TargetRatio` follow it. Costs two passes
    for each batch. Weights, gradients, buffers, random state and mode of the model are left as they were.

    A γ above ε goes beyond the second gradient; where it comes out far above, ε is short for this model.

    Args:
        model: the model, in the mode that it trains in.
        loss_fn: maps a batch to the loss, a scalar.
        batches: batches as in training, at least one; ten give a stable median.
        target: the wanted ratio, > 0.
        epsilon: the ε to train with, > 0; without it that of `GradientRegularizer(model)`.
        options: of `GradientRegularizer`: scheme, ascent, include, exclude, batch, as in training.

    Returns:
        γ, for the same ε and options.

    Raises:
        ValueError: a target or ε that is not > 0, no batch, none whose ratio can be measured (a gradient that is zero
            or not finite, a loss linear in the weights), or a mode of one pass.
        TypeError: a loss in the place of its function.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> loss_fn = lambda x: (model(x) - 1).square().sum() / 2
        >>> round(calibrated_gamma(model, loss_fn, [torch.eye(2)], target=0.3, epsilon=0.1), 3)  # H = 1: the ratio is γ
        0.3
    """
    check_loss_fn(loss_fn)
    if "cap" in options:
        raise ValueError("cap cannot be given: it would bound the ratio that is measured. Give it to the regularizer.")
    epsilon = default_epsilon(options.get("ascent", "gradient")) if epsilon is None else epsilon
    check("epsilon", epsilon)
    if callable(epsilon):
        raise ValueError("epsilon must be a number, got a function of the step: measure for each ε that it takes.")
    rule = TargetRatio(target, ramp=0, start=_PROBE * epsilon)
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch, got none.")
    with _unseen(model):
        slopes = _slopes(GradientRegularizer(model, rule, epsilon, **options), loss_fn, batches)
    known = [s for s in slopes if math.isfinite(s) and s > 0]
    if not known:
        raise ValueError(
            f"batches must give a gradient that changes along the ascent, got ratios of {slopes} per γ: the gradient "
            "is zero or not finite, or the loss is linear in the selected parameters."
        )
    from statistics import median  # not for everybody who imports gradreg

    return target / median(known)


@contextmanager
def _unseen(model: nn.Module) -> Iterator[None]:
    """No regularizer that the model has already takes these forwards for its own."""
    modules = set(model.modules())
    watches = [engine.watch for engine in PLAYERS if engine.anatomy.model in modules and not engine.watch.is_paused]
    for watch in watches:
        watch.is_paused = True
    try:
        yield
    finally:
        for watch in watches:
            watch.is_paused = False


def _slopes(probe: GradientRegularizer, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any]) -> list[float]:
    """The ratio per γ of each batch, leaving no trace."""
    parameters = probe.selection.all
    kept = [p.grad for p in parameters]
    before = Moment(Anatomy(probe.model))
    slopes = []
    try:
        for batch in batches:
            give(parameters, [None] * len(kept))
            probe.backward(loss_fn, [batch])
            found: dict[str, Any] = probe.diagnostics()
            slopes.append(float(found["penalty_ratio"] / found["gamma"]))
    finally:
        before.restore()
        give(parameters, kept)
    return slopes
