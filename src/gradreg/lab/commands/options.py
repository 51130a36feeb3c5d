"""The command line's app, and the options that commands share: checked here, with one line for what cannot be used."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

import gradreg
from gradreg.lab.config import DATA, FIELDS, checked
from gradreg.lab.folder import BadInput, Hopeless
from gradreg.lab.names import one_of
from gradreg.lab.trackers import TRACKERS

app = App(
    name="gradreg",
    help="Gradient regularization, and the laboratory that shows when it helps.",
    version=gradreg.__version__,
    suppress_keyboard_interrupt=False,  # cli.py says what was kept
)

LAST_SEED = 999_999  # the tuning's seeds lie above
MOST_WORKERS = 64


def whole(field: str, low: int, high: int, meaning: str) -> Parameter:
    """An option that is a whole number from `low` to `high`."""

    def convert(_: Any, tokens: Sequence[Any]) -> int:
        text = tokens[0].value
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise BadInput(f"{field} must be a whole number from {low} to {high}, got {text!a}.")
        return number

    return Parameter(name=field, converter=convert, help=f"{meaning} ({low} to {high}).", allow_leading_hyphen=True)


def _device(_: Any, tokens: Sequence[Any]) -> str:
    try:
        return checked(FIELDS["device"], tokens[0].value)
    except BadInput as error:
        raise BadInput(f"--{error}") from None


def switch(field: str, meaning: str) -> Parameter:
    return Parameter(name=field, negative="", help=meaning)


@contextmanager
def interrupted_in(runs: Path) -> Iterator[None]:
    """Ctrl-C and a full disk say where the finished runs are."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished runs are kept in {runs}") from None
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; finished runs are kept in {runs}") from error


@contextmanager
def gone_on_with(*words: object) -> Iterator[None]:
    """Whatever ends the command early says that finished runs are kept, and the words that go on."""
    again = f"finished runs are kept; go on with: {shlex.join(map(str, words))}"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again) from None
    except Hopeless:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {again}", error.filename) from error
    except BadInput as error:
        raise BadInput(f"{str(error).rstrip('.')}. {again[0].upper()}{again[1:]}") from error


@contextmanager
def nothing_in(folder: Path) -> Iterator[None]:
    """Ctrl-C and a full disk say that there is no result."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"no result was written to {folder}") from None
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; no result was written to {folder}") from error


def trackers(asked: Sequence[str]) -> tuple[str, ...]:
    """
    Raises:
        BadInput: no such tracker.
    """
    return tuple(dict.fromkeys(one_of("--log", name, list(TRACKERS)) for name in asked))


Out = Annotated[Path | None, Parameter(name="--out", help="New or empty folder; by default results/COMMAND-TIME.")]
Write = Annotated[
    Path | None, Parameter(name="--write", help="Also write the page here: FILE.md, and figures/ beside it.")
]
Workers = Annotated[int | None, whole("--workers", 1, MOST_WORKERS, "Processes, one thread each; by default 2")]
Log = Annotated[
    list[str] | None,
    Parameter(name="--log", negative="", help=f"Where the numbers go too: {', '.join(TRACKERS)}; may be repeated."),
]
Device = Annotated[str, Parameter(name="--device", converter=_device, help="auto, cpu or cuda.")]
TaskWord = Annotated[
    str | None,
    Parameter(name="TASK", help="FILE.py (its function task), FILE.py:NAME, or a built-in task: " + ", ".join(DATA)),
]
