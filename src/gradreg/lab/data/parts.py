"""Rows of a data set, and its split into training, validation and test rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0
"""Of every shuffle that decides which rows are training, validation or test rows: the same in all runs."""

_NUMBERS_IN_A_TOKEN = 64
"""A token counts as so many, since a model makes a vector of it."""


@dataclass(frozen=True)
class Part:
    """Rows: `x` (n, 40) signals, (n, 8, 8) digits, (n, C, H, W) images, or (n, T) characters as whole numbers;
    `y` (n,) classes, or (n, T) the next characters.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor | slice) -> Part:
        return Part(self.x[rows], self.y[rows])

    def num_batches(self, batch_size: int) -> int:
        """Of an epoch, the last partial one dropped."""
        return len(self) // batch_size

    def batches(self, generator: torch.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of (x, y), each row once, in the generator's order."""
        return ((self.x[rows], self.y[rows]) for rows in order(len(self), generator, batch_size))

    def chunks(self, rows: int | None, numbers: int) -> Iterator[tuple[tuple[Tensor, Tensor], int]]:
        """All rows in their order, with their counts; by default so many at a time that inputs have `numbers`."""
        if rows is None:
            in_a_row = self.x[0].numel() * (1 if self.x.is_floating_point() else _NUMBERS_IN_A_TOKEN)
            rows = max(1, numbers // max(1, in_a_row))
        for first in range(0, len(self), rows):
            chunk = self[first : first + rows]
            yield (chunk.x, chunk.y), len(chunk)


@dataclass(frozen=True)
class Split:
    """The three parts, disjoint."""

    train: Part
    validation: Part
    test: Part
    num_classes: int = 10
    """Of characters, for language."""

    @property
    def is_language(self) -> bool:
        """Rows are characters, and each has a label."""
        return not self.train.x.is_floating_point()


def order(num_rows: int, generator: torch.Generator, batch_size: int) -> tuple[Tensor, ...]:
    """The rows of each batch of an epoch, each row once, the last partial batch dropped."""
    shuffled_rows = torch.randperm(num_rows, generator=generator)
    return shuffled_rows[: num_rows // batch_size * batch_size].split(batch_size)


def shuffled(num_rows: int) -> np.ndarray:
    """The fixed order of so many rows."""
    return np.random.default_rng(SPLIT_SEED).permutation(num_rows)


def from_bytes(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (n, C, H, W) from bytes, each color scaled to [0, 1] and then standardized by `mean` and `std`."""
    x = torch.from_numpy(images).to(torch.float32).div_(255)
    middle, scale = (torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1, 1) for numbers in (mean, std))
    return x.sub_(middle).div_(scale)


def moments(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and deviation of each color of bytes (n, C, H, W), as values in [0, 1]; a constant color keeps its scale."""
    counts = np.stack([np.bincount(pixels[:, color].ravel(), minlength=256) for color in range(pixels.shape[1])])
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    return mean.tolist(), np.where(std > 1e-4, std, 1.0).tolist()
