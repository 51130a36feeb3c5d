"""The global random generators (torch on the host and on a GPU, Python, NumPy): seeded for a run, read, put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, all start from the seed; afterwards they are what they were."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    before = random_state(device)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before, device)


def undisturbed() -> AbstractContextManager[None]:
    """Inside, all start from 0; afterwards they are what they were."""
    return seeded(0)


def random_state(device: torch.device) -> dict[str, Any]:
    """As tensors, numbers and texts."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
