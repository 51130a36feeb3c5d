"""The tasks: two data sets with a model for each, clean labels or a share of random ones.

The split into training, validation and test rows is fixed: the demo's seeds and the tuning's seeds see the same test
rows, so that nothing chosen on validation rows has ever seen them. A seed decides the initialization, the order of
the batches and which labels are random. Random labels are in the training part only: validation and test are clean.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 10
RANDOM_SHARE = 0.25
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Task:
    """What is trained on what, and for how long."""

    data: str
    """`digits` or `mnist1d`."""
    model: str
    """`mlp` or `cnn`."""
    random_labels: float
    """Share of the training labels that are replaced by another class, drawn uniformly from the nine."""
    num_train: int
    """Training rows; small, since regularization shows where a model over-fits."""
    batch_size: int
    """Rows in a step."""
    epochs: int
    """Passes over the training rows."""

    @property
    def name(self) -> str:
        labels = f"{self.random_labels:.0%} random labels" if self.random_labels else "clean labels"
        return f"{self.data}, {self.model.upper()}, {labels}"

    @property
    def num_steps(self) -> int:
        return self.epochs * (self.num_train // self.batch_size)


TASKS: dict[str, Task] = {
    task.name: task
    for share in (0.0, RANDOM_SHARE)
    for task in (
        Task("digits", "cnn", share, num_train=300, batch_size=50, epochs=25),
        Task("mnist1d", "mlp", share, num_train=4000, batch_size=100, epochs=30),
    )
}


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


def load(task: Task, seed: int) -> Split:
    """The split of a task, with the random labels of a seed."""
    rows, first_validation, first_test = _ROWS[task.data]()
    train, validation, test = rows[: task.num_train], rows[first_validation:first_test], rows[first_test:]
    assert task.num_train <= first_validation
    return Split(Part(train.x, with_random_labels(train.y, task.random_labels, seed)), validation, test)


def with_random_labels(y: Tensor, share: float, seed: int) -> Tensor:
    """A copy in which `share` of the labels, rounded to whole rows, are another class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    shift = torch.randint(1, NUM_CLASSES, (len(chosen),), generator=generator)
    y = y.clone()
    y[chosen] = (y[chosen] + shift) % NUM_CLASSES
    return y


@lru_cache(maxsize=1)
def _digits() -> tuple[Part, int, int]:
    """1,797 handwritten digits of 8×8 pixels in a fixed shuffled order: 300 to train on, 500 to choose, 997 to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(y))
    images = torch.tensor(x[order], dtype=torch.float32).reshape(-1, 8, 8)
    return Part((images - 8) / 8, torch.tensor(y[order])), 300, 800


@lru_cache(maxsize=1)
def _mnist1d() -> tuple[Part, int, int]:
    """8,000 generated signals of 40 numbers (Greydanus & Kobak, 2024): 4,000 to train on, 1,000 to choose."""
    from mnist1d.data import get_dataset_args, make_dataset

    settings = {**vars(get_dataset_args()), "num_samples": 8000, "train_split": 1.0, "seed": _SPLIT_SEED}
    with _global_randomness_kept():
        data = make_dataset(SimpleNamespace(**settings))
    return Part(torch.tensor(data["x"], dtype=torch.float32), torch.tensor(data["y"])), 4000, 5000


_ROWS = {"digits": _digits, "mnist1d": _mnist1d}


@contextmanager
def _global_randomness_kept() -> Iterator[None]:
    """mnist1d seeds the global generators of Python and NumPy; put back what was there."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
