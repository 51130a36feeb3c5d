"""Hosts that call `step(closure)` in a state where two passes would go wrong, known without importing them.

A closure is all that `RegularizedOptimizer` is handed. Lightning's and accelerate's bring settings along that act in
each call of it, or hand over a part of an accumulation window; both are read from public attributes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

_LIGHTNING = ("lightning", "pytorch_lightning")
_CALLBACK = (
    "Use Trainer(callbacks=[gradreg.integrations.lightning.GradientRegularization(gamma, epsilon)]) and the base "
)


def check_closure_of_host(closure: Callable[[], Any]) -> None:
    """Refuse a closure whose second call would not be the first one again, at other weights.

    Raises:
        ValueError: naming the host's setting, and what to use instead.
    """
    if isinstance(closure, functools.partial) and _package(closure.func) in _LIGHTNING:
        _check_lightning(*closure.args)
    _check_accelerate()


def loss_division(backward: Callable[..., Any]) -> int:
    """What `accelerator.backward` divides the loss by before it scales it: a part of the loss, not of its scale."""
    return getattr(getattr(backward, "__self__", None), "gradient_accumulation_steps", 1)


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").split(".")[0]


def _check_lightning(module: Any, optimizer: Any, closure: Callable[[], Any]) -> None:
    """The arguments are those of lightning 2.6's closure around the closure of a training step."""
    del optimizer
    if not module.automatic_optimization:
        if getattr(closure, "__name__", "") == "do_nothing_closure":
            raise ValueError(
                "Lightning hands on an empty closure where optimizer.step() is called without one. In manual "
                "optimization return the base optimizer from configure_optimizers and call regularizer.backward("
                "loss_fn, backward=self.manual_backward) before optimizer.step(), or call optimizer.step(closure)."
            )
        return
    windows, clip = module.trainer.accumulate_grad_batches, module.trainer.gradient_clip_val
    if windows > 1:
        raise ValueError(
            f"Trainer(accumulate_grad_batches={windows}) hands the optimizer the last micro-batch of a window only, so "
            f"that the penalty would be that of another loss. {_CALLBACK}optimizer."
        )
    if clip or _package(type(module).configure_gradient_clipping) not in _LIGHTNING:
        setting = f"Trainer(gradient_clip_val={clip})" if clip else "configure_gradient_clipping"
        raise ValueError(
            f"{setting} clips gradients inside the closure, each pass by itself, where ĝ alone should be clipped. "
            f"{_CALLBACK}optimizer."
        )


def _check_accelerate() -> None:
    frame = sys._getframe(3)  # whoever called `RegularizedOptimizer.step`
    for _ in range(4):  # wrappers of schedulers and profilers
        if frame is None:
            return
        if frame.f_globals.get("__name__") == "accelerate.optimizer":
            state = getattr(frame.f_locals.get("self"), "gradient_state", None)
            num_steps = getattr(state, "num_steps", 1)
            if num_steps > 1:
                raise ValueError(
                    f"Accelerator(gradient_accumulation_steps={num_steps}) drops the closure of every micro-batch but "
                    "the last of a window. Use gradreg.integrations.accelerate.AcceleratedRegularizer, or regularizer."
                    "backward(loss_fn, batches, backward=accelerator.backward), and step() without a closure."
                )
            return
        frame = frame.f_back
