r"""The combination: g1 waits aside while the displaced pass runs, and meets each g2 as it arrives.

$$\hat g = g_1 + c \sum_k w_k (g_k - g_1), \qquad c = \gamma/\epsilon,$$

with the stencil weights $w_k$ of the scheme ($w_1 = 1$ for `forward`). Every parameter is combined inside the
backward pass, the moment its second gradient exists: it is still in the cache, its memory is given back at once
(so that no second copy of the gradients is ever held), and it does not matter whether a closure calls
`zero_grad()` first.

A combination is *deferred* to the end of the pass where the whole of g2 must be known first: for a cap on the
penalty, for the policy that falls back to g1, and where one pass holds several backward passes. That holds g2
beside g1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradreg import _vectors as vectors

Gradients = Sequence[Tensor | None]


@dataclass
class Measured:
    """Squared lengths in the units of `.grad`, one for each parameter as it arrives."""

    first_norm: Tensor  # ‖g1‖
    weight: float  # ĝ = g1 + weight · difference
    wanted: bool = True  # else only ‖g2‖ is measured, which tells whether g2 is finite
    share: float = 1.0  # of the batch, that g1 and g2 were taken on
    second: list[Tensor] = field(default_factory=list)  # ‖g2‖²; none for the exact scheme
    distance: list[Tensor] = field(default_factory=list)  # ‖g2 − g1‖²
    difference: list[Tensor] = field(default_factory=list)
    is_partial: bool = False  # several backward passes of one forward: the parts of g2 do not tell its length
    ratio: Tensor | None = None  # ‖ĝ − g1‖/‖g1‖, where it was needed to make ĝ

    def penalty_ratio(self) -> Tensor:
        """‖ĝ − g1‖ / ‖g1‖; on a share of the batch, ‖(γ/ε)(g2 − g1)‖ / ‖g1‖ with both of that share."""
        if self.is_partial:
            return torch.full_like(self.first_norm, torch.nan)
        if self.ratio is not None:
            return self.share * self.ratio
        length = self.share * abs(self.weight) * vectors.total(self.difference).sqrt()
        return length * vectors.safe_reciprocal(self.first_norm)

    def cosine(self) -> Tensor:
        """cos(g1, g2), from the three sides of the triangle that they span."""
        if self.is_partial or not self.second:
            return torch.full_like(self.first_norm, torch.nan)
        first, second = self.first_norm.square(), vectors.total(self.second)
        product = (first + second - vectors.total(self.distance)) / 2
        return product * vectors.safe_reciprocal((first * second).sqrt())

    def is_finite(self) -> Tensor:
        """Whether all second gradients were finite."""
        return vectors.total(self.second if self.second else [self.first_norm]) < torch.inf  # neither ∞ nor NaN

    def add(self, second: Tensor, distance: Tensor, difference: Tensor) -> None:
        self.second.append(vectors.squared(second))
        if self.wanted:
            self.distance.append(vectors.squared(distance))
            self.difference.append(self.distance[-1] if difference is distance else vectors.squared(difference))

    def add_late(self, first: Gradients, combined: Gradients) -> None:
        """The same from g1 and ĝ, where what arrived was one rank's share of g2."""
        pairs = [(g, x) for g, x in zip(first, combined) if g is not None and x is not None]
        if pairs:
            self.wanted, self.second = True, []
        for g, x in pairs:
            difference = (x - g) / self.weight
            self.add(g + difference, difference, difference)


def take_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, taken away from their parameters: nothing that runs meanwhile can write to them.

    A gradient that is a view into something larger is copied: DDP's next backward pass writes to its buckets.
    """
    taken = [p.grad if p.grad is None or _owns_storage(p.grad) else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return taken


@contextmanager
def keeping_views(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A gradient that was a view into something larger (a flat buffer) is that view again, and holds what it is now."""
    views = [(p, p.grad) for p in parameters if p.grad is not None and not _owns_storage(p.grad)]
    try:
        yield
    finally:
        for p, view in views:
            if p.grad is not None and p.grad.layout is torch.strided:
                with torch.no_grad():
                    view.copy_(p.grad)
                p.grad = view


