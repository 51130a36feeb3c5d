r"""The regularizer: makes $\hat g = \nabla L + \gamma H d$ of a model's loss, in any loop.

Three doors lead here. `backward` is handed the loss; `perturbed` opens around a second pass that someone else runs;
`RegularizedOptimizer` (optimizer.py) is handed a closure and calls `run_closure`. What can go wrong is handled
once, in second_pass.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradreg.functional.schemes import Scheme, resolve_scheme
from gradreg.training.batch import Fraction, Split
from gradreg.training.block import Block
from gradreg.training.calls import Backward, check_loss_fn
from gradreg.training.carried import Carried
from gradreg.training.defaults import default_epsilon, default_gamma
from gradreg.training.diagnostics import Realized
from gradreg.training.directions import Ahead, Choice, Momentum, resolve
from gradreg.training.double_backward import check_supported
from gradreg.training.engine import Engine
from gradreg.training.plan import Method
from gradreg.training.ranks import SYNCS
from gradreg.training.schedule import (
    LargeGradients,
    Schedule,
    Strength,
    check,
    name_of,
    strength_of,
)
from gradreg.training.selection import Rules, Selection
from gradreg.training.shards import refuse_flattened, reshard, sharded
from gradreg.training.together import check_together

Call = Callable[[], Tensor]
Result = TypeVar("Result")


class GradientRegularizer:
    r"""Minimizes $L(\theta) + \frac\gamma2 \|\nabla L(\theta)\|^2$ by replacing the gradient that the optimizer sees.

    $$\hat g = g_1 + \tfrac\gamma\epsilon (g_2 - g_1), \; g_1 = \nabla L(\theta), g_2 = \nabla L(\theta + \epsilon d)$$

    The second gradient costs one more forward and backward pass, about twice plain training in all; γ = 0 costs
    nothing. The weights are displaced for the second pass only, and put back bitwise.

    Args:
        model: the model, wrapped or not. It must own every trainable tensor of the loss.
        gamma: strength γ ≥ 0, a number, a function of the step (see `gradreg.warmup`, `late`, `every`), or a
            `TargetRatio`, which finds γ; None is `TargetRatio()`.
        epsilon: step length ε > 0 along the ascent, a number or a function of the step. γ = ε makes ĝ = g2. None is
            a length that suits the ascent.
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
        replay_check: in the first step with γ > 0 the loss is asked twice at θ, one forward pass more, and must give
            the same: what is not replayed (state outside registered buffers, a batch drawn in the loss) is found so.

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
        gamma: Schedule | None = None,
        epsilon: Schedule | None = None,
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
        replay_check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            hint = " pass the model itself, not its parameters()." if isinstance(model, Iterable) else ""
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{':' + hint if hint else '.'}")
        gamma = default_gamma() if gamma is None else gamma
        epsilon = default_epsilon(ascent) if epsilon is None else epsilon
        check("gamma", gamma)
        check("epsilon", epsilon)
        if cap is not None and not (isinstance(cap, (int, float)) and math.isfinite(cap) and cap > 0):
            raise ValueError(f"cap must be a finite number > 0, or None for no cap, got {cap!r}.")
        if nonfinite not in ("keep", "first"):
            raise ValueError(f'nonfinite must be "keep" or "first", got {nonfinite!r}.')
        if ascent_sync not in SYNCS:
            raise ValueError(f'ascent_sync must be "global" or "local", got {ascent_sync!r}.')
        if not isinstance(replay_check, bool):
            raise TypeError(f"replay_check must be True or False, got {replay_check!r}.")
        self.gamma = gamma
        self.epsilon = epsilon
        self._method = Method(resolve_scheme(scheme), resolve(ascent), cap, nonfinite == "first", batch, at)
        self._ascent_sync = ascent_sync
        self._replay_check = replay_check
        check_together(self._method, gamma, epsilon, when, ascent_sync)
        if self._method.scheme.is_exact:
            check_supported(model)
        self.model = model
        refuse_flattened(model.modules())
        reshard(sharded(model.modules()))
        self.selection = Selection(model, include, exclude)
        for known in (self._method.ascent, at.direction if at is not None else None):
            if isinstance(known, Momentum):
                known.check(self.selection.named)
        self._carried = Carried(self._method, when, gamma)
        self._set_up()

    def _set_up(self) -> None:
        self._engine = Engine(
            self.model, self.selection, self._method, self._ascent_sync, self._carried, self._replay_check
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    @property
    def step(self) -> int:
        """Closed second passes, and what would have been one: the argument of schedules."""
        return self._carried.step

    @step.setter
    def step(self, value: int) -> None:
        self._carried.step = value

    def __repr__(self) -> str:
        method, test = self._method, self._carried.test
        more = "" if method.batch is None else f", batch={method.batch}"
        more += "" if method.at is None else f", at={method.at}"
        more += "" if test is None else f", when={test.rule}"
        return (
            f"GradientRegularizer(gamma={self.gamma}, epsilon={self.epsilon}, scheme={method.scheme.name!r}, "
            f"ascent={method.ascent}{more}, step={self.step})\n{self.selection.summary}"
        )

    def check_replay(self) -> None:
        """Ask the loss twice again in the next step with γ > 0, as in the first one (see `replay_check`)."""
        self._engine.is_check_due = self._engine.watch.keeps_calls = True

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
        if batches is not None and not batches:
            raise ValueError("batches must hold at least one micro-batch, got none.")
        engine = self._enter()
        try:
            try:
                losses = engine.step_of_calls(loss_fn, batches, self._strength(), backward, grad_scale)
            finally:
                engine.end()
        finally:  # an interrupt may strike in the first
            engine.end()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _strength(self) -> Strength | None:
        return self._carried.strength_at(self.gamma, self.epsilon, self.step)

    # The second door.

    def perturbed(self, *, grad_scale: float | Tensor = 1.0) -> AbstractContextManager[None]:
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
        return Block(self, grad_scale)

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
        engine = self._enter()
        try:
            try:
                known = set(map(id, self.selection.all))
                owned = self.selection.all if owned is None else owned
                others = [p for p in owned if id(p) not in known]
                return engine.step_of_closure(closure, owned, others, self._strength())
            finally:
                engine.end()
        finally:  # an interrupt may strike in the first
            engine.end()

    # What the doors share.

    def _refuse_division(self, door: str) -> None:
        if self._method.batch is not None:
            raise ValueError(
                f"{door} cannot divide the batch, as batch={self._method.batch} asks: use "
                "backward(loss_fn, batches=[batch]), or a schedule such as every(gamma, 10)."
            )

    def _enter(self) -> Engine:
        """A step begins: refuses to be entered twice. `Engine.end` is due from here on."""
        engine = self._engine
        if engine.is_open:
            raise RuntimeError("a second pass of this regularizer is open: doors do not nest.")
        reshard(engine.anatomy.sharded)
        engine.follow()
        engine.ranks.agree(self._configuration)
        return engine

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
            "when": "None" if self._carried.test is None else name_of(self._carried.test.rule),
            "the selected parameters": ", ".join(self.selection.named),
            "the step": str(self.step),
        }

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
        - `gamma`: γ of that step; with a `TargetRatio` only.
        """
        return self._carried.read()

    def measurements(self) -> dict[str, float]:
        """The same as plain numbers, in one call for a log; `realized` is cosine times norm, and `gamma`, γ of the last
        step, is always there. What was not measured yet, as with γ = 0, is NaN. Waits for an accelerator.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> regularizer = GradientRegularizer(model, gamma=0.1, epsilon=0.1)
            >>> loss = regularizer.backward(lambda: model(torch.ones(4, 2)).square().mean())
            >>> sorted(regularizer.measurements())
            ['active_steps', 'cosine', 'gamma', 'grad_norm', 'penalty_ratio', 'realized', 'skipped_steps']
        """
        found: dict[str, Any] = self.diagnostics()
        found["realized"] = found["realized"].cosine * found["realized"].norm
        if "gamma" not in found:
            found["gamma"] = strength_of(self.gamma, max(self.step - 1, 0))
        return {name: float(value) for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The step, the counters and what a mode carries from step to step, such as what a `TargetRatio` has measured;
        γ and ε are configuration, not saved."""
        return {"step": self.step, **self._carried.state_dict()}

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
        self._carried.load_state_dict(state_dict, self.selection.named)
        self.step = state_dict["step"]
