"""Warnings that point at the user's line, however deep they arise."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """A UserWarning at the nearest line outside of this package and of torch."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("gradreg", "torch"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, UserWarning, stacklevel=depth + 1)
