"""The three models whose step is timed: an MLP, a ResNet-18 and a small GPT, each with one fixed batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A model and the loss of its one batch; calling `loss()` runs a forward pass."""

    model: nn.Module
    loss: Callable[[], Tensor]


def mlp(device: torch.device, depth: int = 10, width: int = 512, batch: int = 128) -> Problem:
    """`depth` weight matrices of `width`, ReLU, 10 classes, on random inputs of `width` numbers."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).to(device)
    x, y = torch.randn(batch, width, device=device), torch.randint(10, (batch,), device=device)
    return Problem(model, lambda: F.cross_entropy(model(x), y))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet18(device: torch.device, width: int = 32, batch: int = 64) -> Problem:
    """ResNet-18 with the CIFAR stem, on random 32×32 images."""
    stages = [BasicBlock(width, width, 1), BasicBlock(width, width, 1)]
    for factor in (2, 4, 8):
        stages += [
            BasicBlock(width * factor // 2, width * factor, 2),
            BasicBlock(width * factor, width * factor, 1),
        ]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)]
    model = nn.Sequential(*stem, *stages, *head).to(device)
    x = torch.randn(batch, 3, 32, 32, device=device)
    y = torch.randint(10, (batch,), device=device)
    return Problem(model, lambda: F.cross_entropy(model(x), y))


class Block(nn.Module):
    """Pre-norm attention and MLP; attention is written out, since its fused forms have no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        causal = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
        mixed = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder with learned positions and an output matrix tied to the embedding."""

    def __init__(self, vocab: int, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def gpt(device: torch.device, depth: int = 4, width: int = 256, batch: int = 16) -> Problem:
    """A character-sized GPT on random tokens: vocabulary 256, 64 positions, 4 heads."""
    model = GPT(vocab=256, width=width, depth=depth, heads=4, length=64).to(device)
    ids = torch.randint(256, (batch, 65), device=device)
    return Problem(model, lambda: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


PROBLEMS = {"MLP-10": mlp, "ResNet-18": resnet18, "GPT": gpt}
