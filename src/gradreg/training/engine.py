"""The engine: the three doors, each of which begins a step, has its passes played, and says how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from gradreg.training.batch import Fraction, Split, cut, weighted
from gradreg.training.calls import Backward, Call, Calls, Closure
from gradreg.training.combination import give, take
from gradreg.training.player import Player
from gradreg.training.replay import Moment
from gradreg.training.schedule import Strength
from gradreg.training.second_pass import SecondPass
from gradreg.training.strangers import Averages, Census, warn_of_scaler


class Engine(Player):
    """A step through each door."""

    # The first door.

    def step_of_calls(
        self,
        loss_fn: Callable[..., Tensor],
        batches: Sequence[Any] | None,
        strength: Strength | None,
        backward: Backward,
        grad_scale: float | Tensor,
    ) -> list[Tensor]:
        """Add ĝ to `.grad`; the losses of the window, or of its parts."""
        if strength is not None and not self._method.is_one_pass:
            self.ranks.check_sync(self.anatomy.sharded)
        self.watch.is_paused = True
        calls: list[Call] = [loss_fn] if batches is None else [partial(loss_fn, batch) for batch in batches]
        is_first = self._is_reentrant is None or not self._strangers.has_looked  # γ may be 0 in the first steps
        door = Calls(self.ranks, self._parameters, backward, grad_scale, is_first)
        is_exact = self._method.scheme.is_exact and strength is not None
        parts = [calls]
        if strength is not None and isinstance(self._method.batch, Split):
            here, ahead, share = cut(loss_fn, batches or [], 1 - strength.ratio)
            parts = [weighted(here, (1 - strength.ratio) / share), weighted(ahead, strength.ratio / (1 - share))]
        elif strength is not None and isinstance(self._method.batch, Fraction):
            first, rest, share = cut(loss_fn, batches or [], self._method.batch.share)
            parts, strength = [first, rest], replace(strength, share=share)
        plan = self._plan(strength)
        if len(plan) == 1 and not is_exact:
            self._begin_alone()
            self._look_ahead()
            losses = self._play(None, strength, plan, parts, door, ())
            self._succeed(None)
            return losses
        step = self._begin(strength, Moment(self.anatomy), leaves_old=True)
        had_gradients = {*map(type, step.old)} != {NoneType}
        if had_gradients:
            give(step.parameters, [None] * len(step.old))
        self._look_ahead()
        if is_exact:
            losses = self._exact(step, door, calls)
        else:
            losses = self._play(step, strength, plan, parts, door, (loss_fn, batches))
        if had_gradients:
            made = take(step.parameters)
            with torch.no_grad():
                for g, before in zip(made, step.old):
                    if g is not None and before is not None and g.layout is before.layout is torch.strided:
                        g.add_(before)
                give(step.parameters, [_sum(g, before) for g, before in zip(made, step.old)])
        self._succeed(step, step.old if had_gradients else ())
        return losses

    # The second door.

    def open_block(
        self, strength: Strength | None, grad_scale: float | Tensor, replays_random_numbers: bool, may_call: bool
    ) -> SecondPass:
        """`.grad` holds g1; the block of the user's is the displaced pass, and `close_block` follows it."""
        checks = self.is_check_due and strength is not None and may_call
        census = None if self._strangers.has_looked else Census()
        if census is not None and may_call and not replays_random_numbers:  # hosts know their scaler
            warn_of_scaler(grad_scale, census)
        self._rewind.start()
        self._block = step = self._begin(strength, None)
        known = [*map(id, (*step.old, *self.displacement.memory, *self._rewind.memory))]
        known += [id(buffer) for _, _, buffer in self.anatomy.buffers()[0]]
        step.forget_old()
        leaves = () if census is None else census.tensors
        second = self._second_pass(step, strength or Strength(1.0, 1.0), grad_scale, leaves)
        if checks:
            failing = self._endings.now
            self._will_end(gradients=second.taken)
            self._check_forwards()
            self._endings.now = failing
        self._is_due = strength is not None and self._passes_test(second)
        if self._is_due:
            [(node, weight)] = self._method.scheme.stencil
            second.displace(node)
            second.prepare(weight * step.strength.ratio, self._endings)  # type: ignore[union-attr]
        self._averages = None if census is None else Averages(self.anatomy.parameters, known, census)
        self.watch.start_replay(compares_random_numbers=not replays_random_numbers)
        return second

    def close_block(self, second: SecondPass) -> None:
        step, self._block = self._block, None
        assert step is not None
        self.watch.finish_replay()
        if self._is_due and all(p.grad is None for p in step.parameters):
            raise ValueError("the perturbed() block ran no backward pass: run the passes of the first one again in it.")
        averages, self._averages = self._averages, None
        if averages is not None:
            averages.warn_if_moved()
        [(_, weight)] = self._method.scheme.stencil
        if self._is_due and step.strength is not None:
            self._collect(second, weight * step.strength.ratio)
        else:
            self._strangers.keep_met()
        self.displacement.close()
        counts = second.finish() if step.strength is not None else second.leave_first()
        self._rewind.restore()
        if self._is_due:
            self.is_check_due = self.watch.keeps_calls = False
        self._will_end(counts=counts)
        step.forget_old()
        self._succeed(step, step.old)

    def open_one_pass(self, strength: Strength | None) -> None:
        """The block is the whole step, at θ + εd; with γ = 0 at θ."""
        self.watch.is_paused = True
        self._begin_alone()
        if strength is not None:
            self._will_end(counts=self._run_ahead_of(strength.epsilon))

    def close_one_pass(self, strength: Strength | None) -> None:
        self.displacement.close()
        self._check_stage(strength)
        self._succeed(None)

    # The third door.

    def step_of_closure(
        self, closure: Callable[[], Any], owned: Sequence[Tensor], others: Sequence[Tensor], strength: Strength | None
    ) -> Any:
        """ĝ in `.grad`, by a closure that is called once for each pass; its loss at θ."""
        self.watch.is_paused = True
        door = Closure(self.ranks, owned, self._parameters)
        plan = self._plan(strength)
        with torch.enable_grad():
            if len(plan) == 1:
                self._begin_alone()
                self._look_ahead()
                [loss] = self._play(None, strength, plan, [[closure]], door, ())
                self._check_stage(strength)
                self._succeed(None)
                return loss
            step = self._begin(strength, Moment(self.anatomy), others)
            if not self.is_check_due:
                step.forget_old()
            self._look_ahead()
            [loss] = self._play(step, strength, plan, [[closure]], door, (closure,))
        step.forget_old()
        self._succeed(step, step.old)
        return loss


def _sum(made: Tensor | None, before: Tensor | None) -> Tensor | None:
    """Of what was made, to which what was there is added already unless one of them is sparse."""
    if made is None or before is None or made.layout is before.layout is torch.strided:
        return made
    return before + made
