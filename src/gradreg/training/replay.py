"""Replay: the second pass draws the same random numbers and starts from the same buffers as the first.

Random state is that of torch on the host and on the devices of the parameters, of Python's `random` and of NumPy's
global generator, since augmentation inside the loss draws from them. After the second pass the random state and the
buffers (BatchNorm statistics, spectral-norm vectors, any other) are those that the first pass left.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch

from gradreg import _vectors as vectors
from gradreg.training.anatomy import Anatomy


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

    def __init__(self, anatomy: Anatomy) -> None:
        self._places = anatomy.buffers()
        seen = {id(buffer): buffer for _, _, buffer in self._places if buffer is not None}
        self._tensors = list(seen.values())
        self._values = [torch.empty_like(t) for t in self._tensors]
        vectors.copy_(self._values, self._tensors)

    def restore(self) -> None:
        """In place; a buffer that was replaced by another tensor becomes the old tensor again."""
        for owner, name, buffer in self._places:
            if owner.get(name) is not buffer:
                owner[name] = buffer
        # Through .data: the graph of an earlier forward of the same loss may be alive, and checks versions (BatchNorm
        # keeps its statistics there without reading them). What it does read, a model that writes buffers has copied.
        vectors.copy_([t.data for t in self._tensors], self._values)


class Moment:
    """Random state and buffers together, at one moment."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._random = RandomState(anatomy.accelerators)
        self._buffers = Buffers(anatomy)

    def restore(self) -> None:
        self._random.restore()
        self._buffers.restore()
