"""The engine: runs the passes of a step around a model.

A step is plain, one pass ahead, a split of the batch, or two passes and what is made of them. The doors
(regularizer.py) ask for one; random state, buffers, gradients and weights are looked after here and in second_pass.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.training.anatomy import Anatomy
from gradreg.training.batch import Fraction, Split, cut, weighted
from gradreg.training.calls import Backward, Examination, differentiate, run_closure
from gradreg.training.carried import Carried
from gradreg.training.combination import give_gradients, take_gradients
from gradreg.training.displacement import Displacement, EarlyReturn
from gradreg.training.double_backward import ExactPenalty
from gradreg.training.hosts import loss_division
from gradreg.training.ranks import Ranks
from gradreg.training.recorder import Recorder
from gradreg.training.replay import Buffers, Moment
from gradreg.training.schedule import Strength
from gradreg.training.second_pass import Displacer, Method, SecondPass, dropping_gradients, without_trace
from gradreg.training.selection import Selection

Call = Callable[[], Tensor]
Result = TypeVar("Result")


class Engine:
    """What belongs to one regularizer in one process, and travels in no copy or pickle.

    Args:
        model: the model.
        selection: which parameters move.
        method: what stays the same over the steps.
        ascent_sync: whose gradient the ascent follows, where there are several ranks.
        carried: what goes on from step to step.
    """

    def __init__(
        self, model: nn.Module, selection: Selection, method: Method, ascent_sync: str, carried: Carried
    ) -> None:
        self._selection = selection
        self._method = method
        self._carried = carried
        self._displacement = Displacement(keeps_room=not method.is_one_pass)
        self.anatomy = Anatomy(model)
        self.ranks = Ranks(model, ascent_sync)
        self.recorder = Recorder(self.anatomy)
        self._examination = Examination()

    def step_of_calls(
        self,
        loss_fn: Callable[..., Tensor],
        batches: Sequence[Any] | None,
        strength: Strength | None,
        step: int,
        backward: Backward,
        grad_scale: float | Tensor,
    ) -> list[Tensor]:
        """Add ĝ to `.grad`; the losses of the window, or of its parts."""
        method = self._method
        calls = [loss_fn] if batches is None else [partial(loss_fn, batch) for batch in batches]
        if strength is None:
            return self._plain(calls, backward)
        if isinstance(method.batch, Split):
            with self._adding_to_gradients(), self.recorder.paused():
                return self._split(loss_fn, batches or [], strength, backward, grad_scale)
        if method.is_one_pass:
            with self.recorder.paused():
                return self._one_pass(calls, strength, backward)
        rest: list[Call] = []
        if isinstance(method.batch, Fraction):
            calls, rest, share = cut(loss_fn, batches or [], method.batch.share)
            strength = replace(strength, share=share)
        with self._adding_to_gradients(), self._all_or_nothing() as before:
            losses = self._regularize(calls, strength, step, before, backward, grad_scale)
            return losses + self._plain(rest, backward)

    def step_of_closure(
        self,
        closure: Callable[[], Any],
        owned: Sequence[Tensor],
        others: Sequence[Tensor],
        strength: Strength,
        step: int,
    ) -> Any:
        """ĝ in `.grad`, by a closure that is called twice; its loss at θ."""
        with self._all_or_nothing() as before, torch.enable_grad():
            with self.recorder.first_pass(), self.ranks.first_pass():
                loss = run_closure(closure, owned, self._selection.parameters)

            def replay() -> None:
                before.restore()
                closure()

            self._second_pass(replay, strength, step, 1.0, self.recorder.num_forwards, others)
        return loss

    def _plain(self, calls: Sequence[Call], backward: Backward) -> list[Tensor]:
        with self.recorder.paused():
            return self._for_each(calls, lambda call: differentiate(call, backward))

    def _regularize(
        self,
        calls: Sequence[Call],
        strength: Strength,
        step: int,
        before: Moment,
        backward: Backward,
        grad_scale: float | Tensor,
    ) -> list[Tensor]:
        exact = ExactPenalty(self._selection.parameters, self._method, strength.gamma, self._carried.diagnostics)
        if self._method.scheme.is_exact and len(calls) == 1 and backward is Tensor.backward:
            return [exact.in_one_pass(calls[0], self._selection.others)]
        factors: list[Tensor] = []
        with self.recorder.first_pass(), self.ranks.first_pass():
            losses = self._for_each(calls, lambda call: differentiate(call, backward, factors, self._examine))
        self._examination.is_done = True
        grad_scale = strength.share * _scale_of(grad_scale, factors, backward)
        if self._method.scheme.is_exact:
            first = [p.grad for p in self._selection.parameters]
            with without_trace(self.anatomy, self._selection.all):
                before.restore()
                penalty = exact.of_window(calls, factors, first, grad_scale)
            exact.add(penalty, grad_scale)
            return losses
        # Gradients that nobody wants are not computed, where we run the backward pass ourselves.
        wanted = self._selection.parameters if self._picks_gradients(backward) else None

        def play(call: Call) -> None:
            loss = call()
            if loss.requires_grad:  # else: nothing selected takes part in the displaced pass
                loss.backward(inputs=wanted) if wanted else backward(loss)

        def replay() -> None:
            before.restore()
            self._for_each(calls, play)

        self._second_pass(replay, strength, step, grad_scale, len(calls))
        return losses

    def _picks_gradients(self, backward: Backward) -> bool:
        is_ours = backward is Tensor.backward and self._examination.allows_inputs and self.ranks.is_alone
        return is_ours and any(p.requires_grad for p in self._selection.others)

    def _one_pass(self, calls: Sequence[Call], strength: Strength, backward: Backward) -> list[Tensor]:
        """∇L(θ + εd) and no other gradient."""
        with self._displacer().standing(strength.epsilon) as moved:
            self._carried.diagnostics.count_pass(moved.step, is_measured=bool(moved.parameters))
            if len(calls) > 1:
                return self._for_each(calls, lambda call: differentiate(call, backward))
            with EarlyReturn(self._displacement, moved.parameters) as early:
                return [differentiate(calls[0], backward, check=early.watch)]

    def _split(
        self,
        loss_fn: Callable[..., Tensor],
        batches: Sequence[Any],
        strength: Strength,
        backward: Backward,
        grad_scale: float | Tensor,
    ) -> list[Tensor]:
        """(1 − λ) ∇L_A(θ) + λ ∇L_B(θ + εd), λ = γ/ε, each row in one pass."""
        here, ahead, share = cut(loss_fn, batches, 1 - strength.ratio)
        factors: list[Tensor] = []
        with self.ranks.first_pass():
            first = weighted(here, (1 - strength.ratio) / share)
            losses = self._for_each(first, lambda call: differentiate(call, backward, factors, self._examine))
        self._examination.is_done = True
        buffers = Buffers(self.anatomy)
        gradients = [p.grad for p in self._selection.parameters]
        scale = (1 - strength.ratio) * _scale_of(grad_scale, factors, backward)
        present = [g for g in gradients if g is not None]
        norm = vectors.norm(present) if present and not self._carried.directions.are_known else None
        with self._displacer().standing(strength.epsilon, gradients, scale, norm) as moved:
            self._carried.diagnostics.count_pass(moved.step, is_measured=bool(moved.parameters))
            second = weighted(ahead, strength.ratio / (1 - share))
            losses += self._for_each(second, lambda call: differentiate(call, backward))
        buffers.restore()
        return losses

    def _for_each(self, calls: Sequence[Call], play: Callable[[Call], Result]) -> list[Result]:
        """The micro-batches of a window; ranks average gradients in the last."""
        results = []
        for k, call in enumerate(calls, 1):
            with self.ranks.micro_batch(is_last=k == len(calls)):
                results.append(play(call))
        return results

    def _second_pass(
        self,
        run: Callable[[], Any],
        strength: Strength,
        step: int,
        grad_scale: float | Tensor,
        num_backwards: int,
        others: Sequence[Tensor] = (),
    ) -> None:
        """`.grad` from g1 to ĝ, where the pass is ours to run."""
        second = self._prepare(strength, grad_scale, num_backwards, others)
        if not self._is_due(second, step):
            second.skip()
            return
        with second.open():
            for k in range(second.num_passes):
                with second.displaced(k), self.recorder.displaced_pass():
                    run()

    def _is_due(self, second: SecondPass, step: int) -> bool:
        """Whether the second pass is to run: it can change something, and the test, if there is one, asks for it."""
        test = self._carried.test
        return second.is_needed and (test is None or test.is_large(second.squared_norm, step))

    def _displacer(self) -> Displacer:
        return Displacer(
            self.anatomy, self._selection.named, self._carried.directions, self._displacement, self._carried.diagnostics
        )

    def _prepare(
        self,
        strength: Strength,
        grad_scale: float | Tensor,
        num_backwards: int,
        others: Sequence[Tensor] = (),
    ) -> SecondPass:
        """The way from g1, which stands in `.grad`, to ĝ."""
        ranks, num_passes = self.ranks, len(self._method.scheme.stencil)
        return SecondPass(
            self._displacer(),
            [*self._selection.others, *others],
            self._method,
            strength,
            grad_scale=grad_scale,
            deferred=not ranks.is_local and (num_backwards > 1 or (ranks.is_replicated and num_passes > 1)),
            is_local=ranks.is_local,
            is_replicated=ranks.is_replicated,
        )

    @contextmanager
    def one_pass(self, strength: Strength | None) -> Iterator[None]:
        """The one pass of a step, at θ + εd; with γ = 0 at θ."""
        with self.recorder.paused():
            if strength is None:
                yield
                return
            with self._displacer().standing(strength.epsilon) as moved:
                self._carried.diagnostics.count_pass(moved.step, is_measured=bool(moved.parameters))
                yield

    @contextmanager
    def second_pass_of_block(self, strength: Strength | None, step: int, grad_scale: float | Tensor) -> Iterator[None]:
        """`.grad` from g1 to ĝ by the one pass that runs within; with γ = 0 it leaves no trace."""
        second = None if strength is None else self._prepare(strength, grad_scale, self.recorder.num_forwards)
        if second is None or not self._is_due(second, step):
            everything, replay = self._selection.all, self.recorder.displaced_pass
            with without_trace(self.anatomy, everything), dropping_gradients(everything), replay():
                yield
            if second is not None:
                second.skip()
        else:
            with second.open(), second.displaced(0), self.recorder.displaced_pass():
                yield

    @contextmanager
    def looking_ahead(self, step: int) -> Iterator[None]:
        """With `at`, all passes of a step from θ + ρd on."""
        at, directions = self._method.at, self._carried.ahead
        radius = 0.0 if at is None else at.radius(step)
        if directions is None or radius == 0:
            yield
            return
        named, diagnostics = self._selection.named, self._carried.diagnostics
        ahead = Displacer(self.anatomy, named, directions, self._displacement, diagnostics, is_base=True)
        with ahead.standing(radius):
            yield

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Moment]:
        """The moment before both passes; after an exception, buffers and random state are back there."""
        before = Moment(self.anatomy)
        try:
            yield before
        except BaseException:
            before.restore()
            raise

    @contextmanager
    def _adding_to_gradients(self) -> Iterator[None]:
        """What is in `.grad` is put aside, and ĝ added to it in the end; after an exception it is as it was."""
        parameters = self._selection.all
        before = take_gradients(parameters)
        try:
            yield
            for i, (p, old) in enumerate(zip(parameters, before)):
                if old is not None and p.grad is not None:
                    with torch.no_grad():
                        before[i] = old + p.grad if old.is_sparse or p.grad.is_sparse else old.add_(p.grad)
                elif old is None:
                    before[i] = p.grad
        finally:
            give_gradients(parameters, before)

    def _examine(self, loss: Tensor) -> None:
        self._examination.of(loss, self._selection.all)


def _scale_of(grad_scale: float | Tensor, factors: Sequence[Tensor], backward: Backward) -> float | Tensor:
    """The loss scale: what the user says, or what `backward` was seen to multiply by."""
    if factors and not isinstance(grad_scale, Tensor) and grad_scale == 1:
        return (factors[0] * loss_division(backward)).clamp(min=1)
    return grad_scale
