"""Crop and flip, for a whole batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (C, H, W) of x (n, C, H, W) padded by an eighth of its side, cropped to its size, perhaps mirrored.

    The padding is 4 pixels for 32×32 (He et al., 2016), of zeros, which is the mean color after standardization. The
    position of the crop is uniform, and the mirror image is taken with probability ½. The random numbers are drawn
    where the generator lives, so that a CPU generator gives the same images on every device.
    """
    n, channels, height, width = x.shape
    pad_rows, pad_columns = height // 8, width // 8
    draw = {"generator": generator, "device": generator.device}
    down = torch.randint(2 * pad_rows + 1, (n, 1), **draw)
    right = torch.randint(2 * pad_columns + 1, (n, 1), **draw)
    mirrored = torch.randint(2, (n, 1), **draw).bool()
    columns = torch.arange(width, device=generator.device)
    rows = down + torch.arange(height, device=generator.device)  # (n, H) in the padded image
    columns = right + torch.where(mirrored, columns.flip(0), columns)  # (n, W)
    index = rows[:, :, None] * (width + 2 * pad_columns) + columns[:, None, :]
    index = index.view(n, 1, height * width).expand(-1, channels, -1).to(x.device)
    padded = F.pad(x, (pad_columns, pad_columns, pad_rows, pad_rows))
    return padded.flatten(2).gather(2, index).view_as(x)


def augmented(batch: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch (x, y) with its images augmented."""
    x, y = batch
    return augment(x, generator), y
