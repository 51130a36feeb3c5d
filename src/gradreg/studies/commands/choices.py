"""How a command shows the hyper-parameters that it chose, and where it puts them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradreg.lab.folder import write_json


def show_choice(choice: Mapping[str, Any], kept: Path, shipped: Path, replaces: bool) -> None:
    """Print a choice, which lies in the file `kept`; with `replaces` it also becomes the one that is shipped."""
    if replaces:
        write_json(shipped, choice)
    for task, methods in choice["tasks"].items():
        print(task)
        width = max(map(len, methods))
        for method, chosen in methods.items():
            settings = ", ".join(f"{key} {value:g}" for key, value in chosen["settings"].items())
            print(
                f"  {method:{width}s} {chosen['validation_accuracy']:7.2%} on validation"
                f"   lr {chosen['learning_rate']:g}, wd {chosen['weight_decay']:g}   {settings}"
            )
    print(f"Choice in {shipped if replaces else kept}, every run in {kept.parent / 'trials.jsonl'}.")
