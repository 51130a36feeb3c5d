"""Replay: the second pass draws the same random numbers and starts from the same buffers as the first.

Random state is that of torch on the host and on the devices of the parameters, of Python's `random` and of NumPy's
global generator, since augmentation inside the loss draws from them. After the second pass the random state and the
buffers (BatchNorm statistics, spectral-norm vectors, any other) are those that the first pass left.
"""

from __future__ import annotations

import _random
import ctypes
import pickle
import random
import sys
from array import array
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gradreg import _vectors as vectors
from gradreg.training.anatomy import Anatomy, Places

_WORDS = 624  # of a Mersenne Twister


class Twister:
    """A Mersenne Twister of Python or NumPy, whose state lies in memory as a position and 624 words.

    Asking for the whole state takes longer than a small layer. Drawing moves the position, and once in 624 words all
    words; so where position and first words are those of the last state, it stands.

    Args:
        read: the whole state, as something that can be compared, and whether a normal number was drawn in advance,
            which both generators keep beside that memory.
        write: sets it.
        position: its address; None where it is not known.
        words: theirs.
        owner: of that memory, which lives as long as this does.
    """

    def __init__(
        self,
        read: Callable[[], tuple[Any, bool]],
        write: Callable[[Any], Any],
        position: int | None,
        words: int,
        owner: Any = None,
    ) -> None:
        self._owner = owner
        self._read = read
        self._write = write
        self._position = None if position is None else ctypes.c_int32.from_address(position)
        self._words = None if position is None else (ctypes.c_char * 32).from_address(words)
        self._state: Any = None  # the last one
        self._stood: Any = None  # position and first words in it, where they tell

    def state(self) -> Any:
        """The whole state; the same object as long as it stands."""
        stands = None if self._position is None else (self._position.value, self._words.raw)  # type: ignore[union-attr]
        if stands is None or stands != self._stood:
            state, has_number_in_advance = self._read()
            if state != self._state:
                self._state = state
            if has_number_in_advance:  # somebody draws normal numbers, and the memory does not tell which of a pair
                self._position = None
            self._stood = stands if self._position is not None else None
        return self._state

    def restore(self, state: Any) -> None:
        """What stands already is left alone."""
        if self.state() != state:
            self._stood = None
            self._write(state)


def _python() -> Twister:
    generator: Any = random._inst  # type: ignore[attr-defined]
    start = id(generator) + object.__basicsize__
    position: int | None = None
    is_known = sys.implementation.name == "cpython"
    if is_known and _random.Random.__basicsize__ >= object.__basicsize__ + 4 * (_WORDS + 1):
        at, *words = array("I", ctypes.string_at(start, 4 * (_WORDS + 1)))
        position = start if (*words, at) == generator.getstate()[1] else None

    def read() -> tuple[Any, bool]:
        state = random.getstate()
        return state, state[2] is not None

    return Twister(read, random.setstate, position, start + 4, generator)


def _numpy(generator: Any) -> Twister:
    module: Any = sys.modules["numpy"].random

    def read() -> tuple[Any, bool]:
        state = module.get_state(legacy=False)
        return pickle.dumps(state), bool(state.get("has_gauss", True))

    words, position = 0, None
    if type(generator).__name__ == "MT19937":
        words = generator.ctypes.state_address
        *key, at = array("I", ctypes.string_at(words, 4 * (_WORDS + 1)))
        state = module.get_state(legacy=False)["state"]
        position = words + 4 * _WORDS if (key, at) == (state["key"].tolist(), state["pos"]) else None
    return Twister(read, lambda state: module.set_state(pickle.loads(state)), position, words, generator)


_PYTHON = _python()
_NUMPY: tuple[Any, Twister] | None = None  # with the generator that it is of, which can be replaced


def twisters() -> list[Twister]:
    """The global generators of `random` and, where it is loaded, of NumPy."""
    global _NUMPY
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return [_PYTHON]
    generator = numpy.random.get_bit_generator() if hasattr(numpy.random, "get_bit_generator") else None
    if _NUMPY is None or _NUMPY[0] is not generator:
        _NUMPY = generator, _numpy(generator)
    return [_PYTHON, _NUMPY[1]]


class RandomState:
    """The random generators as they stand when this is made; `restore` puts them back there."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._host = torch.default_generator.get_state()
        self._twisters = [(twister, twister.state()) for twister in twisters()]
        self._devices: dict[torch.device, Tensor] = {}
        for device in devices:
            module = torch.get_device_module(device)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                continue  # a captured graph advances its own generator; see docs/passes.md
            self._devices[device] = module.get_rng_state(device)

    def is_same(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two; on accelerators the host knows without waiting."""
        theirs = dict(other._twisters)
        return (
            torch.equal(self._host, other._host)
            and all(theirs.get(twister, state) == state for twister, state in self._twisters)
            and all(torch.equal(state, other._devices[device]) for device, state in self._devices.items())
        )

    def restore(self) -> None:
        torch.default_generator.set_state(self._host)
        for twister, state in self._twisters:
            twister.restore(state)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


