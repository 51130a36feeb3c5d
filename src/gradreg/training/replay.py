"""Replay: the second pass draws the same random numbers and starts from the same buffers as the first.

Random state is that of torch on the host and on the devices of the parameters, of Python's `random` and of NumPy's
global generator, since augmentation inside the loss draws from them. After the second pass the random state and the
buffers (BatchNorm statistics, spectral-norm vectors, any other) are those that the first pass left.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradreg import _vectors as vectors
from gradreg.training.anatomy import Anatomy


class NumPyState:
    """NumPy's global generator. Its own interface takes longer than a small layer, so it is asked only when needed.

    The state of its Mersenne Twister lies in memory as 624 words and a position, to which NumPy hands out the address.
    Beside them it keeps at most one normal number that was drawn in advance.
    """

    _SIZE = 624 * 4 + 4
    _last: tuple[Any, bytes] | None = None  # a whole state without a number in advance, and the memory it stood in

    def __init__(self) -> None:
        numpy: Any = sys.modules["numpy"]
        generator = getattr(numpy.random, "get_bit_generator", lambda: None)()  # since NumPy 1.24
        self._memory = b""
        if type(generator).__name__ == "MT19937":
            self._memory = ctypes.string_at(generator.ctypes.state_address, self._SIZE)  # type: ignore[union-attr]
        last = NumPyState._last
        if last is not None and self._memory and last[1] == self._memory:
            self._state = last[0]
            return
        self._state = numpy.random.get_state()
        has_number_in_advance = self._state[3] if self._memory else True
        NumPyState._last = None if has_number_in_advance else (self._state, self._memory)

    def is_same(self, other: NumPyState) -> bool:
        return self._state is other._state

    def restore(self) -> None:
        if not self.is_same(NumPyState()):
            sys.modules["numpy"].random.set_state(self._state)


class RandomState:
    """The random generators as they stand when this is made; `restore` puts them back there."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._host = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = NumPyState() if "numpy" in sys.modules else None
        self._devices: dict[torch.device, Tensor] = {}
        for device in devices:
            module = torch.get_device_module(device)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                continue  # a captured graph advances its own generator; see docs/passes.md
            self._devices[device] = module.get_rng_state(device)

    def is_same(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two; on accelerators the host knows without waiting."""
        return (
            torch.equal(self._host, other._host)
            and self._python == other._python
            and (self._numpy is None or other._numpy is None or self._numpy.is_same(other._numpy))
            and all(torch.equal(state, other._devices[device]) for device, state in self._devices.items())
        )

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.restore()
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


class Buffers:
    """The buffers of a model as they stand when this is made: which tensors, and what they hold.

    Those of one kind are copied into one vector, which is faster than one by one: they are many and small.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._places = anatomy.buffers()
        groups: dict[Any, dict[int, Tensor]] = {}
        for _, _, buffer in self._places:
            if buffer is not None:
                plain = buffer.layout is torch.strided and not vectors.is_sharded(buffer)
                groups.setdefault((buffer.dtype, buffer.device) if plain else id(buffer), {})[id(buffer)] = buffer
        self._saved: list[tuple[list[Tensor], list[torch.Size], Tensor]] = []
        for group in groups.values():
            tensors = [t.data for t in group.values()]
            flat = tensors[0].clone() if len(tensors) == 1 else vectors.flat(tensors)
            self._saved.append((list(group.values()), [t.shape for t in tensors], flat))

    def restore(self) -> None:
        """In place; a buffer that was replaced by another tensor becomes the old tensor again."""
        for owner, name, buffer in self._places:
            if owner.get(name) is not buffer:
                owner[name] = buffer
        for tensors, shapes, flat in self._saved:
            for t, shape in zip(tensors, shapes):
                if t.shape != shape:  # such as observers that take the size of what they first see
                    with torch.no_grad():
                        t.resize_(shape)
            # Through .data: the graph of an earlier forward of the same loss may be alive, and checks versions
            # (BatchNorm keeps its statistics there without reading them). What it does read, a model that writes
            # buffers has copied.
            here = [t.data for t in tensors]
            vectors.copy_(here, [flat] if len(here) == 1 else vectors.parts(flat, here))


class Moment:
    """Random state and buffers together, at one moment."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.random = RandomState(anatomy.accelerators)
        self.buffers = Buffers(anatomy)

    def restore(self) -> None:
        self.random.restore()
        self.buffers.restore()
