"""Pages that a command writes where the user says: `--write`."""

from __future__ import annotations

import os
from pathlib import Path

from gradreg.lab.folder import BadInput, shown


def check_page(path: Path, mark: str, command: str) -> None:
    """A new page, or one that holds the mark of the command, in a folder that exists and can be written to.

    Raises:
        BadInput: another path.
    """
    if path.suffix != ".md" or not str(path).isprintable():
        raise BadInput(f"--write must be the path of a page that ends in .md, got {shown(path)}.")
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise BadInput(f"--write must be a page in a folder that exists and can be written to, got {shown(path)}.")
    try:
        is_ours = mark in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (IsADirectoryError, UnicodeDecodeError):
        is_ours = False
    except OSError as error:
        raise BadInput(f"--write must be a page that can be written, got {shown(path)}: {error.strerror}.") from error
    if not is_ours:
        raise BadInput(f"--write must be a new page or one that {command} made, got {shown(path)}, which it did not.")
