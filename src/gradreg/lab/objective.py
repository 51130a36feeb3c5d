"""The loss that all runs minimize, and how it is measured on whole data sets.

L is the mean cross-entropy over rows, or over all tokens of all rows for language. It is the plain objective: no
penalty, no flooding. Measurements are in evaluation mode, so that BatchNorm uses its running statistics and dropout
is off, and go through the rows in chunks, on the device of the model. A data set of small rows is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg.lab.data.parts import Part

_CHUNK = 2**20
"""Input numbers in a chunk by default: 341 images of 3×32×32."""
_CHUNK_WITH_GRADIENT = 2**18
"""The same where all activations are kept: 85 images, and 4,000 rows of the demo in one."""
_NUMBERS_IN_A_TOKEN = 64
"""A token counts as so many, since a model makes a vector of it."""


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, and the share of rows (tokens for language) whose largest logit is the label."""

    loss: float
    accuracy: float


def loss(model: nn.Module, part: Part) -> Tensor:
    """Mean cross-entropy, for logits (n, C) with labels (n,), and logits (n, T, C) with labels (n, T)."""
    return _cross_entropy(model(part.x), part.y)


def evaluate(model: nn.Module, part: Part, rows: int | None = None) -> Evaluation:
    """Loss and accuracy on all rows, `rows` at a time; by default so many that a chunk stays small."""
    device = _device(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with _evaluation_mode(model), torch.no_grad():
        for chunk, share in _chunks(part, rows, _CHUNK, device):
            logits = model(chunk.x)
            total += _cross_entropy(logits, chunk.y).double() * share
            correct += (logits.argmax(-1) == chunk.y).sum()
    # Rounded to float32 as the mean of a float32 tensor is.
    return Evaluation(total.item(), (correct.double() / part.y.numel()).float().item())


def gradient_norm(model: nn.Module, part: Part, rows: int | None = None) -> tuple[float, float]:
    """L and ‖∇L‖₂ over all parameters that train, for the mean loss over all rows, `rows` at a time.

    Leaves `.grad`, buffers and the mode of the model as they were.
    """
    device = _device(model)
    params = [param for param in model.parameters() if param.requires_grad]
    total = torch.zeros((), dtype=torch.float64, device=device)
    sums = [torch.zeros_like(param) for param in params]
    with _evaluation_mode(model), torch.enable_grad():
        for chunk, share in _chunks(part, rows, _CHUNK_WITH_GRADIENT, device):
            mean = loss(model, chunk)
            total += mean.detach().double() * share
            gradients = torch.autograd.grad(mean, params, allow_unused=True)
            for running, gradient in zip(sums, gradients):
                if gradient is not None:
                    running.add_(gradient, alpha=share)
    norm = torch.stack([running.square().sum() for running in sums]).sum().sqrt()
    return total.item(), norm.item()


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _chunks(part: Part, rows: int | None, numbers: int, device: torch.device) -> Iterator[tuple[Part, float]]:
    """Parts of the rows on the device, each with its share of all rows."""
    if rows is None:
        in_a_row = part.x[0].numel() * (1 if part.x.is_floating_point() else _NUMBERS_IN_A_TOKEN)
        rows = max(1, numbers // in_a_row)
    for first in range(0, len(part), rows):
        chunk = part[first : first + rows]
        yield Part(chunk.x.to(device), chunk.y.to(device)), len(chunk) / len(part)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
