"""What hosts that run the first pass themselves, and let us run the second, cannot serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradreg.functional.schemes import resolve_scheme


def check_one_replay(options: Mapping[str, Any], way_out: str) -> None:
    """Refuse the options of `GradientRegularizer` that need several displaced passes, or the first pass in hand.

    Raises:
        ValueError: the schemes `central` and `exact`, or a local ascent.
    """
    scheme = resolve_scheme(options.get("scheme", "forward"))
    if scheme.is_exact or len(scheme.stencil) > 1:
        raise ValueError(
            f'scheme="{scheme.name}" needs more than one replay of the window, and only one is run here: use "forward" '
            f'or "backward", or {way_out}.'
        )
    if options.get("ascent_sync", "global") != "global":
        raise ValueError(
            'ascent_sync="local" must keep the first pass from being averaged, and that one is the host\'s: use '
            f'"global", or {way_out}.'
        )


def check_loss_fn(loss_fn: Any) -> None:
    """Refuse a loss where its function is needed: the one slip that the change from `backward(loss)` invites.

    Raises:
        TypeError: not callable.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function of a micro-batch that returns its loss, got {type(loss_fn).__name__}: both "
            "passes call it, so pass loss_fn itself and not loss_fn(batch)."
        )
