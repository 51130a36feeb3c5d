"""The `gradreg` command.

Exit status 0; 2 for bad input, with one line that says what is allowed; 1 for what the system refuses, with one line;
130 for Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from gradreg._install import how

_NEEDED = (
    *("cloudpickle", "cyclopts", "jinja2", "matplotlib", "mnist1d", "optuna"),
    *("rich", "safetensors", "scipy", "sklearn", "yaml"),
)


def main(tokens: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own, and return its exit status."""
    try:
        return _main(tokens)
    except KeyboardInterrupt:  # while Python was still reading modules
        print("gradreg: interrupted; nothing was started.", file=sys.stderr)
        return 130


def _main(tokens: Sequence[str] | None) -> int:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(f"gradreg: the laboratory needs {', '.join(missing)}: {how('lab')}", file=sys.stderr)
        return 2

    from gradreg.lab.output import lenient

    with lenient():
        try:
            return _run(tokens)
        except KeyboardInterrupt as interrupt:
            print(f"gradreg: interrupted; {str(interrupt) or 'nothing was started'}.", file=sys.stderr)
            return 130
        except OSError as error:  # a full disk, say; commands say what is kept
            print(f"gradreg: {_in_words(error)}.", file=sys.stderr)
            return 1


def _in_words(error: OSError) -> str:
    where = f" ({str(error.filename)[:300]!a})" if error.filename else ""
    return " ".join(f"{error.strerror or error or type(error).__name__}{where}".split())


def _run(tokens: Sequence[str] | None) -> int:
    from cyclopts import CycloptsError

    import gradreg.studies.commands  # noqa: F401 (adds its commands)
    from gradreg.lab.commands import app
    from gradreg.lab.folder import BadInput

    tokens = list(sys.argv[1:] if tokens is None else tokens)
    if tokens[:1] == ["help"]:
        tokens = [*(token for token in tokens if token != "help"), "--help"]
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_none")
    except BadInput as error:
        return _refuse(str(error))
    except CycloptsError as error:
        error.verbose = False
        hint = error.argument.parameter.help if error.argument else "See gradreg --help."
        return _refuse(f"{error} {hint or ''}")
    return 0


def _refuse(message: str) -> int:
    print(f"gradreg: {' '.join(message.split())}", file=sys.stderr)
    return 2
