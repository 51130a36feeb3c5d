"""Replay: the second pass draws the same random numbers and starts from the same buffers as the first.

Random state is that of torch on the host and on the devices of the parameters, of Python's `random` and of NumPy's
global generator, since augmentation inside the loss draws from them. After the second pass the random state and the
buffers (BatchNorm statistics, spectral-norm vectors, any other) are those that the first pass left.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def _accelerators(model: nn.Module) -> list[torch.device]:
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    return sorted(devices, key=str)


class RandomState:
    """The random generators as they stand when this is made; `restore` puts them back there."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._host = torch.get_rng_state()
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._devices = {}
        for device in devices:
            module = torch.get_device_module(device)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                continue  # a captured graph advances its own generator; see docs/passes.md
            self._devices[device] = module.get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


class Buffers:
    """The buffers of a model as they stand when this is made: which tensors, and what they hold."""

    def __init__(self, model: nn.Module) -> None:
        seen: dict[int, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor | None]] = []
        for module in model.modules():
            for name, buffer in module._buffers.items():
                self._places.append((module._buffers, name, buffer))
                if buffer is not None:
                    seen[id(buffer)] = buffer
        self._tensors = list(seen.values())
        with torch.no_grad():
            self._values = [t.clone() for t in self._tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """In place; a buffer that was replaced by another tensor becomes the old tensor again."""
        for owner, name, buffer in self._places:
            if owner[name] is not buffer:
                owner[name] = buffer
        for tensor, value in zip(self._tensors, self._values):
            tensor.copy_(value)


class Moment:
    """Random state and buffers together, at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._random = RandomState(_accelerators(model))
        self._buffers = Buffers(model)

    def restore(self) -> None:
        self._random.restore()
        self._buffers.restore()


class ForwardRecorder:
    """A forward pre-hook that remembers the moments a later second pass must start from.

    The caller of `perturbed()` runs the first pass before we are asked, so each of its forward passes is recorded; the
    second pass then starts its k-th forward from the k-th record. A window begins with the first forward that finds no
    gradient (after `zero_grad()`), and ends when the block closes. Evaluation under `no_grad` is not recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, ForwardRecorder) and hook.is_blank:  # came with a copy of another model
                del model._forward_pre_hooks[key]
        self._watched: list[nn.Parameter] | None = list(model.parameters())
        self._moments: list[Moment] = []
        self._replaying: int | None = None
        self.suspended = False
        model.register_forward_pre_hook(self)

    # A copied or unpickled model takes no recorder along: the copy belongs to no regularizer.
    def __reduce__(self) -> tuple[Any, ...]:
        return (_blank_recorder, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardRecorder:
        del memo
        return _blank_recorder()

    def __copy__(self) -> ForwardRecorder:
        return _blank_recorder()

    @property
    def is_blank(self) -> bool:
        return self._watched is None

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del args
        if self._watched is None or self.suspended or not torch.is_grad_enabled():
            return
        if self._replaying is not None:
            if self._replaying < len(self._moments):
                self._moments[self._replaying].restore()
            self._replaying += 1
            return
        if all(p.grad is None for p in self._watched):
            self._moments.clear()
        self._moments.append(Moment(module))

    def begin_replay(self) -> None:
        self._replaying = 0

    def end_replay(self) -> None:
        """Forget the window; say so if the second pass was not a replay of the first."""
        replayed, recorded = self._replaying or 0, len(self._moments)
        self._replaying = None
        self._moments.clear()
        if replayed != recorded:
            warnings.warn(
                f"perturbed(): the first pass called the model {recorded} times and the second {replayed} times. Both "
                "passes must see the same batches, in the same order; otherwise the penalty is that of another loss.",
                UserWarning,
                stacklevel=4,
            )


def _blank_recorder() -> ForwardRecorder:
    recorder = object.__new__(ForwardRecorder)
    recorder._watched, recorder._moments, recorder._replaying, recorder.suspended = None, [], None, True
    return recorder


