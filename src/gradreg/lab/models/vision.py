"""Convolutional networks for images of 32×32: ResNet-18 with the CIFAR stem, and WideResNet.

Written without operations in place, so that all of them can be differentiated twice. Convolutions start with He's
normal initialization over outgoing connections (He et al., 2015), as both papers do.
"""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(channels_in, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreactivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions (Zagoruyko & Komodakis, 2016).

    Where the shape changes, the shortcut is a 1×1 convolution that starts after the first ReLU.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3(channels, channels)
        self.activation = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.bn1(x))
        out = self.conv2(self.activation(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def resnet(channels: int, num_classes: int, blocks: int = 2, width: int = 64) -> nn.Sequential:
    """Four stages of `blocks` basic blocks of `width`, 2·, 4· and 8·`width` channels; 2 blocks are ResNet-18.

    The CIFAR stem: one 3×3 convolution of stride 1, and no pooling before the stages.
    """
    layers: list[nn.Module] = [_conv3(channels, width), nn.BatchNorm2d(width), nn.ReLU()]
    layers += _stages(BasicBlock, width, [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)], blocks)
    return _initialized([*layers, *_head(8 * width, num_classes)])


def wide_resnet(channels: int, num_classes: int, depth: int = 28, factor: int = 10) -> nn.Sequential:
    """WideResNet-`depth`-`factor`: three stages of (`depth` − 4)/6 blocks, 16, 32 and 64 times `factor` channels."""
    layers: list[nn.Module] = [_conv3(channels, 16)]
    stages = [(16 * factor, 1), (32 * factor, 2), (64 * factor, 2)]
    layers += _stages(PreactivationBlock, 16, stages, (depth - 4) // 6)
    layers += [nn.BatchNorm2d(64 * factor), nn.ReLU()]
    return _initialized([*layers, *_head(64 * factor, num_classes)])


def _stages(
    block: type[BasicBlock] | type[PreactivationBlock], channels: int, stages: list[tuple[int, int]], blocks: int
) -> list[nn.Module]:
    """Blocks of the stages (channels, stride of the first block)."""
    layers: list[nn.Module] = []
    for width, stride in stages:
        for index in range(blocks):
            layers.append(block(channels, width, 1 if index else stride))
            channels = width
    return layers


def _head(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def _conv3(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)


def _initialized(layers: list[nn.Module]) -> nn.Sequential:
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
