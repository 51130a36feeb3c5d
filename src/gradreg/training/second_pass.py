"""From g1 to ĝ: gradients taken aside, weights displaced, gradients taken again, all of them combined.

The doors run the passes in between. What happens to weights, gradients, buffers and random state when something goes
wrong is written down in ending.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.functional.ascents import Scale
from gradreg.training.combination import Arrival, Gradients, combine, give, take
from gradreg.training.diagnostics import Diagnostics
from gradreg.training.directions import Directions
from gradreg.training.displacement import LARGE, Displacement
from gradreg.training.ending import Endings
from gradreg.training.plan import Method
from gradreg.training.ranks import Ranks
from gradreg.training.schedule import Strength
from gradreg.training.selection import Selection


class Mover:
    """Sets the weights to where they stand + radius · d.

    Args:
        selection: the parameters that may move.
        directions: finds d.
        displacement: owns the extra copy of the weights.
        diagnostics: receives what was realized.
        is_base: nothing is measured, and other displacements go on from there.
    """

    def __init__(
        self,
        selection: Selection,
        directions: Directions,
        displacement: Displacement,
        diagnostics: Diagnostics,
        is_base: bool = False,
    ) -> None:
        self._selection = selection
        self._directions = directions
        self._displacement = displacement
        self._diagnostics = diagnostics
        self._is_base = is_base

    def move(
        self,
        kind: vectors.Kind,
        radius: float,
        parameters: Sequence[nn.Parameter] = (),
        gradients: Sequence[Tensor] = (),
        scale: Scale = 1.0,
        norm: vectors.Scalar | None = None,
    ) -> vectors.Scalar | None:
        """The factor that d was taken by, 0 where it cannot be used; None where there is nothing to move.

        `kind` is that of the selected parameters. `gradients` are those of `parameters`, and `norm` is theirs, where d
        is made of them: one that is 0 or not finite moves nothing.
        """
        moving, direction, length = self._directions.find(self._selection.named, parameters, gradients, scale, norm)
        if not moving:
            return None
        step = radius * length
        if isinstance(norm, Tensor):
            usable = (norm > 0) & (norm < torch.inf)
            step = torch.where(usable, vectors.scalar_like(norm, step), 0.0)
        elif norm is not None and not vectors.has_direction(norm):
            step = 0.0
        self._displacement.open(moving, step, direction, self._is_base)
        # Of shards in every step: whether one rank has read must not decide what all ranks add up together.
        wanted = self._diagnostics.is_wanted or kind.are_sharded or kind.are_low_precision
        if not self._is_base and wanted:
            applied = self._displacement.applied()
            self._diagnostics.record_realized(applied, step, direction, kind.are_low_precision)
        return step


class SecondPass:
    """One step's way from g1, which stands in `.grad` when this is made, to ĝ, which `finish` leaves there.

    Between the two, for each displaced pass: `displace`, forward and backward, `collect`.

    Args:
        mover: displaces the weights.
        parameters: the selected ones.
        others: all whose gradient the displaced passes must not touch.
        method: scheme, ascent, cap and policy.
        strength: γ and ε of this step.
        scale: `.grad` holds scale · ∇L.
        ranks: of this model.
        diagnostics: receives measurements and counts.
        copies_views: a gradient that is a view into something larger is copied.
        kind: of the parameters.
        is_stage: g1 is that of a part of the model, and other processes run the pass whatever this one finds.
        num_strangers: how many of the others, at the end, may have nothing to do with this step.
    """

    def __init__(
        self,
        mover: Mover,
        parameters: Sequence[nn.Parameter],
        others: Sequence[Tensor],
        method: Method,
        strength: Strength,
        scale: Scale,
        ranks: Ranks,
        diagnostics: Diagnostics,
        copies_views: bool,
        kind: vectors.Kind,
        num_strangers: int = 0,
        is_stage: bool = False,
    ) -> None:
        self._mover = mover
        self._parameters = parameters
        self._others = others
        self._method = method
        self._strength = strength
        self._scale = scale
        self._ranks = ranks
        self._diagnostics = diagnostics
        self._is_stage = is_stage
        self._kind = kind
        self._wanted = diagnostics.is_wanted or kind.are_sharded  # not by what one rank has read
        self._copies_views = copies_views or ranks.is_replicated
        self._first: list[Tensor | None] = take(parameters, self._copies_views)
        self._kept: list[Tensor | None] = []
        if others:
            strangers = others[len(others) - num_strangers :]
            kept = take(others[: len(others) - num_strangers], self._copies_views)
            self._kept = [*kept, *(t.grad for t in strangers)]  # the very tensors: they belong to somebody else
            give(strangers, [None] * num_strangers)
        self._moving, present = parameters, self._first
        if NoneType in {*map(type, present)}:
            self._moving = [p for p, g in zip(parameters, present) if g is not None]
            present = [g for g in present if g is not None]
        self._present = vectors.Vector(present, kind.are_together)  # type: ignore[arg-type]
        self._norm = vectors.norm(self._present) if present else torch.zeros(())
        self._length = vectors.read(self._norm)
        self._usable = vectors.has_direction(self._length)
        self._passes: list[tuple[Gradients, float]] = []
        self._arrival: Arrival | None = None

    @property
    def is_needed(self) -> bool:
        """Whether ĝ can differ from g1.

        An accelerator is not asked, and ranks with gradients of their own must not part: there the passes run, masked.
        """
        if not self._moving:
            return False
        return self._ranks.is_local or self._is_stage or isinstance(self._usable, Tensor) or self._usable

    @property
    def taken(self) -> list[Tensor | None]:
        """The gradients of the first pass, of all parameters."""
        return [*self._first, *self._kept]

    def untouched(self, old: Gradients) -> list[Tensor | None]:
        """Of gradients that were there before the first pass, those that it has not written to."""
        written = {id(g) for g in (*self._first, *self._kept) if g is not None}
        return [None if id(g) in written else g for g in old]

    @property
    def squared_norm(self) -> float:
        """‖g1‖² without the loss scale; reading it waits for an accelerator."""
        return float((self._norm / self._scale).square())

    def displace(self, node: float) -> None:
        self._mover.move(
            self._kind, node * self._strength.epsilon, self._moving, self._present, self._scale, self._length
        )

    def prepare(self, weight: float, endings: Endings) -> None:
        """Before a displaced pass. Where ranks average ĝ and not g2, gradients meet before they are averaged."""
        if len(self._method.scheme.stencil) > 1:
            return  # g1 leads to a second displaced point
        self._present = vectors.Vector(())
        if self._ranks.is_local:
            self._combine_on_arrival(weight, endings, all_sizes=True)
        elif weight == 1 and not self._method.needs_whole and not self._wanted:
            self._first = [None for _ in self._first]  # ĝ is g2: g1 makes room for it

    def _combine_on_arrival(self, weight: float, endings: Endings, all_sizes: bool) -> None:
        self._arrival = Arrival(self._parameters, self._first, weight, all_sizes)
        endings.hooks.append(self._arrival)

    def combine_large_on_arrival(self, weight: float, endings: Endings, loss: Tensor) -> None:
        """In a large model, before a backward pass of our own: g1 makes room for ĝ, parameter by parameter."""
        del loss
        is_late = self._method.needs_whole or (self._ranks.is_replicated and self._diagnostics.is_wanted)
        untouched = all(p.grad is None for p in self._parameters)  # no backward pass ran within the loss
        if self._arrival is None and not is_late and untouched and len(self._method.scheme.stencil) == 1:
            self._combine_on_arrival(weight, endings, all_sizes=False)
            endings.hooks.append(_Dropping([p for p in self._others if p.numel() >= LARGE]))

    def collect(self, weight: float) -> None:
        """Take the gradients of a displaced pass."""
        if self._arrival is not None:
            self._arrival.remove()
        self._passes.append((take(self._parameters, self._copies_views), weight))
        give(self._others, [None] * len(self._others))

    def leave_first(self) -> tuple[Tensor | int, Tensor | int]:
        """Leave g1 in `.grad`, as if there had been no step; the counters as they were."""
        give(self._parameters, self._first)
        give(self._others, self._kept)
        return self._diagnostics.counts

    def finish(self) -> tuple[Tensor | int, Tensor | int]:
        """Leave ĝ in `.grad`, g1 where no displaced pass ran; the counters after this step."""
        share, combined, measured = self._strength.share, self._first, None
        was_active: bool | Tensor = False
        if self._passes:
            cap = self._method.cap
            combined, measured = combine(
                self._first,
                self._passes,
                self._norm,
                wanted=self._wanted,
                cap=None if cap is None else cap / share,
                fall_back=self._method.fall_back,
                arrived=self._arrival,
                are_together=self._kind.are_together,
            )
            if NoneType in {*map(type, combined)}:
                took_part = set(map(id, self._moving))
                for i, p in enumerate(self._parameters):
                    if combined[i] is None and id(p) in took_part:  # in the first pass only: g2 = 0
                        combined[i] = torch.zeros_like(p)
            if isinstance(self._length, Tensor) or self._is_stage:
                # ĝ = g2 would hide that g1 was not finite; times 1 is bitwise neutral.
                visible = torch.where(self._norm.isfinite(), 1.0, torch.nan)
                for group in vectors.by_kind([g for g in combined if g is not None]):
                    torch._foreach_mul_(group, visible.to(group[0].device, group[0].dtype))  # type: ignore[attr-defined]
            was_active = measured.is_finite & self._usable
        give(self._parameters, combined)
        give(self._others, self._kept)
        self._diagnostics.record(self._norm, self._scale, measured, share)
        return self._diagnostics.counted(was_active)


class _Dropping:
    """Gradients of these parameters are given back as soon as they are made, so that they take no memory."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        leaves = [p for p in parameters if p.is_leaf and p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._drop) for p in leaves]

    def _drop(self, p: Tensor) -> None:
        p.grad = None

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
