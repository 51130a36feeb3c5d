"""What somebody means by a name: that which differs in case, hyphens, underscores and blanks only; else the nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from gradreg.lab.folder import BadInput


def meant(name: object, known: Iterable[str]) -> str | None:
    """The one of `known` that a name stands for.

    Example:
        >>> meant("f_gr", ["SGD", "F-GR"])
        'F-GR'
    """
    known = list(known)
    if name in known:
        return str(name)
    found = [one for one in known if isinstance(name, str) and _bare(one) == _bare(name)]
    return found[0] if len(found) == 1 else None


def suggestion(name: object, known: Iterable[str]) -> str:
    """A question to put behind a refusal; empty where nothing is near.

    Example:
        >>> suggestion("normalised", ["gradient", "normalized"])
        ' Did you mean normalized?'
    """
    bare = {_bare(one): one for one in known}
    near = difflib.get_close_matches(_bare(str(name)), bare, n=1)
    return f" Did you mean {bare[near[0]]}?" if near else ""


def one_of(field: str, value: object, choices: Sequence[str]) -> str:
    """
    Raises:
        BadInput: none of the choices is meant.
    """
    choice = meant(value, choices)
    if choice is None:
        hint = suggestion(value, choices)
        raise BadInput(f"{field} must be one of {', '.join(choices)}, got {str(value)!a}.{hint}")
    return choice


def _bare(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).casefold()
