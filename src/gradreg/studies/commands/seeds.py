"""The seeds of a study."""

from __future__ import annotations

from gradreg.lab.commands.options import LAST_SEED
from gradreg.lab.folder import BadInput


def consecutive(first: int, count: int) -> tuple[int, ...]:
    """
    Raises:
        BadInput: they would reach the seeds that are kept for choosing hyper-parameters.
    """
    highest = LAST_SEED - count + 1
    if first > highest:
        raise BadInput(f"--seed must be a whole number from 0 to {highest} with {count} seeds, got '{first}'.")
    return tuple(range(first, first + count))
