"""YAML files of the user: data and nothing else, no key twice, and no word that readers of YAML read differently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from gradreg.lab.folder import BadInput

_AMBIGUOUS = {
    r"[-+]?0[0-9_]+": "8 to the base in YAML 1.1, 10 in YAML 1.2; leave out the leading zeros",
    r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?": "a number to the base 60 in YAML 1.1, a word in YAML 1.2",
    r"[-+]?[0-9]+_[0-9_]*(\.[0-9_]*)?": "a number in YAML 1.1, a word in YAML 1.2; leave out the underscores",
    r"(?i:yes|no|on|off)": "true or false in YAML 1.1, a word in YAML 1.2; write true or false",
}


class _Loader(yaml.SafeLoader):
    """Refuses what YAML itself would pass over in silence."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: Any = super().compose_scalar_node(anchor)
        reason = next((why for form, why in _AMBIGUOUS.items() if re.fullmatch(form, node.value)), None)
        if node.style is None and reason is not None:
            message = f"{node.value} is {reason}; in quotes it is a word"
            raise ComposerError(None, None, message, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for k, key in enumerate(keys) if key in keys[:k]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!a} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(argument: str, path: Path, of: str) -> dict[Any, Any]:
    """What a file holds: a mapping, which the message calls a mapping `of`.

    Raises:
        BadInput: it cannot be read, is empty or something else.
    """
    values, shown = read_yaml(argument, path), ascii(str(path))
    if not isinstance(values, dict):
        raise BadInput(f"{argument} must be a mapping {of}, got {shown}{', which is empty' if values is None else ''}.")
    return values


def read_yaml(argument: str, path: Path) -> Any:
    """What a file holds.

    Raises:
        BadInput: it cannot be read, or is not YAML; the message names `argument`.
    """
    shown = ascii(str(path))
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"{argument} must be a YAML file that can be read, got {shown}: {reason}.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{argument} must be YAML, got {shown}: {' '.join(str(error).split())}.") from error
