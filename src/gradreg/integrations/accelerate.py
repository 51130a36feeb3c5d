"""accelerate: one line of the loop changes, and every accumulation window is replayed by itself.

    regularizer = AcceleratedRegularizer(accelerator, model)  # of the prepared model
    for batch in loader:
        with accelerator.accumulate(model):
            loss = regularizer.backward(loss_fn, batch)  # was: loss = loss_fn(batch); accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

Tested with accelerate 1.15; see docs/hosts.md.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel as DDP

from gradreg._install import how

try:
    from accelerate import Accelerator, DistributedType
except ImportError as error:
    raise ImportError(f"gradreg.integrations.accelerate needs accelerate: {how('accelerate')}") from error

from gradreg.integrations._replay import check_one_replay
from gradreg.training.block import Block
from gradreg.training.calls import check_loss_fn, checked
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.replay import RandomState
from gradreg.training.schedule import Schedule, value_at

__all__ = ["AcceleratedRegularizer"]

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class AcceleratedRegularizer:
    r"""Minimizes $L + \frac\gamma2 \|\nabla L\|^2$ of each accumulation window in a loop of `accelerator.accumulate`.

    The loss of a window is that of accelerate: the sum over its micro-batches, each divided by
    `gradient_accumulation_steps`, also where the last window of an epoch is shorter. The micro-batch at which
    `accelerator.sync_gradients` turns true closes the window: all of them run once more at θ + εd, and `.grad` holds
    ĝ times the loss scale, as after `accelerator.backward`. Costs a second pass; γ = 0 costs nothing.

    `accelerator.save_state` and `load_state` carry its step and counters along.

    Args:
        accelerator: the `Accelerator`.
        model: the model as `accelerator.prepare` returned it. The loss must call it, and not its parts.
        gamma: strength γ ≥ 0, a number, a function of the step (a window is one step) or a `TargetRatio`; None is
            `TargetRatio()`.
        epsilon: step length ε > 0, a number or a function of the step; None is one that suits the ascent.
        options: of `GradientRegularizer`: scheme (`forward` or `backward`), ascent, include, exclude, cap, nonfinite.

    Raises:
        ValueError: a model that was not prepared, DeepSpeed, FSDP1, Megatron or XLA, schemes of several replays, and
            whatever `GradientRegularizer` refuses.
        TypeError: something else than an `Accelerator`.

    References:
        Karakida et al., [Understanding Gradient Regularization](https://arxiv.org/abs/2210.02720), ICML 2023.

    Example:
        >>> import torch
        >>> accelerator, model = Accelerator(cpu=True), nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> regularizer = AcceleratedRegularizer(accelerator, model, gamma=0.5, epsilon=0.1)
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> regularizer.backward(lambda x: model(x).square().sum() / 2, x)  # H = 1 along x, so ĝ = (1 + γ) g1
        tensor(0.5000)
        >>> model.weight.grad
        tensor([[1.5000, 0.0000]])
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        gamma: Schedule | None = None,
        epsilon: Schedule | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}.")
        self._is_sharded = accelerator.distributed_type == DistributedType.FSDP and accelerator.is_fsdp2
        if accelerator.distributed_type not in _SUPPORTED and not self._is_sharded:
            raise ValueError(
                f"AcceleratedRegularizer serves one process, DDP and FSDP2, got {accelerator.distributed_type}, whose "
                "gradients or weights it cannot reach. For FSDP set fsdp_version=2; for DeepSpeed ZeRO-1 and 2 use "
                "gradreg.integrations.deepspeed without accelerate."
            )
        if self._is_sharded and getattr(accelerator, "parallelism_config", None) is not None:
            raise ValueError(
                "parallelism_config beside FSDP2 is not tested with AcceleratedRegularizer: leave it out, or shard the "
                "model yourself and use gradreg.GradientRegularizer (docs/hosts.md)."
            )
        if accelerator.num_processes > 1 and not isinstance(model, FSDPModule if self._is_sharded else DDP):
            raise ValueError(
                f"model must be what accelerator.prepare returned, got a bare {type(model).__name__}: prepare it first."
            )
        check_one_replay(
            options, "gradreg.GradientRegularizer and its backward(loss_fn, batches, backward=accelerator.backward)"
        )
        self.regularizer = GradientRegularizer(model, gamma, epsilon, **options)
        self.accelerator = accelerator
        self._window: list[tuple[Callable[[Any], Tensor], Any, RandomState]] = []
        accelerator.register_for_checkpointing(self)

    def backward(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """One micro-batch: add its gradient to `.grad`; the last of a window turns `.grad` into ĝ.

        Args:
            loss_fn: runs the forward pass on a batch and returns the loss, a scalar. It is called again when the
                window closes, so it must take all its data from `batch`: a variable of the loop is another one then.
            batch: the micro-batch.

        Returns:
            the loss of the micro-batch at θ, detached and undivided.

        Raises:
            ValueError: a loss that is not a scalar or has no graph, gradients that were there before a window, or that
                were cleared within one.
            TypeError: a loss in the place of its function, or a function that does not return a tensor.
        """
        check_loss_fn(loss_fn)
        is_active = value_at(self.regularizer.gamma, self.regularizer.step) != 0
        if is_active:
            self._check_gradients()
        random = RandomState(self.regularizer._engine.anatomy.accelerators)
        try:
            loss = checked(loss_fn(batch))
            self.accelerator.backward(loss)
            if is_active:
                self._window.append((loss_fn, batch, random))
        except BaseException:
            self._window.clear()
            raise
        if self.accelerator.sync_gradients:
            window, self._window = self._window, []
            if is_active:
                self._second_pass(window)
            else:
                self.regularizer.step += 1  # what would have been a second pass
        return loss.detach()

    def _second_pass(self, window: list[tuple[Callable[[Any], Tensor], Any, RandomState]]) -> None:
        scaler = self.accelerator.scaler  # of fp16
        scale = scaler.get_scale() if scaler is not None else 1.0
        with Block(self.regularizer, scale, replays_random_numbers=True):
            for k, (loss_fn, batch, random) in enumerate(window, 1):
                quiet = k < len(window)
                with self.accelerator.no_sync(self.regularizer.model) if quiet else nullcontext():
                    random.restore()
                    loss = loss_fn(batch)
                    if loss.requires_grad:  # else: nothing selected takes part in the displaced pass
                        self.accelerator.backward(loss)

    def _check_gradients(self) -> None:
        gradients = [p.grad for p in self.regularizer.selection.all if p.grad is not None]
        if not self._window and any(bool(g.any()) for g in gradients):
            raise ValueError(
                "a window begins with gradients that were there before: call optimizer.zero_grad() after "
                "optimizer.step(), and accumulate within `with accelerator.accumulate(model):`."
            )
        if self._window and not gradients and not self._is_sharded:  # FSDP2 keeps them until the window closes
            raise ValueError(
                f"the gradients of the {len(self._window)} micro-batches before this one of the window are gone: call "
                "optimizer.zero_grad() after optimizer.step(), where accelerate ignores it within a window, and not "
                "before backward."
            )

    def diagnostics(self) -> dict[str, Any]:
        """What `GradientRegularizer.diagnostics` tells of the last window."""
        return self.regularizer.diagnostics()

    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.regularizer.load_state_dict(state_dict)