_SHAPE = attrgetter("shape")


def put(places: Places) -> None:
    """The buffers that stood at these places stand there again."""
    for owner, name, buffer in places:
        if owner.get(name) is not buffer:
            owner[name] = buffer


class Buffers:
    """The buffers of a model as they stand when this is made: which tensors, and what they hold.

    Those of one kind are copied into one vector, which is faster than one by one: they are many and small.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.places, self.groups = anatomy.buffers()
        self.shapes = [[*map(_SHAPE, group)] for group in self.groups]
        flats = [group[0].clone() if len(group) == 1 else vectors.flat(group) for group in self.groups]
        self.values = [values.detach() if values.requires_grad else values for values in flats]

    def restore(self) -> None:
        """In place; a buffer that was replaced by another tensor becomes the old tensor again."""
        put(self.places)
        for group, shapes, values in zip(self.groups, self.shapes, self.values):
            for t, shape in zip(group, shapes):
                if t.shape != shape:  # such as observers that take the size of what they first see
                    with torch.no_grad():
                        t.resize_(shape)
            # Through .data: the graph of an earlier forward of the same loss may be alive, and checks versions
            # (BatchNorm keeps its statistics there without reading them). What it does read, a model that writes
            # buffers has copied.
            here = [t.data for t in group]
            vectors.copy_(here, [values] if len(here) == 1 else vectors.parts(values, here))


class Moment:
    """Random state and buffers together, at one moment."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.random = RandomState(anatomy.accelerators)
        self.buffers = Buffers(anatomy)

    def restore(self) -> None:
        self.random.restore()
        self.buffers.restore()


class Rewind:
    """The way back to a moment for another pass, and forward again to where the pass before it has left things.

    On the host, buffers point at other memory meanwhile, and what was left is never written; elsewhere, and where
    others may hold their address or a part of them, it is copied and put back.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._lent: list[tuple[Tensor, Tensor]] = []  # with their own memory
        self._groups: Any = None  # that there is other memory for
        self._shapes: list[list[torch.Size]] = []
        self._room: list[Tensor] = []
        self._views: list[Tensor] = []
        self.forget()

    @property
    def memory(self) -> list[Tensor]:
        """The other memory."""
        return self._views

    def forget(self) -> None:
        """The step is over."""
        self._random: RandomState | None = None
        self._left: Buffers | None = None
        self._places: Places | None = None

    def start(self) -> None:
        """Note what the pass before has left; its buffers, when another begins."""
        self._random, self._left = RandomState(self._anatomy.accelerators), None
        self._places = None

    def to(self, moment: Moment) -> None:
        """Begin another pass from there; `start` came before."""
        moment.random.restore()
        held = moment.buffers
        if self._places is None:
            self._places, _ = self._anatomy.buffers()
        are_same = self._left is None and self._places is held.places
        if are_same and not held.groups:
            return
        if are_same and self._has_room(held):
            for room, values in zip(self._room, held.values):
                room.copy_(values)
            if not self._lent:
                tensors = [t for group in held.groups for t in group]
                self._lent = [(t, t.data) for t in tensors]
                for t, view in zip(tensors, self._views):
                    t.data = view
            return
        self.remove()
        self._left = self._left or Buffers(self._anatomy)
        held.restore()

    def _has_room(self, held: Buffers) -> bool:
        """Whether buffers may point at other memory, which is made when it is first needed."""
        if self._lent:
            return self._groups is held.groups and self._shapes == held.shapes
        if held.shapes != [[*map(_SHAPE, group)] for group in held.groups]:
            return False  # resized in between
        if self._groups is not held.groups or self._shapes != held.shapes:
            self._groups, self._shapes, self._room, self._views = held.groups, held.shapes, [], []
            if all(vectors.is_alone(t) for group in held.groups for t in group):
                self._room = [torch.empty_like(values) for values in held.values]
                for room, group in zip(self._room, held.groups):
                    self._views += [room] if len(group) == 1 else vectors.parts(room, group)
        return bool(self._room)

    def remove(self) -> None:
        """Buffers have their own memory again; once more does no harm."""
        for t, own in self._lent:
            t.data = own
        self._lent = []

    def restore(self) -> None:
        """What the pass before had left stands again."""
        self.remove()
        if self._random is not None:
            self._random.restore()
        if self._left is not None:
            self._left.restore()
        elif self._places is not None and self._anatomy.buffers()[0] is not self._places:
            put(self._places)
