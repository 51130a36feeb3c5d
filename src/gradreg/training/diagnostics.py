"""Diagnostics: what the second pass did, as tensors that nobody reads before the user asks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradreg import _vectors as vectors
from gradreg.training.combination import Measured


class Realized(NamedTuple):
    """The displacement that the weights took after rounding, against the one that was meant."""

    cosine: Tensor
    norm: Tensor  # ‖applied‖ / ‖intended‖


_UNKNOWN = torch.tensor(float("nan"))


class Diagnostics:
    """Counters of all steps, and measurements of the last step with γ > 0."""

    def __init__(self) -> None:
        self._active: Tensor | int = 0
        self._skipped: Tensor | int = 0
        self._measured: Measured | None = None
        self._grad_norm = _UNKNOWN
        self._realized = Realized(_UNKNOWN, _UNKNOWN)
        self._low_precision = False
        self._warned = False
        self.is_wanted = True  # nobody has measured since the user last read

    def count(self, was_active: Tensor) -> None:
        active = int(was_active) if vectors.is_readable(was_active) else was_active.long()
        self._active = self._active + active
        self._skipped = self._skipped + (1 - active)

    def count_pass(self, step: Tensor, is_measured: bool) -> None:
        """A step of one pass, which has no g1 to measure; active if the weights were displaced for it."""
        self.count(step != 0)
        self.is_wanted = self.is_wanted and not is_measured

    def record(self, grad_norm: Tensor, measured: Measured | None) -> None:
        """Keep the measurements of a step; None where the second pass did not run, so that ĝ = g1."""
        self._grad_norm = grad_norm
        if measured is None or measured.wanted:
            self._measured = measured
            self.is_wanted = False

    def record_realized(
        self, applied: Iterable[Tensor], step: Tensor, direction: Sequence[Tensor], low_precision: bool
    ) -> None:
        length = vectors.norm(direction)
        parts = [(vectors.squared(a), vectors.dot(a, d)) for a, d in zip(applied, direction)]  # one temporary at a time
        size = vectors.total([part for part, _ in parts]).sqrt()
        product = vectors.total([part for _, part in parts])
        cosine = product * vectors.safe_reciprocal(size * length) * step.sign()
        self._realized = Realized(cosine, size * vectors.safe_reciprocal(step.abs() * length))
        self._low_precision = low_precision
        if vectors.is_readable(size):
            self._warn_if_lost()

    def _warn_if_lost(self) -> None:
        """Warn once when rounding kept less than half of the intended displacement. Reads the measurement."""
        kept = float(self._realized.cosine * self._realized.norm)
        if self._low_precision and not self._warned and kept < 0.5:
            self._warned = True
            warnings.warn(
                f"Rounding realized only {kept:.0%} of the displacement εd, since the weights are stored in low "
                'precision: the penalty is mostly noise. Use a larger epsilon, ascent="normalized", or float32 weights '
                "(autocast may still compute in low precision).",
                UserWarning,
                stacklevel=2,
            )

    def read(self) -> dict[str, Tensor | Realized]:
        self.is_wanted = True
        self._warn_if_lost()
        ratio, cosine = self._grad_norm * 0, _UNKNOWN  # a skipped step: ĝ = g1
        if self._measured is not None:
            ratio, cosine = self._measured.penalty_ratio(), self._measured.cosine()
        return {
            "grad_norm": self._grad_norm,
            "penalty_ratio": ratio,
            "cosine": cosine,
            "realized": self._realized,
            "active_steps": torch.as_tensor(self._active),
            "skipped_steps": torch.as_tensor(self._skipped),
        }

    def state_dict(self) -> dict[str, int]:
        return {"active_steps": int(self._active), "skipped_steps": int(self._skipped)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._active, self._skipped = state["active_steps"], state["skipped_steps"]
