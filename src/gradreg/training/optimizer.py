"""The third door: an optimizer around an optimizer, for frameworks that hand their optimizer a closure."""

# pyright: reportIncompatibleVariableOverride=false
# torch.optim.Optimizer has fields where this one reads through to its base.

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from gradreg.training.hosts import check_closure_of_host
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.selection import bare_class

_SCALER_MODULES = ("torch.amp.grad_scaler", "torch.cuda.amp.grad_scaler")
_OF_SCALERS = (
    " A framework with a GradScaler (precision 16-mixed, fp16) runs the closure by itself, once: use "
    "gradreg.integrations.lightning.GradientRegularization, or regularizer.backward(loss_fn, backward=...)."
)


class RegularizedOptimizer(torch.optim.Optimizer):
    r"""Runs the closure twice and hands the base optimizer $\hat g$.

    `param_groups`, `state`, `defaults`, step hooks and whatever else a caller asks for are those of the base
    optimizer, so schedulers, `add_param_group` and checkpoints work on it as before. `state_dict()` is the base's,
    with the regularizer's step beside it under `"regularizer"`.

    Args:
        base: a built optimizer, of torch.optim or any other, over the parameters of the regularizer's model.
        regularizer: the `GradientRegularizer`.

    Raises:
        TypeError: `base` is not an optimizer, or `regularizer` no regularizer.
        ValueError: a base that must call the closure itself (LBFGS): the weights would move between its calls, and
            each of them would need two passes.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> regularizer = GradientRegularizer(model, gamma=0.1, epsilon=0.1)
        >>> optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), regularizer)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> before = closure().item()
        >>> optimizer.step(closure).item() == before  # the loss at θ, not at the displaced point
        True
    """

    def __init__(self, base: torch.optim.Optimizer, regularizer: GradientRegularizer) -> None:
        # torch.optim.Optimizer.__init__ is not called: it would make groups and a state of its own.
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base must be a built torch.optim.Optimizer, got {base!r}.")
        if not isinstance(regularizer, GradientRegularizer):
            raise TypeError(f"regularizer must be a GradientRegularizer, got {regularizer!r}.")
        if isinstance(base, RegularizedOptimizer):
            raise ValueError("base is a RegularizedOptimizer already; pass the optimizer inside it, base.base.")
        closure = inspect.signature(type(base).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"base must take one gradient a step, and {type(base).__name__} evaluates its closure several times at "
                "points of its own: use a first-order optimizer (SGD, AdamW, ...)."
            )
        self.base = base
        self.regularizer = regularizer
        regularizer._engine.follow()
        mine = {id(p) for group in base.param_groups for p in group["params"]}
        if not any(id(p) in mine for p in regularizer.selection.parameters):
            raise ValueError(
                f"base holds none of the parameters that the regularizer penalizes ({regularizer.selection.summary} of "
                f"{bare_class(regularizer.model)}): build both on the same model, and neither on a copy of it."
            )
        self._takes_closure = closure is not None
        self._steps_taken = regularizer.step  # the regularizer's step at our last one

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer along ĝ.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss; it is called twice. Without
                it, `.grad` must have been regularized since the last step, by `regularizer.backward` or
                `perturbed()`.

        Returns:
            the loss at θ, or None without a closure.

        Raises:
            ValueError: neither a closure nor regularized gradients; a call by a gradient scaler with a closure; a
                closure that does not call backward, or adds to existing gradients; a closure of Lightning that clips
                gradients or holds a part of an accumulation window, or one through accelerate that does.
        """
        if closure is None:
            self._check_regularized()
            self._steps_taken = self.regularizer.step
            return self.base.step()
        if _called_by_scaler():
            raise ValueError(
                "closure cannot be used with a GradScaler: it would see scaled gradients. Use "
                "regularizer.backward(loss_fn, backward=lambda loss: scaler.scale(loss).backward()), then "
                "scaler.step(optimizer)."
            )
        check_closure_of_host(closure)
        owned = [p for group in self.param_groups for p in group["params"]]
        loss = self.regularizer.run_closure(closure, owned)
        self._steps_taken = self.regularizer.step
        if self._takes_closure:
            self.base.step(closure=_Answer(loss, owned))  # Polyak's step and its kin ask for the loss
        else:
            self.base.step()
        return loss

    def _check_regularized(self) -> None:
        is_regularized = self.regularizer.step != self._steps_taken
        moves_nothing = all(float(group.get("lr", 1)) == 0 for group in self.param_groups)
        # torch.distributed.checkpoint makes the state of an optimizer by a step with lr = 0 and no closure.
        if not is_regularized and not moves_nothing:
            raise ValueError(
                "step() needs a closure, or gradients that were regularized since the last step: call step(closure) "
                "with a closure that runs zero_grad, forward and backward, or regularizer.backward(loss_fn) before "
                "step(). For a step without the penalty use optimizer.base.step()."
                + (_OF_SCALERS if _called_by_scaler(3) else "")
            )

    # Everything else is the base's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not there yet: being copied or unpickled
            raise AttributeError(name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What a GradScaler leaves for a fused base must reach it.
        if name in ("grad_scale", "found_inf"):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in ("grad_scale", "found_inf"):
            delattr(self.base, name)
        else:
            super().__delattr__(name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return {**self.base.state_dict(), "regularizer": self.regularizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave; a plain state dict of the base is accepted too, and leaves the step alone."""
        rest = {key: value for key, value in state_dict.items() if key != "regularizer"}
        before = self.regularizer.state_dict()
        self.regularizer.load_state_dict(state_dict.get("regularizer", before))
        try:
            self.base.load_state_dict(rest)
        except BaseException:
            self.regularizer.load_state_dict(before)
            raise
        self._steps_taken = self.regularizer.step

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "regularizer", "_steps_taken", "_takes_closure")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"RegularizedOptimizer(\n{self.base!r},\n{self.regularizer!r})"


class _Answer:
    """The closure that the base is handed: the loss whose gradient it finds in `.grad`, once and at these weights."""

    def __init__(self, loss: Any, parameters: list[Any]) -> None:
        self._loss = loss
        self._parameters = parameters
        self._versions = [p._version for p in parameters]
        self._was_asked = False

    def __call__(self) -> Any:
        if self._was_asked or self._versions != [p._version for p in self._parameters]:
            raise ValueError(
                "base must take one gradient a step, at the weights that it finds, and it asks its closure again or "
                "after it has moved: use a first-order optimizer (SGD, AdamW, ...)."
            )
        self._was_asked = True
        return self._loss


def _called_by_scaler(depth: int = 2) -> bool:
    """Whether an enabled GradScaler stands above us: `scaler.step(optimizer, closure)` leaves no other trace."""
    frame = sys._getframe(depth)
    for _ in range(8):  # scaler.step, its helper, and wrappers of schedulers and profilers
        if frame is None:
            return False
        if frame.f_globals.get("__name__") in _SCALER_MODULES:
            scaler = frame.f_locals.get("self")
            return scaler is None or scaler.is_enabled()
        frame = frame.f_back
    return False
