"""What happens between g1 and ĝ: gradients taken aside, weights displaced, the passes run, everything put back.

All three doors go through here. Whatever a displaced pass does, on leaving the weights, the buffers and the random
state are those that the first pass left, and gradients outside the selection are what the first pass made them.
After an exception all gradients are cleared: a half-made sum must not be mistaken for a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.functional.ascents import Ascent, Scale
from gradreg.functional.schemes import Scheme
from gradreg.training.anatomy import Anatomy
from gradreg.training.batch import Fraction, Split
from gradreg.training.combination import Combination, Gradients, Measured, give_gradients, take_gradients
from gradreg.training.diagnostics import Diagnostics
from gradreg.training.directions import Ahead, Directions, Momentum, Previous
from gradreg.training.displacement import Displacement
from gradreg.training.replay import Moment
from gradreg.training.schedule import Strength


@dataclass(frozen=True)
class Method:
    """What stays the same over the steps of a regularizer."""

    scheme: Scheme
    ascent: Ascent | Momentum | Previous
    cap: float | None  # the largest ‖ĝ − g1‖/‖g1‖
    fall_back: bool  # to g1, where the second gradient is not finite
    batch: Fraction | Split | None = None  # that the displaced pass sees
    at: Ahead | None = None  # where all gradients are taken, if not at θ

    @property
    def is_one_pass(self) -> bool:
        """Whether ĝ = ∇L(θ + εd) with a d that needs no pass: γ = ε is all that makes sense then."""
        return self.batch is None and isinstance(self.ascent, (Momentum, Previous))

    @property
    def needs_whole(self) -> bool:
        """Whether one number for all parameters decides ĝ, so that it waits for the last of them."""
        return self.cap is not None or self.fall_back


@contextmanager
def without_trace(anatomy: Anatomy, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Passes that leave no trace: the gradients of `parameters`, buffers and random state come back as they were."""
    after = Moment(anatomy)
    kept = take_gradients(parameters)
    try:
        yield
    except BaseException:
        kept = [None] * len(kept)
        raise
    finally:
        after.restore()
        for p in parameters:
            p.grad = None
        give_gradients(parameters, kept)


@contextmanager
def dropping_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of these parameters are given back as soon as they are made, so that they take no memory."""

    def drop(p: Tensor) -> None:
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in parameters if p.is_leaf and p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Moved(NamedTuple):
    """The parameters that were displaced, and by which factor of their direction: 0 where that cannot be used."""

    parameters: list[nn.Parameter]
    step: Tensor


class Displacer:
    """Sets the weights to θ + radius · d, and back.

    Args:
        anatomy: of the model.
        named: the selected parameters by name.
        directions: finds d.
        displacement: owns the extra copy of the weights.
        diagnostics: receives what was realized.
        is_base: nothing is measured, and other displacements go on from there.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        named: Mapping[str, nn.Parameter],
        directions: Directions,
        displacement: Displacement,
        diagnostics: Diagnostics,
        is_base: bool = False,
    ) -> None:
        self.anatomy = anatomy
        self.named = named
        self.directions = directions
        self.displacement = displacement
        self.diagnostics = diagnostics
        self._is_base = is_base

    @contextmanager
    def standing(
        self,
        radius: float,
        gradients: Sequence[Tensor | None] = (),
        grad_scale: Scale = 1.0,
        norm: Tensor | None = None,
    ) -> Iterator[Moved]:
        """Within, the weights stand at θ + radius · d."""
        level = self.displacement.level
        try:
            moved = self._displace(radius, gradients, grad_scale, norm)
            del gradients  # or they could not be given back while the passes run
            yield moved
        finally:
            if self.displacement.level > level:
                self.displacement.close()

    def _displace(
        self, radius: float, gradients: Sequence[Tensor | None], grad_scale: Scale, norm: Tensor | None
    ) -> Moved:
        """`norm` is that of `gradients`, where d is made of them: one that is 0 or not finite moves nothing."""
        with torch.no_grad():
            moving, direction, scale = self.directions.find(self.named, gradients, grad_scale, norm)
            if not moving:
                return Moved([], torch.zeros(()))
            if norm is None:
                step = radius * scale if isinstance(scale, Tensor) else torch.full((), radius * scale)
            else:
                step = torch.where(vectors.has_direction(norm), torch.full_like(norm, radius) * scale, 0.0)
            self.displacement.open(self.anatomy.modules, moving, step, direction, self._is_base)
            low_precision = vectors.is_low_precision(moving)
            if not self._is_base and (low_precision or self.diagnostics.is_wanted):
                self.diagnostics.record_realized(self.displacement.applied(), step, direction, low_precision)
        return Moved(moving, step)