def _owns_storage(g: Tensor) -> bool:
    if g.layout is not torch.strided or vectors.is_sharded(g):
        return True
    return g.untyped_storage().nbytes() == g.numel() * g.element_size()


def give_gradients(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    for p, g in zip(parameters, gradients):
        p.grad = g


class Combination:
    """A context around the last displaced pass; on leaving, `.grad` holds ĝ.

    Args:
        parameters: the selected parameters.
        first: their g1, already taken; written over.
        earlier: gradients of earlier displaced passes, each with w_k / w_last.
        measured: holds ‖g1‖ and the weight c · w_last; receives the rest.
        deferred: combine after the pass instead of during it.
        is_local: g1 is this rank's own, and ĝ is averaged over ranks once it is made: it must not hide a g1 that is
            not finite, or this rank alone would know.
        cap: the largest ‖ĝ − g1‖/‖g1‖, or None.
        fall_back: leave g1 where the second gradient is not finite.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        first: Gradients,
        earlier: Sequence[tuple[Gradients, float]],
        measured: Measured,
        *,
        deferred: bool,
        is_local: bool,
        cap: float | None,
        fall_back: bool,
    ) -> None:
        self._parameters = parameters
        self._first = list(first)
        self._earlier = earlier
        self._measured = measured
        self._together = cap is not None or fall_back
        self._deferred = deferred or self._together
        self._cap = cap
        self._fall_back = fall_back
        self._is_local = is_local
        self._is_second = measured.weight == 1 and not (measured.wanted or earlier or self._deferred or is_local)
        self._arrived = [False] * len(parameters)
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        if self._is_second:  # ĝ = g2: g1 is not waited with
            self._arrived = [g is None for g in self._first]
            self._first = [None] * len(self._first)
        elif not self._deferred:
            for i, p in enumerate(self._parameters):
                self._hooks.append(p.register_hook(partial(self._arrive, i)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del error, trace
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            return
        with torch.no_grad():
            if self._is_second:
                self._keep_second()
                return
            if self._together:
                differences = [self._difference(i, p.grad) for i, p in enumerate(self._parameters)]
                add_penalty(self._parameters, self._first, differences, self._measured, self._cap, self._fall_back)
                return
            self._combine_rest()

    def _keep_second(self) -> None:
        for p, had_none in zip(self._parameters, self._arrived):
            if p.grad is None and not had_none:
                p.grad = torch.zeros_like(p)  # took part in the first pass only: g2 = 0
        present = [p.grad for p in self._parameters if p.grad is not None]
        self._measured.second.append(vectors.norm(present).square())

    def _arrive(self, i: int, second: Tensor) -> Tensor | None:
        """Answer autograd with ĝ in the place of g2; it takes the memory of g1 over as `.grad`."""
        if self._arrived[i]:  # another backward of the same pass: ĝ is linear in g2
            weight = self._measured.weight
            self._measured.second.append(vectors.squared(second))
            self._measured.is_partial = True
            return None if weight == 1 else second * weight
        self._arrived[i] = True
        return self._combine(i, second)

    def _combine(self, i: int, second: Tensor | None) -> Tensor | None:
        """ĝ of one parameter; its g1 is used up, and in the usual case written over."""
        measured = self._measured
        weight, first = measured.weight, self._first[i]
        if first is not None and second is not None and self._is_usual(first, second):
            self._first[i] = None
            if measured.wanted:
                gap = first - second
                measured.add(second, gap, gap)
            else:
                measured.second.append(vectors.squared(second))
            return torch.lerp(first, second, weight, out=first) if self._needs_first else second
        difference = self._difference(i, second)
        self._first[i] = None
        if difference is None or (second is not None and weight == 1 and not self._earlier):
            return second
        return _add(first, difference, weight)

    def _is_usual(self, first: Tensor, second: Tensor) -> bool:
        """One displaced pass, dense gradients, no narrow dtype: ĝ can be written over g1."""
        return not (self._earlier or first.is_sparse or second.is_sparse) and first.dtype.itemsize >= 4

    @property
    def _needs_first(self) -> bool:
        """ĝ = g2 else."""
        return self._measured.weight != 1 or self._is_local

    def _combine_rest(self) -> None:
        """Those that no hook met: the gradients of a window of several backward passes, and shards."""
        usual: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        for i, p in enumerate(self._parameters):
            first, second = self._first[i], p.grad
            if self._arrived[i]:
                continue
            if self._measured.wanted or first is None or second is None or not self._is_usual(first, second):
                p.grad = self._combine(i, second)
            else:
                usual[p] = first, second
        if usual:
            self._combine_together(usual)

    def _combine_together(self, gradients: dict[nn.Parameter, tuple[Tensor, Tensor]]) -> None:
        """The usual case of all of them in one call; of shards it sees the part that is here."""
        firsts, seconds = zip(*gradients.values())
        self._measured.second.append(vectors.norm(seconds).square())
        if self._needs_first:
            here, there = ([vectors.local(g) for g in side] for side in (firsts, seconds))
            torch._foreach_lerp_(here, there, self._measured.weight)  # pyright: ignore[reportPrivateImportUsage]
            for p, first in zip(gradients, firsts):
                p.grad = first

    def _difference(self, i: int, second: Tensor | None) -> Tensor | None:
        """Σ (w_k / w_last) (g_k − g1), in float32 or wider; a gradient that is not there counts as zero."""
        first = self._first[i]
        terms = [(second, 1.0), *((gradients[i], relative) for gradients, relative in self._earlier)]
        example = next((g for g in (first, *(g for g, _ in terms)) if g is not None), None)
        if example is None:
            return None
        dtype = vectors.wide(example.dtype)
        nothing = torch.zeros_like(example, dtype=dtype)
        origin = nothing if first is None else first.to(dtype)
        distances = [((nothing if g is None else g.to(dtype)) - origin) * relative for g, relative in terms]
        difference = distances[0] if len(distances) == 1 else sum(distances[1:], distances[0])
        self._measured.add(nothing if second is None else second, distances[0], difference)
        return difference


def add_penalty(
    parameters: Sequence[Tensor],
    first: Gradients,
    differences: Gradients,
    measured: Measured,
    cap: float | None,
    fall_back: bool,
) -> None:
    """`.grad` ← g1 + weight · difference, with one weight for all: lowered to the cap, or 0 where not finite."""
    present = [d for d in differences if d is not None]
    length = vectors.norm(present) if present else torch.zeros(())
    weight = torch.full_like(length, measured.weight)
    if cap is not None:
        largest = cap * measured.first_norm.to(length) * vectors.safe_reciprocal(length)
        weight = weight.sign() * torch.minimum(weight.abs(), largest)
    usable = length.isfinite() if fall_back else torch.ones_like(length, dtype=torch.bool)
    ratio = weight.abs() * length * vectors.safe_reciprocal(measured.first_norm)
    measured.ratio = torch.where(usable, ratio, 0.0)
    for p, g, difference in zip(parameters, first, differences):
        if difference is None:
            p.grad = g
            continue
        origin = torch.zeros_like(difference, dtype=p.dtype) if g is None else g
        combined = _add(origin, difference, weight)
        if fall_back and vectors.is_readable(usable):
            p.grad = combined if usable else g
        elif fall_back:
            p.grad = torch.where(usable.to(p.device), combined.to_dense(), origin.to_dense())
        else:
            p.grad = combined


def _add(first: Tensor | None, difference: Tensor, weight: float | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        weight = weight.to(difference.device, difference.real.dtype)
    if first is None:
        return weight * difference
    return (first.to(difference.dtype) + weight * difference).to(first.dtype)
