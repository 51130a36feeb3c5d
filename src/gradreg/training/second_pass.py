"""What happens between g1 and ĝ: gradients taken aside, weights displaced, the passes run, everything put back.

All three doors go through here. Whatever a displaced pass does, on leaving the weights, the buffers and the random
state are those that the first pass left, and gradients outside the selection are what the first pass made them.
After an exception all gradients are cleared: a half-made sum must not be mistaken for a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.functional.ascents import Ascent
from gradreg.functional.schemes import Scheme
from gradreg.training.anatomy import Anatomy
from gradreg.training.combination import Combination, Gradients, Measured, give_gradients, take_gradients
from gradreg.training.diagnostics import Diagnostics
from gradreg.training.displacement import Displacement
from gradreg.training.replay import Moment
from gradreg.training.schedule import Strength


@dataclass(frozen=True)
class Method:
    """What stays the same over the steps of a regularizer."""

    scheme: Scheme
    ascent: Ascent
    cap: float | None  # the largest ‖ĝ − g1‖/‖g1‖
    fall_back: bool  # to g1, where the second gradient is not finite

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


class SecondPass:
    """One step's way from g1, which stands in `.grad`, to ĝ.

        with second.open():
            for k in range(second.num_passes):
                with second.displaced(k):
                    ...  # forward and backward, from the random state and the buffers of the first pass

    Args:
        anatomy: of the model.
        parameters: the selected parameters.
        others: further parameters, whose gradient the displaced passes must not touch.
        method: scheme, ascent, cap and policy.
        strength: γ and ε of this step.
        grad_scale: `.grad` holds `grad_scale` · ∇L.
        deferred: combine when the pass has ended, since it holds several backward passes.
        is_local: g1 is this rank's own, and only ĝ is averaged over ranks.
        is_replicated: ranks average g2 after it arrived.
        displacement: owns the extra copy of the weights.
        diagnostics: receives the measurements.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        parameters: Sequence[nn.Parameter],
        others: Sequence[Tensor],
        method: Method,
        strength: Strength,
        *,
        grad_scale: float | Tensor,
        deferred: bool,
        is_local: bool,
        is_replicated: bool,
        displacement: Displacement,
        diagnostics: Diagnostics,
    ) -> None:
        self._anatomy = anatomy
        self._parameters = parameters
        self._others = others
        self._method = method
        self._strength = strength
        self._grad_scale = grad_scale
        self._deferred = deferred
        self._is_local = is_local
        arrives_in_parts = is_replicated and not (is_local or deferred or method.needs_whole)
        self._measures_late = diagnostics.is_wanted and arrives_in_parts
        self._displacement = displacement
        self._diagnostics = diagnostics
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._norm = vectors.norm(gradients) if gradients else torch.zeros(())
        self._usable = self._norm.isfinite() & (self._norm > 0)
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

    def skip(self) -> None:
        """Leave g1: a gradient that is zero or not finite has no direction."""
        self._diagnostics.count(self._usable)
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
        measured = Measured(self._norm, self._strength.ratio * weight, wanted)
        kept = [None if g is None else g.clone() for g in self._first] if is_last and self._measures_late else []
        with ExitStack() as stack:
            stack.callback(self._displacement.close)
            self._displace(node * self._strength.epsilon)
            if is_last:
                combination = Combination(
                    self._parameters,
                    self._first,
                    self._earlier,
                    measured,
                    deferred=self._deferred,
                    is_local=self._is_local,
                    cap=self._method.cap,
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

    def _displace(self, radius: float) -> None:
        moving = [i for i, g in enumerate(self._first) if g is not None]
        parameters = [self._parameters[i] for i in moving]
        gradients = [g for g in self._first if g is not None]
        with torch.no_grad():
            direction, scale = self._method.ascent([p.data for p in parameters], gradients, self._grad_scale)
            step = torch.where(self._usable, torch.full_like(self._norm, radius) * scale, 0.0)
            self._displacement.open(self._anatomy.modules, parameters, step, direction)
            low_precision = vectors.is_low_precision(parameters)
            if low_precision or self._diagnostics.is_wanted:
                self._diagnostics.record_realized(self._displacement.applied(), step, direction, low_precision)

    def _conclude(self, measured: Measured) -> None:
        if not vectors.is_readable(self._usable):
            # ĝ = g2 would hide that g1 was not finite; times 1 is bitwise neutral.
            visible = torch.where(self._norm.isfinite(), 1.0, torch.nan)
            for p in self._parameters:
                if p.grad is not None:
                    p.grad.mul_(visible.to(p.grad.device, p.grad.dtype))
        self._diagnostics.record(self._norm / self._grad_scale, measured)
        self._diagnostics.count(self._usable & measured.is_finite())
