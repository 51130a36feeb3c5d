"""A player: plays the passes of a step around a model, from g1 to ĝ.

The plan (plan.py) says which passes there are, the door (calls.py) how one is run, second_pass.py makes ĝ of them. What
is put back, and when, is written down in ending.py before it is touched. The doors of engine.py begin and end steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.training import double_backward
from gradreg.training.anatomy import Anatomy, refuse_shared_memory
from gradreg.training.calls import Call, Calls, Closure, checked
from gradreg.training.carried import Carried
from gradreg.training.check import State, check_same
from gradreg.training.combination import Gradients, add_penalty, give, is_view, take
from gradreg.training.displacement import Displacement, EarlyReturn
from gradreg.training.ending import Ending, Endings
from gradreg.training.plan import Method, Plan, plan_of
from gradreg.training.ranks import Ranks
from gradreg.training.replay import Buffers, Moment, Rewind
from gradreg.training.schedule import Strength
from gradreg.training.second_pass import Mover, SecondPass
from gradreg.training.selection import Selection, bare_class
from gradreg.training.shards import lay_out_gradients
from gradreg.training.strangers import Averages, Census, Strangers
from gradreg.training.together import check_stage
from gradreg.training.watch import Watch

Door = Calls | Closure


PLAYERS: weakref.WeakSet[Player] = weakref.WeakSet()


@dataclass
class Step:
    """One step under way."""

    strength: Strength | None
    parameters: list[Tensor]  # the selected ones, then all others whose gradients must not be touched
    old: list[Tensor | None]  # their gradients when it began
    before: Moment | None = None  # the moment that its passes begin at, where they are ours

    def forget_old(self) -> None:
        """Hold only those that are views: they belong to somebody, who expects ĝ in them."""
        self.old = [g if g is not None and is_view(g) else None for g in self.old]


class Player:
    """What belongs to one regularizer in one process, and travels in no copy or pickle.

    Args:
        model: the model.
        selection: which parameters move.
        method: what stays the same over the steps.
        ascent_sync: whose gradient the ascent follows, where there are several ranks.
        carried: what goes on from step to step.
        checks_replay: ask the loss twice in the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        method: Method,
        ascent_sync: str,
        carried: Carried,
        checks_replay: bool,
    ) -> None:
        self._selection = selection
        self._method = method
        self._carried = carried
        self.anatomy = Anatomy(model)
        self.ranks = Ranks(model, ascent_sync, method.is_one_pass)
        self._rewind = Rewind(self.anatomy)
        self.watch = Watch(self.anatomy, self._rewind)
        self.displacement = Displacement(self.anatomy, keeps_room=not (method.is_one_pass and self.anatomy.is_large))
        self._endings = Endings(self.displacement, self._count)
        self._strangers = Strangers()
        self._block: Step | None = None  # of the second door
        self._last_plan: tuple[Strength | None, Plan] | None = None
        self._averages: Averages | None = None
        self._is_reentrant: bool | None = None  # whether checkpoints run backward passes in one; not known yet
        self.is_check_due = self.watch.keeps_calls = checks_replay
        mover = partial(Mover, selection)
        self._mover = mover(carried.directions, self.displacement, carried.diagnostics)
        self._ahead = carried.ahead and mover(carried.ahead, self.displacement, carried.diagnostics, is_base=True)
        self._read()
        PLAYERS.add(self)

    def _read(self) -> None:
        """What belongs to the model is found once, and again when it changes."""
        refuse_shared_memory(dict(self.anatomy.model.named_parameters()))
        self._parameters = self._selection.parameters
        self._kind = vectors.kind_of(self._parameters)
        self._others = self._selection.others

    def follow(self) -> None:
        if self.anatomy.follow():
            self._selection.read(self.anatomy.model)
            self._read()

    # A step begins and ends.

    @property
    def is_open(self) -> bool:
        return self._endings.now is not None

    def _begin(
        self, strength: Strength | None, before: Moment | None, others: Sequence[Tensor] = (), leaves_old: bool = False
    ) -> Step:
        """From here on `end` is due; if it breaks off without gradients, or with those that were there."""
        everything = [*self._parameters, *self._others, *others, *self._strangers.tensors]
        step = Step(strength, everything, [p.grad for p in everything], before)
        left = step.old if leaves_old else [None] * len(everything)
        self._endings.begin(self._ending(parameters=everything, gradients=left, moment=before or self._rewind))
        self._endings.hooks.append(self._rewind)
        return step

    def _ending(self, **fields: Any) -> Ending:
        return Ending(self._carried.step, self._carried.diagnostics.counts, **fields)

    def _begin_alone(self) -> None:
        """A step whose gradients autograd adds by itself; after a failure there are none if there were none before."""
        none = [p for p in self._selection.all if p.grad is None]
        self._endings.begin(self._ending(parameters=none, gradients=[None] * len(none)))

    def end(self) -> None:
        """Put everything back; once more does no harm."""
        self._endings.end()
        self._block = None
        self._rewind.forget()
        self.watch.forget()

    def _count(self, ending: Ending) -> None:
        self._carried.step = ending.step
        self._carried.diagnostics.counts = ending.counts

    def _will_end(self, **changes: Any) -> None:
        """From here on the step ends otherwise."""
        if self._endings.now is None:
            raise RuntimeError("the step was interrupted, and the loss or block went on after the exception.")
        self._endings.now = self._endings.now.but(**changes)

    def _succeed(self, step: Step | None, old: Gradients = ()) -> None:
        """The step is done: it ends with what stands in `.grad`, within the tensors of `old` where there were any."""
        if self._carried.remembers:
            self._carried.remember(self._selection.named, [p.grad for p in self._parameters])
        self._carried.follow(self.ranks)
        changes: dict[str, Any] = {"parameters": (), "gradients": (), "moment": None}
        if step is not None and {*map(type, old)} - {NoneType}:
            gradients = [p.grad for p in step.parameters]
            targets: list[Tensor] = []
            sources: list[Tensor] = []
            for i, (g, before) in enumerate(zip(gradients, old)):
                if before is None or g is before:
                    continue
                if g is not None and g.layout is before.layout is torch.strided:
                    targets.append(before)
                    sources.append(g)
                gradients[i] = before if g is None or (targets and targets[-1] is before) else g
            changes |= {"parameters": step.parameters, "gradients": gradients, "targets": targets, "sources": sources}
        self._will_end(is_success=True, step=self._carried.step + 1, **changes)

    # The plan is played.

    def _plan(self, strength: Strength | None) -> Plan:
        if self._last_plan is None or self._last_plan[0] is not strength:
            self._last_plan = strength, plan_of(self._method, strength)
        return self._last_plan[1]

    def _look_ahead(self) -> None:
        """With `at`, all passes of a step from θ + ρd on."""
        radius = 0.0 if self._method.at is None else self._method.at.radius(self._carried.step)
        if self._ahead is not None and radius != 0:
            self._ahead.move(self._kind, radius)

    def _play(
        self,
        step: Step | None,
        strength: Strength | None,
        plan: Plan,
        parts: Sequence[Sequence[Call]],
        door: Door,
        roots: Sequence[Any],
    ) -> list[Any]:
        """The passes in order; the gradients of all of them, combined, stand in `.grad` then."""
        again = [(one.node, one.weight) for one in plan if one.weight is not None]
        state = State(roots, self.anatomy) if again and self.is_check_due else None
        losses: list[Any] = []
        for one in plan:
            calls = parts[one.part]
            if one.weight is None and one.node == 0:
                losses += self._run_here(door, calls, is_first=one.part == 0 and len(plan) > 1)
            elif one.weight is None and strength is not None:
                losses += self._run_ahead(door, calls, strength, is_alone=len(plan) == 1)
            elif again and step is not None and strength is not None:
                self._penalize(step, strength, again, door, calls, losses, state)  # type: ignore[arg-type]
                again = []
        return losses

    def _run_here(self, door: Door, calls: Sequence[Call], is_first: bool) -> list[Any]:
        with self.ranks.first_pass() if is_first else nullcontext():
            losses = door.run(calls)
        if self._is_reentrant is None and isinstance(door, Calls):
            self._is_reentrant = door.is_reentrant
        return losses

    def _run_ahead(self, door: Door, calls: Sequence[Call], strength: Strength, is_alone: bool) -> list[Any]:
        """A displaced pass on rows of its own: all of them, or those of a `Split`, which leave buffers as they were."""
        if is_alone:
            counts = self._run_ahead_of(strength.epsilon)
            early = None
            if isinstance(door, Calls) and len(calls) == 1 and self.anatomy.is_large:
                early = EarlyReturn(self.displacement)
                self._endings.hooks.append(early)
            losses = door.run(calls, None if early is None else early.watch)
        else:
            buffers = Buffers(self.anatomy)
            lay_out_gradients(self._parameters)
            moving = [p for p in self._parameters if p.grad is not None]
            gradients = vectors.Vector((p.grad for p in moving), self._kind.are_together)  # type: ignore[misc]
            norm = None
            if not self._carried.directions.are_known:
                norm = vectors.read(vectors.norm(gradients)) if gradients else 0.0
            scale = (1 - strength.ratio) * door.scale()
            counts = self._run_ahead_of(strength.epsilon, moving, gradients, scale, norm)
            losses = door.run(calls)
            buffers.restore()
        self.displacement.close()
        self._will_end(counts=counts)
        return losses

    def _run_ahead_of(
        self,
        radius: float,
        moving: Sequence[nn.Parameter] = (),
        gradients: Sequence[Tensor] = (),
        scale: float | Tensor = 1.0,
        norm: vectors.Scalar | None = None,
    ) -> tuple[Any, Any]:
        """Displace for a pass that has no g1 to be measured against; the counters after it."""
        factor = self._mover.move(self._kind, radius, moving, gradients, scale, norm)
        diagnostics = self._carried.diagnostics
        diagnostics.is_wanted = diagnostics.is_wanted and factor is None
        if isinstance(factor, Tensor):
            factor = vectors.read(factor)
        return diagnostics.counted(False if factor is None else factor != 0)

    def _penalize(
        self,
        step: Step,
        strength: Strength,
        again: Sequence[tuple[float, float]],
        door: Door,
        calls: Sequence[Call],
        losses: Sequence[Any],
        state: State | None,
    ) -> None:
        """From g1 to ĝ, by displaced passes of rows that have run at θ."""
        assert step.before is not None
        self._rewind.start()
        second = self._second_pass(step, strength, strength.share * door.scale(), self._leaves(door))
        if state is not None and second.is_needed:
            failing = self._endings.now
            self._will_end(gradients=second.untouched(step.old))
            self._rewind.to(step.before)
            with self._weights_kept() as has_written, self.ranks.quiet():
                answers = door.ask(calls)
            take(step.parameters)
            check_same(losses, answers, state, door.name, is_bitwise=not has_written())
            self._endings.now = failing
            self.is_check_due = self.watch.keeps_calls = False
        if self._passes_test(second):
            for node, weight in again:
                second.displace(node)
                self._rewind.to(step.before)
                second.prepare(weight, self._endings)
                self.watch.starts_again()
                early = partial(second.combine_large_on_arrival, weight, self._endings)
                is_simple = self.anatomy.is_large and len(calls) == 1
                door.run_again(calls, early if is_simple else _nothing, self._wanted(door))
                self._collect(second, weight)
        self.watch.stops_again()
        counts = second.finish()
        self._rewind.restore()
        self._will_end(counts=counts)

    def _leaves(self, door: Door) -> Sequence[Tensor]:
        if self._strangers.has_looked:
            return ()
        return Census().tensors if door.leaves is None else door.leaves

    def _second_pass(
        self, step: Step, strength: Strength, scale: float | Tensor, leaves: Sequence[Tensor]
    ) -> SecondPass:
        """Take g1 from `.grad`; in the first step, also what might belong to the loss outside the model."""
        strangers: list[Tensor] = []
        if not self._strangers.has_looked and self._endings.now is not None:
            known = [*step.parameters, *self.anatomy.model.parameters(), *self._of_other_blocks()]
            strangers = self._strangers.look(known, leaves)
            step.parameters.extend(strangers)
            step.old.extend([None] * len(strangers))
            left = [*self._endings.now.gradients, *(t.grad for t in strangers)]
            self._will_end(parameters=step.parameters, gradients=left)
        return SecondPass(
            self._mover,
            self._parameters,
            step.parameters[len(self._parameters) :],
            self._method,
            strength,
            scale,
            self.ranks,
            self._carried.diagnostics,
            copies_views={*map(type, step.old)} != {NoneType},
            kind=self._kind,
            num_strangers=len(strangers),
            is_stage=self._check_stage(step.strength),
        )

    def _of_other_blocks(self) -> list[Tensor]:
        """Parameters of models whose own second doors are about to open around or inside this one."""
        others = [engine for engine in PLAYERS if engine is not self and engine.watch.has_seen]
        return [
            p
            for engine in others
            for p in engine.anatomy.parameters
            if self._block is not None or self.watch.is_in_pipeline
        ]

    def _check_stage(self, strength: Strength | None) -> bool:
        """Whether the model is a stage of a pipeline; if so, that nothing needs the norm of the whole."""
        if self.watch.is_in_pipeline and strength is not None:
            test = self._carried.test
            check_stage(self._method, None if test is None else test.rule)
        return self.watch.is_in_pipeline

    def _passes_test(self, second: SecondPass) -> bool:
        """Whether the displaced passes are to run: they can change something, and the test, if any, asks for them."""
        test = self._carried.test
        return second.is_needed and (test is None or test.is_large(second.squared_norm, self._carried.step))

    def _collect(self, second: SecondPass, weight: float) -> None:
        if self._endings.now is None:
            raise RuntimeError("the step was interrupted, and the loss or block went on after the exception.")
        self._strangers.keep_met()
        second.collect(weight)
        self.displacement.close(to_base=self._ahead is not None and self.displacement.has_base)

    def _wanted(self, door: Door) -> list[nn.Parameter] | None:
        """The parameters whose gradients are to be made, where we run the backward pass ourselves; None for all."""
        is_ours = door.is_plain and self._is_reentrant is False and self.ranks.is_alone
        return self._parameters if is_ours and any(p.requires_grad for p in self._others) else None

    def _check_forwards(self) -> None:
        """As far as door 2 can be checked: the model, called once more with the same arguments, gives the same."""
        self.watch.is_paused = True
        for note in self.watch.notes:
            if note.call is None or note.call[2] is None:
                continue
            self._rewind.to(note.moment)
            args, kwargs, output = note.call
            state = State((self.anatomy.model, args, kwargs), self.anatomy)
            with torch.enable_grad(), self._weights_kept() as has_written, self.ranks.quiet():
                answer = self.anatomy.model(*args, **kwargs)
            what = f"the output of {bare_class(self.anatomy.model)}, with the inputs of the first pass,"
            check_same(output, answer, state, what, is_bitwise=not has_written())
            note.call = args, kwargs, None
        self.watch.is_paused = False

    @contextmanager
    def _weights_kept(self) -> Iterator[Callable[[], bool]]:
        """A pass at θ that may write to the weights, as some forwards do; tells whether it did."""
        parameters = [p for p in self._parameters if not vectors.is_sharded(p)]
        zeros = [torch.zeros((), dtype=p.dtype, device=p.device).expand_as(p) for p in parameters]
        has_base = self.displacement.has_base
        with torch.no_grad():
            self.displacement.open(parameters, 0.0, zeros)
        written: list[bool] = []
        try:
            yield lambda: any(written)
        finally:
            written.append(not has_base and self.displacement.was_written())
            self.displacement.close(to_base=has_base)

    def _exact(self, step: Step, door: Calls, calls: Sequence[Call]) -> list[Tensor]:
        """ĝ = g1 + γ H d by double backpropagation."""
        assert step.strength is not None
        assert step.before is not None
        selected, ascent = self._parameters, self._method.ascent
        scale: float | Tensor = 1.0
        if len(calls) == 1 and door.is_plain:
            loss = checked(calls[0]())
            known = set(map(id, step.parameters))
            strangers = [leaf for leaf in door.leaves_of(loss) if id(leaf) not in known]
            first, product = double_backward.in_one_pass(loss, selected, [*self._others, *strangers], ascent)
            losses = [loss.detach()]
        else:
            losses = door.run(calls)
            scale = door.scale()
            self._rewind.start()
            lay_out_gradients(selected)
            kept = take(step.parameters)
            first = kept[: len(selected)]
            self._rewind.to(step.before)
            product = double_backward.of_window(calls, selected, first, ascent, door.factors, scale)
            give(step.parameters, kept)
            self._rewind.restore()
        first = [None if g is None else vectors.laid_out(g, p) for g, p in zip(first, selected)]
        product = [None if x is None else vectors.laid_out(x, p) for x, p in zip(product, selected)]
        present = [g for g in first if g is not None]
        norm = vectors.norm(present) if present else torch.zeros(())
        with torch.no_grad():
            penalty = [None if x is None else x * step.strength.gamma for x in product]
            combined, measured = add_penalty(first, penalty, norm, None, self._method.cap, self._method.fall_back)
        give(selected, combined)
        diagnostics = self._carried.diagnostics
        diagnostics.record(norm, scale, measured)
        usable = vectors.has_direction(vectors.read(norm))
        self._will_end(counts=diagnostics.counted(measured.is_finite & usable))
        return losses


def _nothing(loss: Tensor) -> None:
    del loss
