"""How a step ends, whatever happens in it.

At every moment of a step it is written down how it would end if nothing more could be done: where the weights go back
to, which gradients, buffers and random state stand, how many steps have been counted. Ending it may be interrupted
between any two lines and done again; each door does it twice over, and a signal handler that raises (Ctrl-C, a
time-out, a warning of the scheduler) ends the step first, wherever it struck.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradreg import _vectors as vectors
from gradreg.training.combination import Gradients, give
from gradreg.training.displacement import Displacement
from gradreg.training.replay import Moment, Rewind

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2", "SIGQUIT")
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]
# Without the conversion to enumerations, which takes ten times as long as the call; this runs in every step.
_get: Callable[..., Any] = _signal.getsignal
_set: Callable[..., Any] = _signal.signal


@dataclass(frozen=True)
class Ending:
    """What stands when the step is over.

    Args:
        step: steps counted.
        counts: active and skipped steps.
        parameters: whose gradients are put in place.
        gradients: theirs.
        targets: tensors that receive the values of `sources`, such as gradients that the user's code holds.
        moment: random state and buffers, where they are to be put back.
        is_success: nothing has broken off.
    """

    step: int
    counts: tuple[Any, Any]
    parameters: Sequence[Tensor] = ()
    gradients: Gradients = ()
    targets: Sequence[Tensor] = ()
    sources: Sequence[Tensor] = ()
    moment: Moment | Rewind | None = None
    is_success: bool = False

    def but(self, **changes: Any) -> Ending:
        """The same with some things changed; `dataclasses.replace` takes as long as a small layer."""
        other = object.__new__(Ending)
        other.__dict__.update(self.__dict__, **changes)
        return other


@dataclass
class Endings:
    """The one step under way, and how it would end.

    Args:
        displacement: of the weights.
        finish: takes up what was counted, once everything else stands.
    """

    displacement: Displacement
    finish: Callable[[Ending], None]
    now: Ending | None = None
    hooks: list[Any] = field(default_factory=list)  # with a method `remove`
    _grad_mode: bool = True
    _relays: list[tuple[int, _Relay]] = field(default_factory=list)

    def begin(self, ending: Ending) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = _get(number)
                if callable(handler):
                    if isinstance(handler, _Relay) and handler.endings is self:  # an interrupted end left it
                        handler = handler.original
                    relay = _Relay(handler, self)
                    self._relays.append((number, relay))
                    _set(number, relay)
        self._grad_mode = torch.is_grad_enabled()  # an interrupt may strike on the way out of a no_grad()
        self.now = ending

    def end(self) -> None:
        """Once more does no harm."""
        ending = self.now
        if ending is not None:
            torch.set_grad_enabled(self._grad_mode)
            self.displacement.close(after_error=not ending.is_success)
            for hook in self.hooks:
                hook.remove()
            give(ending.parameters, ending.gradients)
            vectors.copy_(ending.targets, ending.sources)
            if ending.moment is not None:
                ending.moment.restore()
            self.finish(ending)
            self.hooks = []
            self.now = None
        while self._relays:
            number, relay = self._relays[-1]
            if _get(number) is relay:
                _set(number, relay.original)
            del self._relays[-1:]


class _Relay:
    """A signal handler that ends the step if the handler it stands for raises."""

    def __init__(self, original: Callable[..., Any], endings: Endings) -> None:
        self.original = original
        self.endings = endings

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.original(number, frame)
        except BaseException:
            self.endings.end()
            raise
