"""What the experiments of this room are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class SeededPlan:
    """Seeds, how much of it, and on how many threads."""

    seeds: tuple[int, ...]
    """At least two."""
    is_quick: bool = False
    """Smaller, as the command says."""
    workers: int = 2
    """Threads, one problem or run each."""
    name: ClassVar[str]

    @property
    def command(self) -> str:
        quick = " --quick" if self.is_quick else ""
        return f"gradreg {self.name}{quick} --seed {self.seeds[0]} --seeds {len(self.seeds)}"
