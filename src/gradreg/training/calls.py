"""How a pass is run: by a loss function and a backward pass of ours (door 1), or by a closure (door 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradreg.training.hosts import loss_division
from gradreg.training.ranks import Ranks
from gradreg.training.strangers import refuse_scaled_loss

Backward = Callable[[Tensor], Any]
Call = Callable[[], Any]
BeforeBackward = Callable[[Tensor], None]


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


def explain_kept_graph(error: BaseException | None) -> None:
    """Say what torch's error about a graph that is gone means in a displaced pass.

    Raises:
        RuntimeError: where `error` is torch's about a graph that is gone.
    """
    if isinstance(error, RuntimeError) and "backward through the graph a second time" in str(error):
        raise RuntimeError(
            "a pass used a tensor whose graph belongs to the pass before, which is over: the loss was computed outside "
            "of its function, which only handed it over, or something is kept between calls of the model or the loss "
            "(a cache of keys and values, torch.nn.utils.parametrize.cached(), a hidden state). Make it anew in each "
            "call, or detach it."
        ) from error


class Calls:
    """Door 1: the losses of a window, one after the other, and a backward pass of each.

    Args:
        ranks: which average gradients in the last micro-batch of a window.
        parameters: the selected ones, which must not move in a backward pass.
        backward: runs the backward pass of a loss.
        grad_scale: the loss scale as the user says it; 1 measures it.
        is_first: the first step of a regularizer, where mistakes that stay are looked for.
    """

    name = "the loss of loss_fn"

    def __init__(
        self,
        ranks: Ranks,
        parameters: Sequence[Tensor],
        backward: Backward,
        grad_scale: float | Tensor,
        is_first: bool,
    ) -> None:
        self._ranks = ranks
        self._parameters = parameters
        self._backward = backward
        self._grad_scale = grad_scale
        self._is_first = is_first
        self.is_plain = backward is Tensor.backward
        self.factors: list[Tensor] = []  # by which `backward` multiplies the gradient of each loss
        self.is_reentrant = False  # checkpoints run backward passes within the backward pass
        self.leaves: list[Tensor] = []  # of the first step's graph

    def run(self, calls: Sequence[Call], before_backward: BeforeBackward | None = None) -> list[Tensor]:
        """The passes of a window; the losses, detached."""
        return [self._differentiate(call, before_backward) for call in self._window(calls)]

    def _window(self, calls: Sequence[Call]) -> Iterator[Call]:
        """Ranks average gradients in the last."""
        for call in calls[:-1]:
            with self._ranks.quiet():
                yield call
        yield calls[-1]

    def _differentiate(self, call: Call, before_backward: BeforeBackward | None) -> Tensor:
        loss = checked(call())
        if self._is_first:
            refuse_scaled_loss(loss)
            self.leaves += self.leaves_of(loss)
        if before_backward is not None:
            before_backward(loss)
        # Of all in the first step; what begins later to step in hooks does so everywhere.
        some = self._parameters if self._is_first else self._parameters[:: max(1, len(self._parameters) // 4)]
        versions = [p._version for p in some]
        if self.is_plain:
            loss.backward()
        else:
            handle = loss.register_hook(lambda factor: self.factors.append(factor.detach()))
            self._backward(loss)
            handle.remove()
        if versions != [p._version for p in some]:
            raise ValueError(
                "the weights changed in the backward pass of loss_fn: an optimizer that steps in a hook "
                "(register_post_accumulate_grad_hook) leaves no gradient to regularize. Step after backward()."
            )
        return loss.detach()

    def leaves_of(self, loss: Tensor) -> list[Tensor]:
        """Of the graph of a loss; notes on the way whether checkpoints run backward passes in its own."""
        leaves: list[Tensor] = []
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node: Any = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self.is_reentrant |= type(node).__name__ == "CheckpointFunctionBackward"
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            nodes.extend(child for child, _ in node.next_functions)
        return leaves

    def run_again(
        self, calls: Sequence[Call], before_backward: BeforeBackward, inputs: Sequence[Tensor] | None
    ) -> None:
        """The displaced passes of a window; gradients of `inputs` alone, if given."""
        try:
            for call in self._window(calls):
                loss = call()
                if loss.requires_grad:  # else: nothing selected takes part in the displaced pass
                    before_backward(loss)
                    loss.backward(inputs=inputs) if inputs else self._backward(loss)
        except RuntimeError as error:
            explain_kept_graph(error)
            raise

    def ask(self, calls: Sequence[Call]) -> list[Tensor]:
        """The losses once more, without a backward pass."""
        return [call().detach() for call in calls]

    def scale(self) -> float | Tensor:
        """The loss scale: what the user says, or what `backward` was seen to multiply by."""
        given = self._grad_scale
        if self.factors and not isinstance(given, Tensor) and given == 1:
            return (self.factors[0] * loss_division(self._backward)).clamp(min=1)
        return given


class Closure:
    """Door 3: a closure that zeroes gradients, runs forward and backward and returns the loss.

    Args:
        ranks: of which each may keep its first gradient to itself.
        owned: the parameters of the optimizer that was handed the closure.
        selected: the penalized parameters.
    """

    name = "the loss of the closure"
    is_plain = False
    leaves = None  # the graph is not in our hands

    def __init__(self, ranks: Ranks, owned: Sequence[Tensor], selected: Sequence[Tensor]) -> None:
        self._ranks = ranks
        mine = set(map(id, owned))
        self._owned = owned
        self._selected = selected
        self._foreign = [p for p in selected if id(p) not in mine]

    def run(self, calls: Sequence[Call], before_backward: BeforeBackward | None = None) -> list[Any]:
        """The first pass, which must leave ∇L in `.grad`; its loss."""
        del before_backward  # the backward pass is the closure's
        witnesses = [_Witness(parameters) for parameters in (self._owned, self._foreign)]
        with self._ranks.first_pass():
            loss = calls[0]()
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"closure must return a scalar loss, got shape {tuple(loss.shape)}.")
        added, added_to_foreign = [witness.was_added_to() for witness in witnesses]
        if all(p.grad is None for p in (*self._selected, *self._owned)):
            raise ValueError(
                "closure left no gradient: it must call loss.backward() and return the loss, and no optimizer may step "
                "in a backward hook and clear it."
            )
        if added:
            raise ValueError(
                "closure added to gradients that were there before: call optimizer.zero_grad() in it. To accumulate "
                "micro-batches use regularizer.backward(loss_fn, batches)."
            )
        if added_to_foreign:
            raise ValueError(
                f"closure added to gradients of {len(self._foreign)} selected parameters that this optimizer does not "
                "own: call model.zero_grad() in it, or select the optimizer's parameters only (include, exclude)."
            )
        return [loss]

    def run_again(self, calls: Sequence[Call], before_backward: BeforeBackward, inputs: Any) -> None:
        del before_backward, inputs
        self.ask(calls)
        if all(p.grad is None for p in (*self._selected, *self._owned)):
            raise ValueError("closure left no gradient in its second call: it must run a backward pass in each.")

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        try:
            return [calls[0]()]
        except RuntimeError as error:
            explain_kept_graph(error)
            raise

    def scale(self) -> float:
        return 1.0


class _Witness:
    """Tells whether gradients that were there before a closure were cleared in it, by one small gradient among them.

    A copy with a value that no gradient has stands in its place, so that clearing in place (`set_to_none=False`) counts
    too; the tensor itself, which others may hold, is not written to but by what the closure did to the copy.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        present = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
        self._parameter = min(present, key=Tensor.numel, default=None)
        self._gradient = None if self._parameter is None else self._parameter.grad
        if self._parameter is not None and self._gradient is not None:
            self._mark = torch.finfo(self._gradient.dtype).max / 4
            self._copy = torch.full_like(self._gradient, self._mark)
            self._parameter.grad = self._copy

    def was_added_to(self) -> bool:
        p = self._parameter
        if p is None or self._gradient is None or p.grad is not self._copy:
            return False
        if bool((self._copy.detach().abs() > self._mark / 2).any()):
            p.grad = self._gradient
            return True
        with torch.no_grad():
            self._gradient.copy_(self._copy)
        p.grad = self._gradient
        return False
