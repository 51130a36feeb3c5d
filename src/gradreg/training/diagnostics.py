"""Diagnostics: what the second pass did, as tensors that nobody reads before the user asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradreg import _vectors as vectors
from gradreg.training.combination import Measured
from gradreg.training.notices import warn


class Realized(NamedTuple):
    """The displacement that the weights took after rounding, against the one that was meant."""

    cosine: Tensor
    norm: Tensor  # ‖applied‖ / ‖intended‖


_UNKNOWN = torch.tensor(float("nan"))
STRONG = 3
"""A ratio above this is warned of."""


class Diagnostics:
    """Counters of all steps, and measurements of the last step with γ > 0."""

    def __init__(self) -> None:
        self.counts: tuple[Tensor | int, Tensor | int] = (0, 0)  # active and skipped steps
        self._grad_norm: tuple[Tensor, float | Tensor] = _UNKNOWN, 1.0
        self._ratio = _UNKNOWN
        self._cosine = _UNKNOWN
        self._realized = Realized(_UNKNOWN, _UNKNOWN)
        self._low_precision = False
        self._warned = False
        self._warned_of_ratio = False
        self.last_ratio: Tensor | None = None  # ‖ĝ − g1‖/‖g1‖ of the last step with γ > 0, if it was measured
        self.is_wanted = True  # nobody has measured since the user last read

    def counted(self, was_active: bool | Tensor) -> tuple[Tensor | int, Tensor | int]:
        """The counters after one more step."""
        is_active = was_active.long() if isinstance(was_active, Tensor) else int(was_active)
        active, skipped = self.counts
        return active + is_active, skipped + (1 - is_active)

    def record(self, norm: Tensor, scale: float | Tensor, measured: Measured | None, share: float = 1.0) -> None:
        """Keep the measurements of a step on a share of the batch; None where ĝ = g1, without a second pass.

        `norm` is ‖scale · g1‖; it is divided when somebody reads, if that can wait.
        """
        # A scale of the user's may change in place before somebody reads.
        self._grad_norm = (norm / scale, 1.0) if isinstance(scale, Tensor) else (norm, scale)
        self.last_ratio = None
        if measured is None:
            self._ratio, self._cosine = norm * 0, _UNKNOWN
        elif measured.ratio is not None:
            self._ratio = self.last_ratio = share * measured.ratio
            if vectors.is_readable(self._ratio):
                self._warn_if_strong()
            self._cosine = _UNKNOWN if measured.cosine is None else measured.cosine
        else:
            return
        self.is_wanted = False

    def record_realized(
        self, applied: Iterable[Tensor], step: vectors.Scalar, direction: Sequence[Tensor], low_precision: bool
    ) -> None:
        square, product, length = vectors.total([vectors.products(a, d) for a, d in zip(applied, direction)])
        size, length = square.sqrt(), length.sqrt()
        step = vectors.scalar_like(length, step)
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
            warn(
                f"Rounding realized only {kept:.0%} of the displacement εd, since the weights are stored in low "
                'precision: the penalty is mostly noise. Use a larger epsilon, ascent="normalized", or float32 weights '
                "(autocast may still compute in low precision)."
            )

    def _warn_if_strong(self) -> None:
        """Warn once of a penalty that is several times the gradient. Reads the measurement."""
        if self._warned_of_ratio or not float(self._ratio) > STRONG:
            return
        self._warned_of_ratio = True
        warn(
            f"The penalty is {float(self._ratio):.3g} times the gradient (penalty_ratio = ‖ĝ − g1‖/‖g1‖ > {STRONG}), "
            "and training follows it instead of the loss: lower gamma, or let gamma=gradreg.TargetRatio() find it; "
            "cap=1.0 bounds the ratio of every step."
        )

    def read(self) -> dict[str, Tensor | Realized]:
        self.is_wanted = True
        self._warn_if_lost()
        self._warn_if_strong()
        active, skipped = self.counts
        norm, scale = self._grad_norm
        return {
            "grad_norm": norm / scale,
            "penalty_ratio": self._ratio,
            "cosine": self._cosine,
            "realized": self._realized,
            "active_steps": torch.as_tensor(active),
            "skipped_steps": torch.as_tensor(skipped),
        }

    def state_dict(self) -> dict[str, int]:
        active, skipped = self.counts
        return {"active_steps": int(active), "skipped_steps": int(skipped)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counts = state["active_steps"], state["skipped_steps"]
