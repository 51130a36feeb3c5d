r"""Flooding: a loss that is pushed back up when it falls below a level (Ishida et al., 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


def flooded(loss: Tensor, level: float) -> Tensor:
    r"""$|L - b| + b$: gradient descent above the level $b$, gradient ascent below.

    Crossing the level and coming back performs one step of the gradient penalty with ε equal to the learning rate
    (Karakida et al., ICML 2023), exactly for plain SGD on one batch.

    Example:
        >>> import torch
        >>> flooded(torch.tensor(0.25), level=1.0)
        tensor(1.7500)
    """
    return (loss - level).abs() + level


@dataclass(frozen=True)
class Flooding:
    """`flooded` as a transform of the loss: `Flooding(level)(loss)`.

    Args:
        level: b, a finite number ≥ 0, in the units of the loss.

    Raises:
        ValueError: a negative or non-finite level.

    Example:
        >>> import torch
        >>> Flooding(0.1)(torch.tensor(0.5))
        tensor(0.5000)
    """

    level: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.level) and self.level >= 0):
            raise ValueError(f"level must be a finite number ≥ 0, got {self.level}.")

    def __call__(self, loss: Tensor) -> Tensor:
        return flooded(loss, self.level)
