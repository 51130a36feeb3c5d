"""YAML files of the user: data and nothing else, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gradreg.lab.folder import BadInput


class _Loader(yaml.SafeLoader):
    """Refuses what YAML itself would pass over in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for k, key in enumerate(keys) if key in keys[:k]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!a} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


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
