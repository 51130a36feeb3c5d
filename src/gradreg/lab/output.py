"""Standard output and error of a command: whatever console they lead to, a run that ended well ends well.

What a console's encoding lacks is written out (‖∇L‖ as ||grad L||). A pipe whose reader has left and a disk that is
full take nothing more; the command goes on, since its results are in its folder.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_PLAIN = {
    "‖": "||",
    "∇": "grad ",
    "θ": "theta",
    "γ": "gamma",
    "ε": "epsilon",
    "η": "eta",
    "ρ": "rho",
    "λ": "lambda",
    "×": "x",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "·": "*",
    "²": "^2",
    "½": "1/2",
    "ĝ": "g^",
    "’": "'",
    "“": '"',
    "”": '"',
}


def _written_out(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("gradreg.plain", _written_out)


class _Lenient:
    """A text stream that takes no more once it cannot be written to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Any) -> None:
        if self.error is not None:
            return
        try:
            act()
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError, ValueError, AttributeError):  # or Python would fail on its way out
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Around a command; says at its end what could not be written, if standard error still can be."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(AttributeError, ValueError):  # a stream of somebody else's
            stream.reconfigure(errors="gradreg.plain")  # type: ignore[union-attr]
    out, err = (_Lenient(stream) for stream in before)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield
    finally:
        out.flush()
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            print(f"gradreg: standard output could not be written: {out.error.strerror}.", file=err)
        err.flush()
        sys.stdout, sys.stderr = before
