"""What hosts that run the first pass themselves, and let us run the second, cannot serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradreg.functional.schemes import resolve_scheme
from gradreg.training.directions import Momentum, Previous


def check_one_replay(options: Mapping[str, Any], way_out: str) -> None:
    """Refuse the options of `GradientRegularizer` that need several displaced passes, or the first pass in hand.

    Raises:
        ValueError: the schemes `central` and `exact`, a local ascent, or a mode that moves or divides the first pass.
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
    is_known = isinstance(options.get("ascent"), (Momentum, Previous))
    for name in ("batch", "at", *(["ascent"] if is_known else [])):
        if options.get(name) is not None:
            raise ValueError(
                f"{name}={options[name]} moves or divides the first pass, and that one is the host's: use a schedule, "
                f"such as every(gamma, 10), or {way_out}."
            )
