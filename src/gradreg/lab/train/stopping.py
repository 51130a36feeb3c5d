"""Ctrl-C and SIGTERM as a request: the step under way ends first, so that its outcome can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """The first signal that came, or None."""

    signal: int | None = None


@contextmanager
def stop_requests(*, once: bool) -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is noted.

    Args:
        once: later signals do what they always do, so that a second Ctrl-C ends at once. Otherwise they are ignored:
            torchrun passes a Ctrl-C on to processes that the terminal has told already.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if request.signal is None:
            request.signal = number
            if once:
                put_back()

    try:
        for number in _SIGNALS:
            signal.signal(number, note)
        yield request
    finally:
        put_back()
