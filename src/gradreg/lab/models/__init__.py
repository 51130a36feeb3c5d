"""The models of a run, by name: which data each one fits, and its default size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from gradreg.lab.config import RunConfig
from gradreg.lab.data import Split
from gradreg.lab.folder import BadInput
from gradreg.lab.models.attention import GPT, HEADS, ViT
from gradreg.lab.models.vision import resnet, wide_resnet


def build(config: RunConfig, data: Split) -> nn.Module:
    """The model of a run, initialized by its seed; the global random state stays what it was.

    Raises:
        BadInput: the model does not fit the data, or has no such depth or width.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        return MODELS[config.model].make(config, data)


def _activated(model: nn.Module, config: RunConfig) -> nn.Module:
    """With the activation of the configuration in the place of ReLU."""
    if config.activation == "relu":
        return model
    found = [(m, name) for m in model.modules() for name, child in m.named_children() if isinstance(child, nn.ReLU)]
    if not found:
        raise BadInput(f"activation must be left out with model {config.model}, which has GELU, got 'silu'.")
    for module, name in found:
        setattr(module, name, nn.SiLU())
    return model


@dataclass(frozen=True)
class Model:
    """A row of the table."""

    architecture: Callable[[RunConfig, Split], nn.Module]
    fits: tuple[str, ...]
    """What rows may be: signals, images, or text."""

    def make(self, config: RunConfig, data: Split) -> nn.Module:
        """The model with its activation, from the global random state; refuses data that it does not fit."""
        kind = _kind(data)
        if kind not in self.fits:
            fitting = ", ".join(name for name, model in MODELS.items() if kind in model.fits)
            raise BadInput(f"model must be one of {fitting} with data {config.data} ({kind}), got {config.model!a}.")
        if config.patch is not None and config.model != "vit":
            raise BadInput(f"patch must be left out with model {config.model}: only vit has it, got '{config.patch}'.")
        return _activated(self.architecture(config, data), config)


def mlp(config: RunConfig, data: Split) -> nn.Module:
    """`depth` linear layers (3) of `width` hidden units (256) with ReLU, for rows of numbers of any shape."""
    depth, width = config.depth or 3, config.width or 256
    sizes = [data.train.x[0].numel(), *[width] * (depth - 1), data.num_classes]
    layers: list[nn.Module] = [] if data.train.x.ndim == 2 else [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(config: RunConfig, data: Split) -> nn.Module:
    """`depth` (2) 3×3 convolutions with BatchNorm, ReLU and pooling; the first has `width` (16) channels, each next
    one twice as many.
    """
    depth, channels = config.depth or 2, config.width or 16
    before, fan_in, (height, width) = _images(data)
    most = min(height, width).bit_length() - 1
    if depth > most:
        raise BadInput(f"depth must be from 1 to {most} with model cnn on {height}×{width} images, got {depth}.")
    layers = before
    for _ in range(depth):
        layers += [nn.Conv2d(fan_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        fan_in, channels, height, width = channels, 2 * channels, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(fan_in * height * width, data.num_classes))


def resnet18(config: RunConfig, data: Split) -> nn.Module:
    """ResNet with the CIFAR stem: `depth` 18 and `width` 64, the channels of its first stage."""
    before, channels, _ = _images(data)
    blocks = (_depth(config, 18, 8, 2) - 2) // 8
    return _after(before, resnet(channels, data.num_classes, blocks, config.width or 64))


def wideresnet(config: RunConfig, data: Split) -> nn.Module:
    """WideResNet-28-10: `depth` 28 and `width` 10, the widening factor."""
    before, channels, _ = _images(data)
    return _after(before, wide_resnet(channels, data.num_classes, _depth(config, 28, 6, 4), config.width or 10))


def vit(config: RunConfig, data: Split) -> nn.Module:
    """A vision transformer of `depth` 6 and `width` 128, on patches that cut the shorter side in about 8."""
    before, channels, size = _images(data)
    sides = [side for side in range(1, min(size) + 1) if not size[0] % side and not size[1] % side]
    patch = config.patch or min(sides, key=lambda side: abs(min(size) / side - 8))
    if patch not in sides:
        allowed = ", ".join(map(str, sides))
        raise BadInput(f"patch must divide both sides, {allowed} on {size[0]}×{size[1]} images, got '{patch}'.")
    return _after(before, ViT(channels, size, data.num_classes, patch, _width(config, 128), config.depth or 6))


def gpt(config: RunConfig, data: Split) -> nn.Module:
    """A decoder of `depth` 2 and `width` 128 that predicts the next character."""
    return GPT(data.num_classes, _width(config, 128), config.depth or 2, data.train.x.size(1))


MODELS: dict[str, Model] = {
    "mlp": Model(mlp, ("signals", "images")),
    "cnn": Model(cnn, ("images",)),
    "resnet18": Model(resnet18, ("images",)),
    "wideresnet": Model(wideresnet, ("images",)),
    "vit": Model(vit, ("images",)),
    "gpt": Model(gpt, ("text",)),
}


def _kind(data: Split) -> str:
    if data.is_language:
        return "text"
    return "signals" if data.train.x.ndim == 2 else "images"


def _images(data: Split) -> tuple[list[nn.Module], int, tuple[int, int]]:
    """What makes (n, C, H, W) of the rows, C, and (H, W)."""
    height, width = data.train.x.shape[-2:]
    if data.train.x.ndim == 3:
        return [nn.Unflatten(1, (1, height))], 1, (height, width)
    return [], data.train.x.size(1), (height, width)


def _after(before: list[nn.Module], model: nn.Module) -> nn.Module:
    return nn.Sequential(*before, model) if before else model


def _depth(config: RunConfig, default: int, step: int, rest: int) -> int:
    depth = config.depth or default
    if depth < step + rest or (depth - rest) % step:
        allowed = ", ".join(str(step * n + rest) for n in range(1, 5))
        raise BadInput(f"depth must be {step}n + {rest} with model {config.model} ({allowed}, …), got {depth}.")
    return depth


def _width(config: RunConfig, default: int) -> int:
    width = config.width or default
    if width % HEADS:
        raise BadInput(f"width must be a multiple of {HEADS} with model {config.model}, got {width}.")
    return width
