r"""The combination of gradients, when the passes are over:

$$\hat g = g_1 + \sum_k w_k (g_k - g_1)$$

with $w_k = \gamma/\epsilon$ times the stencil weights of the scheme. `.grad` is taken as it stands after each pass,
with whatever the user's own code has made of it, and all parameters are combined in one call. In a large model, memory
counts more than calls: where the backward pass is our own, large parameters are combined as their gradient arrives.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradreg import _vectors as vectors
from gradreg.training.displacement import LARGE

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Measured:
    """What a combination saw, as tensors."""

    is_finite: bool | Tensor  # whether all displaced gradients were
    ratio: Tensor | None = None  # ‖ĝ − g1‖/‖g1‖; None where it was not asked for
    cosine: Tensor | None = None  # of g1 and the first displaced gradient


def take(parameters: Sequence[Tensor], copies_views: bool = False) -> list[Tensor | None]:
    """The gradients, taken away from their parameters: nothing that runs meanwhile can write to them.

    `copies_views`: one that is a view into something larger is copied, since others write there (DDP's buckets).
    """
    taken = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    kinds = {*map(type, taken)}
    if vectors.are_sharded(kinds):
        taken = [None if g is None else vectors.laid_out(g, p) for g, p in zip(taken, parameters)]
    # References of this list and of the call. Whoever holds another may write there in the next pass.
    held = [*map(_IS_HELD, map(sys.getrefcount, taken))]
    if kinds <= _USUAL and not any(held) and not any(map(_REQUIRES_GRAD, taken)) and not copies_views:
        return taken
    for i in range(len(taken)):
        g = taken[i]
        if g is None:
            continue
        if g.requires_grad:  # the user's backward pass made a graph of its own
            taken[i] = g = g.detach()
        if held[i] or (copies_views and is_view(g)):
            taken[i] = g.clone()
    return taken


_USUAL = {Tensor}
_REQUIRES_GRAD, _IS_HELD = attrgetter("requires_grad"), (2).__lt__


def give(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    for p, g in zip(parameters, gradients):
        p.grad = g


def is_view(g: Tensor) -> bool:
    """Whether a tensor is a part of something larger, such as a flat buffer."""
    if g.layout is not torch.strided or vectors.is_sharded(g):
        return False
    return g.untyped_storage().nbytes() != g.numel() * g.element_size()


def combine(
    first: Gradients,
    passes: Sequence[tuple[Gradients, float]],
    norm: Tensor,
    *,
    wanted: bool = False,
    cap: float | None = None,
    fall_back: bool = False,
    arrived: Arrival | None = None,
    are_together: bool = False,
) -> tuple[list[Tensor | None], Measured]:
    """ĝ of each parameter; g1 is used up, and in the usual case written over.

    Args:
        first: g1; a gradient that is not there counts as zero.
        passes: the displaced gradients $g_k$ and their weights $w_k$.
        norm: ‖g1‖.
        wanted: measure the penalty's ratio and the cosine.
        cap: the largest ‖ĝ − g1‖/‖g1‖, or None.
        fall_back: leave g1 where a displaced gradient is not finite.
        are_together: those of a small model: all that are there are few and of one kind (`vectors.Kind`).
        arrived: what has combined a part of them already, whose ĝ stands in the place of $g_1$'s second gradient.
    """
    second, weight = passes[0]
    if len(passes) > 1 or cap is not None or fall_back:
        differences = _differences(first, passes, uses_up=not wanted)
        return add_penalty(first, differences, norm, second if wanted else None, cap, fall_back)
    result = _combine_together(first, second, weight, norm, wanted) if are_together and arrived is None else None
    if result is not None:
        return result
    done = set() if arrived is None else arrived.indices
    xs = [None if i in done else g for i, g in enumerate(first)]
    ys = [None if i in done else g for i, g in enumerate(second)]
    square, distance = _sums(xs, ys, norm, wanted)  # before g1 is written over
    if arrived is not None:
        more, further = arrived.sums(norm)
        square, distance = square + more, None if distance is None else distance + further
    if weight == 1:
        combined = [torch.zeros_like(x) if y is None and x is not None else y for x, y in zip(xs, ys)]
    elif _are_usual(xs, ys):
        here, there = ([vectors.local(g) for g in side if g is not None] for side in (xs, ys))
        if here:
            torch._foreach_lerp_(here, there, weight)  # pyright: ignore[reportPrivateImportUsage]
        combined = xs
    else:
        combined = [_added(x, d, 1.0) for x, d in zip(xs, _differences(xs, [(ys, weight)]))]
    return [second[i] if i in done else g for i, g in enumerate(combined)], _measured(norm, weight, square, distance)


def _combine_together(
    first: Gradients, second: Gradients, weight: float, norm: Tensor, wanted: bool
) -> tuple[list[Tensor | None], Measured] | None:
    """In the usual case, all gradients there (g1 only if it is looked at), each in its own memory; None otherwise."""
    is_second = weight == 1 and not wanted
    if not {*map(type, second)} <= _USUAL or not (is_second or {*map(type, first)} <= _USUAL):
        return None
    if not is_second and len({*map(id, first)}) < len(first):
        return None
    try:
        measured = Measured(vectors.are_finite(second))  # type: ignore[arg-type]
    except RuntimeError:  # sparse, or several numbers in one place
        return None
    if wanted:
        here, there = (vectors.Vector(side, together=True) for side in (first, second))  # type: ignore[arg-type]
        measured = _measured(norm, weight, *vectors.square_and_distance(here, there))
    if weight != 1:
        torch._foreach_lerp_(first, second, weight)  # type: ignore[arg-type]
    return list(second if weight == 1 else first), measured


def _are_usual(first: Gradients, second: Gradients) -> bool:
    """Dense gradients of the same parameters, each in its own memory: ĝ can be written over g1."""
    present = [g for g in first if g is not None]
    same = all((g is None) == (s is None) for g, s in zip(first, second))
    dense = all(g.layout is torch.strided for gradients in (first, second) for g in gradients if g is not None)
    return same and dense and len({id(g) for g in present}) == len(present)


def _sums(first: Gradients, second: Gradients, norm: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """‖g2‖², and where it is wanted ‖g2 − g1‖²; of shards always: a rank that reads must not have to ask the others."""
    present = [g for g in second if g is not None]
    if not wanted and not vectors.any_sharded(present):
        return (vectors.norm(present).square() if present else torch.zeros_like(norm)), None
    pairs = [(g, s) for g, s in zip(_filled(first, second), _filled(second, first)) if g is not None and s is not None]
    if not pairs:
        return torch.zeros_like(norm), torch.zeros_like(norm)
    return vectors.square_and_distance([g for g, _ in pairs], [s for _, s in pairs])


def _measured(norm: Tensor, weight: float, square: Tensor, distance: Tensor | None) -> Measured:
    """From ‖g1‖, ‖g2‖² and ‖g2 − g1‖²; the cosine from the three sides of a triangle."""
    if distance is None:
        return Measured(vectors.is_finite(vectors.read(square)))
    product = (norm.square() + square - distance) / 2
    cosine = product * vectors.safe_reciprocal(norm * square.sqrt())
    return Measured(
        vectors.is_finite(vectors.read(square)), abs(weight) * distance.sqrt() * vectors.safe_reciprocal(norm), cosine
    )


def _filled(gradients: Gradients, like: Gradients) -> list[Tensor | None]:
    """Zero for what is missing and there in `like`."""
    return [torch.zeros_like(x) if g is None and x is not None else g for g, x in zip(gradients, like)]


def _differences(
    first: Gradients, passes: Sequence[tuple[Gradients, float]], uses_up: bool = False
) -> list[Tensor | None]:
    """Σ wₖ (gₖ − g1), in float32 or wider: several displaced gradients, missing or sparse ones, a cap, a policy.

    `uses_up`: gₖ may be written over, which takes no memory.
    """
    present = [g for g in first if g is not None]
    if all(_are_usual(first, gradients) for gradients, _ in passes) and not vectors.is_low_precision(present):
        return _differences_together(first, passes, uses_up)
    differences: list[Tensor | None] = []
    for i, g in enumerate(first):
        terms = [(gradients[i], weight) for gradients, weight in passes]
        example = next((x for x in (g, *(x for x, _ in terms)) if x is not None), None)
        if example is None:
            differences.append(None)
            continue
        dtype = vectors.wide(example.dtype)
        nothing = torch.zeros_like(example, dtype=dtype)
        origin = nothing if g is None else g.to(dtype)
        parts = [((nothing if x is None else x.to(dtype)) - origin) * weight for x, weight in terms]
        differences.append(parts[0] if len(parts) == 1 else sum(parts[1:], parts[0]))
    return differences


def _differences_together(
    first: Gradients, passes: Sequence[tuple[Gradients, float]], uses_up: bool
) -> list[Tensor | None]:
    """The same in a few calls for all."""
    xs = [vectors.local(g) for g in first if g is not None]
    total: list[Tensor] = []
    for gradients, weight in passes if xs else ():
        ys = [vectors.local(g) for g in gradients if g is not None]
        if uses_up and len({*map(id, ys)}) == len(ys) and not any(map(is_view, ys)):
            torch._foreach_sub_(ys, xs)  # pyright: ignore[reportPrivateImportUsage]
            gaps = ys
        else:
            gaps = list(torch._foreach_sub(ys, xs))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(gaps, weight)  # pyright: ignore[reportPrivateImportUsage]
        if total:
            torch._foreach_add_(total, gaps)  # pyright: ignore[reportPrivateImportUsage]
        total = total or gaps
    made = iter(total)
    return [None if g is None else _like(next(made), g) for g in first]


def _like(part: Tensor, whole: Any) -> Tensor:
    """A tensor of the part that is here, sharded as another is."""
    if not vectors.is_sharded(whole):
        return part
    return type(whole).from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def add_penalty(
    first: Gradients,
    differences: Gradients,
    norm: Tensor,
    second: Gradients | None = None,
    cap: float | None = None,
    fall_back: bool = False,
) -> tuple[list[Tensor | None], Measured]:
    """g1 + difference, lowered to the cap, or g1 where not finite; with `second` the cosine is measured too."""
    present = [d for d in differences if d is not None]
    length = vectors.norm(present) if present else torch.zeros_like(norm)
    factor, is_finite = torch.ones_like(length), length.isfinite()
    if cap is not None:
        factor = torch.minimum(factor, cap * norm.to(length) * vectors.safe_reciprocal(length))  # NaN stays NaN
    ratio = factor * length * vectors.safe_reciprocal(norm)
    cosine = None if second is None else _measured(norm, 1.0, *_sums(first, second, norm, True)).cosine
    measured = Measured(
        vectors.is_finite(vectors.read(length)), torch.where(is_finite, ratio, 0.0) if fall_back else ratio, cosine
    )
    if cap is None and not fall_back and present and _are_usual(first, differences):
        here = [vectors.local(g) for g in first if g is not None]
        torch._foreach_add_(here, [vectors.local(d) for d in present])  # pyright: ignore[reportPrivateImportUsage]
        return list(first), measured
    combined = [_added(g, difference, factor) for g, difference in zip(first, differences)]
    if fall_back and vectors.is_readable(is_finite):
        return combined if is_finite else list(first), measured
    if fall_back:
        combined = [
            x if x is None else torch.where(is_finite.to(x.device), x.to_dense(), 0.0 if g is None else g.to_dense())
            for x, g in zip(combined, first)
        ]
    return combined, measured


def _added(first: Tensor | None, difference: Tensor | None, factor: float | Tensor) -> Tensor | None:
    if difference is None:
        return first
    if isinstance(factor, Tensor):
        factor = factor.to(difference.device, difference.real.dtype)
    if first is None:
        return factor * difference
    return (first.to(difference.dtype) + factor * difference).to(first.dtype)


class Arrival:
    """Combines the gradients of one displaced pass of weight w as they arrive, and gives g1's memory to them.

    For large parameters in a backward pass of our own; and for all of them where ranks average ĝ instead of g2.
    ĝ is linear in g2, so a gradient that arrives in several parts is combined with the first of them.

    Args:
        parameters: the selected parameters.
        first: their g1; those that are combined here are taken out.
        weight: w.
        all_sizes: also parameters below 1 MB.
    """

    def __init__(
        self, parameters: Sequence[Tensor], first: list[Tensor | None], weight: float, all_sizes: bool
    ) -> None:
        self._first = first
        self._weight = weight
        self.indices: set[int] = set()  # of those whose gradient has arrived
        self._sums: list[tuple[Tensor, Tensor]] = []  # ‖g2‖² and ‖g2 − g1‖²
        self._hooks: list[RemovableHandle] = []
        for i, (p, g) in enumerate(zip(parameters, first)):
            if (all_sizes or p.numel() >= LARGE) and g is not None and g.layout is torch.strided:
                self._hooks.append(p.register_hook(partial(self._arrive, i)))

    def _arrive(self, i: int, second: Tensor) -> Tensor:
        first, self._first[i] = self._first[i], None
        if i in self.indices or first is None:
            self._sums.append((vectors.squared(second), torch.full((), torch.nan, device=second.device)))
            return second * self._weight
        self.indices.add(i)
        with torch.no_grad():
            self._sums.append(vectors.square_and_distance([first], [second]))
            return torch.lerp(first, second, self._weight, out=first)

    def sums(self, norm: Tensor) -> list[Tensor]:
        """Over all that arrived."""
        return [vectors.total([norm * 0, *part]) for part in zip(*self._sums)] if self._sums else [norm * 0] * 2

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
