"""The part of the batch that the displaced pass sees: all of it, a fraction, or its own share of a split batch.

A batch is a tree of tensors (tuples, lists, dictionaries) whose first dimension counts rows, and its loss a mean over
rows; what is no tensor goes to each part whole, so arrays are refused. A window of micro-batches is cut into parts, in
order; each part's loss is weighted by its share of the rows of its micro-batch, so that the weighted losses add up to
the loss of the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gradreg.training.schedule import check_number

LossFunction = Callable[..., Tensor]
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Fraction:
    r"""The penalty on a share q of the batch, its first rows A; the loss on all of it, D.

    $$\hat g = g_D + \tfrac\gamma\epsilon [\nabla L_A(\theta + \epsilon d_A) - g_A]$$

    $g_A$ falls out of the accumulation of $g_D$, so the cost is 1 + q, with one extra copy of the parameters.
    $\|\nabla L_A\|^2$ exceeds $\|\nabla L_D\|^2$ by the noise of the smaller batch, which is penalized with it: a
    smaller γ does as much. Needs `backward(loss_fn, batches=[batch])`, and rows in random order. BatchNorm sees A and
    the rest as two batches, and its statistics change twice. `diagnostics()` are those of A, and the penalty's ratio
    is that to $g_A$.

    Args:
        share: q in (0, 1); rounded to whole rows, at least one.

    Raises:
        ValueError: a share outside of its range.

    References:
        Measured in docs/frontier.md; we know of no publication.

    Example:
        >>> Fraction(0.1)
        Fraction(share=0.1)
    """

    share: float

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 1)
        if self.share in (0, 1):
            raise ValueError(
                f"share must lie between 0 and 1, got {self.share}: for the whole batch leave out batch, for no "
                "penalty use gamma=0."
            )


@dataclass(frozen=True)
class Split:
    r"""One pass in all: the last rows, a share λ = γ/ε, at the displaced point, the first rows, A, at θ.

    $$\hat g = (1-\lambda) \, \nabla L_A(\theta) + \lambda \, \nabla L_B(\theta + \epsilon d)$$

    d is known beforehand (`Momentum`, `Previous`), or is taken from $\nabla L_A$ (`gradient`, `normalized`,
    `adaptive`): as A and B are independent, that penalizes $\|\nabla L\|^2$ without the noise of a batch. Each row is
    used once. γ < ε, since both gradients are on data of their own; needs `backward(loss_fn, batches=[batch])`.
    BatchNorm sees two batches, and keeps the statistics of A. Parameters outside the selection receive their part of
    the second gradient too.

    References:
        Measured in docs/frontier.md; we know of no publication.

    Example:
        >>> Split()
        Split()
    """


def cut(loss_fn: LossFunction, batches: Sequence[Any], share: float) -> tuple[list[Call], list[Call], float]:
    """The losses of the first rows, a share of all, and of the rest; and that share after rounding to rows.

    Raises:
        ValueError: batches without rows, or one row in all.
    """
    counts = [_rows(batch) for batch in batches]
    total = sum(counts)
    if total < 2:
        raise ValueError(f"batches must hold at least 2 rows to be divided by batch=Fraction or Split, got {total}.")
    wanted = min(max(1, math.floor(share * total + 0.5)), total - 1)
    first: list[Call] = []
    rest: list[Call] = []
    left = wanted
    for batch, count in zip(batches, counts):
        taken = min(left, count)
        left -= taken
        if taken:
            first.append(_part(loss_fn, batch, 0, taken, count))
        if taken < count:
            rest.append(_part(loss_fn, batch, taken, count, count))
    return first, rest, wanted / total


def weighted(calls: Sequence[Call], weight: float) -> list[Call]:
    """The same losses times a number."""
    return [partial(_times, call, weight) for call in calls]


def _times(call: Call, weight: float) -> Tensor:
    return call() * weight


def _part(loss_fn: LossFunction, batch: Any, start: int, stop: int, count: int) -> Call:
    if stop - start == count:
        return partial(loss_fn, batch)
    part = tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)
    return partial(_times, partial(loss_fn, part), (stop - start) / count)


def _rows(batch: Any) -> int:
    if any(getattr(leaf, "ndim", 0) and not isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
        raise ValueError(
            "batches must hold tensors to be divided by batch=Fraction or Split, got an array: use torch.as_tensor."
        )
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1:
        found = f"tensors of {sorted(sizes)} rows" if sizes else f"a {type(batch).__name__} without tensors"
        raise ValueError(
            "batches must hold trees of tensors with the same number of rows in their first dimension, to be divided "
            f"by batch=Fraction or Split, got {found}: use batch=None, or a schedule such as every(gamma, 10)."
        )
    return sizes.pop()
