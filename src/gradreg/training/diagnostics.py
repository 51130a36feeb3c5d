"""Diagnostics: what the second pass did, as tensors that nobody reads before the user asks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradreg import _vectors as vectors


class Realized(NamedTuple):
    """The displacement that the weights took after rounding, against the one that was meant."""

    cosine: Tensor
    norm: Tensor  # ‖applied‖ / ‖intended‖


class Diagnostics:
    """Counters of every step, and measurements of the last measured one."""

    def __init__(self) -> None:
        self.active_steps: Tensor | int = 0
        self.skipped_steps: Tensor | int = 0
        self._values = {name: torch.tensor(float("nan")) for name in ("grad_norm", "penalty_ratio", "cosine")}
        self._realized = Realized(torch.tensor(float("nan")), torch.tensor(float("nan")))
        self.wanted = True  # someone read since the last measurement, or nobody has measured yet
        self._warned = False

    def count(self, finite: Tensor) -> None:
        self.active_steps = self.active_steps + finite.long()
        self.skipped_steps = self.skipped_steps + (~finite).long()

    def record(self, **values: Tensor) -> None:
        self._values.update(values)
        self.wanted = False

    def record_realized(
        self, applied: Sequence[Tensor], step: Tensor, direction: Sequence[Tensor], low_precision: bool
    ) -> None:
        length = vectors.norm(direction)
        size = vectors.norm(applied)
        intended = step.abs() * length
        cosine = vectors.dot(applied, direction) * vectors.safe_reciprocal(size * length) * step.sign()
        self._realized = Realized(cosine, size * vectors.safe_reciprocal(intended))
        if low_precision and size.device.type == "cpu":
            self.warn_if_lost()

    def warn_if_lost(self) -> None:
        """Warn once when rounding kept less than half of the intended displacement. Reads the measurement."""
        kept = float(self._realized.cosine * self._realized.norm)
        if not self._warned and kept < 0.5:
            self._warned = True
            warnings.warn(
                f"Rounding realized only {kept:.0%} of the displacement εd, since the weights are stored in low precision: "
                'the penalty is mostly noise. Use a larger epsilon, ascent="normalized", or float32 weights (autocast '
                "may still compute in low precision).",
                UserWarning,
                stacklevel=2,
            )

    def read(self) -> dict[str, Tensor | Realized]:
        self.wanted = True
        return {
            **self._values,
            "realized": self._realized,
            "active_steps": torch.as_tensor(self.active_steps),
            "skipped_steps": torch.as_tensor(self.skipped_steps),
        }

    def state_dict(self) -> dict[str, int]:
        return {"active_steps": int(self.active_steps), "skipped_steps": int(self.skipped_steps)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.active_steps, self.skipped_steps = state["active_steps"], state["skipped_steps"]
