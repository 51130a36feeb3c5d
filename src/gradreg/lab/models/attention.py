"""Transformers: a vision transformer and a decoder for characters, both of pre-norm blocks.

Attention is written out, since its fused forms have no second derivative. Weights start as in the papers: those of
the ViT by their fan (Glorot and Bengio, 2010; patches by fan-in alone), those of the decoder normal with deviation 0.02
(GPT-2, Radford et al., 2019), which is made for widths of some hundreds. Biases start at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS = 4
_DEVIATION = 0.02


class Block(nn.Module):
    """Attention, then an MLP of 4 times the width with GELU, each after LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int = HEADS, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        if self.causal:
            past = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~past, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021): patches, learned positions, and the mean over them."""

    def __init__(
        self, channels: int, size: tuple[int, int], num_classes: int, patch: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.empty(size[0] // patch * (size[1] // patch), width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.positions, std=_DEVIATION)
        nn.init.kaiming_normal_(self.patches.weight, nonlinearity="linear")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class GPT(nn.Module):
    """A decoder with learned positions, whose output matrix is its embedding: (n, T) whole numbers to (n, T, vocab)."""

    def __init__(self, vocab: int, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialize)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        return nn.functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_DEVIATION)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
