"""The parts of a model, walked once and again only when they change: walking is slow beside a small model's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Anatomy:
    """Modules, parameters and places of buffers of a model, kept up to date by `follow`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._walk()

    def _walk(self) -> None:
        self.modules: list[nn.Module] = list(self.model.modules())
        self.parameters: list[nn.Parameter] = list(self.model.parameters())
        self._seen = self._fingerprint()
        devices = {p.device for p in self.parameters if p.device.type not in ("cpu", "meta")}
        self.accelerators: list[torch.device] = sorted(devices, key=str)

    def _fingerprint(self) -> tuple[list[int], list[tuple[int, bool, torch.device]]]:
        children = [id(child) for m in self.modules for child in m._modules.values()]
        parameters = [
            (id(p), p.requires_grad, p.device) for m in self.modules for p in m._parameters.values() if p is not None
        ]
        return children, parameters

    def follow(self) -> bool:
        """Walk again where modules or parameters are others now, moved, or were frozen or thawed; whether it did."""
        if self._fingerprint() == self._seen:
            return False
        self._walk()
        return True

    def buffers(self) -> list[tuple[dict[str, Any], str, Tensor | None]]:
        """(owner, name, tensor) of every buffer, as they stand now."""
        return [
            (module._buffers, name, buffer)
            for module in self.modules
            if module._buffers
            for name, buffer in module._buffers.items()
        ]
