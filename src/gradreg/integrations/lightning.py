"""Lightning: one callback in the Trainer, and the module stays as it is.

    trainer = Trainer(callbacks=[GradientRegularization()], ...)

Automatic optimization goes on as before. When the last backward pass of an accumulation window has run, and before
anything is unscaled, clipped or stepped, `.grad` holds g1 of the window; there (`on_after_backward`) the callback runs
`training_step` once more on each of its micro-batches, at θ + εd, and leaves ĝ. Accumulation, clipping, precision,
schedulers and progress remain the Trainer's. Tested with lightning 2.6.6; see docs/hosts.md.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg._install import how

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(f"gradreg.integrations.lightning needs lightning: {how('lightning')}") from error

from gradreg.integrations._replay import check_one_replay
from gradreg.training.block import Block
from gradreg.training.optimizer import RegularizedOptimizer
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import Schedule, check, value_at

__all__ = ["GradientRegularization"]

# Exactly these: their subclasses shard, compile or step in ways of their own.
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
_PRECISIONS = (Precision, MixedPrecision, DoublePrecision, HalfPrecision)


class GradientRegularization(Callback):
    r"""Minimizes $L + \frac\gamma2 \|\nabla L\|^2$ of each accumulation window in automatic optimization.

    The loss of a window is that of the Trainer: the sum of `training_step` over its micro-batches, each divided by
    `accumulate_grad_batches`. `gradient_clip_val` clips ĝ, once. Costs a second pass; γ = 0 costs nothing. In the
    second pass `self.log` is silent, torchmetrics do not count and no hooks around `backward` run; whatever else
    `training_step` writes to, it writes to twice. A hook that changes gradients belongs in `on_before_optimizer_step`,
    where `.grad` holds ĝ; in `on_after_backward` it would change g1 alone.

    The regularizer is `callback.regularizer` while the Trainer fits; its step and counters are saved in the
    checkpoint.

    Args:
        gamma: strength γ ≥ 0, a number, a function of the optimizer's step or a `TargetRatio`; None is
            `TargetRatio()`.
        epsilon: step length ε > 0, a number or a function of the step; None is one that suits the ascent.
        log: log `grad_norm` (‖g1‖) and `penalty_ratio` (‖ĝ − g1‖/‖g1‖) in every step that the Trainer logs.
        options: of `GradientRegularizer`: scheme (`forward` or `backward`), ascent, include, exclude, cap, nonfinite.

    Raises:
        ValueError: when built, a γ, ε or scheme that cannot be used; when training starts, manual optimization, a
            `RegularizedOptimizer` or LBFGS, strategies other than single device, DDP and model parallel (FSDP2, tensor
            parallelism), precision plugins other than 32-true, 64-true, mixed and half, a `training_step` that draws
            its own batches; and in a step, a window whose last `training_step` returned None.

    References:
        Karakida et al., [Understanding Gradient Regularization](https://arxiv.org/abs/2210.02720), ICML 2023.

    Example:
        >>> trainer = Trainer(
        ...     callbacks=[GradientRegularization()], accumulate_grad_batches=4,
        ...     gradient_clip_val=1.0, accelerator="cpu", logger=False, enable_progress_bar=False,
        ... )
    """

    def __init__(
        self, gamma: Schedule | None = None, epsilon: Schedule | None = None, *, log: bool = True, **options: Any
    ) -> None:
        for name, value in (("gamma", gamma), ("epsilon", epsilon)):
            if value is not None:
                check(name, value)
        check_one_replay(
            options, "manual optimization with regularizer.backward(loss_fn, batches, backward=self.manual_backward)"
        )
        self._make = functools.partial(GradientRegularizer, gamma=gamma, epsilon=epsilon, **options)
        self._log = log
        self.regularizer: GradientRegularizer | None = None
        self._state: dict[str, Any] | None = None  # loaded, for the regularizer that training will begin with
        self._window: list[tuple[Any, ...]] = []  # the arguments of each `training_step`
        self._batch_idx = 0
        self._is_replaying = False
        self._is_due = False  # a backward pass of the window has run, and its second pass has not

    # Before and after training.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_host(trainer, pl_module)
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            model = _Step(pl_module)
        if self._state is None and trainer.global_step > 0:  # fit() again, without a checkpoint
            self._state = self.state_dict() or None
        self.regularizer = self._make(model)
        if self._state is not None:
            self.regularizer.load_state_dict(self._state)
            self._state = None
        self._window.clear()
        self._step_fn = pl_module.training_step
        pl_module.training_step = self._recorded(self._step_fn, model, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "_step_fn" in self.__dict__:
            del pl_module.training_step, self._step_fn
        self._window.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _recorded(self, step_fn: Any, model: nn.Module, trainer: Trainer) -> Any:
        """`training_step` that keeps what it was given.

        It stands on the instance, since hooks of batches run too early: others after ours may draw random numbers.
        """

        @functools.wraps(step_fn)
        def training_step(*args: Any) -> Any:
            if self._is_active and not _skips_backward(trainer):
                if not self._is_replaying:
                    self._window.append(args)
                if isinstance(model, _Step):  # DDP announces itself, by its own forward
                    model(*args)
                args = tuple(copy.copy(arg) if isinstance(arg, (dict, list)) else arg for arg in args)
            return step_fn(*args)

        return training_step

    @property
    def _is_active(self) -> bool:
        assert self.regularizer is not None
        return value_at(self.regularizer.gamma, self.regularizer.step) != 0

    # One window.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """A window begins: `training_step` of its first micro-batch has run, and its backward pass has not."""
        self._window[:] = self._window[-1:]
        self._is_due = False
        if self.regularizer is not None and self._window:
            self.regularizer._engine.watch.begin_with_last()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._is_due = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.regularizer is not None
        if not self._ends_window(trainer):
            return
        self._is_due = False
        if not self._is_active:
            self.regularizer.step += 1  # what would have been a second pass
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        model, replays = trainer.strategy.model, trainer.strategy.training_step
        with (
            Block(self.regularizer, scaler.get_scale() if scaler is not None else 1.0, may_call=False),
            self._replaying(),
            _unseen(pl_module),
        ):
            for k, args in enumerate(self._window, 1):
                is_last = k == len(self._window)
                with nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync():
                    output = replays(*args)
                    loss = output.get("loss") if isinstance(output, Mapping) else output
                    if loss is not None and loss.requires_grad:
                        loss = loss / trainer.accumulate_grad_batches
                        pl_module.backward(loss if scaler is None else scaler.scale(loss))
        self._window.clear()
        self._write(trainer, pl_module)

    def _ends_window(self, trainer: Trainer) -> bool:
        number = self._batch_idx + 1
        is_full = number % trainer.accumulate_grad_batches == 0
        return is_full or trainer.is_last_batch or number == trainer.num_training_batches

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        self._is_replaying = True
        try:
            yield
        finally:
            self._is_replaying = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._is_due and any(p.grad is not None for p in pl_module.parameters()):
            raise ValueError(
                "the optimizer is about to step along a gradient that was not regularized, since training_step "
                "returned None for the last micro-batch of the window: return a loss there, e.g. 0 * loss."
            )

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the Trainer does; ask one step ahead, since a step is measured only after someone has asked."""
        every, step = getattr(trainer, "log_every_n_steps", 0), trainer.global_step + 1
        if not self._log or every == 0 or (step % every != 0 and (step + 1) % every != 0):
            return
        assert self.regularizer is not None
        found = self.regularizer.diagnostics()
        if step % every == 0:
            for name in ("grad_norm", "penalty_ratio"):
                pl_module.log(name, found[name])  # pyright: ignore[reportArgumentType]

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict() if self.regularizer is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None


class _Step(nn.Module):
    """What one `training_step` computes with, as a module: calling it tells the regularizer that a step begins.

    A step may call any part of the LightningModule, or none by its `forward`, so no other call can be relied on.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> None:
        del args


def _skips_backward(trainer: Trainer) -> bool:
    """Whether an epoch runs for its forward passes alone, as that in which averaged weights get their BatchNorm."""
    return getattr(trainer.fit_loop, "_skip_backward", False)


@contextmanager
def _unseen(pl_module: LightningModule) -> Iterator[None]:
    """What `training_step` logs and measures in here is not kept."""

    def log(*args: Any, **kwargs: Any) -> None:
        del args, kwargs

    metrics = [m for m in pl_module.modules() if isinstance(m, Metric)]
    kept = [{name: _copied(value) for name, value in vars(m).items()} for m in metrics]
    pl_module.log = log  # log_dict goes through it
    try:
        yield
    finally:
        del pl_module.log
        for m, state in zip(metrics, kept):
            vars(m).clear()
            vars(m).update(state)


def _copied(value: Any) -> Any:
    """A metric adds to its tensors in place, and appends to its lists."""
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if type(value) is list else value


def _check_host(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse what the callback cannot make right, naming the setting and what to do."""
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    strategy, precision = type(trainer.strategy), type(trainer.precision_plugin)
    if not pl_module.automatic_optimization:
        raise ValueError(
            "GradientRegularization needs automatic_optimization=True. In manual optimization (several optimizers, "
            "GANs) write regularizer.backward(loss_fn, batches, backward=self.manual_backward) with one "
            "gradreg.GradientRegularizer for each optimizer's module, then optimizer.step()."
        )
    if isinstance(optimizer, RegularizedOptimizer):
        raise ValueError(
            "configure_optimizers returned a RegularizedOptimizer beside the GradientRegularization callback, which "
            "would regularize twice: return its base optimizer."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates its closure several times a step: use a first-order optimizer (SGD, AdamW).")
    if strategy not in _STRATEGIES:
        raise ValueError(
            f"Trainer(strategy=...) must be a single device, DDP or ModelParallelStrategy, got {strategy.__name__}, "
            'whose gradients or weights the callback cannot reach: use strategy="ddp", or fully_shard (FSDP2) and '
            'parallelize_module in configure_model() with strategy="model_parallel".'
        )
    if precision not in _PRECISIONS:
        names = ", ".join(sorted(p.__name__ for p in _PRECISIONS))
        raise ValueError(f"Trainer(precision=...) must be served by one of {names}, got {precision.__name__}.")
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            "training_step(dataloader_iter) draws its own batches, so that a second pass would see others: take "
            "training_step(batch, batch_idx)."
        )
