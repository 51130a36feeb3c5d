"""The rows of a part of a task, whatever holds them: tensors, a Dataset, or a DataLoader.

A *batch* is what a loss is given: a tuple (x, y), a dictionary, whatever the Dataset and its `collate_fn` make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset

from gradreg.lab.data.parts import Part, order
from gradreg.lab.folder import BadInput

Batch = Any
Collate = Callable[[list[Any]], Batch]


class Rows(Protocol):
    """What the loop and its measurements ask of a part."""

    def __len__(self) -> int: ...

    def num_batches(self, batch_size: int) -> int:
        """Steps in an epoch; a last partial batch is dropped."""
        ...

    def batches(self, generator: torch.Generator, batch_size: int) -> Iterable[Batch]:
        """An epoch of training batches on the host, in an order that the generator decides."""
        ...

    def chunks(self, rows: int | None, numbers: int) -> Iterator[tuple[Batch, int]]:
        """All rows in order with their counts, `rows` at a time, or so many that a chunk has some `numbers` numbers."""
        ...


@dataclass(frozen=True)
class TensorRows:
    """Tensors with one first dimension; two of them are a `Part` (x, y)."""

    tensors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: Tensor | slice) -> TensorRows:
        return TensorRows(tuple(tensor[rows] for tensor in self.tensors))

    def num_batches(self, batch_size: int) -> int:
        return len(self) // batch_size

    def batches(self, generator: torch.Generator, batch_size: int) -> Iterable[Batch]:
        return (tuple(tensor[rows] for tensor in self.tensors) for rows in order(len(self), generator, batch_size))

    def chunks(self, rows: int | None, numbers: int) -> Iterator[tuple[Batch, int]]:
        rows = rows or max(1, numbers // max(1, sum(t[0].numel() for t in self.tensors)))
        for first in range(0, len(self), rows):
            batch = tuple(tensor[first : first + rows] for tensor in self.tensors)
            yield batch, len(batch[0])


@dataclass(frozen=True)
class DatasetRows:
    """A map-style Dataset."""

    dataset: Dataset[Any]
    batch_size: int
    """Of chunks."""
    collate: Collate | None = None
    num_workers: int = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def num_batches(self, batch_size: int) -> int:
        return len(self) // batch_size

    def batches(self, generator: torch.Generator, batch_size: int) -> Iterable[Batch]:
        rows = [batch.tolist() for batch in order(len(self), generator, batch_size)]
        own = torch.Generator()  # of the seeds of workers: the global state stays the run's
        own.set_state(generator.get_state())
        return DataLoader(
            self.dataset, batch_sampler=rows, collate_fn=self.collate, num_workers=self.num_workers, generator=own
        )

    def chunks(self, rows: int | None, numbers: int) -> Iterator[tuple[Batch, int]]:
        del numbers
        loader = DataLoader(
            self.dataset, batch_size=rows or self.batch_size, collate_fn=self.collate, num_workers=self.num_workers
        )
        for batch in loader:
            yield batch, count(batch)


@dataclass(frozen=True)
class LoaderRows:
    """A DataLoader as it is: its own batch size, order and workers."""

    loader: DataLoader[Any]

    @cached_property
    def _counts(self) -> list[int]:
        return [count(batch) for batch in self.loader]

    def __len__(self) -> int:
        sampler = getattr(self.loader.batch_sampler, "sampler", None)
        if sampler is not None and not self.loader.drop_last:
            return len(sampler)
        return sum(self._counts)

    def num_batches(self, batch_size: int) -> int:
        del batch_size
        return len(self.loader)

    def batches(self, generator: torch.Generator, batch_size: int) -> Iterable[Batch]:
        del batch_size
        if self.loader.generator is not None:  # else the order comes from the global state, which the run has seeded
            self.loader.generator.set_state(torch.Generator().manual_seed(_drawn(generator)).get_state())
        return self.loader

    def chunks(self, rows: int | None, numbers: int) -> Iterator[tuple[Batch, int]]:
        del rows, numbers
        for batch in self.loader:
            yield batch, count(batch)


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def rows_of(name: str, data: Any, batch_size: int, collate: Collate | None, num_workers: int) -> Rows:
    """The rows of a part.

    Raises:
        BadInput: no data, or data of another kind; the message names the part.
    """
    if isinstance(data, Part | TensorRows | DatasetRows | LoaderRows):
        return data
    if isinstance(data, DataLoader):
        try:
            len(data)
        except TypeError:
            raise BadInput(f"{name} must have a length, got a DataLoader over an iterable-style Dataset.") from None
        return LoaderRows(data)
    if isinstance(data, Sequence) and not isinstance(data, Dataset) and data and _are_tensors(data):
        lengths = {len(tensor) for tensor in data}
        if len(lengths) > 1 or 0 in lengths:
            raise BadInput(f"{name} must be tensors of one length above 0, got {', '.join(str(len(t)) for t in data)}.")
        return Part(*data) if len(data) == 2 else TensorRows(tuple(data))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if len(data) == 0:
            raise BadInput(f"{name} must have rows, got an empty {type(data).__name__}.")
        return DatasetRows(data, batch_size, collate, num_workers)  # type: ignore[arg-type]
    raise BadInput(
        f"{name} must be a map-style Dataset, a DataLoader, or a tuple of tensors, got {type(data).__name__}."
    )


def _are_tensors(data: Sequence[Any]) -> bool:
    return all(isinstance(item, Tensor) and item.ndim > 0 for item in data)


def count(batch: Batch) -> int:
    """Rows of a batch: the first dimension of its first tensor, else the length of what there is."""
    leaves = tree_leaves(batch)
    tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    return len(leaves) if tensor is None else len(tensor)


def moved(batch: Batch, device: torch.device) -> Batch:
    """Its tensors on the device."""
    if type(batch) is tuple:  # the plain case, for speed
        return tuple(item.to(device) if isinstance(item, Tensor) else moved(item, device) for item in batch)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def shared_out(batch: Batch, rank: int, size: int) -> Batch:
    """Every `size`-th row from `rank` on, of each tensor.

    Raises:
        BadInput: leaves that are no tensors, or tensors of other lengths: what a row is cannot be told.
    """
    if size == 1:
        return batch
    rows = count(batch)
    if any(not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != rows for leaf in tree_leaves(batch)):
        raise BadInput("batches must be tensors with one row for each example to be shared out to several processes.")
    return tree_map_only(Tensor, lambda tensor: tensor[rank::size], batch)
