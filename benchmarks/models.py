"""The models whose step is timed: an MLP, a ResNet-18 and a GPT, each with one fixed batch, in two sizes.

In the large size a step is mostly matrix products; in the small one it is mostly Python and the dispatch of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg.lab.models.attention import GPT
from gradreg.lab.models.vision import resnet


@dataclass(frozen=True)
class Problem:
    """A model, its one batch of inputs and labels, and the loss of a batch."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]

    def loss(self, batch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Runs a forward pass."""
        x, y = self.batch if batch is None else batch
        return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())


def mlp(device: torch.device, depth: int = 10, width: int = 512, batch: int = 128) -> Problem:
    """`depth` weight matrices of `width`, ReLU, 10 classes, on random inputs of `width` numbers."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).to(device)
    x, y = torch.randn(batch, width, device=device), torch.randint(10, (batch,), device=device)
    return Problem(model, (x, y))


def resnet18(device: torch.device, width: int = 32, batch: int = 64, pixels: int = 32) -> Problem:
    """ResNet-18 with the CIFAR stem, on random images of `pixels`×`pixels`."""
    model = resnet(3, 10, width=width).to(device)
    x = torch.randn(batch, 3, pixels, pixels, device=device)
    y = torch.randint(10, (batch,), device=device)
    return Problem(model, (x, y))


def gpt(device: torch.device, depth: int = 4, width: int = 256, batch: int = 16) -> Problem:
    """A character-sized GPT on random tokens: vocabulary 256, 64 positions, 4 heads."""
    model = GPT(vocab=256, width=width, depth=depth, length=64).to(device)
    ids = torch.randint(256, (batch, 65), device=device)
    return Problem(model, (ids[:, :-1], ids[:, 1:]))


PROBLEMS: dict[str, Callable[..., Problem]] = {"MLP-10": mlp, "ResNet-18": resnet18, "GPT": gpt}
SMALL_PROBLEMS: dict[str, Callable[..., Problem]] = {
    "small MLP": partial(mlp, depth=3, width=128, batch=50),
    "small ResNet": partial(resnet18, width=4, batch=2, pixels=8),
    "small GPT": partial(gpt, width=32, batch=1),
}
