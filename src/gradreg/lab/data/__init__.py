"""The data sets of a run: `load` gives a fixed split into training, validation and test rows.

No seed changes which rows are validation and test rows, so that nothing chosen on validation rows has ever seen
the test rows. The seed of a run decides which labels are random. Random labels are in the training part only:
validation and test are clean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from gradreg.lab.config import RunConfig
from gradreg.lab.data import cifar, idx, images, text
from gradreg.lab.data.cache import kept
from gradreg.lab.data.parts import Part, Split, shuffled
from gradreg.lab.data.places import now
from gradreg.lab.folder import BadInput

AT_PATH = ("cifar10", "cifar100", "idx", "images", "hub")
"""The sources that read what is at `path`; they give images, which may be augmented."""
IMAGES = (*AT_PATH, "fashion-mnist")
MOST_GENERATED = 1_000_000
"""Training rows that may be asked of a generator."""
_BLOCK = 8000


def load(config: RunConfig) -> Split:
    """The split of a run, with the random labels of its seed.

    Raises:
        BadInput: what is not there, too few rows for a step, or a setting that the data set does not have.
    """
    name = config.data
    if config.path is not None and name not in IMAGES:
        raise BadInput(f"path must be left out with data {name}, got {config.path!a}.")
    if config.path is None and name in AT_PATH:
        raise BadInput(f"path must be given with data {name}: {_WHAT_IS_AT_PATH[name]}.")
    if config.augment and name not in IMAGES:
        raise BadInput(f"augment must be false with data {name}: only images ({', '.join(IMAGES)}) are augmented.")
    if config.shrink > 1 and name not in IMAGES:
        raise BadInput(f"shrink must be 1 with data {name}: only images ({', '.join(IMAGES)}) are averaged.")
    if config.random_labels and name == "text":
        raise BadInput(f"random_labels must be 0 with data text, got {config.random_labels:g}.")
    if name in GENERATED and config.num_train is not None:
        _check_rows(config, config.num_train, MOST_GENERATED)
    everything = SOURCES[name](replace(config, path=now(config.path)))
    available = len(everything.train)
    if config.num_train is None and config.batch_size > available:
        raise BadInput(
            f"batch_size must be a whole number from 1 to {available} (the training rows of {name}), "
            f"got '{config.batch_size}'."
        )
    rows = available if config.num_train is None else config.num_train
    _check_rows(config, rows, available)
    train = everything.train[:rows]
    if config.random_labels:
        train = Part(train.x, with_random_labels(train.y, config.random_labels, config.seed, everything.num_classes))
    return _averaged(replace(everything, train=train), config.shrink)


def _check_rows(config: RunConfig, rows: int, most: int) -> None:
    if not config.batch_size <= rows <= most:
        raise BadInput(
            f"num_train must be a whole number from {config.batch_size} (the batch size) to {most} "
            f"(the training rows of {config.data}), got '{rows}'."
        )


def _averaged(split: Split, side: int) -> Split:
    """Images in which each pixel is the mean over a square of the given side; what is left over at the edges goes."""
    if side == 1:
        return split
    height, width = split.train.x.shape[-2:]
    if side > min(height, width):
        raise BadInput(f"shrink must be from 1 to {min(height, width)} for images of {height}×{width}, got '{side}'.")
    parts = (split.train, split.validation, split.test)
    train, validation, test = (Part(avg_pool2d(part.x, side), part.y) for part in parts)
    return replace(split, train=train, validation=validation, test=test)


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
    order = shuffled(len(y))
    pixels = torch.tensor(x[order], dtype=torch.float32).reshape(-1, 8, 8)
    return _cut(Part((pixels - 8) / 8, torch.tensor(y[order])), 300, 800)


@lru_cache(maxsize=1)
def _mnist1d(num_train: int) -> Split:
    """Generated signals of 40 numbers (Greydanus & Kobak, 2024), of any size.

    The 8,000 rows of seed 0 are 4,000 to train on, 1,000 to choose and 3,000 to test. More training rows come from
    seeds 1, 2, …, in blocks of 8,000, after those 4,000: a larger data set contains the smaller ones, and all have
    the same validation and test rows. The generator standardizes each block by its own mean and deviation.
    """
    split = _cut(_mnist1d_block(0), 4000, 5000)
    blocks = [_mnist1d_block(seed) for seed in range(1, 1 + -(-(num_train - 4000) // _BLOCK))]
    if not blocks:
        return split
    x = torch.cat([split.train.x, *(block.x for block in blocks)])
    y = torch.cat([split.train.y, *(block.y for block in blocks)])
    return Split(Part(x, y)[:num_train], split.validation, split.test)


def _mnist1d_block(seed: int) -> Part:
    from mnist1d.data import get_dataset_args, make_dataset

    settings = {**vars(get_dataset_args()), "num_samples": _BLOCK, "train_split": 1.0, "seed": seed}

    def make() -> dict[str, Tensor]:
        with _global_randomness_kept():
            data = make_dataset(SimpleNamespace(**settings))
        return {"x": torch.tensor(data["x"], dtype=torch.float32), "y": torch.tensor(data["y"])}

    versions = {name: version(name) for name in ("mnist1d", "numpy", "scipy")}
    return Part(**kept("mnist1d", {**settings, **versions}, make))


def _cut(rows: Part, first_validation: int, first_test: int) -> Split:
    return Split(rows[:first_validation], rows[first_validation:first_test], rows[first_test:])


def _generated(make: Callable[[int], Split], default: int) -> Callable[[RunConfig], Split]:
    """Never fewer rows than the default, from which `load` takes the first."""
    return lambda config: make(max(config.num_train or 0, default))


GENERATED: dict[str, Callable[[RunConfig], Split]] = {
    "mnist1d": _generated(_mnist1d, 4000),
    "text": _generated(text.make, 2000),
}
SOURCES: dict[str, Callable[[RunConfig], Split]] = {
    **GENERATED,
    "digits": lambda config: _digits(),
    "cifar10": lambda config: cifar.read(cifar.CIFAR10, config.path or ""),
    "cifar100": lambda config: cifar.read(cifar.CIFAR100, config.path or ""),
    "idx": lambda config: idx.from_folder(config.path or ""),
    "fashion-mnist": lambda config: idx.fashion_mnist(config.path),
    "images": lambda config: images.from_folder(config.path or ""),
    "hub": lambda config: images.from_hub(config.path or ""),
}

_WHAT_IS_AT_PATH = {
    "cifar10": f"{cifar.CIFAR10.name}, or the folder that holds it, from {cifar.HOME}",
    "cifar100": f"{cifar.CIFAR100.name}, or the folder that holds it, from {cifar.HOME}",
    "idx": "the folder with the four files of MNIST or its kin, such as train-images-idx3-ubyte.gz",
    "images": "a folder with one subfolder of images for each class, or with train/ and test/ or val/ of that kind",
    "hub": "the name of an image data set on the hub, or a folder written by its save_to_disk",
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