class SecondPass:
    """One step's way from g1, which stands in `.grad`, to ĝ.

        with second.open():
            for k in range(second.num_passes):
                with second.displaced(k):
                    ...  # forward and backward, from the random state and the buffers of the first pass

    Args:
        displacer: moves the selected parameters.
        others: further parameters, whose gradient the displaced passes must not touch.
        method: scheme, ascent, cap and policy.
        strength: γ and ε of this step.
        grad_scale: `.grad` holds `grad_scale` · ∇L.
        deferred: combine when the pass has ended, since it holds several backward passes.
        is_local: g1 is this rank's own, and only ĝ is averaged over ranks.
        is_replicated: ranks average g2 after it arrived.
    """

    def __init__(
        self,
        displacer: Displacer,
        others: Sequence[Tensor],
        method: Method,
        strength: Strength,
        *,
        grad_scale: float | Tensor,
        deferred: bool,
        is_local: bool,
        is_replicated: bool,
    ) -> None:
        self._displacer = displacer
        self._anatomy, self._diagnostics = displacer.anatomy, displacer.diagnostics
        self._parameters = parameters = list(displacer.named.values())
        self._others = others
        self._method = method
        self._strength = strength
        self._grad_scale = grad_scale
        self._deferred = deferred
        self._is_local = is_local
        arrives_in_parts = is_replicated and not (is_local or deferred or method.needs_whole)
        self._measures_late = self._diagnostics.is_wanted and arrives_in_parts
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._norm = vectors.norm(gradients) if gradients else torch.zeros(())
        self._usable = vectors.has_direction(self._norm)
        self._first: list[Tensor | None] = []
        self._earlier: list[tuple[Gradients, float]] = []

    @property
    def is_needed(self) -> bool:
        """Whether ĝ can differ from g1.

        An accelerator is not asked, and ranks with gradients of their own must not part: there the passes run, masked.
        """
        return self._is_local or not vectors.is_readable(self._usable) or bool(self._usable)

    @property
    def num_passes(self) -> int:
        return len(self._method.scheme.stencil)

    @property
    def squared_norm(self) -> float:
        """‖g1‖² without the loss scale; reading it waits for an accelerator."""
        return float((self._norm / self._grad_scale).square())

    def skip(self) -> None:
        """Leave g1: a gradient that is zero or not finite has no direction, and a schedule may not want the pass."""
        self._diagnostics.count(torch.zeros_like(self._usable))
        self._diagnostics.record(self._norm / self._grad_scale, None)

    @contextmanager
    def open(self) -> Iterator[None]:
        with without_trace(self._anatomy, self._others), dropping_gradients(self._others):
            self._first = take_gradients(self._parameters)
            try:
                yield
            except BaseException:
                take_gradients(self._parameters)
                raise
            finally:
                self._first, self._earlier = [], []

    @contextmanager
    def displaced(self, k: int) -> Iterator[None]:
        """The weights stand at θ + s_k ε d; at the end of the last pass `.grad` holds ĝ."""
        stencil = self._method.scheme.stencil
        node, weight = stencil[k]
        is_last = k == len(stencil) - 1
        wanted = self._diagnostics.is_wanted and not self._measures_late
        share, cap = self._strength.share, self._method.cap
        measured = Measured(self._norm, self._strength.ratio * weight, wanted, share)
        kept = [None if g is None else g.clone() for g in self._first] if is_last and self._measures_late else []
        with ExitStack() as stack:
            radius = node * self._strength.epsilon
            stack.enter_context(self._displacer.standing(radius, self._first, self._grad_scale, self._norm))
            if is_last:
                combination = Combination(
                    self._parameters,
                    self._first,
                    self._earlier,
                    measured,
                    deferred=self._deferred,
                    is_local=self._is_local,
                    cap=None if cap is None else cap / share,
                    fall_back=self._method.fall_back,
                )
                self._first = []  # from here on each g1 is given back as its ĝ is made
                stack.enter_context(combination)
            yield
        if is_last:
            measured.add_late(kept, [p.grad for p in self._parameters])
            self._conclude(measured)
        else:
            self._earlier.append((take_gradients(self._parameters), weight / stencil[-1][1]))

    def _conclude(self, measured: Measured) -> None:
        if not vectors.is_readable(self._usable):
            # ĝ = g2 would hide that g1 was not finite; times 1 is bitwise neutral.
            visible = torch.where(self._norm.isfinite(), 1.0, torch.nan)
            for p in self._parameters:
                if p.grad is not None:
                    p.grad.mul_(visible.to(p.grad.device, p.grad.dtype))
        self._diagnostics.record(self._norm / self._grad_scale, measured)
        self._diagnostics.count(self._usable & measured.is_finite())
