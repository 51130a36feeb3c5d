r"""The regularizer: makes $\hat g = \nabla L + \gamma H d$ of a model's loss, in any loop.

Three doors lead here. `backward` is handed the loss; `perturbed` opens around a second pass that someone else runs;
`RegularizedOptimizer` (optimizer.py) is handed a closure and calls `run_closure`. What can go wrong is handled
once, in second_pass.py.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.functional.schemes import Scheme, resolve_scheme
from gradreg.training.anatomy import Anatomy
from gradreg.training.batch import Fraction, Split, cut, weighted
from gradreg.training.calls import Backward, Examination, check_loss_fn, differentiate, run_closure
from gradreg.training.combination import give_gradients, keeping_views, take_gradients
from gradreg.training.diagnostics import Diagnostics, Realized
from gradreg.training.directions import Ahead, Choice, Directions, Momentum, resolve
from gradreg.training.displacement import Displacement, EarlyReturn
from gradreg.training.double_backward import ExactPenalty, check_supported
from gradreg.training.hosts import loss_division
from gradreg.training.ranks import SYNCS, Ranks
from gradreg.training.recorder import Recorder
from gradreg.training.replay import Buffers, Moment
from gradreg.training.schedule import (
    LargeGradients,
    RunningTest,
    Schedule,
    Strength,
    check,
    name_of,
    strength_at,
)
from gradreg.training.second_pass import Displacer, Method, SecondPass, dropping_gradients, without_trace
from gradreg.training.selection import Rules, Selection
from gradreg.training.together import check_step, check_together

Call = Callable[[], Tensor]
Result = TypeVar("Result")


class GradientRegularizer:
    r"""Minimizes $L(\theta) + \frac\gamma2 \|\nabla L(\theta)\|^2$ by replacing the gradient that the optimizer sees.

    $$\hat g = g_1 + \tfrac\gamma\epsilon (g_2 - g_1), \; g_1 = \nabla L(\theta), g_2 = \nabla L(\theta + \epsilon d)$$

    The second gradient costs one more forward and backward pass, about twice plain training in all; γ = 0 costs
    nothing. The weights are displaced for the second pass only, and put back bitwise.

    Args:
        model: the model, wrapped or not. It must own every trainable tensor of the loss.
        gamma: strength γ ≥ 0, a number or a function of the step (see `gradreg.warmup`, `late`, `every`).
        epsilon: step length ε > 0 along the ascent, a number or a function of the step. γ = ε makes ĝ = g2.
        scheme: `forward` (F-GR), `backward` (B-GR), `central` (one pass more), `exact` (double backpropagation).
        ascent: `gradient` (d = g1), `normalized` (d = g1/‖g1‖), `adaptive` (ASAM), or an `Ascent`; or a direction that
            is known before the first pass, `Momentum(optimizer)` or `Previous()`, which makes a step one pass.
        include: shell-style patterns over parameter names, module types, or predicates `(name, parameter) ->
            bool`; None selects every parameter. What is not selected keeps g1 and never moves.
        exclude: the same; taken away from what `include` matched.
        cap: the largest allowed ‖ĝ − g1‖/‖g1‖, or None. Holds one more copy of the gradients.
        batch: what the displaced pass sees: the whole batch (None), `Fraction(q)` of it, or its share of a `Split`.
        at: where all gradients of a step are taken, if not at θ: `Ahead(Momentum(optimizer), rho)`.
        when: the second pass only in steps that pass a test, `LargeGradients()`.
        nonfinite: what to leave in `.grad` when g1 is finite and the second gradient is not: `"keep"` leaves the
            non-finite ĝ, so that a gradient scaler skips the step; `"first"` leaves g1, at one more copy of the
            gradients.
        ascent_sync: under DistributedDataParallel, the direction of the ascent: `"global"`, the gradient of the whole
            batch, as one process would take it, or `"local"`, each rank's own, which averages gradients once a step
            instead of twice. Norms and diagnostics are then each rank's own.

    Raises:
        ValueError: γ < 0, ε ≤ 0, either not finite, an unknown scheme, ascent or policy, a rule that matches
            nothing, no parameter left to select, or `exact` on a model that cannot be differentiated twice.
        TypeError: an argument of the wrong type.

    References:
        Karakida et al., [Understanding Gradient Regularization](https://arxiv.org/abs/2210.02720), ICML 2023.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> nn.init.ones_(model.weight).requires_grad
        True
        >>> regularizer = GradientRegularizer(model, gamma=0.5, epsilon=0.1)
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> regularizer.backward(lambda: model(x).square().sum() / 2)  # H = 1 along x, so ĝ = (1 + γ) g1
        tensor(0.5000)
        >>> model.weight.grad
        tensor([[1.5000, 0.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: Schedule,
        epsilon: Schedule,
        *,
        scheme: str | Scheme = "forward",
        ascent: Choice = "gradient",
        include: Rules | None = None,
        exclude: Rules = (),
        batch: Fraction | Split | None = None,
        at: Ahead | None = None,
        when: LargeGradients | None = None,
        cap: float | None = None,
        nonfinite: str = "keep",
        ascent_sync: str = "global",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        check("gamma", gamma)
        check("epsilon", epsilon)
        if cap is not None and not (isinstance(cap, (int, float)) and math.isfinite(cap) and cap > 0):
            raise ValueError(f"cap must be a finite number > 0, or None for no cap, got {cap!r}.")
        if nonfinite not in ("keep", "first"):
            raise ValueError(f'nonfinite must be "keep" or "first", got {nonfinite!r}.')
        if ascent_sync not in SYNCS:
            raise ValueError(f'ascent_sync must be "global" or "local", got {ascent_sync!r}.')
        self.gamma = gamma
        self.epsilon = epsilon
        self._method = Method(resolve_scheme(scheme), resolve(ascent), cap, nonfinite == "first", batch, at)
        self._ascent_sync = ascent_sync
        self._test = RunningTest(when) if when is not None else None
        check_together(self._method, gamma, epsilon, when, ascent_sync)
        if self._method.scheme.is_exact:
            check_supported(model)
        self.model = model
        self.selection = Selection(model, include, exclude)
        for known in (self._method.ascent, at.direction if at is not None else None):
            if isinstance(known, Momentum):
                known.check(self.selection.named)
        self.step = 0  # closed second passes, and what would have been one
        self._diagnostics = Diagnostics()
        self._directions = Directions(self._method.ascent)
        self._ahead_directions = None if at is None else Directions(at.direction, moves_all=True)
        self._set_up()

    def _set_up(self) -> None:
        """What belongs to this object and this process, and travels in no copy or pickle."""
        self._displacement = Displacement(keeps_room=not self._method.is_one_pass)
        self._anatomy = Anatomy(self.model)
        self._ranks = Ranks(self.model, self._ascent_sync)
        self._recorder = Recorder(self._anatomy)
        self._is_open = False
        self._examination = Examination()
        weakref.finalize(self, self._recorder.handle.remove)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_displacement", "_anatomy", "_ranks", "_recorder", "_is_open", "_examination")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __repr__(self) -> str:
        method, test = self._method, self._test
        more = "" if method.batch is None else f", batch={method.batch}"
        more += "" if method.at is None else f", at={method.at}"
        more += "" if test is None else f", when={test.rule}"
        return (
            f"GradientRegularizer(gamma={self.gamma}, epsilon={self.epsilon}, scheme={method.scheme.name!r}, "
            f"ascent={method.ascent}{more}, step={self.step})\n{self.selection}"
        )

    # The first door.

    def backward(
        self,
        loss_fn: Callable[..., Tensor],
        batches: Iterable[Any] | None = None,
        *,
        backward: Backward = Tensor.backward,
        grad_scale: float | Tensor = 1.0,
    ) -> Tensor:
        r"""Add ĝ to `.grad`, as `loss.backward()` would add g1, and return L(θ), detached.

        Args:
            loss_fn: runs the forward pass and returns the loss, a scalar with a graph. It is called once for each
                pass, so it must not draw a new batch. The second call sees the random numbers and buffers of the
                first.
            batches: the micro-batches of an accumulation window. `loss_fn(batch)` is called for each, and the loss
                is their sum, as in a loop of `loss_fn(batch).backward()`: divide by their number inside for the
                mean. The second pass replays them, which equals one large batch (joint GR). Without `batches`,
                calling this once for each micro-batch regularizes each of them by itself (m-sharpness) and holds
                one more copy of the gradients.
            backward: runs the backward pass of a loss: `accelerator.backward`, `fabric.backward`, or
                `lambda loss: scaler.scale(loss).backward()`.
            grad_scale: the loss scale that `backward` applies: `.grad` holds `grad_scale` · ĝ, and the
                displacement does not depend on it. The default measures it, as the factor by which `backward`
                multiplies the gradient of the loss; a factor below 1 (a division by the number of micro-batches)
                is taken as part of the loss.

        Raises:
            ValueError: a loss that is not a scalar or has no graph, an empty `batches`, a γ or ε that the schedule
                made invalid, or a second pass on another batch. Weights, buffers and `.grad` are then what they were.
        """
        check_loss_fn(loss_fn)
        batches = None if batches is None else list(batches)
        if batches is None and self._method.batch is not None:
            raise ValueError(
                f"batches must be given with batch={self._method.batch}, which divides it: call "
                "backward(loss_fn, batches=[batch]), with loss_fn(batch) a mean over the rows of the batch."
            )
        calls = [loss_fn] if batches is None else [partial(loss_fn, batch) for batch in batches]
        if not calls:
            raise ValueError("batches must hold at least one micro-batch, got none.")
        with self._door(), self._looking_ahead():
            strength = self._strength()
            if strength is None:
                with self._recorder.paused():
                    losses = self._for_each(calls, lambda call: differentiate(call, backward))
            elif isinstance(self._method.batch, Split):
                with self._adding_to_gradients(), self._recorder.paused():
                    losses = self._split(loss_fn, batches or [], strength, backward, grad_scale)
            elif self._method.is_one_pass:
                with self._recorder.paused():
                    losses = self._one_pass(calls, strength, backward)
            else:
                rest: list[Call] = []
                if isinstance(self._method.batch, Fraction):
                    calls, rest, share = cut(loss_fn, batches or [], self._method.batch.share)
                    strength = replace(strength, share=share)
                with self._adding_to_gradients(), self._all_or_nothing() as before:
                    losses = self._regularize(calls, strength, before, backward, grad_scale)
                    with self._recorder.paused():
                        losses += self._for_each(rest, lambda call: differentiate(call, backward))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _strength(self) -> Strength | None:
        strength = strength_at(self.gamma, self.epsilon, self.step)
        if strength is not None:
            check_step(self._method, strength, self.step)
        return strength

    def _regularize(
        self,
        calls: Sequence[Call],
        strength: Strength,
        before: Moment,
        backward: Backward,
        grad_scale: float | Tensor,
    ) -> list[Tensor]:
        exact = ExactPenalty(self.selection.parameters, self._method, strength.gamma, self._diagnostics)
        if self._method.scheme.is_exact and len(calls) == 1 and backward is Tensor.backward:
            return [exact.in_one_pass(calls[0], self.selection.others)]
        factors: list[Tensor] = []
        with self._recorder.first_pass(), self._ranks.first_pass():
            losses = self._for_each(calls, lambda call: differentiate(call, backward, factors, self._examine))
        self._examination.is_done = True
        grad_scale = strength.share * _scale_of(grad_scale, factors, backward)
        if self._method.scheme.is_exact:
            first = [p.grad for p in self.selection.parameters]
            with without_trace(self._anatomy, self.selection.all):
                before.restore()
                penalty = exact.of_window(calls, factors, first, grad_scale)
            exact.add(penalty, grad_scale)
            return losses
        # Gradients that nobody wants are not computed, where we run the backward pass ourselves.
        wanted = self.selection.parameters if self._picks_gradients(backward) else None

        def play(call: Call) -> None:
            loss = call()
            if loss.requires_grad:  # else: nothing selected takes part in the displaced pass
                loss.backward(inputs=wanted) if wanted else backward(loss)

        def replay() -> None:
            before.restore()
            self._for_each(calls, play)

        self._second_pass(replay, strength, grad_scale, num_backwards=len(calls))
        return losses

    def _picks_gradients(self, backward: Backward) -> bool:
        is_ours = backward is Tensor.backward and self._examination.allows_inputs and self._ranks.is_alone
        return is_ours and any(p.requires_grad for p in self.selection.others)

    def _one_pass(self, calls: Sequence[Call], strength: Strength, backward: Backward) -> list[Tensor]:
        """∇L(θ + εd) and no other gradient."""
        with self._displacer().standing(strength.epsilon) as moving:
            self._diagnostics.count_pass(moving)
            if len(calls) > 1:
                return self._for_each(calls, lambda call: differentiate(call, backward))
            with EarlyReturn(self._displacement, moving) as early:
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
        with self._ranks.first_pass():
            first = weighted(here, (1 - strength.ratio) / share)
            losses = self._for_each(first, lambda call: differentiate(call, backward, factors, self._examine))
        self._examination.is_done = True
        buffers = Buffers(self._anatomy)
        gradients = [p.grad for p in self.selection.parameters]
        scale = (1 - strength.ratio) * _scale_of(grad_scale, factors, backward)
        present = [g for g in gradients if g is not None]
        norm = vectors.norm(present) if present and not self._directions.are_known else None
        with self._displacer().standing(strength.epsilon, gradients, scale, norm) as moving:
            self._diagnostics.count_pass(moving)
            second = weighted(ahead, strength.ratio / (1 - share))
            losses += self._for_each(second, lambda call: differentiate(call, backward))
        buffers.restore()
        return losses

    def _for_each(self, calls: Sequence[Call], play: Callable[[Call], Result]) -> list[Result]:
        """The micro-batches of a window; ranks average gradients in the last."""
        results = []
        for k, call in enumerate(calls, 1):
            with self._ranks.micro_batch(is_last=k == len(calls)):
                results.append(play(call))
        return results

    def _second_pass(
        self,
        run: Callable[[], Any],
        strength: Strength,
        grad_scale: float | Tensor,
        num_backwards: int = 1,
        others: Sequence[Tensor] = (),
    ) -> None:
        """`.grad` from g1 to ĝ, where the pass is ours to run."""
        second = self._prepare(strength, grad_scale, num_backwards, others)
        if not self._is_due(second):
            second.skip()
            return
        with second.open():
            for k in range(second.num_passes):
                with second.displaced(k), self._recorder.displaced_pass():
                    run()

    def _is_due(self, second: SecondPass) -> bool:
        test = self._test
        return second.is_needed and (test is None or test.is_large(second.squared_norm, self.step))

    def _displacer(self) -> Displacer:
        return Displacer(self._anatomy, self.selection.named, self._directions, self._displacement, self._diagnostics)

    def _prepare(
        self,
        strength: Strength,
        grad_scale: float | Tensor,
        num_backwards: int,
        others: Sequence[Tensor] = (),
    ) -> SecondPass:
        ranks, num_passes = self._ranks, len(self._method.scheme.stencil)
        return SecondPass(
            self._displacer(),
            [*self.selection.others, *others],
            self._method,
            strength,
            grad_scale=grad_scale,
            deferred=not ranks.is_local and (num_backwards > 1 or (ranks.is_replicated and num_passes > 1)),
            is_local=ranks.is_local,
            is_replicated=ranks.is_replicated,
        )

    # The second door.

    @contextmanager
    def perturbed(self, *, grad_scale: float | Tensor = 1.0) -> Iterator[None]:
        r"""A context for the second pass of a loop that someone else owns: `.grad` goes in as g1 and comes out as ĝ.

            criterion(model(x), y).backward()
            with regularizer.perturbed():
                criterion(model(x), y).backward()
            optimizer.step()

        The block must run the forward and backward passes of the first pass again, in the same order;
        `zero_grad()` in it does no harm. The random state and buffers of each forward are those of its
        counterpart. A step with γ = 0 still runs the block, since Python cannot skip it, and leaves g1.

        With a direction that is known beforehand (`Momentum`, `Previous`) there is no first pass: the block is the
        whole step, from empty gradients.

        Args:
            grad_scale: the loss scale that `.grad` carries; divide it out first with `scaler.unscale_(optimizer)`,
                or pass `scaler.get_scale()` and scale the loss in the block too.

        Raises:
            ValueError: the `central` or `exact` scheme, which one block cannot serve; no gradient to start from; a
                first pass that did not call the model.
        """
        if self._method.scheme.is_exact or len(self._method.scheme.stencil) > 1:
            raise ValueError(
                f'perturbed() runs its block once, which cannot serve scheme="{self._method.scheme.name}": use '
                'backward(loss_fn), or scheme="forward" or "backward".'
            )
        self._refuse_division("perturbed()")
        if self._method.at is not None:
            raise ValueError(
                f"perturbed() opens when the first pass is over, and at={self._method.at} moves that one too: use "
                "backward(loss_fn) or step(closure)."
            )
        with self._door():
            strength = self._strength()
            if self._method.is_one_pass:
                self._refuse_gradients()
                with self._recorder.paused(), self._ahead(strength):
                    yield
                return
            if all(p.grad is None for p in self.selection.parameters):
                raise ValueError(
                    "perturbed() starts from the gradient of the first pass, and no selected parameter has one: run "
                    "loss.backward() before, and zero_grad() before that, not in between."
                )
            if self._recorder.num_forwards == 0:
                raise ValueError(
                    f"perturbed() saw no forward of the model ({type(self.model).__name__}) in the first pass, so it "
                    "cannot replay its random numbers: call the model itself, not its parts, or use backward(loss_fn)."
                )
            second = None if strength is None else self._prepare(strength, grad_scale, self._recorder.num_forwards)
            if second is None or not self._is_due(second):
                everything, replay = self.selection.all, self._recorder.displaced_pass
                with without_trace(self._anatomy, everything), dropping_gradients(everything), replay():
                    yield
                if second is not None:
                    second.skip()
            else:
                with second.open(), second.displaced(0), self._recorder.displaced_pass():
                    yield

    # The third door.

    def run_closure(self, closure: Callable[[], Any], owned: Sequence[Tensor] | None = None) -> Any:
        """Both passes by a closure that zeroes gradients, runs forward and backward and returns the loss.

        `RegularizedOptimizer.step(closure)` calls this with the parameters that it owns (by default those of the
        model); `.grad` then holds ĝ.
        """
        if self._method.scheme.is_exact:
            raise ValueError(
                'scheme="exact" needs the loss before its backward pass, which a closure does not hand out: use '
                'backward(loss_fn) with scheme="exact", or a closure with "forward", "backward" or "central".'
            )
        self._refuse_division("step(closure)")
        known = set(self.selection.all)
        owned = self.selection.all if owned is None else owned
        others = [p for p in owned if p not in known]
        with self._door(others), self._looking_ahead():
            strength = self._strength()
            if strength is None or self._method.is_one_pass:
                with self._recorder.paused(), self._ahead(strength), torch.enable_grad():
                    return closure()
            with self._all_or_nothing() as before, torch.enable_grad():
                with self._recorder.first_pass(), self._ranks.first_pass():
                    loss = run_closure(closure, owned, self.selection.parameters)

                def replay() -> None:
                    before.restore()
                    closure()

                self._second_pass(replay, strength, 1.0, self._recorder.num_forwards, others)
            return loss

    # What the doors share.

    @contextmanager
    def _ahead(self, strength: Strength | None) -> Iterator[None]:
        """The one pass of a step, at θ + εd; with γ = 0 at θ."""
        if strength is None:
            yield
            return
        with self._displacer().standing(strength.epsilon) as moving:
            self._diagnostics.count_pass(moving)
            yield

    @contextmanager
    def _looking_ahead(self) -> Iterator[None]:
        """With `at`, all passes of a step from θ + ρd on."""
        at, directions = self._method.at, self._ahead_directions
        radius = 0.0 if at is None else at.radius(self.step)
        if directions is None or radius == 0:
            yield
            return
        named, diagnostics = self.selection.named, self._diagnostics
        ahead = Displacer(self._anatomy, named, directions, self._displacement, diagnostics, measures=False)
        with ahead.standing(radius):
            yield

    def _refuse_gradients(self) -> None:
        if any(p.grad is not None for p in self.selection.parameters):
            raise ValueError(
                f"perturbed() with ascent={self._method.ascent} is the one pass of a step, and .grad holds a gradient "
                "already: run no pass before, call zero_grad(set_to_none=True), and put a whole window into the block."
            )

    def _refuse_division(self, door: str) -> None:
        if self._method.batch is not None:
            raise ValueError(
                f"{door} cannot divide the batch, as batch={self._method.batch} asks: use "
                "backward(loss_fn, batches=[batch]), or a schedule such as every(gamma, 10)."
            )

    @contextmanager
    def _door(self, others: Sequence[Tensor] = ()) -> Iterator[None]:
        """One step: refuses to be entered twice; counts when it closes well. `others`: parameters outside the model."""
        if self._is_open:
            raise RuntimeError("a second pass of this regularizer is open: doors do not nest.")
        if self._anatomy.follow():
            self.selection.read(self.model)
        self._is_open = True
        try:
            self._ranks.agree(self._configuration)
            with keeping_views([*self.selection.all, *others]):
                yield
                for directions in (self._directions, self._ahead_directions):
                    if directions is not None:
                        directions.remember(self.selection.named)
            self.step += 1
        finally:
            self._recorder.forget()
            self._is_open = False

    def _configuration(self) -> dict[str, str]:
        """What ranks must agree on, as text."""
        method = self._method
        return {
            "gamma": name_of(self.gamma),
            "epsilon": name_of(self.epsilon),
            "scheme": method.scheme.name,
            "ascent": name_of(method.ascent),
            "cap": str(method.cap),
            "nonfinite": "first" if method.fall_back else "keep",
            "ascent_sync": self._ascent_sync,
            "batch": str(method.batch),
            "at": str(method.at),
            "when": "None" if self._test is None else name_of(self._test.rule),
            "the selected parameters": ", ".join(self.selection.named),
            "the step": str(self.step),
        }

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Moment]:
        """The moment before both passes; after an exception, buffers and random state are back there."""
        before = Moment(self._anatomy)
        try:
            yield before
        except BaseException:
            before.restore()
            raise

    @contextmanager
    def _adding_to_gradients(self) -> Iterator[None]:
        """What is in `.grad` is put aside, and ĝ added to it in the end; after an exception it is as it was."""
        parameters = self.selection.all
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
        self._examination.of(loss, self.selection.all)

    # What the user reads and saves.

    def diagnostics(self) -> dict[str, Tensor | Realized]:
        """Measurements of the last step with γ > 0, as tensors: reading them is what waits for an accelerator.

        - `grad_norm`: ‖g1‖ over the selected parameters, without the loss scale.
        - `penalty_ratio`: ‖ĝ − g1‖/‖g1‖, the scale-free dial for γ.
        - `cosine`: of g1 and g2; near 1 where the loss is flat along d. NaN for `exact`, which has no g2.
        - `realized`: displacement after rounding against the intended one (`cosine`, `norm`). Measured in every
          step for weights below float32, else in the first step and in the step after each reading.
        - `active_steps`, `skipped_steps`: steps with γ > 0 whose gradients were all finite and not zero, and the
        others.
        """
        return self._diagnostics.read()

    def state_dict(self) -> dict[str, Any]:
        """The step, the counters and what a mode carries from step to step; γ and ε are configuration, not saved."""
        state = {"step": self.step, **self._diagnostics.state_dict()}
        if self._test is not None:
            state["running_test"] = {"mean": self._test.mean, "variance": self._test.variance}
        if self._remembering is not None:
            state["previous"] = self._remembering.state_dict()
        return state

    @property
    def _remembering(self) -> Directions | None:
        """What carries gradients from step to step."""
        if self._ahead_directions is not None:
            return self._ahead_directions if self._ahead_directions.remembers else None
        return self._directions if self._directions.remembers else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict()` gave.

        Raises:
            ValueError: missing or unknown keys, a step that is not an integer ≥ 0, or gradients of other parameters;
                nothing is changed.
        """
        expected = set(self.state_dict())
        if set(state_dict) != expected:
            raise ValueError(f"state_dict must have the keys {sorted(expected)}, got {sorted(state_dict)}.")
        for name in ("active_steps", "skipped_steps", "step"):
            value = state_dict[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"state_dict[{name!r}] must be an integer ≥ 0, got {value!r}.")
        if self._remembering is not None:
            self._remembering.load_state_dict(state_dict["previous"], self.selection.named)
        if self._test is not None:
            self._test = RunningTest(self._test.rule, **state_dict["running_test"])
        self.step = state_dict["step"]
        self._diagnostics.load_state_dict(state_dict)


def _scale_of(grad_scale: float | Tensor, factors: Sequence[Tensor], backward: Backward) -> float | Tensor:
    """The loss scale: what the user says, or what `backward` was seen to multiply by."""
    if factors and not isinstance(grad_scale, Tensor) and grad_scale == 1:
        return (factors[0] * loss_division(backward)).clamp(min=1)
    return grad_scale
