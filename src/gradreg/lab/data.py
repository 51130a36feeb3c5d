"""The data sets: a fixed split into training, validation and test rows, with clean labels or a share of random ones.

The demo's seeds and the tuning's seeds see the same test rows, so that nothing chosen on validation rows has ever
seen them. A seed decides which labels are random. Random labels are in the training part only: validation and test
are clean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from gradreg.lab.config import RunConfig
from gradreg.lab.folder import BadInput

_SPLIT_SEED = 0


@dataclass(frozen=True)
class Part:
    """Rows of a data set: `x` (n, 8, 8) or (n, 40), `y` (n,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor | slice) -> Part:
        return Part(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Split:
    """The three parts, disjoint."""

    train: Part
    validation: Part
    test: Part
    num_classes: int = 10


def load(config: RunConfig) -> Split:
    """The split of a run, with the random labels of its seed."""
    everything = SOURCES[config.data](config)
    rows = len(everything.train) if config.num_train is None else config.num_train
    if not config.batch_size <= rows <= len(everything.train):
        raise BadInput(
            f"num_train must be a whole number from {config.batch_size} (the batch size) to {len(everything.train)} "
            f"(the training rows of {config.data}), got '{rows}'."
        )
    train = everything.train[:rows]
    y = with_random_labels(train.y, config.random_labels, config.seed, everything.num_classes)
    return Split(Part(train.x, y), everything.validation, everything.test, everything.num_classes)


def with_random_labels(y: Tensor, share: float, seed: int, num_classes: int = 10) -> Tensor:
    """A copy in which `share` of the labels, rounded to whole rows, are another class, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    y = y.clone()
    y[chosen] = (y[chosen] + shift) % num_classes
    return y


@lru_cache(maxsize=1)
def _digits() -> Split:
    """1,797 handwritten digits of 8×8 pixels in a fixed shuffled order: 300 to train on, 500 to choose, 997 to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(y))
    images = torch.tensor(x[order], dtype=torch.float32).reshape(-1, 8, 8)
    return _cut(Part((images - 8) / 8, torch.tensor(y[order])), 300, 800)


@lru_cache(maxsize=1)
def _mnist1d() -> Split:
    """8,000 generated signals of 40 numbers (Greydanus & Kobak, 2024): 4,000 to train on, 1,000 to choose."""
    from mnist1d.data import get_dataset_args, make_dataset

    settings = {**vars(get_dataset_args()), "num_samples": 8000, "train_split": 1.0, "seed": _SPLIT_SEED}
    with _global_randomness_kept():
        data = make_dataset(SimpleNamespace(**settings))
    return _cut(Part(torch.tensor(data["x"], dtype=torch.float32), torch.tensor(data["y"])), 4000, 5000)


def _cut(rows: Part, first_validation: int, first_test: int) -> Split:
    return Split(rows[:first_validation], rows[first_validation:first_test], rows[first_test:])


SOURCES: dict[str, Callable[[RunConfig], Split]] = {
    "digits": lambda config: _digits(),
    "mnist1d": lambda config: _mnist1d(),
}


@contextmanager
def _global_randomness_kept() -> Iterator[None]:
    """mnist1d seeds the global generators of Python and NumPy; put back what was there."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
