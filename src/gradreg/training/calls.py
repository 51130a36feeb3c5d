"""One call of the user's loss function or closure, and what is refused about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradreg._vectors import is_sharded

Backward = Callable[[Tensor], Any]


def check_loss_fn(loss_fn: Any) -> None:
    """Refuse a loss where its function is needed: the one slip that the change from `loss.backward()` invites.

    Raises:
        TypeError: not callable.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function that returns the loss, got {type(loss_fn).__name__}: both passes call it, so "
            "pass the function itself, such as lambda: criterion(model(x), y), and not what it returned."
        )


def checked(loss: Any) -> Tensor:
    """The loss, if it can be differentiated."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return the loss as a tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}: reduce it, e.g. loss.mean().")
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn returned a loss without a graph: run the forward pass in it, not under torch.no_grad(), and do "
            "not detach the loss."
        )
    return loss


def differentiate(
    loss_fn: Callable[[], Any],
    backward: Backward,
    factors: list[Tensor] | None = None,
    check: Callable[[Tensor], None] = lambda loss: None,
) -> Tensor:
    """A forward and a backward pass; the loss, detached.

    `factors` receives what a `backward` of the user's multiplies gradients by, such as a loss scale.
    """
    loss = checked(loss_fn())
    check(loss)
    if factors is None or backward is Tensor.backward:
        backward(loss)
    else:
        handle = loss.register_hook(lambda factor: factors.append(factor.detach()))
        backward(loss)
        handle.remove()
    return loss.detach()


class GradientWitness:
    """Tells whether gradients that were there before a closure were cleared in it, by one small gradient among them.

    It is set to a value that no gradient has, so that clearing in place (`set_to_none=False`) counts too.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        present = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
        self._parameter = min(present, key=lambda p: p.numel(), default=None)
        self._gradient = self._parameter.grad if self._parameter is not None else None
        if self._gradient is not None:
            self._mark = torch.finfo(self._gradient.dtype).max / 4
            self._gradient.fill_(self._mark)

    def was_added_to(self) -> bool:
        if self._parameter is None or self._gradient is None or self._parameter.grad is not self._gradient:
            return False
        return bool((self._gradient.detach().abs() > self._mark / 2).any())


def run_closure(closure: Callable[[], Any], owned: Sequence[Tensor], selected: Sequence[Tensor]) -> Any:
    """The loss of a closure whose first pass left ∇L in `.grad`.

    Args:
        closure: zeroes gradients, runs forward and backward, returns the loss.
        owned: the parameters of the optimizer that was handed the closure.
        selected: the penalized parameters.
    """
    mine = set(owned)
    foreign = [p for p in selected if p not in mine]
    witness, foreign_witness = GradientWitness(owned), GradientWitness(foreign)
    loss = closure()
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"closure must return a scalar loss, got shape {tuple(loss.shape)}.")
    if all(p.grad is None for p in (*selected, *owned)):
        raise ValueError("closure left no gradient: it must call loss.backward() and return the loss.")
    if witness.was_added_to():
        raise ValueError(
            "closure added to gradients that were there before: call optimizer.zero_grad() in it. To accumulate "
            "micro-batches use regularizer.backward(loss_fn, batches)."
        )
    if foreign_witness.was_added_to():
        raise ValueError(
            f"closure added to gradients of {len(foreign)} selected parameters that this optimizer does not own: "
            "call model.zero_grad() in it, or select the optimizer's parameters only (include, exclude)."
        )
    return loss


class Examination:
    """What the graph of the first loss tells: tensors outside the model, and whether gradients may be picked."""

    def __init__(self) -> None:
        self.is_done = False
        self._is_reentrant = False

    def of(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        if self.is_done or any(map(is_sharded, parameters)):  # shards are gathered in other tensors
            return
        known, strangers = set(parameters), []
        for node in _nodes(loss):
            leaf = getattr(node, "variable", None)
            if leaf is not None and leaf not in known:
                strangers.append(tuple(leaf.shape))
            self._is_reentrant |= type(node).__name__ == "CheckpointFunctionBackward"
        if strangers:
            _warn_of_strangers(strangers)

    @property
    def allows_inputs(self) -> bool:
        """Whether `loss.backward(inputs=...)` works: reentrant activation checkpoints need the whole backward pass."""
        return self.is_done and not self._is_reentrant


def _warn_of_strangers(strangers: Sequence[tuple[int, ...]]) -> None:
    """Trainable tensors outside the model would receive the sum of both passes."""
    warnings.warn(
        f"the loss depends on {len(strangers)} trainable tensors outside the model (shapes {strangers[:3]}): both "
        "passes add to their .grad. Give the regularizer a model that owns them, such as nn.ModuleList([...]), or "
        "clear their .grad before you use it.",
        UserWarning,
        stacklevel=9,
    )


def _nodes(loss: Tensor) -> Iterator[Any]:
    """The graph of a loss."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        nodes.extend(child for child, _ in node.next_functions)
